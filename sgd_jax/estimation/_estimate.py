"""From a sample to an estimate of the gradient: the one place where ĝ = Gᵀ[indices] · weights."""

import jax
import jax.numpy as jnp

from sgd_jax import _validate, sampling
from sgd_jax.estimation._mean_gradient import WeightedMean, mean_value_and_grad
from sgd_jax.sampling import Sample
from sgd_jax.typing import Array, CostFn, Examples, Params


def estimate(
    fun: CostFn, params: Params, examples: Examples, sample: Sample
) -> tuple[Array, Params]:
    """Returns what a sample says of the mean cost and of its gradient: Σ_k c_k C_k, Σ_k c_k g_k.

    c are the weights of the sample, which contain the 1/m or what stands for it, so both are
    unbiased for the mean over all n examples wherever the sampler is. An index of −1 counts for
    nothing. An empty sample, as `sampling.poisson` draws it now and then, gives cost 0 and
    gradient 0.

    Args:
      fun: the cost of ONE example, ``(params, example) -> scalar``.
      params: a pytree of floating-point arrays.
      examples: all n of them; NumPy or JAX arrays.
      sample: indices and weights, each (m,).

    Returns:
      ``(cost, gradient)``, a scalar and a pytree like params. NaN for an index outside of [−1, n)
      that could not be refused because it was traced.

    Raises:
      TypeError: sample is not a `Sample`.
      ValueError: an index outside of [−1, n); shapes that do not fit; what `mean_value_and_grad`
        raises.

    >>> import jax.numpy as jnp, sgd_jax as sj
    >>> sample = sj.Sample(jnp.array([2, 0, -1]), jnp.array([0.5, 0.25, 0.0]))
    >>> cost, gradient = estimate(
    ...     sj.quadratic_cost, jnp.array(0.0), jnp.array([1.0, 3.0, 8.0]), sample
    ... )
    >>> float(cost), float(gradient)  # ½·½·64 + ¼·½·1 and −(½·8 + ¼·1)
    (16.125, -4.25)
    """
    return estimate_by(mean_value_and_grad(fun), params, examples, sample)


def estimate_by(
    mean: WeightedMean, params: Params, examples: Examples, sample: Sample
) -> tuple[Array, Params]:
    """Returns `estimate` by a way of taking weighted means."""
    rows, weights, is_empty = chosen(examples, sample)
    return jax.tree.map(
        lambda value: jnp.where(is_empty, jnp.zeros_like(value), value), mean(params, rows, weights)
    )


def chosen(examples: Examples, sample: Sample) -> tuple[Examples, Array, Array]:
    """Returns the examples of a sample, their weights, (m,), and whether there are none.

    Raises:
      TypeError: sample is not a `Sample`.
      ValueError: indices and weights are not vectors of one length; as `sampling.take`.
    """
    if not isinstance(sample, Sample):
        raise TypeError(
            f"sample must be a Sample(indices, weights), got {type(sample).__name__}; "
            "sampling.plain_mean(indices) weighs indices alike"
        )
    indices, weights = jnp.asarray(sample.indices), jnp.asarray(sample.weights)
    if indices.ndim != 1 or weights.shape != indices.shape:
        raise ValueError(
            "sample must hold as many indices as weights, both (m,), got "
            f"{indices.shape} and {weights.shape}"
        )
    rows = sampling.take(examples, indices)
    weights = checked_weights(indices, weights, _validate.num_examples(examples))
    return rows, weights, jnp.all(indices == -1)


def checked_weights(indices: Array, weights: Array, n: int) -> Array:
    """Returns weights that are 0 for an index of −1 and NaN for one outside of [−1, n)."""
    weights = jnp.where(indices >= 0, weights, 0)
    return jnp.where((indices >= -1) & (indices < n), weights, jnp.nan)
