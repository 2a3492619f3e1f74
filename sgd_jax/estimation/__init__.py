"""What an estimate of ∇C is and what it is worth: moments, error laws, noise scale, SVRG."""

from sgd_jax.estimation._error_laws import expected_cosine, expected_squared_error
from sgd_jax.estimation._estimate import estimate
from sgd_jax.estimation._mean_gradient import (
    MeanStrategyChoice,
    choose_mean_strategy,
    mean_value_and_grad,
)
from sgd_jax.estimation._moment_streams import gradient_moments
from sgd_jax.estimation._moments import GradientMoments, merge_across
from sgd_jax.estimation._subsets import (
    MeanCosine,
    SubsetErrors,
    mean_cosine,
    subset_errors,
)

__all__ = [
    "GradientMoments",
    "MeanCosine",
    "MeanStrategyChoice",
    "SubsetErrors",
    "choose_mean_strategy",
    "estimate",
    "expected_cosine",
    "expected_squared_error",
    "gradient_moments",
    "mean_cosine",
    "mean_value_and_grad",
    "merge_across",
    "subset_errors",
]
