"""Which examples make a mini-batch, with which weights: pure, keyed, on the device.

A `Sample` says which rows of G and how much of each: ĝ = Gᵀ[indices] · weights. Every sampler here
that takes a key makes ĝ unbiased, E ĝ = ∇C = 1/n Σ_i g_i, and `sgd_jax.expected_squared_error` has
the exact E‖ĝ − ∇C‖² of each. An order of an epoch is a matrix of indices, one row a mini-batch.

Sizes are static, so each function runs under `jax.jit` and `jax.vmap` with a traced key. Arrays
given as concrete values are checked; a traced array cannot be, and one that would make ĝ biased
gives weights of NaN instead. Two schemes that get the same key do not draw independently: with and
without replacement share their last index in 99 % of draws. Give each a key of its own.

`sj.sharding.lay_out` lays a draw out over a mesh.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from sgd_jax import _validate
from sgd_jax.typing import Array

_HALF = 31
"""Probabilities are whole numbers of 2⁻⁶²: pairs of 31 bits. Integers are drawn exactly."""

_NUM_CANDIDATES = 32

_LEAST_PROBABILITY = 2.0**-50
"""Below it a probability in units of 2⁻⁶² is off by more than 2⁻¹², a part in 4,000."""

_FLOYD = 32
"""Up to m² = 32n Floyd's m² comparisons take less time than sorting n (measured on a CPU)."""


class Sample(NamedTuple):
    """Some examples and their weights: the estimate is ĝ = Σ_k weights[k] · g_(indices[k])."""

    indices: Array
    """int32, shape (m,); an index of −1 is no example and has weight 0."""
    weights: Array
    """Shape (m,); they contain the 1/m or what stands for it."""


def epoch(key: Array, n: int, m: int, *, keep_last: bool = False) -> Array:
    """Returns the mini-batches of one epoch by random reshuffling.

    A uniformly random permutation of the n examples is cut into consecutive mini-batches of m,
    so no example is used twice. The n mod m examples left over are dropped; with
    ``keep_last=True`` they make a last, short mini-batch instead, filled up with −1: "no example
    here". `make_epoch` gives such an entry weight zero and divides by the length of the short
    batch.

    Args:
      key: a JAX random key.
      n: number of examples.
      m: mini-batch size, 1 ≤ m ≤ n; m = n is full-batch gradient descent.
      keep_last: keep the short last mini-batch.

    Returns:
      int32 indices, shape (n // m, m), or (⌈n / m⌉, m) with ``keep_last=True``.

    Raises:
      ValueError: m < 1 or m > n.
      TypeError: n or m is not a whole number.

    >>> import jax
    >>> batches = epoch(jax.random.key(0), n=5, m=2, keep_last=True)
    >>> batches.shape, int(batches[-1, -1])
    ((3, 2), -1)
    >>> sorted(batches.ravel().tolist())
    [-1, 0, 1, 2, 3, 4]

    Source: Nielsen, chapter 1, section "Implementing our network to classify digits".
    """
    n, m = _sizes(n, m)
    order = jax.random.permutation(key, jnp.arange(n, dtype=jnp.int32))
    return fixed_order(order, m, keep_last=keep_last)


def fixed_order(order: Array, m: int, *, keep_last: bool = False) -> Array:
    """Returns the mini-batches of an epoch that takes the examples in the order given.

    The order is cut into rows of m, as `epoch` cuts a random one. One fixed order for a whole run,
    drawn once, is ``fixed_order(jax.random.permutation(key, n), m)`` with one key for all epochs.
    Over the draw of that key, each row is a draw without replacement; in a given order it is no
    random draw, and its error is that of one known subset (`sgd_jax.estimation.subset_errors`).

    Args:
      order: indices of the examples, shape (n,).
      m: mini-batch size, 1 ≤ m ≤ n.
      keep_last: keep the short last mini-batch, filled up with −1.

    Returns:
      int32 indices, shape (n // m, m), or (⌈n / m⌉, m) with ``keep_last=True``.

    Raises:
      ValueError: order is no vector, m < 1 or m > n.
      TypeError: order does not hold integers, or m is not a whole number.

    >>> fixed_order(jnp.array([4, 2, 0, 1, 3]), 2, keep_last=True).tolist()
    [[4, 2], [0, 1], [3, -1]]
    """
    order = _vector_of_indices("order", order)
    n, m = _sizes(order.shape[0], m)
    if keep_last:
        batches = jnp.pad(order, (0, -n % m), constant_values=-1).reshape(-1, m)
    else:
        batches = order[: n - n % m].reshape(-1, m)
    return batches


