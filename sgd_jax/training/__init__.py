"""Training: SGD, one step, one epoch as a single compiled program, and sweeps over runs."""

from sgd_jax.training._epoch import make_epoch
from sgd_jax.training._sgd import SGDState, sgd
from sgd_jax.training._step import StepInfo, TrainState, init_state, make_step
from sgd_jax.training._sweeps import Sweep, make_sweep

__all__ = [
    "SGDState",
    "StepInfo",
    "Sweep",
    "TrainState",
    "init_state",
    "make_epoch",
    "make_step",
    "make_sweep",
    "sgd",
]
