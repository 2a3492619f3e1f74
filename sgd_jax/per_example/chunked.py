"""G for any n: nothing is kept, and every question goes through the examples in chunks."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sgd_jax._chunks import chunks, vary_like
from sgd_jax.per_example.grads import PerExampleGrads, Rows
from sgd_jax.typing import Array, Examples, Params, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChunkedPerExampleGrads(Rows):
    """The same G as `PerExampleGrads`, with the same methods, in the memory of one chunk.

    It holds params and examples; every method takes the gradients of ``chunk_size`` examples at a
    time. Where n is no multiple, the last chunk reaches back into the one before, at weight zero.
    """

    params: Params
    examples: Examples
    grads_of: Callable[[Params, Examples], PerExampleGrads] = dataclasses.field(
        metadata={"static": True}
    )
    num_examples: int = dataclasses.field(metadata={"static": True})
    """n."""
    chunk_size: int = dataclasses.field(metadata={"static": True})

    def sum(self, weights: Array | None = None) -> Params:
        """Returns Σ_i c_i g_i, a sum without 1/n; like params. See `PerExampleGrads.sum`."""
        weights = self._checked_weights(weights)
        weights = jnp.ones(self.num_examples) if weights is None else weights
        return self._sum_chunks(lambda grads, chunk: grads.sum(chunk), weights)

    def squared_norms(self, per_leaf: bool = False) -> PyTree:
        """Returns ‖g_i‖², (n,), or for each leaf. See `PerExampleGrads.squared_norms`."""
        return self._map_grads(lambda grads: grads.squared_norms(per_leaf))

    def second_moment(self, weights: Array | None = None) -> Params:
        """Returns 1/n Σ_i g_i², or Σ_i c_i g_i². See `PerExampleGrads.second_moment`."""
        weights = self._checked_weights(weights)
        n = self.num_examples
        weights = jnp.full((n,), 1 / n) if weights is None else weights
        return self._sum_chunks(lambda grads, chunk: grads.second_moment(chunk), weights)

    def inner_products(self, direction: Params) -> Array:
        """Returns ⟨g_i, v⟩, (n,). See `PerExampleGrads.inner_products`."""
        return self._map_grads(lambda grads: grads.inner_products(direction))

    def gram(self, other: "PerExampleGrads | ChunkedPerExampleGrads | None" = None) -> Array:
        """Returns ⟨g_i, h_j⟩, (n, n'): every pair of chunks. See `PerExampleGrads.gram`."""
        other = self if other is None else other

        def rows(mine: PerExampleGrads) -> Array:
            if isinstance(other, PerExampleGrads):
                return mine.gram(other)
            return other._map_grads(lambda theirs: theirs.gram(mine)).T

        return self._map_grads(rows)

    def materialize(self) -> Params:
        """Returns the g_i themselves, leaves (n, *shape). See `PerExampleGrads.materialize`."""
        return self._map_grads(lambda grads: grads.materialize())

    def map_chunks(self, function: Callable[[Examples], PyTree]) -> PyTree:
        """Applies a function of examples to all of them, a chunk at a time; leaves (n, ...)."""
        steps, size, chunk_of = chunks(self.examples, self.chunk_size)
        values = jax.lax.map(lambda k: function(chunk_of(self.examples, k)[0]), jnp.arange(steps))
        seen = steps * size - self.num_examples  # at the head of the last chunk

        def join(leaf: Array) -> Array:
            return jnp.concatenate([leaf[:-1].reshape(-1, *leaf.shape[2:]), leaf[-1, seen:]])

        return jax.tree.map(join, values)

    def _map_grads(self, function: Callable[[PerExampleGrads], PyTree]) -> PyTree:
        return self.map_chunks(lambda chunk: function(self.grads_of(self.params, chunk)))

    def _sum_chunks(
        self, function: Callable[[PerExampleGrads, Array], PyTree], weights: Array
    ) -> PyTree:
        steps, _, chunk_of = chunks(self.examples, self.chunk_size)

        def value(step: Array) -> PyTree:
            (chunk, chunk_weights), fresh = chunk_of((self.examples, weights), step)
            grads = self.grads_of(self.params, chunk)
            return function(grads, jnp.where(fresh, chunk_weights, 0))

        def add(total: PyTree, step: Array) -> tuple[PyTree, None]:
            return jax.tree.map(jnp.add, total, value(step)), None

        like = jax.eval_shape(value, jnp.asarray(0))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
        zeros = vary_like((self.params, self.examples), zeros)
        return jax.lax.scan(add, zeros, jnp.arange(steps))[0]
