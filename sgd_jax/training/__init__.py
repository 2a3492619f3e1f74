"""Training: SGD, one step, one epoch as a single compiled program, and sweeps over runs."""

from sgd_jax.training._step._sgd import SGDState, sgd
from sgd_jax.training._step._step import StepInfo, TrainState, init_state, make_epoch, make_step
from sgd_jax.training._step._sweeps import Sweep, make_sweep

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
