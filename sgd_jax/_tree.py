"""Linear algebra on pytrees seen as vectors."""

import functools
import operator

import jax
import jax.numpy as jnp

from sgd_jax.typing import Array, PyTree


def tree_dot(a: PyTree, b: PyTree) -> Array:
    """Returns ⟨a, b⟩ = Σ_k a_k b_k over all coordinates of all leaves."""
    return functools.reduce(operator.add, jax.tree.leaves(jax.tree.map(jnp.vdot, a, b)))


def tree_norm(a: PyTree) -> Array:
    """Returns ‖a‖ = √⟨a, a⟩."""
    return jnp.sqrt(tree_dot(a, a))


def tree_axpy(alpha: Array | float, x: PyTree, y: PyTree) -> PyTree:
    """Returns α x + y, leaf by leaf; α takes the dtype of x."""
    return jax.tree.map(
        lambda x_leaf, y_leaf: jnp.asarray(alpha, x_leaf.dtype) * x_leaf + y_leaf, x, y
    )