def cyclic(n: int, m: int, num_steps: int, start: int | Array = 0) -> Array:
    """Returns mini-batches that walk round and round through examples 0 … n − 1.

    Row s holds (start + s·m + k) mod n for k < m: nothing is shuffled, and nothing left over is
    dropped. Only the ``start`` can be random: uniform on 0 … n − 1, every row is an unbiased
    draw, and its mean squared error is the mean over the n subsets that a start can give.

    Args:
      n: number of examples.
      m: mini-batch size, 1 ≤ m ≤ n.
      num_steps: number of rows.
      start: where the first row begins; to go on after ``num_steps``, start + num_steps·m.

    Returns:
      int32 indices, shape (num_steps, m).

    Raises:
      ValueError: a size below 1, or m > n.
      TypeError: a size that is not a whole number.

    >>> cyclic(5, 2, 3).tolist()
    [[0, 1], [2, 3], [4, 0]]
    """
    n, m = _sizes(n, m)
    steps = np.arange(_validate.positive_int("num_steps", num_steps), dtype=np.int64)
    offsets = (steps[:, None] * m + np.arange(m)) % n
    batches = (jnp.asarray(offsets, jnp.int32) + jnp.asarray(start % n, jnp.int32)) % n
    return batches


def plain_mean(indices: Array) -> Sample:
    """Returns the sample that averages the examples named: weights 1/(number of them).

    Args:
      indices: shape (m,), such as one row of an order; an entry of −1 is no example.

    Returns:
      A `Sample`, weights as `make_epoch` gives them: 0 where the index is −1.

    Raises:
      ValueError: indices is no vector.
      TypeError: indices does not hold integers.

    >>> plain_mean(jnp.array([3, 1, -1])).weights.tolist()
    [0.5, 0.5, 0.0]
    """
    indices = _vector_of_indices("indices", indices)
    present = indices >= 0
    return Sample(indices, jnp.where(present, 1 / jnp.sum(present), 0.0))


def without_replacement(key: Array, n: int, m: int) -> Sample:
    """Returns m different examples, every subset of m equally likely, with weights 1/m.

    E‖ĝ − ∇C‖² = (n − m)/(n − 1) · tr Σ/m, Σ with 1/n: zero at m = n. The order within the sample
    is not random. Small samples (m² ≤ 32n) cost m² comparisons, larger ones a sort of n.

    Args:
      key: a JAX random key.
      n: number of examples.
      m: sample size, 1 ≤ m ≤ n.

    Raises:
      ValueError: m < 1 or m > n.
      TypeError: n or m is not a whole number.

    >>> sample = without_replacement(jax.random.key(0), n=4, m=4)
    >>> sorted(sample.indices.tolist()), sample.weights.tolist()
    ([0, 1, 2, 3], [0.25, 0.25, 0.25, 0.25])

    Source: Bentley and Floyd, "A sample of brilliance" (1987); Cochran, "Sampling Techniques".
    """
    n, m = _sizes(n, m)
    if m == n:
        indices = jnp.arange(n, dtype=jnp.int32)
    elif m * m <= _FLOYD * n:
        indices = _floyd(key, jnp.array([n]), np.array([m]))[0]
    else:
        indices = jax.random.permutation(key, jnp.arange(n, dtype=jnp.int32))[:m]
    return Sample(indices, jnp.full((m,), 1 / m))


def with_replacement(key: Array, n: int, m: int) -> Sample:
    """Returns m independent uniform draws, with weights 1/m: E‖ĝ − ∇C‖² = tr Σ/m.

    Args:
      key: a JAX random key.
      n: number of examples.
      m: number of draws, at least 1; it may exceed n.

    Raises:
      ValueError: n < 1 or m < 1.
      TypeError: n or m is not a whole number.

    >>> with_replacement(jax.random.key(0), n=1, m=3).indices.tolist()
    [0, 0, 0]
    """
    n, m = _validate.positive_int("n", n), _validate.positive_int("m", m)
    indices = jax.random.randint(key, (m,), 0, n, jnp.int32)
    return Sample(indices, jnp.full((m,), 1 / m))


