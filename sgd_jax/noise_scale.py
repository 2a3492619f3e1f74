"""The gradient noise scale: how large a mini-batch must be before noise stops dominating."""

import functools
import math
from typing import NamedTuple

import jax
import jax.core
import jax.numpy as jnp
from jax.scipy.special import ndtri
from jax.sharding import Mesh

from sgd_jax import _validate, sharding
from sgd_jax._chunks import chunks, vary_like
from sgd_jax._typing import Array, CostFn, Examples, Params, PyTree
from sgd_jax.moment_streams import gradient_moments
from sgd_jax.moments import GradientMoments
from sgd_jax.per_example import per_example_grad


class NoiseParts(NamedTuple):
    """Unbiased estimates of tr Σ and ‖G‖². Average many of each apart, then take ``ratio``."""

    trace: Array
    """Of tr Σ, the variance of one example's gradient."""
    squared_norm: Array
    """Of ‖G‖²; being unbiased, it can be negative where ‖G‖² is small."""

    def ratio(self) -> Array:
        """B = tr Σ/‖G‖², or NaN where the estimate of ‖G‖² is not above 0: undetermined."""
        return jnp.where(self.squared_norm > 0, self.trace / self.squared_norm, jnp.nan)


class NoiseScale(NamedTuple):
    """B_simple = tr Σ/‖G‖², in examples, with an interval; NaN and True where undetermined."""

    value: Array
    """The ratio of the unbiased parts; NaN where undetermined."""
    low: Array
    """Lower end of the interval; it stands also where ``value`` is undetermined.

    Infinite where even the upper end of ‖G‖² is below 0.
    """
    high: Array
    """Upper end of the interval; infinite where undetermined."""
    undetermined: Array
    """Whether ‖G‖² cannot be told from zero at this confidence."""
    parts: NoiseParts
    """The unbiased estimates of tr Σ and ‖G‖²."""
    per_leaf: PyTree
    """`NoiseParts` of each leaf: tr Σ and ‖G‖² of its coordinates; its B is ``ratio()``."""


def noise_scale(
    moments: GradientMoments, *, confidence: float = 0.95, population: int | None = None
) -> NoiseScale:
    """Returns the simple noise scale B_simple = tr Σ/‖G‖², with a confidence interval.

    The n examples of ``moments`` are taken for a random sample, and Σ and G are those of what it
    was drawn from. With Ĝ the mean of the sample and s² = 1/(n − 1) Σ‖g_i − Ĝ‖² the unbiased parts
    are tr Σ ≈ s² and ‖G‖² ≈ ‖Ĝ‖² − s²/n. Drawn without replacement from ``population`` = N, they
    are (N − 1)/N s² and ‖Ĝ‖² − (1 − n/N) s²/n; with N = n nothing is estimated, the interval is a
    point and B = tr Σ/‖G‖² of these very examples.

    The interval is Fieller's for a ratio, from the jackknife covariance of the two parts over
    examples. It needs moments with ``squared_norms`` and ``alignments``; without them ``low`` and
    ``high`` are NaN. ``undetermined`` is True where ‖G‖² is not significantly above 0: z standard
    errors, or, without an interval, an estimate ≤ 0. The set of values that the data
    allow is then unbounded: ``value`` is NaN, ``high`` infinite, and ``low`` still a bound. Nothing
    is clamped. In that regime the jackknife overstates the variance: the interval is cautious.

    For an interval of one layer, take the moments in that layer's parameters alone.

    Args:
      moments: of n ≥ 2 examples, n ≥ 3 for an interval; not of strata.
      confidence: of the two-sided interval, in (0, 1).
      population: N ≥ n; None is a population without bound.

    Raises:
      ValueError: confidence outside (0, 1), moments of strata, or, where concrete, too few examples
        or population < n.
      TypeError: population is not a whole number.

    >>> import jax.numpy as jnp
    >>> x = jnp.array([3.0, 4.0, 5.0, 4.0])  # mean 4, s² = 2/3
    >>> m = gradient_moments(lambda w, x: w * x, jnp.array(0.0), x)
    >>> round(float(noise_scale(m).value * (16 - 2 / 12)), 4)
    0.6667

    Source: McCandlish, Kaplan and Amodei 2018 (arXiv 1812.06162); Fieller 1954; Efron and Stein
    1981 for the jackknife's caution.
    """
    _validate.finite_float("confidence", confidence, low=0, low_allowed=False, high=1)
    if moments.count.ndim:
        raise ValueError("noise_scale takes moments of one set; of strata take moments.pooled()")
    norms, alignments = moments.squared_norms, moments.alignments
    has_interval = norms is not None and alignments is not None
    if not isinstance(moments.count, jax.core.Tracer):
        n, least = int(moments.count), 3 if has_interval else 2
        if n < least:
            raise ValueError(f"noise_scale needs at least {least} examples, got n = {n}")
        if population is not None and _validate.positive_int("population", population) < n:
            raise ValueError(f"population must be at least n, got {population} < n = {n}")
    count = moments.count.astype(moments.trace.dtype)
    parts_of = functools.partial(_unbiased, count, population)
    parts = parts_of(moments.trace, moments.squared_norm)
    per_leaf = jax.tree.map(parts_of, moments.trace_per_leaf, moments.squared_norm_per_leaf)
    if norms is not None and alignments is not None:
        covariance = _jackknife(norms, alignments, moments.squared_norm, population)
        low, high, undetermined = _fieller(parts, covariance, confidence)
    else:
        low = high = jnp.full_like(parts.trace, jnp.nan)
        undetermined = ~(parts.squared_norm > 0)
    value = jnp.where(undetermined, jnp.nan, parts.trace / parts.squared_norm)
    return NoiseScale(value, low, high, undetermined, parts, per_leaf)


