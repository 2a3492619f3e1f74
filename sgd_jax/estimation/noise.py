"""The noise scale B = tr Σ/‖∇C‖²: computed exactly, estimated with an interval, tracked."""

from sgd_jax.estimation._error_laws import gradient_signal_to_noise
from sgd_jax.estimation._moment_streams import alignments
from sgd_jax.estimation._noise_scale import (
    CurvatureNoiseScale,
    NoiseParts,
    NoiseScale,
    Of,
    curvature_noise_scale,
    noise_scale,
    noise_scale_of_steps,
    two_batch_noise_parts,
)
from sgd_jax.estimation._noise_tracking import (
    NoiseTrackingState,
    noise_of_examples,
    noise_of_parts,
    noise_of_shards,
    track_noise_scale,
)
from sgd_jax.estimation._preconditioned import preconditioned, scaling_of

__all__ = [
    "CurvatureNoiseScale",
    "NoiseParts",
    "NoiseScale",
    "NoiseTrackingState",
    "Of",
    "alignments",
    "curvature_noise_scale",
    "gradient_signal_to_noise",
    "noise_of_examples",
    "noise_of_parts",
    "noise_of_shards",
    "noise_scale",
    "noise_scale_of_steps",
    "preconditioned",
    "scaling_of",
    "track_noise_scale",
    "two_batch_noise_parts",
]