def poisson(key: Array, n: int, m: int, *, max_size: int | None = None) -> Sample:
    """Returns a Poisson sample: each example in or out independently, in with probability m/n.

    The number of examples K is random with mean m, and the denominator is m all the same:
    ĝ = 1/m Σ_(i in) g_i, E‖ĝ − ∇C‖² = (1 − m/n)/m · 1/n Σ_i ‖g_i‖². K = 0 gives ĝ = 0.

    Shapes are static, so indices come as ``max_size`` entries, filled up with −1 of weight 0. Where
    K > max_size, a uniformly random max_size of the K stay, each weighted K/max_size times more:
    ĝ remains exactly unbiased, and `sgd_jax.expected_squared_error` has the exact error of that
    too. The default, `poisson_max_size`, lets it happen once in 10⁹ draws.

    Args:
      key: a JAX random key.
      n: number of examples.
      m: mean sample size, 1 ≤ m ≤ n.
      max_size: length of the sample, from 1 to n; n never overflows.

    Raises:
      ValueError: m or max_size below 1 or above n.
      TypeError: a size is not a whole number.

    >>> poisson(jax.random.key(0), n=4, m=4).weights.tolist()  # each one in for certain
    [0.25, 0.25, 0.25, 0.25]
    """
    n, m = _sizes(n, m)
    size = poisson_max_size(n, m) if max_size is None else max_size
    size = _validate.positive_int("max_size", size)
    if size > n:
        raise ValueError(f"max_size must be at most n, got max_size = {size} > n = {n}")
    draw_key, order_key = jax.random.split(key)
    # Integers, since P(uniform < m/n) is off by up to 2⁻²³ in float32.
    drawn = jax.random.randint(draw_key, (n,), 0, n) < m
    count = jnp.sum(drawn)
    order = jnp.arange(n, dtype=jnp.int32)
    if size < n:
        order = jax.lax.cond(
            count > size, lambda: jax.random.permutation(order_key, order), lambda: order
        )
    (places,) = jnp.nonzero(drawn[order], size=size, fill_value=-1)
    present = places >= 0
    weight = jnp.maximum(count, size) / size / m
    indices = jnp.where(present, order[places], -1)
    return Sample(indices, jnp.where(present, weight, 0.0))


def poisson_max_size(n: int, m: int, overflow: float = 1e-9) -> int:
    """Returns a length that a Poisson sample of mean m exceeds with probability below ``overflow``.

    m + t with t = L/3 + √(L²/9 + 2 L m), L = ln(1/overflow), from Bernstein's inequality; at most
    n, which no sample exceeds.

    Raises:
      ValueError: overflow is not in (0, 1), m < 1 or m > n.
      TypeError: n or m is not a whole number.

    >>> poisson_max_size(n=50_000, m=10), poisson_max_size(n=20, m=10)
    (39, 20)
    """
    n, m = _sizes(n, m)
    _validate.finite_float("overflow", overflow, low=0, low_allowed=False, high=1)
    log = math.log(1 / overflow)
    return min(n, m + math.ceil(log / 3 + math.sqrt(log**2 / 9 + 2 * log * m)))