def two_batch_noise_parts(
    small_squared_norm: Array,
    big_squared_norm: Array,
    small_batch_size: int,
    big_batch_size: int,
    *,
    population: int | None = None,
) -> NoiseParts:
    """Returns tr Σ and ‖G‖² from the squared norms of gradients at two batch sizes.

    With b < B the sizes, ‖G‖²_est = (B |G_B|² − b |G_b|²)/(B − b) and
    S_est = (|G_b|² − |G_B|²)/(1/b − 1/B): unbiased for draws with replacement. Draws without
    replacement from n examples make them exactly ‖G‖² − S/(n − 1) and S n/(n − 1) in expectation,
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

    >>> parts = two_batch_noise_parts(5.0, 2.0, 1, 4)  # ‖G‖² = 1, tr Σ = 4
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


class CurvatureNoiseScale(NamedTuple):
    """B_noise = tr(HΣ)/(GᵀHG), in examples, and its two parts."""

    value: Array
    """B_noise; NaN where GᵀHG is not above 0."""
    standard_error: Array
    """Of ``value``, from the spread over probes; 0 where exact."""
    noise: Array
    """tr(HΣ)."""
    curvature: Array
    """GᵀHG: the curvature along the mean gradient, times ‖G‖²."""


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
    """Returns the noise scale B_noise = tr(HΣ)/(GᵀHG), H the Hessian of the mean cost.

    Of the n examples given: G, Σ (with 1/n) and H are theirs, and nothing else is estimated. Since
    tr(HΣ) = E vᵀHv for v = 1/√n Σ_i z_i (g_i − G) with random signs z, each probe v is one product
    with G and vᵀHv one second derivative along a line; H is never formed. With ``num_probes`` it is
    the mean over so many probes, unbiased; without, v = (g_i − G)/√n for every i and their sum:
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
    return CurvatureNoiseScale(noise / curved, error / curved, noise, curvature)


def _unbiased(
    count: Array, population: int | None, trace: Array, squared_norm: Array
) -> NoiseParts:
    """Unbiased tr Σ and ‖G‖² of the population, from those of n examples with 1/n."""
    sample_variance = trace * (count / (count - 1))
    if population is None:
        return NoiseParts(sample_variance, squared_norm - sample_variance / count)
    absent = 1 - count / population
    return NoiseParts(
        sample_variance * ((population - 1) / population),
        squared_norm - absent * sample_variance / count,
    )


def _jackknife(
    norms: Array, alignments: Array, squared_norm: Array, population: int | None
) -> tuple[Array, Array, Array]:
    """Variance of s², covariance, and variance of ‖Ĝ‖² − s²/n, by leaving each example out.

    With e_i = ‖g_i − Ĝ‖² and c_i = ⟨g_i − Ĝ, Ĝ⟩, leaving i out moves s² by n(ē − e_i)/((n−1)(n−2))
    and ‖Ĝ‖² by −2c_i/(n−1) + e_i/(n−1)²: differences, so that nothing cancels.
    """
    n = norms.shape[0]
    e, c = norms - 2 * alignments + squared_norm, alignments - squared_norm
    mean_e = jnp.mean(e)
    shift_of_s2 = (mean_e - e) * (n / ((n - 1) * (n - 2)))
    s2 = mean_e * (n / (n - 1))
    shift_of_norm = -2 * c / (n - 1) + e / float(n - 1) ** 2  # 50,000² is beyond int32
    shift_of_norm -= (s2 + shift_of_s2) / (n - 1) - s2 / n
    scale = (n - 1) / n * (1 if population is None else 1 - n / population)

    def covariance(x: Array, y: Array) -> Array:
        return scale * jnp.vdot(x - jnp.mean(x), y - jnp.mean(y))

    return (
        covariance(shift_of_s2, shift_of_s2),
        covariance(shift_of_s2, shift_of_norm),
        covariance(shift_of_norm, shift_of_norm),
    )


def _fieller(
    parts: NoiseParts, covariance: tuple[Array, Array, Array], confidence: float
) -> tuple[Array, Array, Array]:
    """The B with (S − B U)² ≤ z² Var(S − B U): its ends, and whether it is unbounded."""
    S, U = parts
    z2 = jnp.square(ndtri((1 + confidence) / 2))
    var_S, cov, var_U = (z2 * v for v in covariance)
    a, b, c = U**2 - var_U, S * U - cov, S**2 - var_S
    root = jnp.sqrt(jnp.maximum(b**2 - a * c, 0))  # below 0 only by rounding, or where c < 0
    determined = (a > 0) & (U > 0)
    bounded = jnp.where(b + root > 0, c / (b + root), jnp.inf)  # U is below 0 for certain
    low = jnp.where(c > 0, bounded, 0)
    high = jnp.where(determined, (b + root) / jnp.where(determined, a, 1), jnp.inf)
    return low, high, ~determined


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
