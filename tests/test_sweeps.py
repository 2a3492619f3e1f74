"""The claims of sgd_jax.sweeps: each run of a sweep is the run alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import sgd_jax as sj

SIZES, N, M = (4, 3, 2), 7, 3
TOLERANCE = {jnp.float64: 1e-12, jnp.float32: 1e-5}
RATES, MOMENTA = (0.1, 0.7, 3.0), (0.0, 0.5, 0.9)


def fun(network, example):
    return sj.quadratic_cost(sj.feedforward(network, example[0]), example[1])


def optimizer(setting):
    return sj.sgd(setting["learning_rate"], momentum=setting["momentum"])


def problem(num_orders, num_runs, dtype=jnp.float64):
    """Returns params and settings (G, R), examples, and an order for each of G."""
    keys = jax.random.split(jax.random.key(0), num_orders * num_runs)
    params = jax.vmap(lambda key: sj.init_network(key, SIZES, dtype=dtype))(keys)
    params = jax.tree.map(lambda x: x.reshape(num_orders, num_runs, *x.shape[1:]), params)
    settings = {
        name: jnp.broadcast_to(jnp.array(values[:num_runs], dtype), (num_orders, num_runs))
        for name, values in (("learning_rate", RATES), ("momentum", MOMENTA))
    }
    examples = tuple(
        jax.random.uniform(jax.random.key(k), (N, size), dtype)
        for k, size in ((1, SIZES[0]), (2, SIZES[-1]))
    )
    batches = jax.vmap(lambda key: sj.sampling.epoch(key, N, M, keep_last=True))(keys[:num_orders])
    return params, settings, examples, batches


@pytest.mark.parametrize(
    ("num_orders", "num_runs", "dtype", "orders"),
    [
        (2, 3, jnp.float64, "in_turn"),
        (2, 3, jnp.float64, "together"),
        (3, 1, jnp.float64, "auto"),
        (2, 3, jnp.float32, "auto"),
    ],
)
def test_each_run_is_that_of_the_oracle_alone(num_orders, num_runs, dtype, orders):
    params, settings, examples, batches = problem(num_orders, num_runs, dtype)
    sweep = sj.make_sweep(fun, optimizer, orders=orders)
    states = sweep.init(params, settings)
    states, first = sweep.epoch(states, settings, examples, batches)
    states, second = sweep.epoch(states, settings, examples, batches)
    assert first.cost.shape == second.cost.shape == (num_orders, num_runs, len(batches[0]))
    rows = list(zip(*(np.asarray(leaf, np.float64) for leaf in examples), strict=True))
    for run in np.ndindex(num_orders, num_runs):
        network = [np.asarray(leaf[run], np.float64) for leaf in jax.tree.leaves(params)]
        velocities = [np.zeros_like(leaf) for leaf in network]
        hyperparameters = {name: float(values[run]) for name, values in settings.items()}
        for costs in (first.cost[run], second.cost[run]):
            for cost, row in zip(costs, np.asarray(batches[run[0]]), strict=True):
                batch = [i for i in row if i >= 0]
                expected = reference.mean_cost(
                    network, [rows[i] for i in batch], reference.quadratic_cost
                )
                np.testing.assert_allclose(cost, expected, rtol=TOLERANCE[dtype])
                network, velocities = reference.epoch(
                    network, velocities, rows, [batch], reference.quadratic_delta, **hyperparameters
                )
        for leaf, expected in zip(jax.tree.leaves(states.params), network, strict=True):
            assert leaf.dtype == dtype
            np.testing.assert_allclose(leaf[run], expected, rtol=10 * TOLERANCE[dtype])


def test_settings_and_orders_go_to_their_own_runs():
    """The twin that must differ: a setting, or an order, of a neighbour."""
    params, settings, examples, batches = problem(2, 3)
    sweep = sj.make_sweep(fun, optimizer)
    states = sweep.init(params, settings)
    right, _ = sweep.epoch(states, settings, examples, batches)
    rolled = jax.tree.map(lambda x: jnp.roll(x, 1, axis=1), settings)
    for wrong, _ in (
        sweep.epoch(states, rolled, examples, batches),
        sweep.epoch(states, settings, examples, batches[::-1]),
    ):
        for leaf, other in zip(
            jax.tree.leaves(right.params), jax.tree.leaves(wrong.params), strict=True
        ):
            distance = jnp.abs(leaf - other).max(axis=tuple(range(2, leaf.ndim)))
            assert distance.min() > 1e-6


def test_a_second_epoch_does_not_compile_again():
    params, settings, examples, batches = problem(2, 2)
    traced = []

    def counted(params, example):
        traced.append(None)
        return fun(params, example)

    sweep = sj.make_sweep(counted, optimizer)
    states, _ = sweep.epoch(sweep.init(params, settings), settings, examples, batches)
    before = len(traced)
    sweep.epoch(states, settings, examples, batches)
    assert before == len(traced) > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, s, b: (p, s, b[:1]), r"batches must be \(2, steps, m\)"),
        (lambda p, s, b: (p, s, b[0]), r"batches must be \(2, steps, m\)"),
        (lambda p, s, b: (p, {**s, "momentum": jnp.zeros(2)}, b), r"settings\['momentum'\] has"),
        (lambda p, s, b: (p, jax.tree.map(lambda x: x[:, :2], s), b), "expected one .G, R. for"),
        (lambda p, s, b: ((), (), b), "hold no arrays"),
    ],
)
def test_bad_input_is_refused(change, message):
    params, settings, examples, batches = problem(2, 3)
    params, settings, batches = change(params, settings, batches)
    sweep = sj.make_sweep(fun, optimizer)
    with pytest.raises(ValueError, match=message):
        sweep.epoch(sweep.init(params, settings), settings, examples, batches)


def test_an_unknown_way_to_take_orders_is_refused():
    with pytest.raises(ValueError, match="orders must be auto, in_turn or together, got 'first'"):
        sj.make_sweep(fun, optimizer, orders="first")
