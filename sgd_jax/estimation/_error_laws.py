"""What a mini-batch gradient is worth: its exact error, predicted from the moments of a data set.

Notation: n examples with gradients g_i, ∇C their mean, Σ = 1/n Σ_i (g_i − ∇C)(g_i − ∇C)ᵀ with 1/n,
B = tr Σ/‖∇C‖², m the batch size, ĝ the estimate of ∇C. All functions take `GradientMoments`, do no
clamping, and run under `jax.jit`; a division by ‖∇C‖ = 0 gives NaN or infinity.
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from sgd_jax import _validate
from sgd_jax.estimation._moments import GradientMoments
from sgd_jax.sampling import check_probabilities
from sgd_jax.typing import Array, Params

Scheme = Literal["with_replacement", "without_replacement", "poisson", "stratified", "importance"]


def expected_squared_error(
    moments: GradientMoments,
    batch_size: int | Sequence[int],
    scheme: Scheme = "without_replacement",
    *,
    probabilities: Array | None = None,
    max_size: int | None = None,
) -> Array:
    """Returns E‖ĝ − ∇C‖² of a sampling scheme of `sgd_jax.sampling`, exactly.

    With f = (n − m)/(n − 1)::

        with_replacement      tr Σ/m
        without_replacement   f · tr Σ/m                                      zero at m = n
        poisson               (1 − m/n)/m · 1/n Σ‖g_i‖²
        stratified            Σ_h (n_h/n)² (n_h − m_h)/(n_h − 1) · tr Σ_h/m_h
        importance            (1/m)(1/n² Σ‖g_i‖²/p_i − ‖∇C‖²)
        importance, best p    ((1/n Σ‖g_i‖)² − ‖∇C‖²)/m

    One mini-batch of an epoch, reshuffled or in one order drawn at random, is a draw without
    replacement. Control variates (SVRG): give the moments of the differences g_i − h_i
    (`sgd_jax.svrg.control_variate`); `expected_cosine` then needs ‖∇C‖² too. Mirrored pairs: the
    moments of the pairs, and m/2.

    Args:
      moments: of the n examples sampled from; "stratified" takes moments of strata.
      batch_size: m ≥ 1, for all but with_replacement and importance m ≤ n; for "stratified" the
        draws m_h of each stratum, as `sampling.stratified` takes them.
      scheme: one of the names above.
      probabilities: p of importance sampling, (n,), as `sampling.importance` takes them; needs
        moments with ``squared_norms``. None is the best p, for which the moments suffice.
      max_size: of a Poisson sample, as `sampling.poisson` takes it: adds the error of its
        overflow. None is no overflow, which the sampler's default is to within 10⁻⁸.

    Returns:
      A scalar, in the units of a squared gradient. Where ∇C is subtracted, rounding can leave a
      small negative number where the error is zero.

    Raises:
      ValueError: an unknown scheme; m > n; moments that lack what the scheme needs; an argument
        of another scheme; probabilities of the wrong length, negative, not summing to one, or zero
        for an example whose gradient is not. Traced values are not checked.
      TypeError: a size is not a whole number.

    >>> import jax.numpy as jnp, sgd_jax as sj
    >>> from sgd_jax.estimation import gradient_moments
    >>> x = jnp.array([1.0, 3.0, 5.0])  # tr Σ = 8/3
    >>> m = gradient_moments(lambda w, x: w * x, jnp.array(0.0), x)
    >>> round(float(expected_squared_error(m, 2)), 5)  # ½ · 8/3 / 2
    0.66667

    Source: Cochran, "Sampling Techniques"; Needell, Ward and Srebro 2014 (arXiv 1310.5715).
    """
    if scheme not in get_args(Scheme):
        raise ValueError(f"scheme must be one of {get_args(Scheme)}, got {scheme!r}")
    if probabilities is not None and scheme != "importance":
        raise ValueError(f'probabilities belong to scheme="importance", not {scheme!r}')
    if max_size is not None and scheme != "poisson":
        raise ValueError(f'max_size belongs to scheme="poisson", not {scheme!r}')
    if scheme == "stratified":
        return _stratified_error(moments, batch_size)
    if moments.count.ndim:
        raise ValueError(
            f'scheme={scheme!r} takes moments of one set; of strata, only "stratified", or '
            "moments.pooled()"
        )
    m = _validate.positive_int("batch_size", batch_size)
    if scheme == "with_replacement":
        return moments.trace / m
    if scheme == "importance":
        return _importance_error(moments, m, probabilities)
    _check_at_most_n(m, moments)
    if scheme == "without_replacement":
        return _finite_population(_count(moments), m) * moments.trace / m
    if max_size is not None:
        return _overflowing_poisson_error(moments, m, max_size)
    return (1 - m / _count(moments)) / m * moments.mean_squared_norm


def expected_cosine(
    moments: GradientMoments,
    batch_size: int | Sequence[int],
    scheme: Scheme = "without_replacement",
    *,
    probabilities: Array | None = None,
    max_size: int | None = None,
    squared_norm: Array | float | None = None,
) -> Array:
    """Returns the alignment of ĝ with ∇C, E⟨ĝ, ∇C⟩/√(E‖ĝ‖² · ‖∇C‖²), exactly.

    For any unbiased ĝ it is ‖∇C‖/√(‖∇C‖² + E‖ĝ − ∇C‖²); without replacement 1/√(1 + f B/m) with
    f = (n − m)/(n − 1), with replacement 1/√(1 + B/m). It is a cosine of expectations and **not**
    the expected cosine of a mini-batch, E cos(ĝ, ∇C), which the moments do not determine. That one
    is larger if ‖ĝ‖ varies much (heavy tails: most estimates are shorter than √E‖ĝ‖² and so better
    aligned), and smaller if examples that are long are also aligned. Measured on trained networks
    of 64-30-10 and 784-30-10 neurons at m = 10: 0.058 for 0.092, 0.186 for 0.134 and 0.154 for
    0.088. From the Gram matrix `mean_cosine` has it, with a standard error.

    Args and errors are those of `expected_squared_error`, and:

    Args:
      moments: as there; of differences g_i − h_i (SVRG) together with ``squared_norm``.
      batch_size: as there.
      scheme: as there.
      probabilities: as there.
      max_size: as there.
      squared_norm: ‖∇C‖², for a control variate, whose moments are those of the differences: their
        mean is ∇C − H, and only the error comes from them. None is ‖mean of the moments‖².

    Returns:
      A scalar in [0, 1] but for rounding; NaN where ∇C = 0 and the error is 0.

    >>> import jax.numpy as jnp, sgd_jax as sj
    >>> from sgd_jax.estimation import gradient_moments
    >>> m = gradient_moments(lambda w, x: w * x, jnp.array(0.0), jnp.array([0.0, 2.0]))  # B = 1
    >>> round(float(expected_cosine(m, 3, "with_replacement")), 4)  # 1/√(1 + 1/3)
    0.866
    """
    error = expected_squared_error(
        moments, batch_size, scheme, probabilities=probabilities, max_size=max_size
    )
    if squared_norm is None:
        whole = moments.pooled() if moments.count.ndim else moments
        squared_norm = whole.squared_norm
    squared_norm = jnp.asarray(squared_norm, error.dtype)
    return jnp.sqrt(squared_norm / (squared_norm + error))


def norm_test(moments: GradientMoments, batch_size: int) -> Array:
    """Returns θ² of the norm test: tr Σ/(m ‖∇C‖²), the squared relative error with replacement.

    A batch size passes the test of strength θ₀ where this is at most θ₀². It is B/m, and the sum
    of `inner_product_test` and `orthogonality_test`. Σ has 1/n.

    Source: Byrd, Chin, Nocedal and Wu 2012.
    """
    return moments.trace / (_validate.positive_int("batch_size", batch_size) * moments.squared_norm)


def inner_product_test(moments: GradientMoments, batch_size: int) -> Array:
    """Returns θ² of the inner-product test: Var(⟨g_i, ∇C⟩)/(m ‖∇C‖⁴), the variance with 1/n.

    The part of the error along ∇C: how surely −ĝ is a direction of descent.

    Raises:
      ValueError: the moments carry no ``alignments``.

    Source: Bollapragada, Byrd and Nocedal 2017 (arXiv 1710.11258).
    """
    if moments.alignments is None:
        raise ValueError(
            "the inner-product test needs ⟨g_i, ∇C⟩ of every example: "
            "gradient_moments(..., keep_alignments=True)"
        )
    m = _validate.positive_int("batch_size", batch_size)
    return jnp.var(moments.alignments) / (m * jnp.square(moments.squared_norm))


def orthogonality_test(moments: GradientMoments, batch_size: int) -> Array:
    """Returns ν² of the orthogonality test: E‖part of g_i orthogonal to ∇C‖²/(m ‖∇C‖²).

    What the error across ∇C amounts to, (tr Σ − Var(⟨g_i, ∇C⟩)/‖∇C‖²)/(m ‖∇C‖²). Needs
    ``alignments``, as `inner_product_test` does.

    Source: Bollapragada, Byrd and Nocedal 2017 (arXiv 1710.11258).
    """
    return norm_test(moments, batch_size) - inner_product_test(moments, batch_size)


def norm_test_batch_size(moments: GradientMoments, theta: float | Array) -> Array:
    """Returns the batch size at which the norm test holds with equality: tr Σ/(θ² ‖∇C‖²).

    A real number, not rounded; infinite where ∇C = 0. θ > 0, 0.5 to 1 in the literature.

    Raises:
      ValueError: a concrete theta is not a finite number above 0.
      TypeError: theta is not one number.

    Source: Byrd, Chin, Nocedal and Wu 2012.
    """
    _validate.finite_float("theta", theta, low=0, low_allowed=False, high=math.inf)
    return moments.trace / (jnp.square(theta) * moments.squared_norm)


def cabs_batch_size(moments: GradientMoments, learning_rate: float | Array) -> Array:
    """Returns the batch size of CABS: η tr Σ/C, with C the mean cost and C ≥ 0 its infimum.

    A real number, not rounded; it is meant for costs whose least value is near zero.

    Raises:
      ValueError: a concrete learning_rate is not a finite number above 0.
      TypeError: learning_rate is not one number.

    Source: Balles, Romero and Hennig 2017 (arXiv 1612.05086), equation (10).
    """
    _validate.finite_float("learning_rate", learning_rate, low=0, low_allowed=False, high=math.inf)
    return learning_rate * moments.trace / moments.cost


def gradient_diversity(moments: GradientMoments) -> Array:
    """Returns Σ_i ‖g_i‖²/‖Σ_i g_i‖² = (1 + B)/n: 1/n where all agree, larger the less they do.

    Source: Yin et al. 2018 (arXiv 1706.05699).
    """
    return moments.mean_squared_norm / (_count(moments) * moments.squared_norm)


def gradient_signal_to_noise(moments: GradientMoments) -> Params:
    """Returns GSNR of every coordinate, G_j²/Σ_jj with Σ population (1/n); like params.

    Infinite where Σ_jj = 0, and NaN where G_j = 0 too, as for a weight on a pixel always dark.

    Raises:
      ValueError: the moments carry no ``variance``.

    Source: Liu et al. 2020 (arXiv 2001.07384).
    """
    if moments.variance is None:
        raise ValueError(
            "GSNR needs the variance of every coordinate: "
            "gradient_moments(..., per_coordinate=True)"
        )
    return jax.tree.map(lambda g, v: jnp.square(g) / v, moments.mean, moments.variance)


def adascale_gain(moments: GradientMoments, batch_size: int, scale: float | Array) -> Array:
    """Returns AdaScale's gain (σ² + μ²)/(σ²/S + μ²) of S times the batch, from 1 to S.

    σ² = tr Σ/b is the variance of the mean of b draws with replacement, μ² = ‖∇C‖², so the gain is
    (1 + B/b)/(1 + B/(b S)): one step of batch b·S does the work of so many steps of batch b.

    Args:
      moments: of the data set.
      batch_size: b ≥ 1, the batch that is scaled up.
      scale: S ≥ 1.

    Raises:
      ValueError: batch_size < 1, or a concrete scale below 1 or non-finite.
      TypeError: batch_size is not a whole number, or scale not one number.

    Source: Johnson, Agrawal, Gu and Guestrin 2020 (arXiv 2007.05105).
    """
    b = _validate.positive_int("batch_size", batch_size)
    _validate.finite_float("scale", scale, low=1, low_allowed=True, high=math.inf)
    noise, signal = moments.trace / b, moments.squared_norm
    return (noise + signal) / (noise / scale + signal)


def _count(moments: GradientMoments) -> Array:
    """The count n as floating point: int32/int32 would be float32 even among float64."""
    return moments.count.astype(moments.trace.dtype)


def _finite_population(count: Array, m: int | Array) -> Array:
    """The factor f = (n − m)/(n − 1), which goes with Σ of 1/n; 0 for n = 1."""
    return (count - m) / jnp.maximum(count - 1, 1)


def _check_at_most_n(m: int, moments: GradientMoments) -> None:
    if not isinstance(moments.count, jax.core.Tracer) and m > int(moments.count):
        raise ValueError(
            f"batch_size must be at most n, got {m} > {int(moments.count)}; only draws with "
            "replacement can exceed n"
        )


def _stratified_error(moments: GradientMoments, sizes: int | Sequence[int]) -> Array:
    if moments.count.ndim != 1:
        raise ValueError(
            'scheme="stratified" needs moments of strata: gradient_moments(..., strata=labels)'
        )
    if not isinstance(sizes, Sequence | np.ndarray) or len(sizes) != moments.count.shape[0]:
        raise ValueError(
            'for scheme="stratified", batch_size must be the number of draws of each of the '
            f"{moments.count.shape[0]} strata, got {sizes!r}"
        )
    whole = [_validate.positive_int(f"batch_size[{h}]", size) for h, size in enumerate(sizes)]
    if not isinstance(moments.count, jax.core.Tracer):
        for h, (size, count) in enumerate(zip(whole, np.asarray(moments.count), strict=True)):
            if size > count:
                raise ValueError(f"batch_size[{h}] is {size}, but stratum {h} holds {count}")
    draws = jnp.array(whole)
    counts = _count(moments)
    share = counts / jnp.sum(counts)
    within = _finite_population(counts, draws) * moments.trace / draws
    return jnp.sum(jnp.square(share) * within)


def _importance_error(moments: GradientMoments, m: int, probabilities: Array | None) -> Array:
    if probabilities is None:
        return (jnp.square(moments.mean_norm) - moments.squared_norm) / m
    if moments.squared_norms is None:
        raise ValueError(
            "given probabilities need ‖g_i‖² of every example: gradient_moments(..., "
            "keep_norms=True)"
        )
    norms = moments.squared_norms
    if jnp.shape(probabilities) != norms.shape:
        raise ValueError(
            f"probabilities must have shape {norms.shape}, one for each example, "
            f"got {jnp.shape(probabilities)}"
        )
    if not isinstance(norms, jax.core.Tracer) and not isinstance(probabilities, jax.core.Tracer):
        check_probabilities(np.asarray(probabilities, np.float64))
        lost = np.flatnonzero((np.asarray(probabilities) == 0) & (np.asarray(norms) > 0))
        if lost.size:
            raise ValueError(
                f"probabilities[{lost[0]}] is 0 but the gradient of that example is not "
                f"({lost.size} such examples): the estimate would be biased. Mix in uniform "
                "draws: optimal_probabilities(norms, floor=0.1)"
            )
    p = jnp.asarray(probabilities)
    terms = jnp.where(norms > 0, norms / jnp.where(norms > 0, p, 1), 0)
    return (jnp.mean(terms) / norms.shape[0] - moments.squared_norm) / m


def _overflowing_poisson_error(moments: GradientMoments, m: int, max_size: int) -> Array:
    """E‖ĝ − ∇C‖² where at most s of the K drawn stay, each weighted K/s more.

    Given K, ĝ = (K/m) times the mean of min(K, s) draws without replacement, so the error is
    E[(K/m − 1)²] ‖∇C‖² + E[(K/m)² f(min(K, s))/min(K, s)] tr Σ, K binomial(n, m/n).
    """
    if isinstance(moments.count, jax.core.Tracer):
        raise ValueError("max_size needs a concrete count: the sum over K has n terms")
    n, size = int(moments.count), _validate.positive_int("max_size", max_size)
    if size > n:
        raise ValueError(f"max_size must be at most n, got max_size = {size} > n = {n}")
    if m == n:
        probability = np.array([0.0] * n + [1.0])
    else:
        k = np.arange(n + 1)
        log_factorial = np.array([math.lgamma(j + 1) for j in range(n + 1)])
        log_choose = log_factorial[n] - log_factorial - log_factorial[::-1]
        probability = np.exp(log_choose + k * math.log(m / n) + (n - k) * math.log1p(-m / n))
    k = np.arange(n + 1)
    kept = np.minimum(k, size)
    spread = np.where(k > 0, (k / m) ** 2 * (n - kept) / max(n - 1, 1) / np.maximum(kept, 1), 0)
    return moments.trace * float(probability @ spread) + moments.squared_norm * (1 - m / n) / m
