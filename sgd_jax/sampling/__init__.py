"""Which examples a mini-batch holds, with which weights: schemes, orders and allocations."""

from sgd_jax.sampling._allocation import (
    neyman_allocation,
    optimal_probabilities,
    proportional_allocation,
)
from sgd_jax.sampling._schemes import (
    Sample,
    antithetic,
    check_probabilities,
    cyclic,
    epoch,
    fixed_order,
    importance,
    plain_mean,
    poisson,
    poisson_max_size,
    stratified,
    with_replacement,
    without_replacement,
)
from sgd_jax.sampling._take import take

__all__ = [
    "Sample",
    "antithetic",
    "check_probabilities",
    "cyclic",
    "epoch",
    "fixed_order",
    "importance",
    "neyman_allocation",
    "optimal_probabilities",
    "plain_mean",
    "poisson",
    "poisson_max_size",
    "proportional_allocation",
    "stratified",
    "take",
    "with_replacement",
    "without_replacement",
]