def stratified(key: Array, strata: Array, sizes: Sequence[int]) -> Sample:
    """Returns m_h examples of each stratum h, drawn without replacement within it.

    Weights are W_h/m_h with W_h = n_h/n the stratum's share of all examples, so ĝ is unbiased
    whatever the sizes, and E‖ĝ − ∇C‖² = Σ_h W_h² (n_h − m_h)/(n_h − 1) · tr Σ_h/m_h.
    `proportional_allocation` and `neyman_allocation` choose sizes.

    Args:
      key: a JAX random key.
      strata: the stratum of each example, integers 0 … H − 1, shape (n,): labels, for instance.
        Given as a concrete array it is checked and grouped once; a traced one is sorted each time.
      sizes: m_h, H whole numbers, 1 ≤ m_h ≤ n_h.

    Returns:
      A `Sample` of Σ_h m_h examples, stratum after stratum.

    Raises:
      ValueError: strata is no vector or holds a number outside 0 … H − 1; a stratum is empty, gets
        no draw, or more draws than it has examples.
      TypeError: strata does not hold integers, or a size is not a whole number.

    >>> sample = stratified(jax.random.key(0), jnp.array([0, 1, 1, 1]), sizes=(1, 3))
    >>> sample.weights.tolist()  # every example drawn: 1/n each
    [0.25, 0.25, 0.25, 0.25]

    Source: Cochran, "Sampling Techniques", chapter 5.
    """
    sizes = [_validate.positive_int(f"sizes[{h}]", size) for h, size in enumerate(sizes)]
    if not sizes:
        raise ValueError("sizes is empty; expected the number of draws of each stratum, H ≥ 1")
    labels = _vector_of_indices("strata", strata)
    n, most = labels.shape[0], max(sizes)
    members, valid = None, True
    if isinstance(strata, jax.core.Tracer):
        counts = jnp.bincount(labels, length=len(sizes))
        valid = jnp.all(counts >= jnp.array(sizes)) & (jnp.min(labels) >= 0)
        valid &= jnp.max(labels) < len(sizes)
    else:
        concrete = np.asarray(strata)
        counts = jnp.asarray(_checked_counts(concrete, sizes))
        members = jnp.asarray(np.argsort(concrete, kind="stable"), jnp.int32)
    if most * most <= _FLOYD * n:
        members = jnp.argsort(labels) if members is None else members
        places = _floyd(key, counts, np.array(sizes))
    else:
        bits = jax.random.bits(key, (2, n), jnp.uint32)  # 64 bits decide: no ties
        places = jnp.arange(n, dtype=jnp.int32)
        members = jax.lax.sort((labels, bits[0], bits[1], places), num_keys=3)[3]
        places = jnp.broadcast_to(jnp.arange(most), (len(sizes), most))
    starts = (jnp.cumsum(counts) - counts)[:, None]
    rows, columns = np.nonzero(np.arange(most)[None, :] < np.array(sizes)[:, None])
    indices = members[(places + starts)[rows, columns]].astype(jnp.int32)
    weights = (counts / (n * jnp.array(sizes)))[rows]
    return Sample(indices, jnp.where(valid, weights, jnp.nan))


def importance(key: Array, probabilities: Array, m: int) -> Sample:
    """Returns m independent draws, example i with probability p_i, with weights 1/(m n p_i).

    E‖ĝ − ∇C‖² = (1/m)(1/n² Σ_i ‖g_i‖²/p_i − ‖∇C‖²), least at p_i ∝ ‖g_i‖ (`optimal_probabilities`).
    ĝ is unbiased where p_i > 0 for every example whose gradient is not zero;
    `sgd_jax.expected_squared_error`, which has the norms, checks that. Draws are exact in whole
    numbers of 2⁻⁶², p_i as given up to their sum; smaller probabilities than 2⁻⁵⁰ are refused,
    since the law at the p_i drawn would not be that at the p_i given.

    Args:
      key: a JAX random key.
      probabilities: p, shape (n,), p_i ≥ 0, Σ p_i = 1 to within 10⁻⁵.
      m: number of draws, at least 1; it may exceed n.

    Raises:
      ValueError: p is not a vector, is empty, has a negative or non-finite entry or one in
        (0, 2⁻⁵⁰), or does not sum to 1. If p is traced, the weights are NaN instead.
      TypeError: m is not a whole number, or p is not floating point.

    >>> sample = importance(jax.random.key(0), jnp.array([0.0, 1.0]), m=2)
    >>> sample.indices.tolist(), sample.weights.tolist()  # 1/(2·2·1)
    ([1, 1], [0.25, 0.25])

    Source: Needell, Ward and Srebro 2014 (arXiv 1310.5715); Zhao and Zhang 2015 (1401.2753).
    """
    m = _validate.positive_int("m", m)
    is_traced = isinstance(probabilities, jax.core.Tracer)
    concrete = None if is_traced else np.asarray(probabilities, np.float64)
    probabilities = jnp.asarray(probabilities)
    if probabilities.ndim != 1 or probabilities.size == 0:
        raise ValueError(
            f"probabilities must be a vector of n ≥ 1 numbers, got shape {probabilities.shape}"
        )
    if not jnp.issubdtype(probabilities.dtype, jnp.floating):
        raise TypeError(f"probabilities must be floating point, got dtype {probabilities.dtype}")
    n = probabilities.shape[0]
    if concrete is not None:
        check_probabilities(concrete)
    # A NaN fails both comparisons.
    valid = jnp.all(probabilities >= 0) & (jnp.abs(jnp.sum(probabilities) - 1) <= 1e-5)
    valid &= jnp.all((probabilities == 0) | (probabilities >= _LEAST_PROBABILITY))
    units = _in_units(probabilities)
    upper = jax.lax.associative_scan(_add, units)
    indices = _first_above(upper, _draw_below(key, m, (upper[0][-1], upper[1][-1])))
    share = _as_float((units[0][indices], units[1][indices]))
    weights = _as_float((upper[0][-1], upper[1][-1])) / share / (m * n)
    return Sample(indices, jnp.where(valid, weights, jnp.nan))


