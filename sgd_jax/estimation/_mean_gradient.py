"""The mean of per-example gradients, by the way of computing it that costs least."""

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.extend.core import Literal as Constant
from jax.sharding import Mesh

from sgd_jax import _validate
from sgd_jax._chunks import vary_like
from sgd_jax.distributed import sharding
from sgd_jax.per_example import per_example_value_and_grad
from sgd_jax.typing import Array, CostFn, Examples, MeanStrategy, Params, Strategy

WeightedMean: TypeAlias = Callable[[Params, Examples, Array], tuple[Array, Params]]
"""``(params, examples, weights) -> (Σ_j c_j C_j, Σ_j c_j ∇C_j)``."""

_Way: TypeAlias = Literal["factored", "materialized", "mean_cost"]

_OPERATIONS_PER_NUMBER = 16.0
"""Writing a number and reading it again takes about as long as so many operations of a product."""

_MOVES = frozenset(
    {"reshape", "transpose", "broadcast_in_dim", "squeeze", "expand_dims", "convert_element_type"}
    | {"slice", "copy", "copy_p", "optimization_barrier", "iota", "stop_gradient"}
)
"""Operations that XLA makes part of what comes after, or of nothing: they count as free."""

_SUMS = frozenset({"add", "add_any"})

_MARGIN = 1.1
"""The explicit mean is preferred unless something else saves a tenth: estimates are rough."""


class MeanStrategyChoice(NamedTuple):
    """How the mean of per-example gradients is computed, and what each way was estimated to cost.

    As text it is a line for each way.
    """

    name: _Way
    """The way chosen."""
    work: dict[_Way, float]
    """Operations by way: those of products, and 16 for each number that is written down."""

    def __str__(self) -> str:
        least = min(self.work.values())
        return "\n".join(
            f"{name:12}  {work:9.3g} operations  {work / least:5.2f}"
            + "  chosen" * (name == self.name)
            for name, work in self.work.items()
        )


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
        chosen = choose_mean_strategy(fun, params, examples).name
        return _ways(fun)[chosen](params, examples, weights)

    return value_and_grad


def choose_mean_strategy(fun: CostFn, params: Params, examples: Examples) -> MeanStrategyChoice:
    """Returns how `make_step` and `make_epoch` compute the mini-batch gradient, and why.

    Each way of computing Gᵀc is traced on shapes alone, and its operations are counted:
    2·a·b·c for a product of (a, b) and (b, c), and 16 for each number that any operation writes.
    The mean of the factored per-example gradients is chosen unless another way is estimated to
    save a tenth: convolutions are cheaper by the gradient of the mean cost, and where a parameter
    meets the example in a way that has no rule, so is everything.

    Args:
      fun: the cost of ONE example.
      params: its parameters; `jax.ShapeDtypeStruct` will do.
      examples: a mini-batch, leading axis m; `jax.ShapeDtypeStruct` will do.

    Raises:
      ValueError: examples is empty or its leading axes differ; the cost is no scalar.

    >>> import jax.numpy as jnp, sgd_jax as sj
    >>> params = sj.init_network(jax.random.key(0), (784, 30, 10))
    >>> fun = lambda params, x: sj.quadratic_cost(sj.feedforward(params, x), jnp.zeros(10))
    >>> choose_mean_strategy(fun, params, jnp.zeros((10, 784))).name
    'factored'
    """
    m = _validate.num_examples(examples)
    weights = jax.ShapeDtypeStruct((m,), jnp.result_type(*jax.tree.leaves(params)))
    work: dict[_Way, float] = {
        name: _work(jax.make_jaxpr(way)(params, examples, weights).jaxpr)
        for name, way in _ways(fun).items()
    }
    least = min(work.values())
    name: _Way = next(name for name in work if work[name] <= _MARGIN * least)
    return MeanStrategyChoice(name, work)


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


def _ways(fun: CostFn) -> dict[_Way, WeightedMean]:
    """The ways to choose from, in order of preference."""
    return {
        "factored": _explicit_mean(fun, "auto"),  # what has no rule is written down
        "mean_cost": _gradient_of_mean_cost(fun),
        "materialized": _explicit_mean(fun, "materialized"),
    }


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


def _work(jaxpr: Jaxpr) -> float:
    """An estimate of what a jaxpr costs, in operations of a product."""
    total, zeros = 0.0, set()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in _MOVES:
            if all(_is_zero(v, zeros) for v in eqn.invars):
                zeros.update(eqn.outvars)
        elif eqn.primitive.name not in _SUMS or not any(_is_zero(v, zeros) for v in eqn.invars):
            total += _work_of_equation(eqn)  # the probes are zeros: XLA does not add them
    return total


def _is_zero(atom: Any, zeros: set[Any]) -> bool:
    if isinstance(atom, Constant):
        return bool(np.all(np.asarray(atom.val) == 0))
    return atom in zeros


def _work_of_equation(eqn: Any) -> float:
    name, params = eqn.primitive.name, eqn.params
    inner = [_work(jaxpr) for jaxpr in _inner_jaxprs(params)]
    if name == "cond":
        return max(inner, default=0.0)
    if inner:  # of a while loop, one turn: how many there are is not known
        return sum(inner) * params.get("length", 1)
    written = sum(math.prod(v.aval.shape) for v in eqn.outvars)
    operations = 0.0
    if name == "dot_general":
        (contract, _), _ = params["dimension_numbers"]
        operations = 2.0 * written * math.prod(eqn.invars[0].aval.shape[d] for d in contract)
    elif name == "conv_general_dilated":
        kernel = eqn.invars[1].aval.shape
        out_features = kernel[params["dimension_numbers"].rhs_spec[0]]
        operations = 2.0 * written * math.prod(kernel) / out_features
    return operations + _OPERATIONS_PER_NUMBER * written


def _inner_jaxprs(params: dict[str, Any]) -> Iterator[Jaxpr]:
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, ClosedJaxpr):
                yield part.jaxpr
            elif isinstance(part, Jaxpr):
                yield part
