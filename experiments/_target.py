"""How many steps SGD takes to a target accuracy: many learning rates and seeds, one program."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import sgd_jax as sj
from sgd_jax.typing import Array, CostFn, Params

RATES = tuple(2.0 ** (k / 2) for k in range(-6, 11))
"""At a factor of √2: at a factor of 2 the best one is off by up to 12 % in steps."""

_WINDOW = 5  # looks that the accuracy is averaged over
_NEIGHBOURS = 1.5  # how much longer than the best those next to it may run


class Problem(NamedTuple):
    """What is trained from where, and how far it has come."""

    fun: CostFn
    examples: Any
    networks: Params
    """Before the first step, of each seed: leaves (num_seeds, …)."""
    keys: Array
    """For the draws of each seed."""
    measure: Callable[[Params], Array]
    """The accuracy of networks of every seed and rate: from leaves (G, R, …) to (G, R)."""


def make_accuracy(
    output: Callable[[Params, Array], Array], examples: Any
) -> Callable[[Params], Array]:
    """Returns the accuracy of networks (G, R, …) on examples: (G, R)."""

    @jax.jit
    @jax.vmap
    @jax.vmap
    def accuracy(params: Params) -> Array:
        outputs = jax.vmap(output, in_axes=(None, 0))(params, jnp.asarray(examples.inputs))
        return jnp.mean(jnp.argmax(outputs, axis=1) == examples.labels)

    return accuracy


def count_steps(
    problem: Problem, m: int, segment: int, most_steps: int, target: float
) -> np.ndarray:
    """Returns the steps to the target, (num_seeds, num_rates); infinite where it is not reached.

    The accuracy is looked at after every segment; the mean of five looks, at their middle, crosses
    the target at the step that counts, interpolated. (The first noisy look above it comes too
    early, most of all for small mini-batches.) All run until none can change any more which
    learning rate needs the fewest steps in the mean of the seeds, and those next to it have arrived
    or taken half as long again: what has not arrived by then stays infinite.

    Args:
      problem: What is trained, with m examples a step, drawn with replacement.
      m: The mini-batch size.
      segment: Steps from one look to the next.
      most_steps: When to give up.
      target: The accuracy.

    Raises:
      ArithmeticError: no learning rate brings every seed there.
    """
    n, shape = len(problem.examples.labels), (len(problem.keys), len(RATES))
    sweep = sj.make_sweep(problem.fun, sj.sgd)
    params = jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf[:, None], (*shape, *leaf.shape[1:])), problem.networks
    )
    rates = jnp.broadcast_to(jnp.asarray(RATES, jax.tree.leaves(params)[0].dtype), shape)
    states = sweep.init(params, rates)

    @jax.jit
    def draw(number: Array) -> Array:
        return jax.vmap(
            lambda key: jax.random.randint(
                jax.random.fold_in(key, number), (segment, m), 0, n, jnp.int32
            )
        )(problem.keys)

    looks = [np.asarray(problem.measure(states.params), np.float64)]
    before, at = looks[0], 0.0
    reached = np.where(before >= target, 0.0, np.inf)
    taken = 0
    while taken < most_steps and not is_decided(reached, at):
        states, _ = sweep.epoch(states, rates, problem.examples, draw(jnp.asarray(taken)))
        taken += segment
        looks = [*looks, np.asarray(problem.measure(states.params), np.float64)][-_WINDOW:]
        after, middle = np.mean(looks, axis=0), taken - segment * (len(looks) - 1) / 2
        crossed = (after >= target) & np.isinf(reached)
        share = (target - before) / np.where(crossed, after - before, 1)
        reached = np.where(crossed, at + (middle - at) * share, reached)
        before, at = after, middle
    if not np.isfinite(reached).all(axis=0).any():
        raise ArithmeticError(
            f"no learning rate brings every seed to an accuracy of {target:g} in {taken} steps of "
            f"{m} examples; give a lower --target, or more --most_epochs"
        )
    return reached


def is_decided(reached: np.ndarray, taken: float) -> bool:
    """Whether the best learning rate and those next to it are known, whatever comes after.

    The best is the one whose mean over seeds is least. A seed that has not arrived, infinite in
    ``reached``, will have taken more than ``taken`` steps when it does. Neighbours are known once
    they have arrived, or have taken 1.5 times as long as the best.
    """
    at_least = np.where(np.isfinite(reached), reached, taken).mean(axis=0)
    means = reached.mean(axis=0)
    best = int(np.argmin(means))
    if means[best] > at_least.min():
        return False
    beside = reached[:, max(best - 1, 0) : best + 2]
    return bool(np.isfinite(beside).all() or taken >= _NEIGHBOURS * means[best])
