"""The mean of per-example gradients, by the way of computing it that costs least."""

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sgd_jax import _validate
from sgd_jax._chunks import vary_like
from sgd_jax.distributed import sharding
from sgd_jax.per_example import (
    find_sites,
    per_example_value_and_grad,
    weighted_value_and_grad,
)
from sgd_jax.typing import Array, CostFn, Examples, MeanStrategy, Params, Strategy

WeightedMean: TypeAlias = Callable[[Params, Examples, Array], tuple[Array, Params]]
"""``(params, examples, weights) -> (Σ_j c_j C_j, Σ_j c_j ∇C_j)``."""

_Way: TypeAlias = Literal["factored", "mean_cost"]


class MeanStrategyChoice(NamedTuple):
    """How the mean of per-example gradients is computed, and why; as text, one line."""

    name: _Way
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def mean_value_and_grad(
    fun: CostFn, *, strategy: MeanStrategy = "auto", mesh: Mesh | None = None
) -> WeightedMean:
    """Returns the weighted mean of the costs of examples, and its gradient.

    C = Σ_j c_j C_j and ∇C = Σ_j c_j ∇C_j = Gᵀc. With c_j = 1/m these are the mean cost and the
    mini-batch gradient.

    Args:
      fun: the cost of ONE example.
      strategy: ``"factored"`` and ``"materialized"`` take the mean of the per-example gradients
        explicitly, see `per_example_value_and_grad`, and ``"factored"`` raises where a parameter
        meets the example in a way that has no rule; ``"mean_cost"`` is the gradient of the
        weighted mean cost; ``"auto"`` is what `choose_mean_strategy` finds cheapest. All agree to
        rounding.
      mesh: devices that share the examples: each sums over its own, then one sum over the mesh axis
        ``"data"``. See `sgd_jax.sharding`.

    Returns:
      A function ``(params, examples, weights) -> (cost, gradient)``; weights are c, shape (m,), and
      an example of weight zero contributes exactly zero unless its own gradient is non-finite.

    Raises:
      ValueError: an unknown strategy; when called, what `per_example_value_and_grad` raises.

    >>> import jax.numpy as jnp, sgd_jax as sj
    >>> mean = mean_value_and_grad(sj.quadratic_cost)
    >>> cost, gradient = mean(jnp.array(0.0), jnp.array([1.0, 3.0]), jnp.array([0.5, 0.5]))
    >>> float(cost), float(gradient)  # (½·1 + ½·9) / 2 and −(1 + 3) / 2
    (2.5, -2.0)
    """
    if strategy not in get_args(MeanStrategy):
        raise ValueError(f"strategy must be one of {get_args(MeanStrategy)}, got {strategy!r}")
    if mesh is not None:
        return _over_mesh(mean_value_and_grad(fun, strategy=strategy), mesh)
    if strategy == "mean_cost":
        return _gradient_of_mean_cost(fun)
    if strategy == "factored" or strategy == "materialized":
        return _explicit_mean(fun, strategy)

    def value_and_grad(params: Params, examples: Examples, weights: Array) -> tuple[Array, Params]:
        if choose_mean_strategy(fun, params, examples).name == "mean_cost":
            return _gradient_of_mean_cost(fun)(params, examples, weights)
        costs, gradient = weighted_value_and_grad(fun)(params, examples, weights)
        return jnp.dot(weights.astype(costs.dtype), costs), gradient

    return value_and_grad


def choose_mean_strategy(fun: CostFn, params: Params, examples: Examples) -> MeanStrategyChoice:
    """Returns how `make_step` and `make_epoch` compute the mini-batch gradient, and why.

    The places where parameters meet an example are found by tracing ``fun`` once, as
    `per_example_grad` finds them. If each leaves a product, Gᵀc costs what a plain gradient costs,
    and is taken from the factors. A convolution leaves patches, larger than its input, and a use
    without a rule leaves n gradients: then the gradient of the weighted mean cost is cheaper.

    Args:
      fun: the cost of ONE example.
      params: its parameters; `jax.ShapeDtypeStruct` will do.
      examples: a mini-batch, leading axis m; `jax.ShapeDtypeStruct` will do.

    Raises:
      ValueError: examples is empty or its leading axes differ; the cost is not a scalar.

    >>> import jax.numpy as jnp, sgd_jax as sj
    >>> params = sj.init_network(jax.random.key(0), (784, 30, 10))
    >>> fun = lambda params, x: sj.quadratic_cost(sj.feedforward(params, x), jnp.zeros(10))
    >>> print(choose_mean_strategy(fun, params, jnp.zeros((10, 784))))
    factored: every use of a parameter leaves a product
    """
    _validate.num_examples(examples)
    for site in find_sites(fun, params, examples):
        where = f"a parameter meets the example in {site.primitive} at {site.source}"
        if site.fallback:
            return MeanStrategyChoice("mean_cost", f"{where}, which has no rule")
        if site.rule.expands:
            return MeanStrategyChoice(
                "mean_cost", f"{where}, whose factor is larger than its input"
            )
    return MeanStrategyChoice("factored", "every use of a parameter leaves a product")


def _over_mesh(mean: WeightedMean, mesh: Mesh) -> WeightedMean:
    """Sums what every device finds for its own examples."""

    def local(
        params: Params, rows: tuple[Examples, Array], num_valid: Array
    ) -> tuple[Array, Params]:
        examples, weights = rows
        weights = jnp.where(jnp.arange(weights.shape[0]) < num_valid, weights, 0)
        own = vary_like(rows, params)  # else the gradient of the mean cost would be summed at once
        return jax.lax.psum(mean(own, examples, weights), sharding.DATA_AXIS)

    return lambda params, examples, weights: sharding.on_each_shard(
        local, mesh, params, (examples, weights)
    )


def _explicit_mean(fun: CostFn, strategy: Strategy) -> WeightedMean:
    value_and_grad = per_example_value_and_grad(fun, strategy=strategy)

    def explicit_mean(params: Params, examples: Examples, weights: Array) -> tuple[Array, Params]:
        costs, grads = value_and_grad(params, examples)
        return jnp.dot(weights.astype(costs.dtype), costs), grads.sum(weights)

    return explicit_mean


def _gradient_of_mean_cost(fun: CostFn) -> WeightedMean:
    def mean_cost(params: Params, examples: Examples, weights: Array) -> Array:
        costs = jax.vmap(fun, in_axes=(None, 0))(params, examples)
        _validate.scalar_cost(jax.ShapeDtypeStruct(costs.shape[1:], costs.dtype))
        return jnp.dot(weights.astype(costs.dtype), costs)

    return jax.value_and_grad(mean_cost)
