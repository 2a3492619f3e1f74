"""How to spread draws over strata, and probability over examples: planned before sampling."""

import heapq
from collections.abc import Sequence

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from sgd_jax import _validate
from sgd_jax.typing import Array


def proportional_allocation(counts: Sequence[int] | np.ndarray, m: int) -> tuple[int, ...]:
    """Returns draws per stratum in proportion to its size: m_h ≈ m n_h/n, at least 1 each.

    Exactly m n_h/n where these are whole; otherwise rounded so that Σ_h n_h²/m_h is least, which is
    `neyman_allocation` for strata of one variance. A host function.

    Args:
      counts: n_h, H whole numbers of at least 1.
      m: Σ_h m_h, H ≤ m ≤ n.

    Returns:
      m_h, H whole numbers, 1 ≤ m_h ≤ n_h.

    Raises:
      ValueError: a stratum is empty, m < H or m > n.
      TypeError: a number is not whole.

    >>> proportional_allocation([60, 30, 10], m=10)
    (6, 3, 1)
    """
    counts, m = _checked(counts, m)
    return _allocate(counts, np.array(counts, np.float64), m)


def neyman_allocation(
    counts: Sequence[int] | np.ndarray, traces: Sequence[float] | np.ndarray, m: int
) -> tuple[int, ...]:
    """Returns the draws per stratum for which the stratified estimate is best.

    The exact integer minimum of Σ_h W_h² (n_h − m_h)/(n_h − 1) · tr Σ_h/m_h under Σ_h m_h = m and
    1 ≤ m_h ≤ n_h: about m_h ∝ n_h √(tr Σ_h). Found by giving one draw after another to the stratum
    where it helps most, which is optimal because the error is convex in each m_h. A host function.

    Args:
      counts: n_h, H whole numbers of at least 1.
      traces: tr Σ_h, with 1/n_h, H finite numbers ≥ 0: ``gradient_moments(..., strata=...).trace``.
      m: Σ_h m_h, H ≤ m ≤ n.

    Returns:
      m_h, H whole numbers, 1 ≤ m_h ≤ n_h.

    Raises:
      ValueError: a stratum is empty, m < H or m > n, or a trace is missing, negative or non-finite.
      TypeError: a number that should be is not whole.

    >>> neyman_allocation([50, 50], traces=[9.0, 1.0], m=8)
    (6, 2)

    Source: Neyman 1934; Wright 2012 for exact integers by priority.
    """
    counts, m = _checked(counts, m)
    traces = np.asarray(traces, np.float64)
    if traces.shape != (len(counts),):
        raise ValueError(f"traces must have shape ({len(counts)},), got {traces.shape}")
    bad = np.flatnonzero(~(np.isfinite(traces) & (traces >= 0)))
    if bad.size:
        raise ValueError(f"traces[{bad[0]}] is {traces[bad[0]]}; expected a finite number ≥ 0")
    sizes = np.array(counts, np.float64)
    return _allocate(counts, sizes * np.sqrt(traces * sizes / np.maximum(sizes - 1, 1)), m)


def optimal_probabilities(norms: Array, floor: float | Array) -> Array:
    """Returns the probabilities that importance sampling is best with: p_i ∝ ‖g_i‖, mixed.

    p_i = (1 − α) ‖g_i‖/Σ_k ‖g_k‖ + α/n with α = floor. With α = 0 and the norms of the very
    gradients sampled, E‖ĝ − ∇C‖² = ((1/n Σ‖g_i‖)² − ‖∇C‖²)/m, the least possible. Old or
    approximate norms need α > 0: then no weight exceeds 1/(m α), and the error is at most 1/α times
    that of uniform draws plus (1/α − 1)‖∇C‖²/m. Norms that are all zero give uniform p.

    Args:
      norms: ‖g_i‖ ≥ 0 (not squared), shape (n,).
      floor: α in [0, 1], the share of uniform draws.

    Returns:
      p, shape (n,), summing to 1 to rounding. Non-finite norms give NaN, which `importance`
      refuses.

    Raises:
      ValueError: norms is no vector, or is empty; a concrete floor outside [0, 1].
      TypeError: floor is not one number.

    >>> optimal_probabilities(jnp.array([3.0, 1.0]), floor=0.5).tolist()
    [0.625, 0.375]

    Source: Zhao and Zhang 2015 (arXiv 1401.2753); Katharopoulos and Fleuret 2018 (1803.00942).
    """
    norms = jnp.asarray(norms)
    if norms.ndim != 1 or norms.size == 0:
        raise ValueError(f"norms must be a vector of n ≥ 1 numbers, got shape {norms.shape}")
    if isinstance(floor, jax.core.Tracer) or floor != 1:
        _validate.finite_float("floor", floor, low=0, low_allowed=True, high=1)
    n = norms.shape[0]
    total = jnp.sum(norms)
    share = jnp.where(total == 0, 1 / n, norms / jnp.where(total == 0, 1, total))
    return (1 - floor) * share + floor / n


def _checked(counts: Sequence[int] | np.ndarray, m: int) -> tuple[list[int], int]:
    m = _validate.positive_int("m", m)
    whole = [_validate.positive_int(f"counts[{h}]", count) for h, count in enumerate(counts)]
    if not len(whole) <= m <= sum(whole):
        raise ValueError(
            f"m must lie between {len(whole)}, one draw for each stratum, and n = {sum(whole)}, "
            f"got m = {m}"
        )
    return whole, m


def _allocate(counts: list[int], spreads: np.ndarray, m: int) -> tuple[int, ...]:
    """Minimizes Σ_h spread_h²/m_h: the next draw goes where spread/√(m_h (m_h + 1)) is largest."""
    sizes = [1] * len(counts)
    # Ties go to the larger stratum.
    heap = [
        (-spread / 2**0.5, -n_h, h)
        for h, (spread, n_h) in enumerate(zip(spreads, counts, strict=True))
        if n_h > 1
    ]
    heapq.heapify(heap)
    for _ in range(m - len(counts)):
        _, minus_count, h = heap[0]
        sizes[h] += 1
        if sizes[h] == counts[h]:
            heapq.heappop(heap)
        else:
            priority = spreads[h] / (sizes[h] * (sizes[h] + 1)) ** 0.5
            heapq.heapreplace(heap, (-priority, minus_count, h))
    return tuple(sizes)
