"""SVRG: mini-batch gradients whose noise shrinks near an anchor with a known full gradient."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sgd_jax.estimation._moment_streams import gradient_moments
from sgd_jax.per_example import per_example_grad
from sgd_jax.typing import Array, CostFn, Example, Examples, Params

__all__ = [
    "Anchor",
    "control_variate",
    "difference",
    "refresh",
]


class Anchor(NamedTuple):
    """A point where the gradient of all examples has been taken."""

    params: Params
    """The point a."""
    gradient: Params
    """H = 1/n Σ_i h_i, h_i = ∇fun(a, x_i); like params."""


def refresh(fun: CostFn, params: Params, examples: Examples, *, chunk_size: int = 1000) -> Anchor:
    """Returns an anchor at params, with the mean gradient of all examples there.

    One pass over the data, in chunks. SVRG takes a new anchor every epoch or few. Arguments and
    errors are those of `gradient_moments`.

    >>> import jax.numpy as jnp
    >>> float(refresh(lambda w, x: w * x, jnp.array(0.0), jnp.array([1.0, 3.0])).gradient)
    2.0

    Source: Johnson and Zhang 2013.
    """
    return Anchor(params, gradient_moments(fun, params, examples, chunk_size=chunk_size).mean)


def control_variate(fun: CostFn) -> Callable[[Params, Anchor, Examples, Array], Params]:
    """Returns the SVRG estimate of the gradient: ĝ = Σ_k c_k (g_k − h_k) + H.

    g_k is the gradient of example k at params and h_k at the anchor. With weights c that are
    unbiased (those of any `sampling.Sample`), ĝ is unbiased for the mean gradient at params, and
    its error is that of the same scheme on the differences g_i − h_i: zero at the anchor.

    Args:
      fun: the cost of ONE example.

    Returns:
      A function ``(params, anchor, examples, weights) -> ĝ``, like params: the m examples of a
      sample and their weights, (m,). Two gradients of m examples. It raises as
      `per_example_grad` and its ``sum`` do.

    >>> import jax.numpy as jnp
    >>> fun = lambda w, x: (w - x) ** 2 / 2  # g_i − h_i = w − a for every example: no noise at all
    >>> x = jnp.array([1.0, 3.0])
    >>> anchor = refresh(fun, jnp.array(0.0), x)
    >>> float(control_variate(fun)(jnp.array(5.0), anchor, x[:1], jnp.array([1.0])))  # 5 − 2
    3.0

    Source: Johnson and Zhang 2013, "Accelerating stochastic gradient descent using predictive
    variance reduction".
    """
    gradient = per_example_grad(fun)

    def estimate(params: Params, anchor: Anchor, examples: Examples, weights: Array) -> Params:
        here = gradient(params, examples).sum(weights)
        there = gradient(anchor.params, examples).sum(weights)
        return jax.tree.map(lambda g, h, H: g - h + H, here, there, anchor.gradient)

    return estimate


def difference(fun: CostFn, params: Params, anchor_params: Params) -> CostFn:
    """Returns the cost whose per-example gradients at zero are the differences g_i − h_i.

    fun'(δ, x) = fun(w + δ, x) − fun(a + δ, x), w = params, a = anchor_params: at δ = 0 its
    gradients are g_i − h_i. So everything that takes a cost takes control variates:
    ``gradient_moments(difference(fun, w, a), zeros_like(w), examples)`` predicts the error of
    `control_variate` by `expected_squared_error`. The full gradient of ``fun`` at w is its mean
    plus H, and E‖ĝ − ∇C‖² does not depend on H.

    >>> import jax.numpy as jnp
    >>> f = difference(lambda w, x: w**2 * x, jnp.array(3.0), jnp.array(1.0))
    >>> float(jax.grad(f)(jnp.array(0.0), 1.0))  # 2·3 − 2·1
    4.0
    """

    def cost(offset: Params, example: Example) -> Array:
        here, there = (jax.tree.map(jnp.add, at, offset) for at in (params, anchor_params))
        return fun(here, example) - fun(there, example)

    return cost
