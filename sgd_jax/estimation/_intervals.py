"""Confidence intervals of a ratio B = S/U whose parts S ≥ 0 and U ≥ 0 are estimated."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri

from sgd_jax.typing import Array

_TAIL_SHARE = 0.1
_LEAST_TAIL = 25
_NUM_RATES = 80
_NUM_HALVINGS = 40


class Spread(NamedTuple):
    """Variances and covariance of the estimates of S and U."""

    numerator: Array
    covariance: Array
    denominator: Array


def normal_quantile(confidence: float | Array) -> Array:
    """Returns z, which a standard normal exceeds in absolute value with 1 − confidence."""
    return ndtri((1 + jnp.asarray(confidence)) / 2)


def student_quantile(confidence: float | Array, degrees: Array) -> Array:
    """Returns the two-sided quantile of Student's t, to 0.2 % from five degrees of freedom on.

    The expansion of Abramowitz and Stegun, 26.7.5, in powers of 1/degrees.
    """
    z = normal_quantile(confidence)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / degrees ** (k + 1) for k, term in enumerate(terms))


def fieller(S: Array, U: Array, spread: Spread, quantile: Array) -> tuple[Array, Array, Array]:
    """Returns the B with (S − B U)² ≤ q² Var(S − B U): their ends, and whether U differs from 0.

    The set is unbounded if U is not significantly above 0: then the upper end is infinite.

    Source: Fieller 1954.
    """
    var_S, cov, var_U = (jnp.square(quantile) * v for v in spread)
    a, b, c = U**2 - var_U, S * U - cov, S**2 - var_S
    root = jnp.sqrt(jnp.maximum(b**2 - a * c, 0))  # below 0 only by rounding, or if c < 0
    determined = (a > 0) & (U > 0)
    bounded = jnp.where(b + root > 0, c / jnp.where(b + root > 0, b + root, 1), jnp.inf)
    low = jnp.where(c > 0, bounded, 0)
    high = jnp.where(determined, (b + root) / jnp.where(determined, a, 1), jnp.inf)
    return low, high, determined


def asymmetric_ratio(
    S: Array, U: Array, spread: Spread, quantile: Array, S_above: Array, U_above: Array
) -> tuple[Array, Array, Array]:
    """Returns `fieller`'s interval with wider upper ends of S and of U.

    The upper end of B takes S + S_above for the upper end of S, the lower end of B takes U +
    U_above for that of U, if these exceed q standard errors; correlations are kept. So the interval
    holds Fieller's. With U + U_above > 0 the lower end is finite.

    Source: Donner and Zou 2012, "Closed-form confidence intervals for functions of the normal mean
    and standard deviation", for the method of variance estimates recovery.
    """
    low, high, determined = fieller(S, U, spread, quantile)
    wider_S = _widening(S_above, quantile * jnp.sqrt(spread.numerator))
    wider_U = _widening(U_above, quantile * jnp.sqrt(spread.denominator))
    finite = jnp.isfinite(wider_S)
    k = jnp.where(finite, wider_S, 1)
    above = Spread(k**2 * spread.numerator, k * spread.covariance, spread.denominator)
    upper = jnp.where(finite, fieller(S, U, above, quantile)[1], jnp.inf)
    k = wider_U
    below = Spread(spread.numerator, k * spread.covariance, k**2 * spread.denominator)
    return (
        jnp.minimum(low, fieller(S, U, below, quantile)[0]),
        jnp.maximum(high, upper),
        determined,
    )


def _widening(wanted: Array, had: Array) -> Array:
    return jnp.where(had > 0, jnp.maximum(wanted / jnp.where(had > 0, had, 1), 1), 1)


def upper_end_of_mean(values: Array, confidence: float) -> Array:
    """Returns how far the expectation of n values ≥ 0 may exceed their mean, heavy tails included.

    The k = max(n/10, 25) largest, at most n/2, are taken for a sample of a generalized Pareto tail
    above the next one, u; its mean excess has an upper end by profile likelihood, infinite if the
    data allow an infinite expectation. That end and the ordinary standard error of min(value, u)
    add up in squares. The shape is at least exponential (ξ ≥ 0), so the end of a bounded tail is
    cautious. What never occurred among the n values, no method sees.

    Args:
      values: (n,), n ≥ 2.
      confidence: two-sided, in (0, 1).

    Returns:
      A scalar ≥ 0, infinity possible.

    Source: Davison and Smith 1990 for the profile likelihood of a generalized Pareto tail.
    """
    n = values.shape[0]
    k = min(max(math.ceil(_TAIL_SHARE * n), _LEAST_TAIL), n // 2)
    ordered = jnp.sort(values)
    threshold = ordered[n - k - 1]
    excess = ordered[n - k :] - threshold
    mean = jnp.mean(excess)
    unit = excess / jnp.where(mean > 0, mean, 1)
    z = normal_quantile(confidence)
    stretch = _tail_stretch(unit, jnp.square(z) / (2 * k)) - 1
    share = k / n
    body = jnp.minimum(values, threshold)
    variance = jnp.var(body) + 2 * share * mean * (threshold - jnp.mean(body))
    variance += share * (1 - share) * jnp.square(mean)
    tail = jnp.where(mean > 0, share * mean * jnp.where(mean > 0, stretch, 0), 0)
    return jnp.sqrt(jnp.square(z) * variance / n + jnp.square(tail))


def _tail_stretch(excess: Array, allowed: Array) -> Array:
    """The largest mean of a generalized Pareto law within ``allowed`` of the best log-likelihood.

    Of k excesses of mean 1, log-likelihood over k. With τ = ξ/σ and g = mean log(1 + τ y) it is
    log τ − log ξ − g/ξ − g, largest at ξ = g; the mean of the law is ξ/(τ (1 − ξ)). τ → 0 is the
    exponential law of mean μ, with −log μ − 1/μ.
    """
    rates = jnp.geomspace(1e-3, 1e4, _NUM_RATES).astype(excess.dtype)
    g = jax.lax.map(lambda rate: jnp.mean(jnp.log1p(rate * excess)), rates)
    best = jnp.log(rates) - jnp.log(g) - g - 1
    most = jnp.maximum(jnp.max(best), -1.0)
    shape = g * _ratio_at(allowed + best - most)
    mean = jnp.where(shape < 1, shape / (rates * jnp.where(shape < 1, 1 - shape, 1)), jnp.inf)
    mean = jnp.where(allowed + best >= most, mean, 1)
    exponential = jnp.where(allowed - 1 >= most, _ratio_at(allowed - 1 - most), 1)
    return jnp.maximum(jnp.max(mean), exponential)


def _ratio_at(drop: Array) -> Array:
    """The r ≥ 1 with log r + 1/r − 1 = drop, of a drop ≥ 0, by bisection in log r."""
    drop = jnp.maximum(drop, 0)

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        is_below = middle + jnp.expm1(-middle) < drop
        return jnp.where(is_below, middle, low), jnp.where(is_below, high, middle)

    ends = (jnp.zeros_like(drop), drop + 1)
    return jnp.exp(jax.lax.fori_loop(0, _NUM_HALVINGS, halve, ends)[1])
