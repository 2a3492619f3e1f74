"""A model of the zoo: what is differentiated, at what, and where it comes from."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Case(NamedTuple):
    """The cost of ONE example, parameters and examples."""

    fun: Callable[[Any, Any], jax.Array]
    params: Any
    examples: Any


class Model(NamedTuple):
    """A model that somebody else wrote, at a size that two cores run in a second."""

    name: str
    source: str
    """Package and class."""
    needs: tuple[str, ...]
    """Modules without which the model is skipped; `make` imports them."""
    make: Callable[[Any], Case]
    """Builds the model with floating point numbers of a dtype; nothing is downloaded."""
    large: bool = False
    """Whether it takes gigabytes: then it is only timed, and only when asked for by its name."""


def cast(tree: Any, dtype: Any) -> Any:
    """Returns a tree with its floating point leaves in another dtype, complex ones accordingly."""

    def one(leaf: Any) -> Any:
        leaf = jnp.asarray(leaf)
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            return leaf.astype(jnp.result_type(dtype, jnp.complex64))
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(one, tree)


def normal(seed: int, *shape: int) -> np.ndarray:
    """Returns standard normal numbers, the same in every dtype once cast."""
    return np.random.default_rng(seed).standard_normal(shape)


def integers(seed: int, high: int, *shape: int) -> np.ndarray:
    """Returns integers from 0 to high − 1."""
    return np.random.default_rng(seed).integers(0, high, shape).astype(np.int32)


def cross_entropy(logits: jax.Array, labels: Any) -> jax.Array:
    """Returns −log softmax(logits)[label], averaged over the leading axes."""
    log_probabilities = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(log_probabilities, jnp.asarray(labels)[..., None], -1))


def squares(output: jax.Array, target: Any = 0.0) -> jax.Array:
    """Returns half of the sum of squared errors."""
    return 0.5 * jnp.sum((output - target) ** 2)
