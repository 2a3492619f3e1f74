"""The examples that a sample names."""

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from sgd_jax import _validate
from sgd_jax.sampling._schemes import Sample
from sgd_jax.typing import Array, Examples


def take(examples: Examples, sample: Sample | Array) -> Examples:
    """Returns the examples that a sample names, leaves (m, ...).

    An index of −1 is no example: its place is taken by another one of the sample, so that nothing
    outside of the sample, a NaN say, gets in; give it weight 0. With no example at all in the
    sample, example 0 stands in everywhere.

    Args:
      examples: leading axis n; NumPy or JAX arrays, traced or not.
      sample: a `Sample`, or indices of any shape, such as (m,), or (steps, m) for rows of batches.

    Raises:
      TypeError: the indices are not integers.
      ValueError: an index outside of [−1, n), unless it is traced; examples is empty or its leading
        axes differ.

    >>> import numpy as np
    >>> take(np.array([10.0, 20.0, 30.0]), np.array([2, 0, -1])).tolist()
    [30.0, 10.0, 30.0]
    """
    n = _validate.num_examples(examples)
    indices = jnp.asarray(sample.indices if isinstance(sample, Sample) else sample)
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise TypeError(f"a sample must hold indices of examples, got dtype {indices.dtype}")
    is_known = not isinstance(indices, jax.core.Tracer)
    if is_known and indices.size and not (indices.min() >= -1 and indices.max() < n):
        raise ValueError(
            f"a sample names example {int(indices.min())} to {int(indices.max())}; expected "
            f"indices from 0 to n - 1 = {n - 1}, or -1 for no example"
        )
    if jnp.issubdtype(indices.dtype, jnp.unsignedinteger):
        named = indices
    else:
        stand_in = jnp.max(indices, axis=-1, keepdims=True, initial=0)
        named = jnp.where(indices >= 0, indices, stand_in)

    def rows(leaf: Array | np.ndarray) -> Array:
        if is_known and isinstance(leaf, np.ndarray):  # only these rows go to the device
            return jnp.asarray(leaf[np.asarray(named)])
        return jnp.asarray(leaf).at[named].get(mode="clip")

    return jax.tree.map(rows, examples)
