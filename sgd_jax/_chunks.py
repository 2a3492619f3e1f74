"""Walking through examples in chunks of one size, inside one compiled program."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sgd_jax import _validate
from sgd_jax.typing import Array, Examples, PyTree


def chunks(
    examples: Examples, chunk_size: int, num_valid: Array | None = None
) -> tuple[int, int, Callable[..., Any]]:
    """Returns the number of chunks, their one size ≤ chunk_size, and what cuts out chunk ``step``.

    The function takes arrays with leading axis n and a step, and returns (chunk, fresh). Nothing
    is padded: the last chunk reaches back into the one before, and ``fresh`` (size,) is False where
    an example has been seen already, or lies beyond the first ``num_valid``.
    """
    n = _validate.num_examples(examples)
    steps = -(-n // chunk_size)
    size = -(-n // steps)

    def chunk_of(arrays: PyTree, step: Array) -> tuple[PyTree, Array]:
        start = jnp.minimum(step * size, n - size)
        chunk = jax.tree.map(
            lambda leaf: jax.lax.dynamic_slice_in_dim(jnp.asarray(leaf), start, size), arrays
        )
        places = start + jnp.arange(size)
        fresh = places >= step * size
        return chunk, fresh if num_valid is None else fresh & (places < num_valid)

    return steps, size, chunk_of


def vary_like(examples: PyTree, values: PyTree) -> PyTree:
    """Marks values as varying over the mesh axes that examples vary over, inside shard_map.

    A scan needs it of the zeros it starts from. And the gradient of a value that does not vary is
    summed over devices: no longer one example's.
    """
    axes = frozenset().union(*(_varying_axes(leaf) for leaf in jax.tree.leaves(examples)))

    def vary(value: Array) -> Array:
        missing = tuple(sorted(axes - _varying_axes(value)))
        return jax.lax.pcast(value, missing, to="varying") if missing else jnp.asarray(value)

    return jax.tree.map(vary, values)


def _varying_axes(value: Any) -> frozenset[str]:
    """The mesh axes over which an array, or the type of one, varies."""
    kind = value if hasattr(value, "manual_axis_type") else jax.typeof(value)
    return kind.manual_axis_type.varying if kind.manual_axis_type else frozenset()
