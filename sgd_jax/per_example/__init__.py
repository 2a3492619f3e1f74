"""G, the n × p matrix of per-example gradients of any JAX function, in factors."""

from sgd_jax.per_example._table import explain
from sgd_jax.per_example.chunked import ChunkedPerExampleGrads
from sgd_jax.per_example.grads import PerExampleGrads
from sgd_jax.per_example.transform import (
    find_sites,
    per_example_grad,
    per_example_value_and_grad,
    weighted_value_and_grad,
)

__all__ = [
    "ChunkedPerExampleGrads",
    "PerExampleGrads",
    "explain",
    "find_sites",
    "per_example_grad",
    "per_example_value_and_grad",
    "weighted_value_and_grad",
]
