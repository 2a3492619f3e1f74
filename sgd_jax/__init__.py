"""Stochastic gradient descent in JAX, understood through its per-example gradients.

The gradients of n examples are the rows of a matrix G (n × p); everything in stochastic gradient
descent is a product with G.
"""

import importlib as _importlib
import typing as _typing

from sgd_jax._version import __version__

# The cost of one example, and a network to play with
from sgd_jax.costs import cross_entropy_cost, logit_cross_entropy_cost, mean_cost, quadratic_cost
from sgd_jax.networks import Layer, feedforward, init_network

# G, the n × p matrix of per-example gradients
from sgd_jax.per_example import (
    PerExampleGrads,
    explain,
    per_example_grad,
    per_example_value_and_grad,
)

# Estimates of ∇C, and what they are worth
from sgd_jax.sampling import Sample
from sgd_jax.estimation import (
    GradientMoments,
    estimate,
    expected_cosine,
    expected_squared_error,
    gradient_moments,
    mean_value_and_grad,
)
from sgd_jax.estimation.noise import NoiseScale, noise_scale

# Training
from sgd_jax.training import (
    StepInfo,
    TrainState,
    init_state,
    make_epoch,
    make_step,
    make_sweep,
    sgd,
)

# Namespaces
from sgd_jax import costs, estimation, networks, per_example, sampling, training, typing
from sgd_jax.distributed import processes, sharding
from sgd_jax.estimation import batch_size, estimators, noise, quadratic, svrg

if _typing.TYPE_CHECKING:
    from sgd_jax import data

__all__ = [
    "__version__",
    # the cost of one example, and a network to play with
    "Layer",
    "cross_entropy_cost",
    "feedforward",
    "init_network",
    "logit_cross_entropy_cost",
    "mean_cost",
    "quadratic_cost",
    # G
    "PerExampleGrads",
    "explain",
    "per_example_grad",
    "per_example_value_and_grad",
    # estimates
    "GradientMoments",
    "NoiseScale",
    "Sample",
    "estimate",
    "expected_cosine",
    "expected_squared_error",
    "gradient_moments",
    "mean_value_and_grad",
    "noise_scale",
    # training
    "StepInfo",
    "TrainState",
    "init_state",
    "make_epoch",
    "make_step",
    "make_sweep",
    "sgd",
    # namespaces
    "batch_size",
    "costs",
    "data",
    "estimators",
    "estimation",
    "networks",
    "noise",
    "per_example",
    "processes",
    "quadratic",
    "sampling",
    "sharding",
    "svrg",
    "training",
    "typing",
]


def __getattr__(name: str) -> _typing.Any:
    """Imports `data` when it is first used: reading files is not part of a quick start."""
    if name == "data":
        return _importlib.import_module("sgd_jax.data")
    raise AttributeError(f"module 'sgd_jax' has no attribute {name!r}")
