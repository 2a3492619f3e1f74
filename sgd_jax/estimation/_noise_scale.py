"""The gradient noise scale: how large a mini-batch must be before noise stops dominating."""

import dataclasses
import functools
import math
import warnings
from typing import Literal, NamedTuple, get_args

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sgd_jax import _validate
from sgd_jax._chunks import chunks, vary_like
from sgd_jax.distributed import sharding
from sgd_jax.estimation import _intervals
from sgd_jax.estimation._moment_streams import gradient_moments
from sgd_jax.estimation._moments import GradientMoments
from sgd_jax.per_example import per_example_grad
from sgd_jax.typing import Array, CostFn, Examples, Params, PyTree


class NoiseParts(NamedTuple):
    """tr Σ and ‖∇C‖², or estimates of them. Average many of each apart, then take ``ratio``."""

    trace: Array
    """Of tr Σ, the variance of one example's gradient."""
    squared_norm: Array
    """Of ‖∇C‖²; being unbiased, it can be negative where ‖∇C‖² is small."""

    def ratio(self) -> Array:
        """B = tr Σ/‖∇C‖², or NaN where the estimate of ‖∇C‖² is not above 0: undetermined."""
        return jnp.where(self.squared_norm > 0, self.trace / self.squared_norm, jnp.nan)


Of = Literal["these_examples", "subset", "population"]
"""The question that a noise scale answers: see `noise_scale`."""

