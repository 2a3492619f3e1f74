"""Stochastic gradient descent in JAX, understood through its per-example gradients.

The gradients of n examples are the rows of a matrix G (n × p); everything in stochastic gradient
descent is a product with G.
"""

from sgd_jax import sampling, sharding
from sgd_jax._version import __version__
from sgd_jax.allocation import (
    neyman_allocation,
    optimal_probabilities,
    proportional_allocation,
)
from sgd_jax.control_variate import Anchor, control_variate, difference, refresh
from sgd_jax.costs import cross_entropy_cost, logit_cross_entropy_cost, mean_cost, quadratic_cost
from sgd_jax.estimates import (
    adascale_gain,
    cabs_batch_size,
    expected_cosine,
    expected_squared_error,
    gradient_diversity,
    gradient_signal_to_noise,
    inner_product_test,
    norm_test,
    norm_test_batch_size,
    orthogonality_test,
)
from sgd_jax.mean_gradient import (
    MeanStrategyChoice,
    choose_mean_strategy,
    mean_value_and_grad,
)
from sgd_jax.moment_streams import alignments, gradient_moments
from sgd_jax.moments import GradientMoments, merge_across
from sgd_jax.networks import Layer, feedforward, init_network, weighted_input
from sgd_jax.noise_scale import (
    CurvatureNoiseScale,
    NoiseParts,
    NoiseScale,
    curvature_noise_scale,
    noise_scale,
    noise_scale_of_steps,
    two_batch_noise_parts,
)
from sgd_jax.noise_tracking import (
    NoiseTrackingState,
    noise_of_examples,
    noise_of_parts,
    noise_of_shards,
    track_noise_scale,
)
from sgd_jax.per_example import (
    ChunkedPerExampleGrads,
    PerExampleGrads,
    explain,
    per_example_grad,
    per_example_value_and_grad,
)
from sgd_jax.quadratic import epoch_fixed_point, expected_squared_distance
from sgd_jax.sampling import Sample
from sgd_jax.sgd import SGDState, sgd
from sgd_jax.subsets import SubsetErrors, subset_errors
from sgd_jax.sweeps import Sweep, make_sweep
from sgd_jax.training import StepInfo, TrainState, init_state, make_epoch, make_step

__all__ = [
    "Anchor",
    "ChunkedPerExampleGrads",
    "CurvatureNoiseScale",
    "GradientMoments",
    "Layer",
    "MeanStrategyChoice",
    "NoiseParts",
    "NoiseScale",
    "NoiseTrackingState",
    "PerExampleGrads",
    "SGDState",
    "Sample",
    "StepInfo",
    "SubsetErrors",
    "Sweep",
    "TrainState",
    "__version__",
    "adascale_gain",
    "alignments",
    "cabs_batch_size",
    "choose_mean_strategy",
    "control_variate",
    "cross_entropy_cost",
    "curvature_noise_scale",
    "difference",
    "epoch_fixed_point",
    "expected_cosine",
    "expected_squared_distance",
    "expected_squared_error",
    "explain",
    "feedforward",
    "gradient_diversity",
    "gradient_moments",
    "gradient_signal_to_noise",
    "init_network",
    "init_state",
    "inner_product_test",
    "logit_cross_entropy_cost",
    "make_epoch",
    "make_step",
    "make_sweep",
    "mean_cost",
    "mean_value_and_grad",
    "merge_across",
    "neyman_allocation",
    "noise_of_examples",
    "noise_of_parts",
    "noise_of_shards",
    "noise_scale",
    "noise_scale_of_steps",
    "norm_test",
    "norm_test_batch_size",
    "optimal_probabilities",
    "orthogonality_test",
    "per_example_grad",
    "per_example_value_and_grad",
    "proportional_allocation",
    "quadratic_cost",
    "refresh",
    "sampling",
    "sgd",
    "sharding",
    "subset_errors",
    "track_noise_scale",
    "two_batch_noise_parts",
    "weighted_input",
]
