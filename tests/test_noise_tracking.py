"""The claims of track_noise_scale: unbiased, a ratio of means, in anyone's optax loop."""

import itertools
import os
import pathlib
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick
import reference
from scipy import stats

from sgd_jax.estimation.noise import (
    NoiseParts,
    noise_of_examples,
    noise_of_parts,
    noise_of_shards,
    noise_scale_of_steps,
    track_noise_scale,
    two_batch_noise_parts,
)
from sgd_jax.per_example import per_example_grad

ROWS = np.random.default_rng(0).normal(size=(4, 3)) + 0.5
MEAN, TRACE, *_ = reference.moments(ROWS)
W = jnp.zeros(3)


def dot(w, x):
    """A cost whose gradient at any w is the example itself."""
    return jnp.dot(w, x)


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12)


def run(steps, decay=None):
    """Returns the state after steps given as pairs (trace, squared norm)."""
    tracker = track_noise_scale(decay)
    state = tracker.init(W)
    for trace, squared_norm in steps:
        noise = NoiseParts(jnp.array(trace), jnp.array(squared_norm))
        updates, state = tracker.update(W + 1, state, W, noise=noise)
        close(updates, W + 1)
    return state


STEPS = [(2.0, -1.0), (6.0, 3.0), (1.0, 0.5)]


def test_the_noise_scale_is_the_ratio_of_means_not_the_mean_of_ratios():
    close(run(STEPS).mean().ratio(), 9 / 2.5)
    assert not np.isclose(9 / 2.5, np.mean([t / s for t, s in STEPS]))


@pytest.mark.parametrize("decay", [0.5, 0.99])
def test_an_exponential_average_weighs_old_steps_less_and_is_unbiased_from_the_first(decay):
    for length in (1, 2, 3):
        weights = decay ** np.arange(length)[::-1]
        expected = np.average(STEPS[:length], axis=0, weights=weights)
        close(run(STEPS[:length], decay).mean(), expected)


def test_before_the_first_step_the_means_are_nan():
    assert np.all(np.isnan(run([]).mean()))


def test_a_negative_mean_norm_is_undetermined():
    assert np.isnan(run([(2.0, -1.0)]).mean().ratio())


