"""Type aliases shared by every floor."""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax

__all__ = [
    "Array",
    "CostAndMetricsFn",
    "CostFn",
    "Example",
    "Examples",
    "MeanStrategy",
    "Params",
    "PyTree",
    "Strategy",
]

Array: TypeAlias = jax.Array
"""A JAX array."""

PyTree: TypeAlias = Any
"""Any nesting of containers with arrays at the leaves."""

Params: TypeAlias = Any
"""A pytree of floating-point arrays: what is trained."""

Example: TypeAlias = Any
"""A pytree holding ONE example, without any batch axis."""

Examples: TypeAlias = Any
"""A pytree holding n examples: every leaf has leading axis n."""

Strategy: TypeAlias = Literal["auto", "factored", "materialized"]
"""How per-example gradients are kept."""

MeanStrategy: TypeAlias = Literal["auto", "factored", "materialized", "mean_cost"]
"""How the mean of per-example gradients is computed."""

CostFn: TypeAlias = Callable[[Params, Example], Array]
"""The cost of ONE example: ``(params, example) -> scalar``."""

CostAndMetricsFn: TypeAlias = Callable[[Params, Example], tuple[Array, PyTree]]
"""The cost of ONE example with metrics of it: ``(params, example) -> (scalar, metrics)``."""
