"""How often the interval of the noise scale of a population holds it, in heavy tails too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sgd_jax.estimation import GradientMoments
from sgd_jax.estimation.noise import noise_scale

REPEATS = 300
SCALES = (0.5, 5.0, 50.0, 5000.0)


def draw(kind, n, p):
    """Returns deviations of gradients from their expectation with tr Σ = 1, (REPEATS, n, p)."""
    random, shape = np.random.default_rng(n + p), (REPEATS, n, p)
    if kind == "normal":
        return random.normal(size=shape) / np.sqrt(p)
    if kind == "student":  # with 3 degrees of freedom: tr Σ exists, its variance does not
        return random.standard_t(3, size=shape) / np.sqrt(3 * p)
    directions = random.normal(size=shape)
    if kind == "rare":  # one example in a hundred is ten times as long
        length = np.where(random.random((REPEATS, n, 1)) < 0.01, 10.0, 1.0)
        return directions / np.sqrt(p) * length / np.sqrt(0.99 + 0.01 * 100)
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    return directions * np.exp(1.5 * random.normal(size=(REPEATS, n, 1)) - 1.5**2)


@jax.jit
@jax.vmap
def measure(rows):
    """The moments of rows, from their definition, and the noise scale of the population."""
    mean = jnp.mean(rows, axis=0)
    norms = jnp.sum(rows**2, axis=1)
    moments = GradientMoments(
        count=jnp.asarray(len(rows), jnp.int32),
        cost=jnp.zeros([]),
        mean=mean,
        trace_per_leaf=jnp.mean(jnp.sum((rows - mean[None]) ** 2, axis=1)),
        mean_norm=jnp.mean(jnp.sqrt(norms)),
        squared_norms=norms,
        alignments=rows @ mean,
    )
    return noise_scale(moments, of="population")


@functools.cache
def coverage(kind, n, p):
    """Returns the share of intervals that hold B, for each of SCALES, and their lower ends."""
    deviations = draw(kind, n, p)
    shares, lows = [], []
    for scale in SCALES:
        mean = np.zeros(p)
        mean[0] = scale**-0.5
        found = measure(jnp.asarray(deviations + mean))
        shares.append(np.mean((found.low <= scale) & (scale <= found.high)))
        lows.append(found.low)
    return np.array(shares), np.array(lows)


@pytest.mark.slow
@pytest.mark.parametrize("p", [1, 5, 100])
@pytest.mark.parametrize("n", [50, 500])
@pytest.mark.parametrize("kind", ["normal", "student", "lognormal"])
def test_intervals_of_95_percent_hold_the_truth_in_90(kind, n, p):
    shares, lows = coverage(kind, n, p)
    assert np.all(shares >= 0.9), shares
    assert np.all(np.isfinite(lows))


@pytest.mark.slow
@pytest.mark.parametrize("p", [1, 5, 100])
def test_a_rare_large_gradient_is_reckoned_with_if_there_is_one(p):
    """With n = 500 five are expected; three samples of 50 in five hold none: nothing helps."""
    shares, _ = coverage("rare", 500, p)
    assert np.all(shares >= 0.9), shares
    blind, _ = coverage("rare", 50, p)
    assert blind[0] < 0.85
