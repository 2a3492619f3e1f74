"""Rules that choose a batch size, or rescale a learning rate for one, from gradient moments."""

from sgd_jax.estimation._error_laws import (
    adascale_gain,
    cabs_batch_size,
    gradient_diversity,
    inner_product_test,
    norm_test,
    norm_test_batch_size,
    orthogonality_test,
)

__all__ = [
    "adascale_gain",
    "cabs_batch_size",
    "gradient_diversity",
    "inner_product_test",
    "norm_test",
    "norm_test_batch_size",
    "orthogonality_test",
]
