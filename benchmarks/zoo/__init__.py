"""Models that other people wrote, for the suite `models`."""

from benchmarks.zoo import (
    equinox_models,
    flax_models,
    haiku_models,
    probabilistic,
    transformers_flax,
)
from benchmarks.zoo.model import Case, Model

MODELS: list[Model] = [
    *transformers_flax.MODELS,
    *equinox_models.MODELS,
    *haiku_models.MODELS,
    *flax_models.MODELS,
    *probabilistic.MODELS,
]

__all__ = ["MODELS", "Case", "Model"]
