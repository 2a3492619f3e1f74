"""The cost of one example, and its average: C = 1/n Σ_x C_x."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sgd_jax import _validate
from sgd_jax.typing import Array, CostFn, Examples, Params

__all__ = [
    "cross_entropy_cost",
    "logit_cross_entropy_cost",
    "mean_cost",
    "quadratic_cost",
]


def quadratic_cost(output: Array, target: Array) -> Array:
    """Returns the quadratic cost of one example.

    C_x = ½ ‖y − a‖², with a the output and y the target: a sum, not a mean, over the coordinates of
    the output, and with the ½, so that ∂C_x/∂a = a − y.

    Args:
      output: a, an array of any one shape.
      target: y, an array of the same shape.

    Returns:
      A scalar in the dtype of the two arguments.

    Raises:
      ValueError: the two shapes differ (they are never broadcast against each other).

    >>> import jax.numpy as jnp
    >>> float(quadratic_cost(jnp.array([0.0, 2.0]), jnp.array([1.0, 0.0])))
    2.5

    Source: Nielsen, "Neural Networks and Deep Learning", equation (6).
    """
    _same_shape(output, target)
    return jnp.sum(jnp.square(target - output)) / 2


def cross_entropy_cost(output: Array, target: Array) -> Array:
    """Returns the cross-entropy cost of one example, from outputs in [0, 1].

    C_x = −Σ_j [y_j ln a_j + (1 − y_j) ln(1 − a_j)], a sum over the coordinates, in nats.

    Cost and gradient are finite for every output in [0, 1]: 0 ln 0 = 0, an output of exactly
    1 that should be 0 costs −ln of the spacing of the dtype below 1 (16.6 nats in float32, 36.7 in
    float64), and one of exactly 0 that should be 1 costs −ln of the smallest normal number (87.3
    and 708.4). Those two constants have gradient zero: a network that saturates completely stops
    learning. Where weighted inputs are at hand, `logit_cross_entropy_cost` is exact everywhere.

    Args:
      output: a, floating point, any one shape, every entry in [0, 1].
      target: y, the same shape, every entry in [0, 1].

    Returns:
      A scalar in the dtype of the two arguments.

    Raises:
      ValueError: the two shapes differ.

    >>> import jax.numpy as jnp
    >>> round(float(cross_entropy_cost(jnp.array([0.5, 1.0]), jnp.array([1.0, 1.0]))), 6)  # ln 2
    0.693147

    Source: Nielsen, equation (63).
    """
    _same_shape(output, target)
    limits = jnp.finfo(jnp.result_type(output))
    log_a = jnp.log(jnp.maximum(output, limits.tiny))
    log_not_a = jnp.log(jnp.maximum(1 - output, limits.epsneg))
    return -jnp.sum(target * log_a + (1 - target) * log_not_a)


def logit_cross_entropy_cost(weighted_input: Array, target: Array) -> Array:
    """Returns the cross-entropy cost of one example, from weighted inputs z with a = σ(z).

    C_x = Σ_j [ln(1 + e^{z_j}) − y_j z_j], equal to `cross_entropy_cost(σ(z), y)` in exact
    arithmetic. Finite wherever z is, and ∂C_x/∂z = σ(z) − y to rounding, however saturated.

    Args:
      weighted_input: z, floating point, any one shape.
      target: y, the same shape, every entry in [0, 1].

    Returns:
      A scalar in the dtype of the two arguments.

    Raises:
      ValueError: the two shapes differ.

    >>> import jax.numpy as jnp
    >>> float(logit_cross_entropy_cost(jnp.array([-200.0]), jnp.array([1.0])))
    200.0
    """
    _same_shape(weighted_input, target)
    return jnp.sum(jax.nn.softplus(weighted_input) - target * weighted_input)


def mean_cost(fun: CostFn) -> Callable[[Params, Examples], Array]:
    """Returns the cost of a set of examples: the mean of ``fun`` over them.

    C(params) = 1/n Σ_x fun(params, x).

    Args:
      fun: the cost of ONE example, ``(params, example) -> scalar``.

    Returns:
      A function ``(params, examples) -> scalar``; every leaf of ``examples`` has leading axis
      n ≥ 1. It raises `ValueError` where leading axes differ, n = 0 or a cost is no scalar, and
      `TypeError` where it is not floating point.

    >>> import jax.numpy as jnp
    >>> fun = lambda w, x: quadratic_cost(w * x, jnp.ones_like(x))
    >>> float(mean_cost(fun)(2.0, jnp.array([0.0, 1.0])))  # (½·1 + ½·1) / 2
    0.5
    """

    def cost(params: Params, examples: Examples) -> Array:
        _validate.num_examples(examples)
        costs = jax.vmap(fun, in_axes=(None, 0))(params, examples)
        _validate.scalar_cost(jax.ShapeDtypeStruct(costs.shape[1:], costs.dtype))
        return jnp.mean(costs)

    return cost


def _same_shape(output: Array, target: Array) -> None:
    if jnp.shape(output) != jnp.shape(target):
        raise ValueError(
            f"output has shape {jnp.shape(output)} and target {jnp.shape(target)}; expected one "
            "shape for both. A class label becomes a target by jax.nn.one_hot(label, num_classes)"
        )
