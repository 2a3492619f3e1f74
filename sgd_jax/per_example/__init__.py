"""G, the n × p matrix of per-example gradients of any JAX function, in factors."""

from sgd_jax.per_example.chunked import ChunkedPerExampleGrads
from sgd_jax.per_example.gradients import (
    explain,
    per_example_grad,
    per_example_value_and_grad,
)
from sgd_jax.per_example.matrix import PerExampleGrads

__all__ = [
    "ChunkedPerExampleGrads",
    "PerExampleGrads",
    "explain",
    "per_example_grad",
    "per_example_value_and_grad",
]
