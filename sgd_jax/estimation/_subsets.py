"""The exact error of any weighted subset of examples, from the Gram matrix alone."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sgd_jax.sampling import Sample
from sgd_jax.typing import Array


class SubsetErrors(NamedTuple):
    """How far estimates ĝ are from the mean gradient ∇C, exactly; both of shape (...)."""

    squared_error: Array
    """‖ĝ − ∇C‖²."""
    cosine: Array
    """⟨ĝ, ∇C⟩/(‖ĝ‖ ‖∇C‖); NaN where ĝ or ∇C is zero."""


class MeanCosine(NamedTuple):
    """E cos(ĝ, ∇C) over samples."""

    mean: Array
    """Over the samples whose cosine is defined; scalar."""
    standard_error: Array
    """Of ``mean``, from the spread of the samples; NaN of fewer than two."""


def mean_cosine(gram: Array, samples: Sample) -> MeanCosine:
    """Returns the mean cosine between an estimate ĝ and ∇C over samples, unbiased, with its error.

    The expected cosine of one mini-batch, which the moments do not determine; `expected_cosine` is
    another number, the cosine of expectations. Each cosine is exact, from the Gram matrix; the mean
    over k samples has standard error s/√k. Costs k n² multiplications, as `subset_errors`.

    Args:
      gram: K = G Gᵀ, (n, n), as for `subset_errors`.
      samples: k ≥ 1 samples: a `Sample` with arrays (k, m), ``jax.vmap`` of a sampler over keys.

    Raises:
      ValueError: as `subset_errors`.

    >>> import jax.numpy as jnp
    >>> gram = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> samples = Sample(jnp.array([[0], [1]]), jnp.array([[1.0], [1.0]]))
    >>> round(float(mean_cosine(gram, samples).mean), 4)  # both 1/√2
    0.7071
    """
    cosines = subset_errors(gram, samples).cosine.reshape(-1)
    defined = jnp.isfinite(cosines)
    count = jnp.sum(defined).astype(cosines.dtype)
    mean = jnp.sum(jnp.where(defined, cosines, 0)) / count
    squares = jnp.sum(jnp.where(defined, jnp.square(cosines - mean), 0))
    error = jnp.sqrt(squares / jnp.where(count > 1, count - 1, jnp.nan) / count)
    return MeanCosine(mean, error)


def subset_errors(gram: Array, samples: Sample) -> SubsetErrors:
    """Returns the error and the cosine of many weighted subsets, without touching the network.

    With K = G Gᵀ the Gram matrix of all n gradients and c the weights of a sample, spread over the
    n examples, ‖ĝ − ∇C‖² = (c − 1/n)ᵀ K (c − 1/n), exactly, whatever the scheme; repeated indices
    add up. One Gram matrix gives the whole distribution of error and cosine over thousands of
    samples: the mean error, which `expected_squared_error` predicts, and all the quantiles.

    K is centred first, so that what two gradients have in common does not cancel; rounding leaves
    an absolute error of about ε tr Σ. Costs k n² multiplications for k samples, and k n numbers.

    Args:
      gram: K, shape (n, n): ``per_example_grad(fun)(params, examples).gram()``.
      samples: a `Sample` whose arrays have shape (..., m): ``jax.vmap`` of a sampler over keys.
        Indices must lie in [−1, n); −1 is no example.

    Returns:
      `SubsetErrors`, both arrays of shape (...).

    Raises:
      ValueError: gram is not a square matrix with n ≥ 1, or indices and weights differ in shape.

    >>> import jax.numpy as jnp
    >>> gram = jnp.array([[1.0, 0.0], [0.0, 1.0]])  # two orthogonal gradients of norm 1
    >>> errors = subset_errors(gram, Sample(jnp.array([[0], [1]]), jnp.array([[1.0], [1.0]])))
    >>> errors.squared_error.tolist(), round(float(errors.cosine[0]), 4)  # ½ and 1/√2
    ([0.5, 0.5], 0.7071)
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or gram.shape[0] == 0:
        raise ValueError(f"gram must be (n, n) with n ≥ 1, got shape {gram.shape}")
    if samples.indices.shape != samples.weights.shape or samples.indices.ndim == 0:
        raise ValueError(
            "samples must have indices and weights of one shape (..., m), got "
            f"{samples.indices.shape} and {samples.weights.shape}"
        )
    n, leading = gram.shape[0], samples.indices.shape[:-1]
    indices = samples.indices.reshape(-1, samples.indices.shape[-1])
    weights = samples.weights.reshape(indices.shape).astype(gram.dtype)

    def spread(indices: Array, weights: Array) -> Array:
        present = jnp.where(indices >= 0, weights, 0)
        return jnp.zeros(n, gram.dtype).at[jnp.maximum(indices, 0)].add(present)

    c = jax.vmap(spread)(indices, weights)
    toward_mean = jnp.mean(gram, axis=1)  # ⟨g_i, ∇C⟩
    squared_norm = jnp.mean(toward_mean)  # ‖∇C‖²
    deviation = toward_mean - squared_norm  # ⟨g_i − ∇C, ∇C⟩
    centred = gram - toward_mean[:, None] - deviation[None, :]  # ⟨g_i − ∇C, g_k − ∇C⟩
    products = jnp.matmul(c, centred, precision="highest")
    excess = jnp.sum(c, axis=1) - 1
    along = jnp.matmul(c, deviation, precision="highest")
    squared_error = jnp.sum(products * c, axis=1) + excess * (2 * along + excess * squared_norm)
    inner = along + (1 + excess) * squared_norm  # ⟨ĝ, ∇C⟩
    norm = jnp.sqrt(squared_error + 2 * inner - squared_norm)  # ‖ĝ‖
    cosine = inner / (norm * jnp.sqrt(squared_norm))
    return SubsetErrors(squared_error.reshape(leading), cosine.reshape(leading))
