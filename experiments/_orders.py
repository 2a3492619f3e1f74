"""Orders of the examples: how they are drawn, and what SGD makes of them on a quadratic."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import sgd_jax as sj
from experiments import _classifier
from sgd_jax import sampling
from sgd_jax.estimation.quadratic import epoch_fixed_point, expected_squared_distance
from sgd_jax.typing import Array

ORDERS = ("with_replacement", "reshuffling", "fixed_order", "cyclic", "sorted")
DRAWN = ORDERS[:3]
"""Those with an expectation over draws."""
START = 3.0
"""x₀ − x* of every walk, in units of the standard deviation of the targets."""


def draw_epoch(
    order: str, labels: np.ndarray | None, key: Array, number: Array, n: int, batch_size: int
) -> Array:
    """Returns the mini-batches of an epoch; without labels the examples are sorted already."""
    if order == "reshuffling":
        return _classifier.draw_reshuffled(key, number, n, batch_size)
    if order == "with_replacement":
        shape = (-(-n // batch_size), batch_size)
        return jax.random.randint(jax.random.fold_in(key, number), shape, 0, n, jnp.int32)
    if order == "fixed_order":
        indices = jax.random.permutation(key, n)
    elif order == "sorted" and labels is not None:
        indices = jnp.asarray(np.argsort(labels, kind="stable"), jnp.int32)
    else:
        indices = jnp.arange(n)
    return sampling.fixed_order(indices, batch_size, keep_last=True)


class Walks(NamedTuple):
    """Squared distances of walks on the quadratic from its minimum, s² = 1."""

    mean: np.ndarray
    """After each step, (num_rates, steps + 1)."""
    standard_error: np.ndarray
    """Of the mean, at the end: (num_rates,)."""


def predict(
    order: str, rate: float, targets: np.ndarray, num_epochs: float, step: int = 0
) -> float:
    """Returns E(x − x*)² after so many epochs and steps, exactly, for targets of variance 1."""
    n = len(targets)
    if order in DRAWN:
        return expected_squared_distance(
            order,
            rate,
            n,
            num_epochs=num_epochs,
            step=step,
            start=START**2,  # pyright: ignore[reportArgumentType]
        )
    given = np.sort(targets) if order == "sorted" else targets
    begin = np.roll(given, -step)  # the epoch that begins at this step
    after_first = START
    for target in given[:step]:
        after_first += rate * (target - after_first)
    kept = (1 - rate) ** (n * num_epochs)
    return (kept * after_first + (1 - kept) * epoch_fixed_point(begin, rate)) ** 2


def walk(
    order: str,
    targets: np.ndarray,
    rates: Sequence[float],
    key: Array,
    *,
    num_walks: int,
    num_epochs: int,
) -> Walks:
    """Walks by SGD on ½(x − a_i)², one example a step, many times with each learning rate.

    Args:
      order: One of `ORDERS`; what has no draws is walked once.
      targets: The a_i as stored, mean 0.
      rates: ηλ.
      key: Of the draws.
      num_walks: With each rate.
      num_epochs: Of each walk.
    """
    n, num_walks = len(targets), num_walks if order in DRAWN else 1
    values = jnp.asarray(np.sort(targets) if order == "sorted" else targets, float)
    gradient = jax.grad(sj.mean_cost(sj.quadratic_cost))

    def epoch(state: tuple[Array, Array], number: Array) -> tuple[tuple[Array, Array], Array]:
        x, key = state  # (num_walks, num_rates), and a key for each walk
        draw = functools.partial(draw_epoch, order, None)
        batches = jax.vmap(lambda key: draw(key, number, n, 1))(key)

        def step(x: Array, indices: Array) -> tuple[Array, Array]:
            along_rates = jax.vmap(gradient, in_axes=(0, None))
            g = jax.vmap(along_rates)(x, values[indices])
            x = x - jnp.asarray(rates)[None, :] * g
            return x, jnp.mean(jnp.square(x), axis=0)

        x, squares = jax.lax.scan(step, x, jnp.swapaxes(batches, 0, 1))
        return (x, key), squares

    @jax.jit
    def walks(key: Array) -> tuple[Array, Array]:
        x = jnp.full((num_walks, len(rates)), START)
        keys = jax.random.split(key, num_walks)
        (x, _), squares = jax.lax.scan(epoch, (x, keys), jnp.arange(num_epochs))
        return squares.reshape(-1, len(rates)), jnp.std(jnp.square(x), axis=0)

    squares, spread = (np.asarray(part, np.float64) for part in walks(key))
    first = np.full((1, len(rates)), START**2)
    return Walks(np.concatenate([first, squares]).T, spread / math.sqrt(max(num_walks - 1, 1)))