def by_blocks(parts, weights, block_size, quantile):
    """The covariance of the weighted means from blocks, and Fieller's ends, in NumPy."""
    parts, weights = np.asarray(parts), np.asarray(weights)
    whole = len(parts) // block_size * block_size
    blocks = np.split(np.arange(whole), whole // block_size)
    W = np.array([weights[b].sum() for b in blocks])
    y = np.array([weights[b] @ parts[b] for b in blocks])
    mean = y.sum(axis=0) / W.sum()
    count = W.sum() ** 2 / np.sum(W**2)
    off = y - W[:, None] * mean
    covariance = count / (count - 1) * off.T @ off / W.sum() ** 2
    S, U = np.average(parts, axis=0, weights=weights)
    t2 = quantile(count - 1) ** 2
    a, b, c = (
        U**2 - t2 * covariance[1, 1],
        S * U - t2 * covariance[0, 1],
        S**2 - t2 * covariance[0, 0],
    )
    root = np.sqrt(b**2 - a * c)
    return S / U, (b - root) / a, (b + root) / a


@pytest.mark.parametrize(("decay", "length"), [(None, 60), (None, 67), (0.97, 60), (0.97, 64)])
def test_the_interval_of_tracking_is_that_of_blocks_of_steps(decay, length):
    generator = np.random.default_rng(2)
    parts = np.stack([generator.normal(10, 1, length), generator.normal(2, 0.5, length)], axis=1)
    tracker = track_noise_scale(decay, block_size=5)
    update = jax.jit(lambda state, s, u: tracker.update(W, state, W, noise=NoiseParts(s, u))[1])
    state = tracker.init(W)
    for s, u in parts:
        state = update(state, s, u)
    scale = state.noise_scale()
    weights = np.ones(length) if decay is None else decay ** np.arange(length)[::-1]
    expected = by_blocks(parts, weights, 5, lambda degrees: stats.t.ppf(0.975, degrees))
    np.testing.assert_allclose([scale.value, scale.low, scale.high], expected, rtol=2e-3)
    assert "over" in repr(scale)
    assert "steps" in repr(scale)


def test_steps_and_tracking_without_decay_have_the_same_interval():
    generator = np.random.default_rng(2)
    parts = NoiseParts(*(jnp.array(generator.normal(m, 0.5, 60)) for m in (10.0, 2.0)))
    tracker = track_noise_scale(block_size=5)
    state = tracker.init(W)
    for s, u in zip(*parts, strict=True):
        _, state = tracker.update(W, state, W, noise=NoiseParts(s, u))
    tracked, at_once = state.noise_scale(), noise_scale_of_steps(parts, num_blocks=12)
    for name in ("value", "low", "high"):
        close(getattr(tracked, name), getattr(at_once, name))


def test_before_three_blocks_there_is_no_interval():
    tracker = track_noise_scale(block_size=2)
    state = tracker.init(W)
    for _ in range(5):
        _, state = tracker.update(W, state, W, noise=NoiseParts(4.0, 2.0))
    scale = state.noise_scale()
    assert scale.value == 2
    assert np.isnan(scale.low)
    assert np.isnan(scale.high)


def test_an_interval_over_steps_covers_the_truth_as_often_as_it_says():
    """Two-batch parts of 400 runs of 100 steps at one w: B = 4, 20 blocks of 5."""
    generator = np.random.default_rng(0)
    mean, runs, steps, small, big = np.full(20, 0.5), 400, 100, 5, 50
    at = lambda size: np.sum(  # noqa: E731
        (mean + generator.normal(size=(runs, steps, 20)) / np.sqrt(size)) ** 2, axis=-1
    )
    parts = two_batch_noise_parts(jnp.array(at(small)), jnp.array(at(big)), small, big)
    scales = jax.jit(jax.vmap(noise_scale_of_steps))(parts)
    share = np.mean((scales.low <= 4) & (scales.high >= 4))
    assert 0.92 < share < 0.98, share
    narrow = np.mean(np.abs(scales.value - 4) < (scales.high - scales.low) / 4)
    assert narrow < 0.8


@pytest.mark.parametrize("m", [2, 3])
def test_noise_of_examples_is_unbiased_over_all_draws(m):
    measure = jax.jit(lambda x: noise_of_examples(per_example_grad(dot)(W, x)))
    parts = [measure(jnp.array(ROWS[list(s)])) for s in itertools.product(range(4), repeat=m)]
    close(np.mean([p.trace for p in parts]), TRACE)
    close(np.mean([p.squared_norm for p in parts]), MEAN @ MEAN)


@pytest.mark.parametrize(("count", "size"), [(2, 1), (2, 2), (3, 1)])
def test_noise_of_parts_is_unbiased_over_all_draws(count, size):
    measure = jax.jit(noise_of_parts, static_argnums=1)
    found = []
    for s in itertools.product(range(4), repeat=count * size):
        gradients = ROWS[list(s)].reshape(count, size, 3).mean(axis=1)
        mean, parts = measure(jnp.array(gradients), size)
        close(mean, ROWS[list(s)].mean(axis=0))
        found.append(parts)
    close(np.mean([p.trace for p in found]), TRACE)
    close(np.mean([p.squared_norm for p in found]), MEAN @ MEAN)


def test_parts_of_one_example_and_the_examples_themselves_say_the_same():
    of_examples = noise_of_examples(per_example_grad(dot)(W, jnp.array(ROWS)))
    close(noise_of_parts(jnp.array(ROWS), 1)[1], of_examples)


def test_a_named_axis_says_the_same_as_parts():
    both = jax.vmap(lambda g: noise_of_shards(g, "data", 5), axis_name="data")(jnp.array(ROWS))
    mean, parts = noise_of_parts(jnp.array(ROWS), 5)
    close(both[0][0], mean)
    close([p[0] for p in both[1]], parts)


def test_examples_over_a_named_axis_say_the_same_as_together():
    def measure(x, axis):
        return noise_of_examples(per_example_grad(dot)(W, x), axis)

    split = jnp.array(ROWS).reshape(2, 2, 3)
    both = jax.vmap(lambda x: measure(x, "data"), axis_name="data")(split)
    together = measure(jnp.array(ROWS), None)
    for device in range(2):
        close([part[device] for part in both], together)


def test_an_optax_loop_tracks_it_without_tracing_again():
    generator = np.random.default_rng(1)
    optimizer = optax.chain(track_noise_scale(), optax.adam(0.01))
    traces = []

    @jax.jit
    def step(w, state, x):
        traces.append(1)
        grads = per_example_grad(lambda w, x: jnp.sum((w - x) ** 2) / 2)(w, x)
        noise = noise_of_examples(grads)
        updates, state = optimizer.update(grads.mean(), state, w, noise=noise)
        return optax.apply_updates(w, updates), state

    w = jnp.full(3, 2.0, jnp.float64)
    state = optimizer.init(w)
    for _ in range(200):
        w, state = step(w, state, jnp.array(generator.normal(size=(10, 3))))
    assert len(traces) == 1
    parts = state[0].mean()  # tr Σ = 3; its standard error is 3·√(2/(3·9·200)) = 0.06
    assert abs(parts.trace - 3) < 0.24
    assert parts.ratio() > 0


PROGRAM = """
import functools, jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import AxisType, PartitionSpec as P
from sgd_jax.estimation import gradient_moments
from sgd_jax.estimation import merge_across
from sgd_jax.estimation.noise import noise_of_parts, noise_of_shards, track_noise_scale

jax.config.update("jax_enable_x64", True)
assert jax.device_count() == 4
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
fun = lambda w, x: jnp.sum((w - x) ** 2) / 2
x = jnp.array(np.random.default_rng(0).normal(size=(20, 3)))
w = jnp.ones(3)
optimizer = optax.chain(track_noise_scale(0.9), optax.sgd(0.1))
sharded = functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), P(), P("data")))

@jax.jit
@functools.partial(sharded, out_specs=P())
def step(w, state, x):
    mine = jax.lax.pcast(w, "data", to="varying")
    local = jax.grad(lambda w: jnp.mean(jax.vmap(fun, (None, 0))(w, x)))(mine)
    gradient, noise = noise_of_shards(local, "data", shard_size=x.shape[0])
    updates, state = optimizer.update(gradient, state, w, noise=noise)
    return optax.apply_updates(w, updates), state

new_w, state = step(w, optimizer.init(w), x)
parts = jnp.mean((w - x).reshape(4, 5, 3), axis=1)
gradient, noise = noise_of_parts(parts, 5)
np.testing.assert_allclose(new_w, w - 0.1 * gradient, atol=1e-12)
np.testing.assert_allclose(state[0].mean(), noise, atol=1e-12)

@jax.jit
@functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
def moments(w, x):
    return merge_across(gradient_moments(fun, w, x, chunk_size=2, per_coordinate=True), "data")

jax.tree.map(
    functools.partial(np.testing.assert_allclose, atol=1e-12),
    moments(w, x),
    gradient_moments(fun, w, x, per_coordinate=True),
)
print("four devices agree with one")
"""


@pytest.mark.slow
def test_four_devices_under_shard_map_agree_with_one():
    environment = dict(
        os.environ, XLA_FLAGS=f"--xla_force_host_platform_device_count=4 {quick.FLAGS}"
    )
    environment["JAX_PLATFORMS"] = "cpu"
    root = pathlib.Path(__file__).parent.parent
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM)],
        env=environment,
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "four devices agree with one"


