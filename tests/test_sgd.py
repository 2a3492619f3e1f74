"""The claims of sj.sgd: an exact twin of optax's and of the oracle's, and its own rules."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import sgd_jax as sj

NUM_STEPS = 100
TOLERANCE = {jnp.float64: 1e-12, jnp.float32: 2e-5}
WEIGHTS_ONLY = (sj.Layer(True, False), sj.Layer(True, False))

HYPERPARAMETERS = {
    "plain": {"learning_rate": 0.5},
    "momentum": {"learning_rate": 0.2, "momentum": 0.9},
    "nesterov": {"learning_rate": 0.2, "momentum": 0.9, "nesterov": True},
    "decay": {"learning_rate": 0.5, "weight_decay": 0.1},
    "decay of weights": {"learning_rate": 0.5, "weight_decay": 0.1, "mask": WEIGHTS_ONLY},
    "all": {
        "learning_rate": 0.2,
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 0.1,
        "mask": WEIGHTS_ONLY,
    },
}
SCHEDULES = {
    "cosine": optax.cosine_decay_schedule(0.5, NUM_STEPS),
    "steps": optax.piecewise_constant_schedule(0.5, {0: 0.5, 30: 0.1}),
    "own": lambda step: 0.5 / (1.0 + step),
}


def optax_twin(learning_rate, momentum=0.0, nesterov=False, weight_decay=0.0, mask=None):
    if weight_decay == 0:
        return optax.sgd(learning_rate, momentum or None, nesterov)
    return optax.chain(
        optax.trace(momentum, nesterov),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def problem(dtype=jnp.float64):
    """Returns a network, five examples and the cost of one."""
    network_key, x_key, y_key = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(x_key, (5, 4), dtype)
    y = jax.random.uniform(y_key, (5, 2), dtype)
    network = sj.init_network(network_key, (4, 3, 2), dtype=dtype)
    return network, (x, y)


def fun(network, example):
    x, y = example
    return sj.quadratic_cost(sj.feedforward(network, x), y)


def run(optimizer, dtype=jnp.float64):
    """Returns the flattened params after each of a hundred steps, (steps, p)."""
    network, examples = problem(dtype)

    def body(carry, _):
        params, state = carry
        gradient = jax.grad(sj.mean_cost(fun))(params, examples)
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), jax.flatten_util.ravel_pytree(params)[0]

    start = (network, optimizer.init(network))
    return jax.jit(lambda start: jax.lax.scan(body, start, length=NUM_STEPS)[1])(start)


def run_oracle(learning_rate, mask=None, **hyperparameters):
    network, (x, y) = problem()
    params = [np.asarray(leaf) for leaf in jax.tree.leaves(network)]
    velocities = [np.zeros_like(w) for w in params]
    examples = list(zip(np.asarray(x), np.asarray(y), strict=True))
    decays = None if mask is None else jax.tree.leaves(mask)
    path = []
    for step in range(NUM_STEPS):
        rate = float(learning_rate(jnp.int32(step))) if callable(learning_rate) else learning_rate
        gradient = reference.mean_gradient(params, examples, reference.quadratic_delta)
        params, velocities = reference.sgd_step(
            params, velocities, gradient, rate, decays=decays, **hyperparameters
        )
        path.append(np.concatenate([w.ravel() for w in params]))
    return np.stack(path)


def assert_same_path(optimizer, expected, dtype=jnp.float64):
    path = run(optimizer, dtype)
    assert path.dtype == dtype
    assert float(jnp.abs(path[-1] - path[0]).max()) > 0.01, "nothing was learned: no comparison"
    np.testing.assert_allclose(path, expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", HYPERPARAMETERS)
def test_sgd_is_the_twin_of_optax_over_a_hundred_steps(case, dtype):
    expected = run(optax_twin(**HYPERPARAMETERS[case]), dtype)
    assert_same_path(sj.sgd(**HYPERPARAMETERS[case]), expected, dtype)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("case", ["plain", "all"])
def test_sgd_with_a_schedule_is_the_twin_of_optax_and_of_the_oracle(case, schedule):
    hyperparameters = HYPERPARAMETERS[case] | {"learning_rate": schedule}
    assert_same_path(sj.sgd(**hyperparameters), run(optax_twin(**hyperparameters)))
    assert_same_path(sj.sgd(**hyperparameters), run_oracle(**hyperparameters))


@pytest.mark.parametrize("case", HYPERPARAMETERS)
def test_sgd_is_the_twin_of_the_oracle_over_a_hundred_steps(case):
    assert_same_path(sj.sgd(**HYPERPARAMETERS[case]), run_oracle(**HYPERPARAMETERS[case]))


def coupled(weight_decay, mask, **hyperparameters):
    """The fault: decay enters the velocity, as in optax.add_decayed_weights before the trace."""
    return optax.chain(optax.add_decayed_weights(weight_decay, mask), optax_twin(**hyperparameters))


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(coupled(**HYPERPARAMETERS["all"]), id="decay is coupled"),
        pytest.param(sj.sgd(**HYPERPARAMETERS["all"] | {"mask": None}), id="biases decay"),
        pytest.param(sj.sgd(**HYPERPARAMETERS["all"] | {"nesterov": False}), id="no look-ahead"),
        pytest.param(sj.sgd(**HYPERPARAMETERS["all"] | {"momentum": 0.89}), id="momentum is off"),
        pytest.param(
            optax.chain(sj.sgd(**HYPERPARAMETERS["all"]), optax.scale(5.0)), id="sum for mean"
        ),
    ],
)
def test_a_planted_fault_leaves_the_path_of_the_oracle(fault):
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_same_path(fault, run_oracle(**HYPERPARAMETERS["all"]))


def test_a_mask_may_be_a_function_of_params():
    def weights_only(params):
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    by_function = run(sj.sgd(**HYPERPARAMETERS["all"] | {"mask": weights_only}))
    np.testing.assert_array_equal(by_function, run(sj.sgd(**HYPERPARAMETERS["all"])))


def test_a_prefix_of_params_is_enough_of_a_mask():
    first_layer = run(sj.sgd(0.5, weight_decay=0.1, mask=(True, False)))
    in_full = (sj.Layer(True, True), sj.Layer(False, False))
    np.testing.assert_array_equal(run(sj.sgd(0.5, weight_decay=0.1, mask=in_full)), first_layer)


def one_step(optimizer, w, g):
    updates, state = optimizer.update(g, optimizer.init(w), w)
    return optax.apply_updates(w, updates), state


def test_plain_sgd_is_w_minus_eta_g():
    w, _ = one_step(sj.sgd(0.25), jnp.array([1.0, 2.0]), jnp.array([4.0, -8.0]))
    np.testing.assert_array_equal(w, [0.0, 4.0])


def test_weight_decay_is_the_l2_regularization_of_the_textbook():
    eta, decay, n = 0.5, 5.0, 1000
    w, g = jnp.array([1.0, 2.0]), jnp.array([0.3, -0.7])
    renewed, _ = one_step(sj.sgd(eta, weight_decay=decay / n), w, g)
    np.testing.assert_allclose(renewed, (1 - eta * decay / n) * w - eta * g, rtol=1e-15)


def test_weight_decay_takes_the_old_w_and_stays_out_of_the_velocity():
    w, g = jnp.array([10.0]), jnp.array([1.0])
    _, state = one_step(sj.sgd(0.5, momentum=0.9, weight_decay=0.1), w, g)
    np.testing.assert_array_equal(state.velocity, g)


def test_a_schedule_is_evaluated_at_the_number_of_steps_taken_from_zero():
    optimizer = sj.sgd(lambda step: step + 1.0)
    w = jnp.array(0.0)
    state = optimizer.init(w)
    for taken in range(3):
        assert state.step == taken
        updates, state = optimizer.update(jnp.array(1.0), state)
        assert updates == -(taken + 1.0)
    assert state.step.dtype == jnp.int32


def test_there_is_a_velocity_only_with_momentum():
    params = {"w": jnp.ones((2, 3))}
    assert sj.sgd(0.1).init(params).velocity is None
    velocity = sj.sgd(0.1, momentum=0.5).init(params).velocity
    np.testing.assert_array_equal(velocity["w"], np.zeros((2, 3)))


def test_params_are_needed_only_for_weight_decay():
    g = jnp.ones(2)
    for optimizer in (sj.sgd(0.1), sj.sgd(0.1, momentum=0.5, nesterov=True)):
        optimizer.update(g, optimizer.init(g))
    decaying = sj.sgd(0.1, weight_decay=0.1)
    with pytest.raises(ValueError, match=r"weight_decay > 0 needs the params: call update\("):
        decaying.update(g, decaying.init(g))


@pytest.mark.parametrize(
    "name", ["learning_rate", "momentum", "weight_decay", "learning_rate schedule"]
)
def test_updates_and_velocity_keep_the_dtype_of_the_gradient(name):
    hyperparameters = {"learning_rate": 0.5, "momentum": 0.5, "weight_decay": 0.5}
    if name == "learning_rate schedule":
        hyperparameters["learning_rate"] = lambda step: jnp.float64(0.5)
    else:
        hyperparameters[name] = jnp.float64(0.5)
    w, state = one_step(sj.sgd(**hyperparameters), jnp.ones(2, jnp.float32), jnp.ones(2, "float32"))
    assert w.dtype == state.velocity.dtype == jnp.float32


@pytest.mark.parametrize("name", ["learning_rate", "momentum", "weight_decay"])
def test_a_sweep_is_vmap_over_a_traced_hyperparameter(name):
    values = jnp.array([0.1, 0.3, 0.7])
    base = HYPERPARAMETERS["all"]
    together = jax.vmap(lambda value: run(sj.sgd(**base | {name: value})))(values)
    for value, path in zip(values, together, strict=True):
        expected = run(sj.sgd(**base | {name: float(value)}))
        np.testing.assert_allclose(path, expected, rtol=0, atol=1e-12)


def test_a_traced_momentum_of_zero_is_plain_sgd():
    path = jax.jit(lambda momentum: run(sj.sgd(0.5, momentum=momentum)))(0.0)
    np.testing.assert_allclose(path, run(sj.sgd(0.5)), rtol=0, atol=1e-12)


def test_sgd_takes_injected_hyperparameters_and_chains_like_any_optax_transformation():
    injected = optax.inject_hyperparams(sj.sgd)(learning_rate=0.5)
    np.testing.assert_allclose(run(injected), run(sj.sgd(0.5)), rtol=0, atol=1e-12)
    clipped = optax.chain(optax.clip_by_global_norm(0.01), sj.sgd(0.5))
    expected = optax.chain(optax.clip_by_global_norm(0.01), optax.sgd(0.5))
    np.testing.assert_allclose(run(clipped), run(expected), rtol=0, atol=1e-12)


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("hyperparameters", "kind", "message"),
    [
        ({"learning_rate": 0.0}, ValueError, r"learning_rate must be .* in \(0, inf\), got 0.0"),
        ({"learning_rate": -1.0}, ValueError, "learning_rate must be .*, got -1.0"),
        ({"learning_rate": NAN}, ValueError, "learning_rate must be a finite number.*, got nan"),
        ({"learning_rate": INFINITY}, ValueError, "learning_rate must be .*, got inf"),
        ({"learning_rate": "0.1"}, TypeError, "learning_rate must be one number, got '0.1'"),
        ({"momentum": 1.0}, ValueError, r"momentum must be .* in \[0, 1\), got 1.0"),
        ({"momentum": -0.1}, ValueError, "momentum must be .*, got -0.1"),
        ({"momentum": NAN}, ValueError, "momentum must be .*, got nan"),
        ({"weight_decay": -0.1}, ValueError, r"weight_decay must be .* in \[0, inf\), got -0.1"),
        ({"weight_decay": INFINITY}, ValueError, "weight_decay must be .*, got inf"),
        ({"nesterov": True}, ValueError, "nesterov=True needs momentum > 0, got momentum = 0"),
        ({"mask": True}, ValueError, "mask .* weight_decay = 0; drop the mask"),
    ],
)
def test_bad_hyperparameters_are_refused_by_name(hyperparameters, kind, message):
    with pytest.raises(kind, match=message):
        sj.sgd(**{"learning_rate": 0.1} | hyperparameters)