_Pair = tuple[Array, Array]
"""Whole numbers of 62 bits, two uint32 of 31 bits: the higher and the lower half."""


def _in_units(probabilities: Array) -> _Pair:
    """Each probability in units of 2⁻⁶², rounded down: scaling by powers of two is exact."""
    scaled = probabilities * 2.0**_HALF
    high = jnp.floor(scaled)
    low = jnp.floor((scaled - high) * 2.0**_HALF)
    return high.astype(jnp.uint32), low.astype(jnp.uint32)


def _add(a: _Pair, b: _Pair) -> _Pair:
    low = a[1] + b[1]
    return a[0] + b[0] + (low >> _HALF), low & ((1 << _HALF) - 1)


def _is_below(a: _Pair, b: _Pair) -> Array:
    return (a[0] < b[0]) | ((a[0] == b[0]) & (a[1] < b[1]))


def _as_float(pair: _Pair) -> Array:
    return pair[0].astype(float) + pair[1].astype(float) * 2.0**-_HALF


def _draw_below(key: Array, m: int, total: _Pair) -> _Pair:
    """Uniform whole numbers below ``total``, of about 2⁶²: the first of 32 candidates below it.

    A candidate has 63 bits if the total exceeds 2⁶² and 62 otherwise, so that half of them or more
    are below it, and none is with a probability of 2⁻³². (`jax.random.randint` is biased by up to a
    half for ranges of this size.)
    """
    high, low = jax.random.bits(key, (2, _NUM_CANDIDATES, m), jnp.uint32)
    high = jnp.where(total[0] >> _HALF == 0, high >> 1, high)
    low = low >> 1
    first = jnp.argmax(_is_below((high, low), total), axis=0)[None]
    high, low = (jnp.take_along_axis(half, first, axis=0)[0] for half in (high, low))
    return high, low


def _first_above(upper: _Pair, drawn: _Pair) -> Array:
    """The first index whose cumulated units exceed what is drawn, by bisection."""
    n = upper[0].shape[0]
    ends = (jnp.zeros_like(drawn[0], jnp.int32), jnp.full_like(drawn[0], n - 1, jnp.int32))

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) // 2
        is_above = _is_below(drawn, (upper[0][middle], upper[1][middle]))
        return jnp.where(is_above, low, middle + 1), jnp.where(is_above, middle, high)

    return jax.lax.fori_loop(0, max(1, (n - 1).bit_length()), halve, ends)[1]