TRACKER = track_noise_scale()
GRADS = per_example_grad(dot)(W, jnp.array(ROWS[:1]))
STEPS_OF_TEN = NoiseParts(jnp.ones(10), jnp.ones(10))
BAD = [
    (lambda: track_noise_scale(block_size=0), ValueError, "block_size must be at least 1"),
    (
        lambda: noise_scale_of_steps(NoiseParts(jnp.ones(3), jnp.ones(4))),
        ValueError,
        r"shapes \(3,\) and \(4,\)",
    ),
    (
        lambda: noise_scale_of_steps(STEPS_OF_TEN, num_blocks=11),
        ValueError,
        "num_blocks=11: expected 3 to 10",
    ),
    (lambda: track_noise_scale(1.0), ValueError, "decay must be"),
    (lambda: track_noise_scale("0.9"), TypeError, "decay must be one number"),
    (lambda: TRACKER.update(W, TRACKER.init(W), W), ValueError, "noise=noise_of_examples"),
    (
        lambda: TRACKER.update(W, TRACKER.init(W), W, noise=(1.0, 2.0)),
        TypeError,
        "noise must be NoiseParts, got tuple",
    ),
    (lambda: noise_of_examples(GRADS), ValueError, "at least 2"),
    (lambda: noise_of_parts(jnp.array(ROWS[:1]), 5), ValueError, "at least 2"),
    (lambda: noise_of_parts(jnp.array(ROWS), 0), ValueError, "must be at least 1"),
    (
        lambda: jax.vmap(lambda g: noise_of_shards(g, "data", 5), axis_name="data")(ROWS[:1]),
        ValueError,
        "has one device",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD)
def test_bad_input_is_refused_by_name(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
