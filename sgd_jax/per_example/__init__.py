"""G, the n × p matrix of per-example gradients of any JAX function, in factors."""

from sgd_jax.per_example.gradients import (
    PerExampleGrads,
    explain,
    per_example_grad,
    per_example_value_and_grad,
)

__all__ = ["PerExampleGrads", "explain", "per_example_grad", "per_example_value_and_grad"]
