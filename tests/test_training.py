"""The claims of make_step and make_epoch: equal to the oracle and to each other."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from quick import slow

import sgd_jax as sj
from sgd_jax.training import _epoch, _step

SIZES = (4, 3, 2)
NUM_EXAMPLES = 7
SHORT = jnp.array([[5, 0, 3], [6, 1, 4], [2, -1, -1]])  # every example once; a short last batch
SWEEP = {"learning_rate": 0.7, "momentum": 0.5, "nesterov": True, "weight_decay": 0.01}
TOLERANCE = {jnp.float64: 1e-12, jnp.float32: 1e-5}
OPTAX = {
    "adam": optax.adam(0.1),
    "adamw": optax.adamw(0.1, weight_decay=0.1),
    "lion": optax.lion(0.01),
    "rmsprop": optax.rmsprop(0.01, momentum=0.5),
    "clipped sgd": optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.5)),
    "schedule": optax.sgd(optax.exponential_decay(0.5, 2, 0.5)),
    "takes the cost": optax.polyak_sgd(0.5, scaling=0.1),
    "waits for the cost": optax.chain(
        optax.sgd(0.5), optax.contrib.reduce_on_plateau(0.5, rtol=0.9, patience=0)
    ),
}


def quadratic(network, example):
    x, y = example
    return sj.quadratic_cost(sj.feedforward(network, x), y)


def cross_entropy(network, example):
    x, y = example
    return sj.logit_cross_entropy_cost(sj.networks.weighted_input(network, x), y)


FUNS = {
    "quadratic": (quadratic, reference.quadratic_cost, reference.quadratic_delta),
    "cross-entropy": (cross_entropy, reference.cross_entropy_cost, reference.cross_entropy_delta),
}


def problem(n=NUM_EXAMPLES, dtype=jnp.float64):
    """Returns a network and n examples."""
    network_key, x_key, y_key = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(x_key, (n, SIZES[0]), dtype)
    y = jax.random.uniform(y_key, (n, SIZES[-1]), dtype)
    return sj.init_network(network_key, SIZES, dtype=dtype), (x, y)


def rows(examples):
    return list(zip(*(np.asarray(leaf, np.float64) for leaf in examples), strict=True))


def as_reference(network):
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(network)]


def assert_trees_close(actual, expected, atol=1e-12):
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)


def train(run_epoch, optimizer, batches, dtype=jnp.float64):
    """Returns the network after one epoch from the start, and the costs reported."""
    network, examples = problem(dtype=dtype)
    state, info = run_epoch(sj.init_state(network, optimizer), examples, batches)
    return state.params, info.cost


def assert_epoch_equals_oracle(
    make_epoch, name="quadratic", batches=SHORT, dtype=jnp.float64, **hyperparameters
):
    """Asserts params and costs of one epoch; the oracle drops entries of −1 from its lists."""
    fun, cost, delta = FUNS[name]
    hyperparameters = hyperparameters or SWEEP
    optimizer = sj.sgd(**hyperparameters)
    params, costs = train(make_epoch(fun, optimizer), optimizer, batches, dtype)

    network, examples = problem(dtype=dtype)
    expected, examples = as_reference(network), rows(examples)
    velocities = [np.zeros_like(w) for w in expected]
    expected_costs = []
    for row in np.asarray(batches):
        batch = [i for i in row if i >= 0]
        expected_costs.append(reference.mean_cost(expected, [examples[i] for i in batch], cost))
        expected, velocities = reference.epoch(
            expected, velocities, examples, [batch], delta, **hyperparameters
        )
    assert_trees_close(params, expected, TOLERANCE[dtype])
    np.testing.assert_allclose(costs, expected_costs, rtol=TOLERANCE[dtype])


# --- init_state ---


def test_a_state_starts_at_step_0_and_shares_the_buffers_of_params():
    network, _ = problem()
    state = sj.init_state(network, sj.sgd(0.1))
    assert state.step == 0
    assert state.step.dtype == jnp.int32
    for mine, yours in zip(jax.tree.leaves(state.params), jax.tree.leaves(network), strict=True):
        assert mine.unsafe_buffer_pointer() == yours.unsafe_buffer_pointer()


def test_init_state_refuses_integer_params_with_the_remedy():
    with pytest.raises(TypeError, match=r"params\['n'\] has dtype int.*inside `examples`"):
        sj.init_state({"n": jnp.arange(3)}, sj.sgd(0.1))


def test_init_state_refuses_params_without_arrays():
    with pytest.raises(ValueError, match="params holds no arrays"):
        sj.init_state((), sj.sgd(0.1))


# --- the gradient ---


@pytest.mark.parametrize("name", FUNS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_mean_of_per_example_gradients_is_the_gradient_of_the_mean_cost(name, dtype):
    fun, cost, delta = FUNS[name]
    network, examples = problem(dtype=dtype)
    weights = jnp.full(NUM_EXAMPLES, 1 / NUM_EXAMPLES, dtype)
    value, gradient = jax.jit(sj.mean_value_and_grad(fun))(network, examples, weights)
    per_example = jax.jit(jax.vmap(jax.grad(fun), in_axes=(None, 0)))(network, examples)
    expected_value, expected = jax.jit(jax.value_and_grad(sj.mean_cost(fun)))(network, examples)
    oracle = as_reference(network)
    assert {leaf.dtype for leaf in jax.tree.leaves((value, gradient))} == {jnp.dtype(dtype)}
    for candidate in (
        expected,
        jax.tree.map(lambda g: jnp.mean(g, axis=0), per_example),
        reference.mean_gradient(oracle, rows(examples), delta),
    ):
        assert_trees_close(gradient, candidate, TOLERANCE[dtype])
    for candidate in (expected_value, reference.mean_cost(oracle, rows(examples), cost)):
        np.testing.assert_allclose(value, candidate, rtol=TOLERANCE[dtype])


WEIGHTED = jax.jit(sj.mean_value_and_grad(quadratic))
EACH = jax.jit(jax.vmap(jax.value_and_grad(quadratic), in_axes=(None, 0)))


@given(st.lists(st.floats(-3, 3), min_size=NUM_EXAMPLES, max_size=NUM_EXAMPLES))
def test_cost_and_gradient_are_sums_with_the_weights_given(weights):
    network, examples = problem()
    weights = np.array(weights)
    expected = jax.tree.map(
        lambda leaf: np.tensordot(weights, leaf, axes=1), EACH(network, examples)
    )
    assert_trees_close(WEIGHTED(network, examples, weights), expected)


def test_an_example_of_weight_zero_contributes_exactly_zero():
    network, examples = problem()
    other = jax.tree.map(lambda leaf: leaf.at[0].add(100.0), examples)
    weights = jnp.full(NUM_EXAMPLES, 0.2).at[0].set(0.0)
    gradients = [WEIGHTED(network, each, weights) for each in (examples, other)]
    jax.tree.map(np.testing.assert_array_equal, *gradients)


# --- make_step ---


@pytest.mark.parametrize("name", FUNS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_step_equals_the_oracle_and_reports_the_cost_before_it(name, dtype):
    fun, cost, delta = FUNS[name]
    network, examples = problem(dtype=dtype)
    optimizer = sj.sgd(learning_rate=0.7)
    state, info = sj.make_step(fun, optimizer)(sj.init_state(network, optimizer), examples)
    before = as_reference(network)
    gradient = reference.mean_gradient(before, rows(examples), delta)
    expected, _ = reference.sgd_step(before, [np.zeros_like(w) for w in before], gradient, 0.7)
    assert state.step == 1
    assert_trees_close(state.params, expected, TOLERANCE[dtype])
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(dtype)}
    assert info.cost.dtype == dtype
    np.testing.assert_allclose(
        info.cost, reference.mean_cost(before, rows(examples), cost), rtol=TOLERANCE[dtype]
    )


def count_traces(fun):
    """Returns fun and a list that grows by one each time fun is traced."""
    traces = []

    def counted(params, example):
        traces.append(1)
        return fun(params, example)

    return counted, traces


@pytest.mark.parametrize("optimizer", [sj.sgd(**SWEEP), OPTAX["adam"]])
@pytest.mark.parametrize("make", [sj.make_step, sj.make_epoch])
@pytest.mark.parametrize(
    "params",
    [
        pytest.param(1.5, id="Python float"),
        pytest.param(jnp.asarray(1.5), id="weakly typed"),
        pytest.param(jnp.ones(2, jnp.float32), id="float32"),
        pytest.param({"w": np.ones((2, 1))}, id="NumPy"),
    ],
)
def test_the_second_call_does_not_retrace(make, params, optimizer):
    def fun(params, x):
        return sum(jnp.sum(jnp.square(w - x)) for w in jax.tree.leaves(params))

    counted, traces = count_traces(fun)
    advance = make(counted, optimizer)
    arguments = (jnp.arange(4, dtype=jnp.float32),)
    if make is sj.make_epoch:
        arguments = (*arguments, jnp.array([[0, 1], [2, -1]]))
    state, _ = advance(sj.init_state(params, optimizer), *arguments)
    after_first_call = len(traces)
    assert after_first_call > 0
    state, _ = advance(state, *arguments)
    advance(state, *arguments)
    assert len(traces) == after_first_call


def test_another_shape_is_another_trace():
    counted, traces = count_traces(quadratic)
    network, examples = problem()
    optimizer = sj.sgd(0.1)
    step = sj.make_step(counted, optimizer)
    step(sj.init_state(network, optimizer), examples)
    after_first_call = len(traces)
    step(sj.init_state(network, optimizer), jax.tree.map(lambda leaf: leaf[:3], examples))
    assert len(traces) > after_first_call


@pytest.mark.parametrize("optimizer", [sj.sgd(0.1), sj.sgd(**SWEEP), OPTAX["adam"]])
@pytest.mark.parametrize("make", [sj.make_step, sj.make_epoch])
def test_the_incoming_state_is_donated_only_where_asked(make, optimizer):
    network, examples = problem()
    arguments = (examples,) if make is sj.make_step else (examples, SHORT)
    for donate in (False, True):
        state = sj.init_state(jax.tree.map(jnp.copy, network), optimizer)
        make(quadratic, optimizer, donate=donate)(state, *arguments)
        assert {leaf.is_deleted() for leaf in jax.tree.leaves(state)} == {donate}
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(arguments))


def test_donation_changes_no_result():
    runs = []
    for donate in (False, True):
        optimizer = sj.sgd(**SWEEP)
        runs.append(train(sj.make_epoch(quadratic, optimizer, donate=donate), optimizer, SHORT))
    jax.tree.map(np.testing.assert_array_equal, *runs)


@pytest.mark.parametrize("make", [sj.make_step, sj.make_epoch])
@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ({}, "examples holds no arrays"),
        ((np.ones((0, 4)), np.ones((0, 2))), r"examples is empty \(n = 0\)"),
        ((np.ones((3, 4)), np.ones((2, 2))), r"differ \(examples\[0\]: 3, examples\[1\]: 2\)"),
    ],
)
def test_examples_without_one_leading_axis_are_refused(make, examples, message):
    network, _ = problem()
    optimizer = sj.sgd(0.1)
    batches = () if make is sj.make_step else (SHORT,)
    with pytest.raises(ValueError, match=message):
        make(quadratic, optimizer)(sj.init_state(network, optimizer), examples, *batches)


# --- make_epoch ---


@pytest.mark.parametrize("name", FUNS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_an_epoch_equals_the_oracle_with_a_short_last_batch_divided_by_its_own_length(name, dtype):
    assert_epoch_equals_oracle(sj.make_epoch, name, dtype=dtype)


@settings(max_examples=5)
@given(st.integers(1, NUM_EXAMPLES), st.booleans(), st.integers(0, 2**16))
def test_an_epoch_equals_the_oracle_for_every_batch_size(m, keep_last, seed):
    batches = sj.sampling.epoch(jax.random.key(seed), NUM_EXAMPLES, m, keep_last=keep_last)
    assert_epoch_equals_oracle(sj.make_epoch, batches=batches, learning_rate=0.7)


@pytest.mark.parametrize(
    "batches",
    [
        pytest.param([[2, 2, 2], [0, 0, 1]], id="repetitions"),
        pytest.param([[-1, 4, -1], [3, -1, 2]], id="gaps anywhere"),
        pytest.param([list(range(NUM_EXAMPLES))], id="full batch"),
    ],
)
def test_any_explicit_order_goes(batches):
    assert_epoch_equals_oracle(sj.make_epoch, batches=np.array(batches))


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_indices_of_any_integer_dtype_go(dtype):
    assert_epoch_equals_oracle(sj.make_epoch, batches=np.array([[1, 2], [5, 6]], dtype))


@pytest.mark.parametrize(("together", "rest"), [(1, 0), (4, 3), (11, 0)])
def test_an_epoch_is_the_same_however_many_mini_batches_are_gathered_together(
    monkeypatch, together, rest
):
    batches = np.arange(11)[:, None] % NUM_EXAMPLES
    bytes_per_step = 8 * (SIZES[0] + SIZES[-1])
    monkeypatch.setattr(_epoch, "_BLOCK_BYTES", together * bytes_per_step)
    assert _epoch._block_length(len(batches), bytes_per_step) == together
    assert len(batches) % together == rest
    assert_epoch_equals_oracle(sj.make_epoch, batches=batches)


def test_what_is_gathered_together_fits_and_wastes_little():
    for steps, size in itertools.product((1, 2, 97, 100, 781, 5000), (1, 7840, 50_176, 100_352)):
        length = _epoch._block_length(steps, size)
        assert 1 <= length <= steps
        assert length * size <= max(size, 2 * _epoch._BLOCK_BYTES)
        if size >= _epoch._SINGLE_BYTES:
            assert length == 1
        elif steps % length:  # a rest is compiled by itself, where nothing near divides the steps
            assert length == min(steps, _epoch._BLOCK_BYTES // size)


def weights_replaced(replace):
    """Returns a plant for `mean_value_and_grad` that sees other weights than it was given."""
    right = sj.mean_value_and_grad

    def faulty(fun, **options):
        gradient = right(fun)
        return lambda params, examples, weights: gradient(params, examples, replace(weights))

    return faulty


@pytest.mark.parametrize(
    "replace",
    [
        pytest.param(lambda weights: jnp.ceil(weights), id="sum for mean"),
        pytest.param(lambda weights: jnp.sign(weights) / len(weights), id="short batch over m"),
        pytest.param(lambda weights: jnp.full_like(weights, 1 / len(weights)), id="-1 counts"),
    ],
)
def test_a_planted_fault_in_the_weights_is_caught(monkeypatch, replace):
    monkeypatch.setattr(_step, "mean_value_and_grad", weights_replaced(replace))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_epoch_equals_oracle(sj.make_epoch)


def test_weights_replaced_by_themselves_are_no_fault(monkeypatch):
    monkeypatch.setattr(_step, "mean_value_and_grad", weights_replaced(lambda weights: weights))
    assert_epoch_equals_oracle(sj.make_epoch)


def test_a_quadratic_cost_without_its_half_is_caught():
    def faulty(fun, optimizer):
        return sj.make_epoch(lambda params, example: 2 * fun(params, example), optimizer)

    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_epoch_equals_oracle(faulty)


def make_eager_epoch(fun, optimizer, renewed_within_the_batch):
    """Plain SGD example by example; the fault takes each gradient at the newest weights."""
    gradient_of_one = jax.jit(jax.value_and_grad(fun))

    def epoch(state, examples, batches):
        costs, params = [], state.params
        for row in np.asarray(batches):
            batch = [jax.tree.map(lambda leaf, i=i: leaf[i], examples) for i in row if i >= 0]
            old, cost, m = params, 0.0, len(batch)
            for example in batch:
                value, gradient = gradient_of_one(
                    params if renewed_within_the_batch else old, example
                )
                cost += value / m
                updates, _ = optimizer.update(gradient, state.opt_state, old)
                step = jax.tree.map(lambda u, m=m: u / m, updates)
                params = optax.apply_updates(params, step)
            costs.append(cost)
        return sj.TrainState(params, state.opt_state, state.step), sj.StepInfo(jnp.stack(costs))

    return epoch


def test_all_gradients_of_a_batch_are_taken_at_the_old_weights():
    assert_epoch_equals_oracle(sj.make_epoch, learning_rate=0.7)
    assert_epoch_equals_oracle(
        lambda *pair: make_eager_epoch(*pair, renewed_within_the_batch=False), learning_rate=0.7
    )


def test_new_weights_within_a_batch_are_caught():
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_epoch_equals_oracle(
            lambda *pair: make_eager_epoch(*pair, renewed_within_the_batch=True), learning_rate=0.7
        )


OFTEN = ["adamw", "waits for the cost"]
SELDOM = slow(*(name for name in OPTAX if name not in OFTEN))


@pytest.mark.parametrize("name", ["sgd", *OFTEN, *SELDOM])
def test_an_epoch_equals_a_loop_of_steps_with_any_optimizer(name):
    optimizer = OPTAX.get(name, sj.sgd(**SWEEP))
    network, examples = problem()
    state = sj.init_state(network, optimizer)
    after, info = sj.make_epoch(quadratic, optimizer)(state, examples, SHORT)
    step, costs = sj.make_step(quadratic, optimizer), []
    for row in SHORT:
        batch = jax.tree.map(lambda leaf, row=row: leaf[row[row >= 0]], examples)
        state, step_info = step(state, batch)
        costs.append(step_info.cost)
    assert after.step == state.step == len(SHORT)
    assert_trees_close(after, state)
    np.testing.assert_allclose(info.cost, costs, rtol=1e-12)


@pytest.mark.parametrize("name", [*OFTEN, *SELDOM])
def test_an_epoch_equals_a_plain_optax_loop(name):
    optimizer = OPTAX[name]
    network, examples = problem()
    batches = SHORT[:-1]
    params, _ = train(sj.make_epoch(quadratic, optimizer), optimizer, batches)
    opt_state = optimizer.init(network)

    @jax.jit
    def step(network, opt_state, batch):
        cost, gradient = jax.value_and_grad(sj.mean_cost(quadratic))(network, batch)
        update = optax.with_extra_args_support(optimizer).update
        updates, opt_state = update(gradient, opt_state, network, value=cost)
        return optax.apply_updates(network, updates), opt_state

    for row in batches:
        batch = jax.tree.map(lambda leaf, row=row: leaf[row], examples)
        network, opt_state = step(network, opt_state, batch)
    assert_trees_close(params, network, atol=1e-10)


def test_two_epochs_in_a_row_carry_the_optimizer_state():
    optimizer = sj.sgd(**SWEEP)
    network, examples = problem()
    epoch = sj.make_epoch(quadratic, optimizer)
    together, _ = epoch(sj.init_state(network, optimizer), examples, jnp.tile(SHORT, (2, 1)))
    half_way, _ = epoch(sj.init_state(network, optimizer), examples, SHORT)
    assert_trees_close(epoch(half_way, examples, SHORT)[0], together)


@pytest.mark.parametrize("own_batches", [False, True])
def test_vmap_over_states_trains_each_as_a_single_run(own_batches):
    optimizer = sj.sgd(**SWEEP)
    _, examples = problem()
    keys = jax.random.split(jax.random.key(1), 3)
    epoch = sj.make_epoch(quadratic, optimizer)
    orders = [sj.sampling.epoch(key, NUM_EXAMPLES, 3, keep_last=True) for key in keys]
    orders = orders if own_batches else [SHORT] * len(keys)

    def start(key):
        return sj.init_state(sj.init_network(key, SIZES, dtype=jnp.float64), optimizer)

    together, info = jax.vmap(epoch, in_axes=(0, None, 0))(
        jax.vmap(start)(keys), examples, jnp.stack(orders)
    )
    for i, (key, batches) in enumerate(zip(keys, orders, strict=True)):
        alone, alone_info = epoch(start(key), examples, batches)
        assert_trees_close(
            jax.tree.map(lambda leaf, i=i: leaf[i], (together, info)), (alone, alone_info)
        )


def test_a_sweep_over_learning_rates_is_vmap():
    network, examples = problem()

    def run(learning_rate):
        optimizer = sj.sgd(learning_rate, momentum=0.5)
        state = sj.init_state(network, optimizer)
        return sj.make_epoch(quadratic, optimizer)(state, examples, SHORT)[0].params

    rates = jnp.array([0.1, 1.0, 3.0])
    together = jax.vmap(run)(rates)
    for i, rate in enumerate(rates):
        alone = run(float(rate))
        assert_trees_close(jax.tree.map(lambda leaf, i=i: leaf[i], together), alone)


def test_uint8_examples_stay_uint8_and_are_scaled_within_the_program():
    pixels = np.random.default_rng(0).integers(0, 256, (NUM_EXAMPLES, SIZES[0]), np.uint8)
    labels = np.arange(NUM_EXAMPLES, dtype=np.uint8) % SIZES[-1]
    seen = set()

    def from_pixels(network, example):
        x, label = example
        seen.add((x.dtype, label.dtype))
        return quadratic(network, (x / 255.0, jax.nn.one_hot(label, SIZES[-1])))

    network, _ = problem()
    optimizer = sj.sgd(**SWEEP)
    state = sj.init_state(network, optimizer)
    raw, _ = sj.make_epoch(from_pixels, optimizer)(state, (pixels, labels), SHORT)
    prepared = (jnp.asarray(pixels) / 255.0, jax.nn.one_hot(labels, SIZES[-1]))
    expected, _ = sj.make_epoch(quadratic, optimizer)(state, prepared, SHORT)
    assert seen == {(jnp.dtype(jnp.uint8), jnp.dtype(jnp.uint8))}
    assert_trees_close(raw, expected)


def test_float32_stays_float32_through_an_epoch():
    optimizer = sj.sgd(**SWEEP)
    params, costs = train(sj.make_epoch(quadratic, optimizer), optimizer, SHORT, jnp.float32)
    dtypes = {leaf.dtype for leaf in itertools.chain(jax.tree.leaves(params), [costs])}
    assert dtypes == {jnp.dtype(jnp.float32)}


def test_an_epoch_of_no_steps_changes_nothing():
    optimizer = sj.sgd(**SWEEP)
    params, costs = train(sj.make_epoch(quadratic, optimizer), optimizer, jnp.zeros((0, 3), int))
    jax.tree.map(np.testing.assert_array_equal, params, problem()[0])
    assert costs.shape == (0,)


@pytest.mark.parametrize("row", [[-1, -1], [0, NUM_EXAMPLES], [2, -2], [10**6, 1]])
def test_a_row_without_examples_or_with_an_index_out_of_range_gives_a_nan_cost(row):
    optimizer = sj.sgd(0.1)
    params, costs = train(sj.make_epoch(quadratic, optimizer), optimizer, jnp.array([[0, 1], row]))
    assert jnp.isnan(costs).tolist() == [False, True]
    assert all(jnp.isnan(leaf).any() for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("batches", "kind", "message"),
    [
        (np.arange(6), ValueError, r"batches must be \(steps, m\), got shape \(6,\)"),
        (np.zeros((1, 2, 3), int), ValueError, r"batches must be .*, got shape \(1, 2, 3\)"),
        (np.zeros((2, 3)), TypeError, "batches must hold indices, got dtype float64"),
        (np.zeros((2, 3), bool), TypeError, "batches must hold indices, got dtype bool"),
        ([[0, 1], [2, 3]], TypeError, "batches must be one array .*, got a list of 2 with lengths"),
    ],
)
def test_batches_that_are_no_matrix_of_integers_are_refused(batches, kind, message):
    optimizer = sj.sgd(0.1)
    with pytest.raises(kind, match=message):
        train(sj.make_epoch(quadratic, optimizer), optimizer, batches)


@pytest.mark.parametrize("slip", [optax.adam, 0.1, None])
def test_what_is_no_optimizer_is_refused_before_any_work(slip):
    for call in (
        lambda: sj.make_step(quadratic, slip),
        lambda: sj.make_epoch(quadratic, slip),
        lambda: sj.init_state(jnp.zeros(2), slip),
    ):
        with pytest.raises(TypeError, match=r"optimizer is .*; expected one with init"):
            call()


def test_the_oracle_gradient_is_the_slope_of_its_cost():
    """The oracle itself, checked by central differences: it shares no code with JAX."""
    network, examples = problem()
    network, examples = as_reference(network), rows(examples)
    for _, cost, delta in FUNS.values():
        gradient = reference.mean_gradient(network, examples, delta)
        for k, w in enumerate(network):
            for index in np.ndindex(w.shape):
                nudged = []
                for sign in (1, -1):
                    copy = [leaf.copy() for leaf in network]
                    copy[k][index] += sign * 1e-5
                    nudged.append(reference.mean_cost(copy, examples, cost))
                slope = (nudged[0] - nudged[1]) / 2e-5
                np.testing.assert_allclose(gradient[k][index], slope, rtol=1e-6, atol=1e-9)