_FEW = 10
"""With fewer effective examples than this, tr Σ is known to 30 % at best: a warning."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoiseScale:
    """B_simple = tr Σ/‖∇C‖², in examples, with an interval; made by `noise_scale`.

    The last fields are for the reader: ``repr`` says in one line what B is, and of what.
    """

    value: Array
    """B, the ratio of the parts; NaN if undetermined."""
    low: Array
    """Lower end of the interval; it stands also if ``value`` is undetermined."""
    high: Array
    """Upper end of the interval; infinite if undetermined, or if tr Σ has no upper end."""
    undetermined: Array
    """Whether ‖∇C‖² cannot be told from zero at this confidence."""
    parts: NoiseParts
    """tr Σ and ‖∇C‖²."""
    per_leaf: PyTree
    """`NoiseParts` of each leaf: tr Σ and ‖∇C‖² of its coordinates; its B is ``ratio()``."""
    count: Array
    """n, the examples measured; the steps, of `noise_scale_of_steps`."""
    effective_count: Array
    """(Σ s_i)²/Σ s_i² with s_i = ‖g_i − ∇C‖², from 1 to n: how many examples tr Σ rests on.

    NaN if the moments lack ``squared_norms`` or ``alignments``.
    """
    of: Of | Literal["steps"] = dataclasses.field(metadata={"static": True})
    """The question answered."""
    population: int | None = dataclasses.field(default=None, metadata={"static": True})
    """N, for a subset."""

    def __repr__(self) -> str:
        is_number = isinstance(self.value, jax.Array | np.ndarray | np.generic)
        if not is_number or isinstance(self.value, jax.core.Tracer) or self.value.ndim:
            return f"NoiseScale(of={self.of!r}, value={self.value!r})"
        return _sentence(self)


def noise_scale(
    moments: GradientMoments,
    *,
    of: Of,
    population: int | None = None,
    confidence: float = 0.95,
) -> NoiseScale:
    """Returns the simple noise scale B = tr Σ/‖∇C‖² of these examples, or of what they stand for.

    Which B is asked for has no default, because the answers differ. With g̅ the mean of the n
    gradients, s² = 1/(n − 1) Σ‖g_i − g̅‖²::

        of                 tr Σ              ‖∇C‖²                       interval
        "these_examples"   (n − 1)/n s²      ‖g̅‖²                        none: exact
        "subset"           (N − 1)/N s²      ‖g̅‖² − (1 − n/N) s²/n       for B of all N examples
        "population"       s²                ‖g̅‖² − s²/n                 for B of the distribution

    - ``"these_examples"``: the n examples are the cost that is minimized. Nothing is estimated.
      This is the B of training if the moments are of all training examples.
    - ``"subset"``: the n were drawn without replacement from ``population`` = N examples, and B is
      that of all N. Unbiased parts, whatever params are.
    - ``"population"``: the n are independent draws from a distribution, and **params were not
      fitted to them**: held-out examples, or any examples before training. Of examples that params
      were fitted to it is wrong: ‖g̅‖² is small because of the fit, and subtracting s²/n makes it
      smaller; on a linear model with n = 1,000 and p = 50 such an interval held the B of the
      distribution in 3 % of data sets after five steps of gradient descent, and in none after ten.

    The interval is Fieller's for a ratio, from the jackknife covariance of the two parts over
    examples, with two ends widened: tr Σ upward by the profile likelihood of a generalized Pareto
      tail
    of the s_i = ‖g_i − g̅‖², and ‖∇C‖² upward to (√‖∇C‖²_est + z √(variance along g̅/n))², since
    ‖∇C‖² ≥ 0 is known. It needs moments with ``squared_norms`` and ``alignments``; without them
    ``low`` and ``high`` are NaN, and repr says so. ``undetermined`` is True if ‖∇C‖² is not
    significantly above 0: z standard errors, or, without an interval, an estimate ≤ 0. Then
      ``value``
    is NaN, ``high`` infinite, and ``low`` still a bound. Nothing is clamped.

    Coverage of a nominal 95 %, measured (n = 50, 500, 5,000; p = 1, 5, 100; B = 0.5 to 5,000; 400
    data sets each): at least 92 % of Gaussian gradients, 90 % of Student's t with 3 degrees of
    freedom, 97 % of lognormal norms (σ = 1.5), for whose tails ``high`` is mostly infinite. A
    gradient ten times as long in one of a hundred examples: at least 92 % from n = 500 on, 42 %
    with n = 50, because two out of five such samples hold none of them and no method sees what is
    not there. A concrete result that rests on fewer than ten examples, ``effective_count``, gives a
    warning. Values that are shown only if determined are biased low by a factor of 2 to 5 next to
    the undetermined: show the intervals.

    For an interval of one layer, take the moments in that layer's parameters alone.

    Args:
      moments: of n ≥ 1 examples for "these_examples", otherwise n ≥ 2, n ≥ 3 for an interval; not
        of strata.
      of: "these_examples", "subset" or "population".
      population: N ≥ n, for "subset" only.
      confidence: of the two-sided interval, in (0, 1).

    Raises:
      ValueError: an unknown ``of``; population missing for "subset", given for another, or below n;
        confidence outside (0, 1); moments of strata; concrete moments of too few examples.
      TypeError: population is not a whole number.

    >>> import jax.numpy as jnp
    >>> x = jnp.array([3.0, 4.0, 5.0, 4.0])  # mean 4, s² = 2/3
    >>> m = gradient_moments(lambda w, x: w * x, jnp.array(0.0), x)
    >>> noise_scale(m, of="these_examples")  # ½/16
    B = 0.0312 of these 4 examples, exact
    >>> round(float(noise_scale(m, of="population").value * (16 - 2 / 12)), 4)
    0.6667

    Source: McCandlish, Kaplan and Amodei 2018 (arXiv 1812.06162); Fieller 1954; Davison and Smith
      1990
    for the tail.
    """
    population = _checked_question(moments, of, population, confidence)
    count = moments.count.astype(moments.trace.dtype)
    norms, alignments = moments.squared_norms, moments.alignments
    effective = jnp.full_like(moments.trace, jnp.nan)
    if of == "these_examples":
        parts = NoiseParts(moments.trace, moments.squared_norm)
        per_leaf = jax.tree.map(NoiseParts, moments.trace_per_leaf, moments.squared_norm_per_leaf)
        value = parts.trace / parts.squared_norm  # infinite at a stationary point
        exact = jnp.zeros_like(value, bool)
        return NoiseScale(value, value, value, exact, parts, per_leaf, moments.count, effective, of)
    parts_of = functools.partial(_unbiased, count, population)
    parts = parts_of(moments.trace, moments.squared_norm)
    per_leaf = jax.tree.map(parts_of, moments.trace_per_leaf, moments.squared_norm_per_leaf)
    low = high = jnp.full_like(parts.trace, jnp.nan)
    undetermined = ~(parts.squared_norm > 0)
    if norms is not None and alignments is not None:
        distances = norms - 2 * alignments + moments.squared_norm
        effective = jnp.square(jnp.sum(distances)) / jnp.sum(jnp.square(distances))
        low, high, undetermined = _interval(moments, parts, distances, population, confidence)
    value = jnp.where(undetermined, jnp.nan, parts.trace / parts.squared_norm)
    scale = NoiseScale(
        *(value, low, high, undetermined, parts, per_leaf, moments.count, effective, of, population)
    )
    _warn_of_few(scale)
    return scale


def two_batch_noise_parts(
    small_squared_norm: Array,
    big_squared_norm: Array,
    small_batch_size: int,
    big_batch_size: int,
    *,
    population: int | None = None,
) -> NoiseParts:
    """Returns tr Σ and ‖∇C‖² from the squared norms of gradients at two batch sizes.

    With b < B the sizes, ‖∇C‖²_est = (B |G_B|² − b |G_b|²)/(B − b) and
    S_est = (|G_b|² − |G_B|²)/(1/b − 1/B): unbiased for draws with replacement. Draws without
    replacement from n examples make them exactly ‖∇C‖² − S/(n − 1) and S n/(n − 1) in expectation,
    S = tr Σ with 1/n; ``population=n`` corrects for it. Both are linear in the squared norms: to
    average over steps, average the norms, or the parts, and divide last.

    Args:
      small_squared_norm: |G_b|², the squared norm of a mini-batch gradient, or its mean over steps.
      big_squared_norm: |G_B|², likewise.
      small_batch_size: b ≥ 1.
      big_batch_size: B > b.
      population: n, where both were drawn without replacement from n examples.

    Returns:
      `NoiseParts`, unbiased; either can be negative.

    Raises:
      ValueError: a size below 1, B ≤ b, or population < B.
      TypeError: a size is not a whole number.

    >>> parts = two_batch_noise_parts(5.0, 2.0, 1, 4)  # ‖∇C‖² = 1, tr Σ = 4
    >>> float(parts.trace), float(parts.squared_norm), float(parts.ratio())
    (4.0, 1.0, 4.0)

    Source: McCandlish, Kaplan and Amodei 2018 (arXiv 1812.06162), appendix A.1.
    """
    small = _validate.positive_int("small_batch_size", small_batch_size)
    big = _validate.positive_int("big_batch_size", big_batch_size)
    if big <= small:
        raise ValueError(f"big_batch_size must exceed small_batch_size, got {big} ≤ {small}")
    squared_norm = (big * big_squared_norm - small * small_squared_norm) / (big - small)
    trace = (small_squared_norm - big_squared_norm) / (1 / small - 1 / big)
    if population is not None:
        n = _validate.positive_int("population", population)
        if n < big:
            raise ValueError(f"population must be at least big_batch_size, got {n} < {big}")
        trace = trace * ((n - 1) / n)
        squared_norm = squared_norm + trace / (n - 1)
    return NoiseParts(jnp.asarray(trace), jnp.asarray(squared_norm))


def noise_scale_of_steps(
    parts: NoiseParts, *, num_blocks: int = 20, confidence: float = 0.95
) -> NoiseScale:
    """Returns B = mean tr Σ/mean ‖∇C‖² over steps, with an interval from blocks of steps.

    The T steps are split into K consecutive blocks of T // K steps, the first T mod K left out of
    the interval. The K pairs of block means are treated as independent draws: Fieller's interval
    with their covariance and Student's t with K − 1 degrees of freedom. Blocks that are long
    against the correlation of steps make it hold; a drift of B along training counts as spread.

    Args:
      parts: of every step in order, shapes (T,): `two_batch_noise_parts` of arrays, or those of
        `noise_of_examples` or `noise_of_parts`, stacked.
      num_blocks: K, from 3 to T.
      confidence: of the two-sided interval, in (0, 1).

    Returns:
      `NoiseScale` with ``of="steps"``; ``count`` is T. ``value`` is NaN and ``high`` infinite if
      the mean of ‖∇C‖² cannot be told from zero.

    Raises:
      ValueError: parts that are not vectors of one length; num_blocks out of range; confidence
        outside (0, 1).
      TypeError: num_blocks is not a whole number.

    >>> import jax.numpy as jnp
    >>> parts = NoiseParts(jnp.array([3.0, 5.0, 4.0, 4.0]), jnp.array([2.0, 2.5, 1.5, 2.0]))
    >>> noise_scale_of_steps(parts, num_blocks=4)
    B = 2 (1.42 to 2.81) examples over 4 steps
    """
    trace, squared_norm = (jnp.asarray(part) for part in (parts.trace, parts.squared_norm))
    if trace.ndim != 1 or trace.shape != squared_norm.shape:
        raise ValueError(
            f"parts have shapes {trace.shape} and {squared_norm.shape}: expected (T,) for both, "
            "one entry for each step"
        )
    _validate.finite_float("confidence", confidence, low=0, low_allowed=False, high=1)
    steps, blocks = trace.shape[0], _validate.positive_int("num_blocks", num_blocks)
    if not 3 <= blocks <= steps:
        raise ValueError(f"num_blocks={blocks}: expected 3 to {steps}, the number of steps")
    pairs = jnp.stack([trace, squared_norm])
    of_blocks = pairs[:, steps % blocks :].reshape(2, blocks, -1).mean(axis=2)  # (2, blocks)
    deviations = of_blocks - jnp.mean(of_blocks, axis=1, keepdims=True)
    covariance = deviations @ deviations.T / (blocks * (blocks - 1))
    spread = _intervals.Spread(covariance[0, 0], covariance[0, 1], covariance[1, 1])
    mean = NoiseParts(jnp.mean(trace), jnp.mean(squared_norm))
    return scale_of_means(mean, spread, jnp.asarray(steps), jnp.asarray(blocks), confidence)


def scale_of_means(
    mean: NoiseParts,
    spread: _intervals.Spread,
    steps: Array,
    blocks: Array,
    confidence: float,
) -> NoiseScale:
    """Returns the `NoiseScale` of means over steps whose covariance comes from so many blocks."""
    quantile = _intervals.student_quantile(confidence, blocks - 1)
    low, high, determined = _intervals.fieller(*mean, spread, quantile)
    value = jnp.where(determined, mean.trace / mean.squared_norm, jnp.nan)
    nothing = jnp.full_like(value, jnp.nan)
    return NoiseScale(value, low, high, ~determined, mean, None, steps, nothing, "steps")


class CurvatureNoiseScale(NamedTuple):
    """B_noise = tr(HΣ)/(∇CᵀH∇C), in examples, and its two parts."""

    value: Array
    """B_noise; NaN where ∇CᵀH∇C is not above 0."""
    standard_error: Array
    """Of ``value``, from the spread over probes; 0 where exact."""
    noise: Array
    """tr(HΣ)."""
    curvature: Array
    """∇CᵀH∇C: the curvature along the mean gradient, times ‖∇C‖²."""
    noise_standard_error: Array
    """Of ``noise``, from the spread over probes; 0 where exact."""


def curvature_noise_scale(
    fun: CostFn,
    params: Params,
    examples: Examples,
    *,
    key: Array | None = None,
    num_probes: int | None = None,
    chunk_size: int = 1000,
    mesh: Mesh | None = None,
) -> CurvatureNoiseScale:
    """Returns the noise scale B_noise = tr(HΣ)/(∇CᵀH∇C), H the Hessian of the mean cost.

    Of the n examples given: ∇C, Σ (with 1/n) and H are theirs, and nothing else is estimated. Since
    tr(HΣ) = E vᵀHv for v = 1/√n Σ_i z_i (g_i − ∇C) with random signs z, each probe v is one product
    with G and vᵀHv one second derivative along a line; H is never formed. With ``num_probes`` it is
    the mean over so many probes, unbiased; without, v = (g_i − ∇C)/√n for every i and their sum:
    exact, at n passes over the data. On a quadratic cost the best learning rate at batch size B is
    ε_max/(1 + B_noise/B).

    Args:
      fun: the cost of ONE example, twice differentiable in forward mode.
      params: a pytree of floating-point arrays.
      examples: a pytree whose leaves have leading axis n ≥ 1.
      key: a JAX random key, for the probes.
      num_probes: K ≥ 2; None is exact.
      chunk_size: examples at a time.
      mesh: devices that share the examples, as for `gradient_moments`.

    Raises:
      ValueError: key without num_probes or the other way round, num_probes < 2, no examples.
      TypeError: a size that is not a whole number; params or cost not floating point.
      FloatingPointError: gradients are not finite, as in `gradient_moments`.

    >>> import jax.numpy as jnp
    >>> fun = lambda w, x: (w - x) ** 2  # g_i = 2 (w − x_i), H = 2
    >>> scale = curvature_noise_scale(fun, jnp.array(3.0), jnp.array([0.0, 2.0]))
    >>> round(float(scale.noise), 4), float(scale.curvature), round(float(scale.value), 4)
    (8.0, 32.0, 0.25)

    Source: McCandlish, Kaplan and Amodei 2018 (arXiv 1812.06162), equation (2.8).
    """
    _validate.positive_int("chunk_size", chunk_size)
    if (key is None) != (num_probes is None):
        raise ValueError("give key and num_probes together, or neither for the exact value")
    if num_probes is not None and _validate.positive_int("num_probes", num_probes) < 2:
        raise ValueError("num_probes must be at least 2: the standard error comes from a spread")
    mesh = None if mesh is None else sharding.check_mesh(mesh)
    if mesh is not None:
        params, examples = (sharding.on_mesh(tree, mesh) for tree in (params, examples))
    mean = gradient_moments(fun, params, examples, chunk_size=chunk_size, mesh=mesh).mean
    probes, curvature = _probe(
        fun, params, examples, mean, key, num_probes=num_probes, chunk_size=chunk_size, mesh=mesh
    )
    if num_probes is None:
        noise, error = jnp.sum(probes), jnp.zeros_like(curvature)
    else:
        noise, error = jnp.mean(probes), jnp.std(probes, ddof=1) / math.sqrt(num_probes)
    curved = jnp.where(curvature > 0, curvature, jnp.nan)
    return CurvatureNoiseScale(noise / curved, error / curved, noise, curvature, error)


def _unbiased(
    count: Array, population: int | None, trace: Array, squared_norm: Array
) -> NoiseParts:
    """Unbiased tr Σ and ‖∇C‖² of the population, from those of n examples with 1/n."""
    sample_variance = trace * (count / (count - 1))
    if population is None:
        return NoiseParts(sample_variance, squared_norm - sample_variance / count)
    absent = 1 - count / population
    return NoiseParts(
        sample_variance * ((population - 1) / population),
        squared_norm - absent * sample_variance / count,
    )


def _checked_question(
    moments: GradientMoments, of: Of, population: int | None, confidence: float
) -> int | None:
    """Raises what `noise_scale` says; returns N."""
    if of not in get_args(Of):
        raise ValueError(
            f"of={of!r}: expected 'these_examples' (exact), 'subset' (with population=N) or "
            "'population' (examples that params were not fitted to)"
        )
    _validate.finite_float("confidence", confidence, low=0, low_allowed=False, high=1)
    if moments.count.ndim:
        raise ValueError("noise_scale takes moments of one set; of strata take moments.pooled()")
    if (population is None) == (of == "subset"):
        raise ValueError(
            f"population={population} with of={of!r}: expected the number N of all examples with "
            "of='subset', and only there"
        )
    if population is not None:
        population = _validate.positive_int("population", population)
    if isinstance(moments.count, jax.core.Tracer):
        return population
    n = int(moments.count)
    has_interval = moments.squared_norms is not None and moments.alignments is not None
    least = 1 if of == "these_examples" else 3 if has_interval else 2
    if n < least:
        raise ValueError(f"noise_scale of={of!r} needs at least {least} examples, got n = {n}")
    if population is not None and population < n:
        raise ValueError(f"population must be at least n, got {population} < n = {n}")
    return population


def _interval(
    moments: GradientMoments,
    parts: NoiseParts,
    distances: Array,
    population: int | None,
    confidence: float,
) -> tuple[Array, Array, Array]:
    """The ends of the interval, and whether ‖∇C‖² cannot be told from zero."""
    n, squared_norm = distances.shape[0], moments.squared_norm
    assert moments.alignments is not None
    along = moments.alignments - squared_norm  # ⟨g_i − g̅, g̅⟩
    z = _intervals.normal_quantile(confidence)
    absent = 1.0 if population is None else 1 - n / population
    spread = _jackknife(distances, along, absent)
    trace_above = _intervals.upper_end_of_mean(distances, confidence)
    if absent < 1:
        trace_above = trace_above * math.sqrt(absent) if absent else jnp.zeros_like(trace_above)
    sigma = jnp.sqrt(absent * jnp.mean(jnp.square(along)) / (n * squared_norm))
    root = jnp.sqrt(jnp.maximum(parts.squared_norm, 0))
    norm_above = jnp.square(root + z * jnp.where(squared_norm > 0, sigma, 0)) - parts.squared_norm
    low, high, determined = _intervals.asymmetric_ratio(
        parts.trace, parts.squared_norm, spread, z, trace_above, norm_above
    )
    return low, high, ~determined


def _jackknife(e: Array, c: Array, absent: float) -> _intervals.Spread:
    """Variance of s², covariance, and variance of ‖g̅‖² − s²/n, by leaving each example out.

    With e_i = ‖g_i − g̅‖² and c_i = ⟨g_i − g̅, g̅⟩, leaving i out moves s² by n(ē −
    e_i)/((n−1)(n−2)) and ‖g̅‖² by −2c_i/(n−1) + e_i/(n−1)²: differences, so that nothing cancels.
    All are multiplied by ``absent``, 1 − n/N.
    """
    n = e.shape[0]
    mean_e = jnp.mean(e)
    shift_of_s2 = (mean_e - e) * (n / ((n - 1) * (n - 2)))
    s2 = mean_e * (n / (n - 1))
    shift_of_norm = -2 * c / (n - 1) + e / float(n - 1) ** 2  # 50,000² is beyond int32
    shift_of_norm -= (s2 + shift_of_s2) / (n - 1) - s2 / n
    scale = (n - 1) / n * absent

    def covariance(x: Array, y: Array) -> Array:
        return scale * jnp.vdot(x - jnp.mean(x), y - jnp.mean(y))

    return _intervals.Spread(
        covariance(shift_of_s2, shift_of_s2),
        covariance(shift_of_s2, shift_of_norm),
        covariance(shift_of_norm, shift_of_norm),
    )


def _warn_of_few(scale: NoiseScale) -> None:
    """Warns if a handful of many examples carry tr Σ; not while being traced."""
    effective = scale.effective_count
    if isinstance(effective, jax.core.Tracer) or not float(effective) < _FEW:
        return
    if float(effective) < int(scale.count) / 4:
        warnings.warn(
            f"tr Σ rests on {float(effective):.1f} of {int(scale.count)} examples, counted as "
            "(Σ s)²/Σ s² with s = ‖g_i − ∇C‖²: the noise scale of what they were drawn from may be "
            "far larger. Look at the largest moments.squared_norms, or measure more examples",
            RuntimeWarning,
            stacklevel=3,
        )


def _sentence(scale: NoiseScale) -> str:
    """One line for a reader: B, its interval, and of what it is."""
    n = int(scale.count)
    value, low, high = (_short(float(x)) for x in (scale.value, scale.low, scale.high))
    if scale.of == "these_examples":
        return f"B = {value} of these {n:,} examples, exact"
    has_interval = not math.isnan(float(scale.low))
    if bool(scale.undetermined):
        found = f"B undetermined, at least {low} examples" if has_interval else "B undetermined"
    else:
        found = f"B = {value}{f' ({low} to {high})' if has_interval else ''} examples"
    about = {
        "subset": f"of a set of {scale.population}, from {n:,} of them",
        "population": f"of the population, if params were not fitted to these {n:,}",
        "steps": f"over {n:,} steps",
    }[scale.of]
    why = "" if has_interval else "; an interval needs keep_norms=True and keep_alignments=True"
    return f"{found} {about}{why}"


def _short(value: float) -> str:
    """Three significant digits, and no fewer than all before the point."""
    if not math.isfinite(value):
        return "∞" if value > 0 else str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


@functools.partial(jax.jit, static_argnums=0, static_argnames=("num_probes", "chunk_size", "mesh"))
def _probe(
    fun: CostFn,
    params: Params,
    examples: Examples,
    mean: Params,
    key: Array | None,
    *,
    num_probes: int | None,
    chunk_size: int,
    mesh: Mesh | None,
) -> tuple[Array, Array]:
    """vᵀHv of every probe, (K,), and of the mean gradient."""
    n = _validate.num_examples(examples)

    def signs(k: Array) -> Array:
        if key is None:
            return jax.nn.one_hot(k, n)
        return jax.random.rademacher(jax.random.fold_in(key, k), (n,), float)

    def walk(
        shared: tuple[Params, Params], examples: Examples, num_valid: Array | None = None
    ) -> tuple[Array, Array]:
        params, mean = shared
        size = _validate.num_examples(examples)
        grads = per_example_grad(fun, chunk_size=min(chunk_size, size))(params, examples)
        bend = functools.partial(
            _second_derivative, fun, params, examples, num_valid, chunk_size=chunk_size
        )

        def total(value: PyTree) -> PyTree:
            return value if num_valid is None else jax.lax.psum(value, sharding.DATA_AXIS)

        def one(k: Array) -> Array:
            z = signs(k)
            z = (z - jnp.mean(z)) / math.sqrt(n)
            if num_valid is not None:
                start = jax.lax.axis_index(sharding.DATA_AXIS) * size
                places = start + jnp.arange(size)
                z = jnp.where(places < n, z[jnp.minimum(places, n - 1)], 0)
            return total(bend(total(grads.sum(z)))) / n

        count = num_probes or n
        probes = jax.lax.map(one, jnp.arange(count), batch_size=min(count, 8))
        return probes, total(bend(mean)) / n

    if mesh is None:
        return walk((params, mean), examples)
    return sharding.on_each_shard(walk, mesh, (params, mean), examples)


def _second_derivative(
    fun: CostFn,
    params: Params,
    examples: Examples,
    num_valid: Array | None,
    direction: Params,
    *,
    chunk_size: int,
) -> Array:
    """vᵀHv = d²/dt² of the summed cost of the valid examples at params + t v, at t = 0."""
    steps, _, chunk_of = chunks(examples, chunk_size, num_valid)

    def add(total: Array, step: Array) -> tuple[Array, None]:
        chunk, fresh = chunk_of(examples, step)

        def cost(params: Params) -> Array:
            costs = jax.vmap(fun, in_axes=(None, 0))(params, chunk)
            return jnp.vdot(fresh.astype(costs.dtype), costs)

        def slope(params: Params) -> Array:
            return jax.jvp(cost, (params,), (direction,))[1]

        return total + jax.jvp(slope, (params,), (direction,))[1], None

    example = jax.tree.map(lambda leaf: leaf[0], examples)
    zero = jnp.zeros([], jax.eval_shape(fun, params, example).dtype)
    zero = vary_like((params, examples), zero)
    return jax.lax.scan(add, zero, jnp.arange(steps))[0]