def antithetic(key: Array, order: Array, m: int) -> Sample:
    """Returns m/2 mirrored pairs, drawn without replacement among the n/2 pairs; weights 1/m.

    Example order[r] is paired with order[n − 1 − r]. Where the order sorts the examples by
    something their gradients follow, such as ⟨g_i, v⟩, the errors of two partners oppose each other
    and cancel. Every example is in with probability m/n, so ĝ is unbiased in any order. The error
    is that of drawing m/2 pairs without replacement: `sgd_jax.expected_squared_error` of the
    moments of pairs, whose cost is ½(C_i + C_partner), with batch size m/2.

    Args:
      key: a JAX random key.
      order: a permutation of the examples, shape (n,), n even.
      m: sample size, even, 2 ≤ m ≤ n.

    Returns:
      A `Sample`; entry k is paired with entry k + m/2.

    Raises:
      ValueError: n or m is odd, m > n, or order is no vector.
      TypeError: order does not hold integers, or m is not a whole number.

    >>> sample = antithetic(jax.random.key(0), jnp.array([3, 1, 0, 2]), m=4)
    >>> sorted(zip(sample.indices[:2].tolist(), sample.indices[2:].tolist()))
    [(1, 0), (3, 2)]
    """
    order = _vector_of_indices("order", order)
    n, m = _sizes(order.shape[0], m)
    if n % 2 or m % 2:
        raise ValueError(
            f"antithetic draws are pairs: n and m must be even, got n = {n} and m = {m}; "
            "leave one example out of the order, or draw without_replacement"
        )
    pairs = without_replacement(key, n // 2, m // 2).indices
    indices = jnp.concatenate([order[pairs], order[n - 1 - pairs]])
    return Sample(indices, jnp.full((m,), 1 / m))


def check_probabilities(probabilities: np.ndarray) -> None:
    """Raises `ValueError` unless the concrete entries are finite, ≥ 0 and sum to 1 within 10⁻⁵."""
    bad = np.flatnonzero(~(np.isfinite(probabilities) & (probabilities >= 0)))
    if bad.size:
        raise ValueError(
            "probabilities must be finite and at least 0; "
            f"probabilities[{bad[0]}] is {probabilities[bad[0]]} ({bad.size} such entries)"
        )
    (tiny,) = np.nonzero((probabilities > 0) & (probabilities < _LEAST_PROBABILITY))
    if tiny.size:
        raise ValueError(
            f"probabilities[{tiny[0]}] is {probabilities[tiny[0]]} ({tiny.size} such entries): "
            "expected 0, or at least 2⁻⁵⁰ ≈ 9e-16. Mix in uniform draws: "
            "optimal_probabilities(norms, floor=0.1)"
        )
    total = float(np.sum(probabilities))
    if abs(total - 1) > 1e-5:
        raise ValueError(f"probabilities must sum to 1, got {total:.7g}; divide them by their sum")


def _sizes(n: int, m: int) -> tuple[int, int]:
    n, m = _validate.positive_int("n", n), _validate.positive_int("m", m)
    if m > n:
        raise ValueError(
            f"m must be at most n, the number of examples, got m = {m} > n = {n}; "
            "m = n is full-batch gradient descent"
        )
    return n, m


def _vector_of_indices(name: str, value: Array) -> Array:
    """Returns ``value`` as int32; raises unless it is a vector of integers."""
    if jnp.ndim(value) != 1:
        raise ValueError(f"{name} must be a vector, got shape {jnp.shape(value)}")
    if not jnp.issubdtype(jnp.result_type(value), jnp.integer):
        raise TypeError(f"{name} must hold integers, got dtype {jnp.result_type(value)}")
    return jnp.asarray(value, jnp.int32)


def _checked_counts(strata: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Returns n_h; raises unless labels are 0 … H − 1 and 1 ≤ m_h ≤ n_h."""
    outside = np.flatnonzero((strata < 0) | (strata >= len(sizes)))
    if outside.size:
        raise ValueError(
            f"strata must lie in 0 … {len(sizes) - 1}, one for each of the sizes; "
            f"strata[{outside[0]}] is {strata[outside[0]]} ({outside.size} such examples)"
        )
    counts = np.bincount(strata, minlength=len(sizes))
    for h, (count, size) in enumerate(zip(counts, sizes, strict=True)):
        if size > count:
            raise ValueError(f"sizes[{h}] is {size}, but stratum {h} holds {count} examples")
    return counts


def _floyd(key: Array, counts: Array, sizes: np.ndarray) -> Array:
    """m_h different places below n_h for each h, every subset equally likely: (H, max m_h).

    Robert Floyd's method. For k = 0 … m − 1 let j = n − m + k and draw t from 0 … j; take t, or j
    where t has been taken. What stands beyond m_h in a row means nothing.
    """
    most = int(sizes.max())
    last = (counts[:, None] - jnp.array(sizes)[:, None] + jnp.arange(most)[None, :]).astype(int)
    drawn = jax.random.randint(key, last.shape, 0, jnp.maximum(last + 1, 1), jnp.int32)

    def take(k: int | Array, taken: Array) -> Array:
        t = drawn[:, k]
        seen = jnp.any(taken == t[:, None], axis=1)
        return taken.at[:, k].set(jnp.where(seen, last[:, k], t).astype(jnp.int32))

    return jax.lax.fori_loop(0, most, take, jnp.full(last.shape, -1, jnp.int32))
