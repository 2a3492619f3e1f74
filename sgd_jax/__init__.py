"""Stochastic gradient descent in JAX, understood through its per-example gradients.

The gradients of n examples are the rows of a matrix G (n × p); everything in stochastic gradient
descent is a product with G.
"""

from sgd_jax import sampling
from sgd_jax._version import __version__
from sgd_jax.costs import cross_entropy_cost, logit_cross_entropy_cost, mean_cost, quadratic_cost
from sgd_jax.networks import Layer, feedforward, init_network, weighted_input
from sgd_jax.per_example import (
    PerExampleGrads,
    explain,
    per_example_grad,
    per_example_value_and_grad,
)
from sgd_jax.sgd import SGDState, sgd
from sgd_jax.training import StepInfo, TrainState, init_state, make_epoch, make_step

__all__ = [
    "Layer",
    "PerExampleGrads",
    "SGDState",
    "StepInfo",
    "TrainState",
    "__version__",
    "cross_entropy_cost",
    "explain",
    "feedforward",
    "init_network",
    "init_state",
    "logit_cross_entropy_cost",
    "make_epoch",
    "make_step",
    "mean_cost",
    "per_example_grad",
    "per_example_value_and_grad",
    "quadratic_cost",
    "sampling",
    "sgd",
    "weighted_input",
]
