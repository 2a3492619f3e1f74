"""The n × p matrix G of per-example gradients, as one lazy, factored object."""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sgd_jax import _validate
from sgd_jax._chunks import vary_like
from sgd_jax.per_example import factors as F  # noqa: N812
from sgd_jax.per_example.factors import Dense, Factor, Shared
from sgd_jax.typing import Array, Params, PyTree


class Rows:
    """What follows from sums and norms, however the rows of G are kept."""

    num_examples: int
    """n."""

    def sum(self, weights: Array | None = None) -> Params:
        """Returns Σ_i c_i g_i."""
        raise NotImplementedError

    def squared_norms(self, per_leaf: bool = False) -> PyTree:
        """Returns ‖g_i‖²."""
        raise NotImplementedError

    def mean(self) -> Params:
        """Returns the gradient of the mean cost, 1/n Σ_i g_i; like params."""
        return jax.tree.map(lambda leaf: leaf / self.num_examples, self.sum())

    def clipped_mean(self, max_norm: float | Array, weights: Array | None = None) -> Params:
        """Returns Σ_i c_i min(1, r/‖g_i‖) g_i with r = max_norm; like params.

        The norm is over all parameters together. A gradient of norm zero stays zero; one whose norm
        is not a number makes the result not a number.

        Args:
          max_norm: r, at least 0.
          weights: c, shape (n,); None is 1/n each. A padded example takes weight 0.

        Raises:
          ValueError: max_norm is negative or NaN; weights is not (n,).
        """
        _validate.non_negative("max_norm", max_norm)
        norms = jnp.sqrt(self.squared_norms())
        checked = self._checked_weights(weights)
        scale = 1 / self.num_examples if checked is None else checked
        return self.sum(scale * jnp.minimum(1, max_norm / jnp.where(norms == 0, 1, norms)))

    def _checked_weights(self, weights: Array | None) -> Array | None:
        if weights is None:
            return None
        if jnp.shape(weights) != (self.num_examples,):
            raise ValueError(
                f"weights must have shape ({self.num_examples},), one number for each example, "
                f"got {jnp.shape(weights)}"
            )
        return jnp.asarray(weights)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pulled:
    """Factors of values that parameters were computed into, such as a normalized weight.

    Gradients with respect to the parameters are their pullback by the VJP of that computation.
    """

    factors: tuple[Factor, ...]
    pull: Callable[[tuple[Array, ...]], tuple[list[Array]]]
    """From cotangents of the values to cotangents of the leaves."""
    leaves: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    shapes: tuple[tuple[tuple[int, ...], Any], ...] = dataclasses.field(metadata={"static": True})
    """Shape and dtype of each value."""

    def pull_back(self, cotangents: Sequence[Array]) -> dict[int, Array]:
        """Cotangents of the leaves, by leaf."""
        typed = (c.astype(dtype) for c, (_, dtype) in zip(cotangents, self.shapes, strict=True))
        (leaves,) = self.pull(tuple(typed))
        return dict(zip(self.leaves, leaves, strict=True))

    def push_forward(self, direction: Sequence[Array]) -> tuple[Array, ...]:
        """The directional derivative of the values: the transpose of `pull_back`."""
        zeros = self._zeros()

        def product(cotangents: tuple[Array, ...]) -> Array:
            pulled = self.pull_back(cotangents)
            products = [jnp.sum(p * direction[leaf]).real for leaf, p in pulled.items()]
            return functools.reduce(operator.add, products)

        return jax.grad(product)(zeros)

    def _zeros(self) -> tuple[Array, ...]:
        """A zero cotangent for each value, varying over a mesh as the factors do."""
        return vary_like(
            self.factors, tuple(jnp.zeros(shape, dtype) for shape, dtype in self.shapes)
        )

    def factors_of_leaves(self) -> dict[int, list[Factor]]:
        """The same gradients as factors of the parameters themselves."""
        result: dict[int, list[Factor]] = {leaf: [] for leaf in self.leaves}
        zeros = self._zeros()
        full = [k for k, z in enumerate(zeros) if z.size != 1 or jnp.iscomplexobj(z)]
        for k, zero in enumerate(zeros):
            if k in full:
                continue
            ones = [jnp.ones_like(zero) if j == k else z for j, z in enumerate(zeros)]
            coefficients = self.factors[k].materialize().reshape(-1)  # (n,)
            for leaf, basis in self.pull_back(ones).items():
                result[leaf].append(Shared(coefficients.astype(basis.dtype), basis))
        if full:

            def pull_one(values: list[Array]) -> dict[int, Array]:
                cotangents = list(zeros)
                for k, value in zip(full, values, strict=True):
                    cotangents[k] = value
                return self.pull_back(cotangents)

            pulled = jax.vmap(pull_one)([self.factors[k].materialize() for k in full])
            for leaf, values in pulled.items():
                result[leaf].append(Dense(values))
        return result


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PerExampleGrads(Rows):
    """The gradients g_1 … g_n of n examples: the rows of G, kept in factors.

    Made by `per_example_grad`. A pytree, so it passes through `jax.jit`, `jax.vmap`,
    `jax.lax.scan` and `jax.shard_map`. Products with G cost about one plain gradient; only
    `materialize`, and what is said to form g_i below, writes gradients down. Every method equals
    what the same formula gives on ``jax.vmap(jax.grad(fun))``, to rounding.
    """

    factors: tuple[tuple[Factor, ...], ...]
    pulled: Pulled | None
    treedef: Any = dataclasses.field(metadata={"static": True})
    shapes: tuple[tuple[tuple[int, ...], Any], ...] = dataclasses.field(metadata={"static": True})
    num_examples: int = dataclasses.field(metadata={"static": True})
    """n."""

    def sum(self, weights: Array | None = None) -> Params:
        """Returns Σ_i c_i g_i, a sum without 1/n; like params.

        Args:
          weights: c, shape (n,); None is all ones. A padded example takes weight 0.

        Raises:
          ValueError: weights is not (n,).
        """
        weights = self._checked_weights(weights)
        leaves = [_total(factors, weights) for factors in self.factors]
        if self.pulled is not None:
            sums = [f.weighted_sum(weights) for f in self.pulled.factors]
            for leaf, value in self.pulled.pull_back(sums).items():
                known = leaves[leaf]
                leaves[leaf] = value if known is None else known + value
        return self._like_params(leaves)

    def squared_norms(self, per_leaf: bool = False) -> PyTree:
        """Returns ‖g_i‖², shape (n,), over all parameters; exact also for shared parameters.

        In float32 at least, and never negative. Of a complex gradient it is Σ |g|².

        Args:
          per_leaf: return a pytree like params instead, with the (n,) of each leaf.
        """
        leaves = F.squared_norms(self._leaf_factors(), self.num_examples)
        leaves = [
            leaf.astype(F.accumulator(dtype))
            for leaf, (_, dtype) in zip(leaves, self.shapes, strict=True)
        ]
        if per_leaf:
            return jax.tree.unflatten(self.treedef, leaves)
        return functools.reduce(operator.add, leaves)

    def second_moment(self, weights: Array | None = None) -> Params:
        """Returns 1/n Σ_i |g_i|², entry by entry, or Σ_i c_i |g_i|² with weights; like params.

        One product if an example uses a parameter once; otherwise g_i is formed, some examples at
        a time. The variance of each coordinate is this less the square of `mean`. Real also for
        complex parameters.
        """
        weights = self._checked_weights(weights)
        if weights is None:
            weights = jnp.full((self.num_examples,), 1 / self.num_examples)
        leaves = [
            F.second_moment(factors, weights.astype(F.accumulator(dtype))) if factors else None
            for factors, (_, dtype) in zip(self._leaf_factors(), self.shapes, strict=True)
        ]
        return self._like_params(leaves, real=True)

    def inner_products(self, direction: Params) -> Array:
        """Returns ⟨g_i, v⟩ = Re Σ ḡ_i v, shape (n,), in float32 at least.

        For real parameters it is the derivative of each example's cost along v; for complex ones,
        whose gradient in JAX is ∂C/∂x − i ∂C/∂y, the derivative along the conjugate of v.

        Args:
          direction: v, like params.

        Raises:
          ValueError: direction has another structure or other shapes than params.
        """
        leaves, treedef = jax.tree.flatten(direction)
        found = tuple(jnp.shape(leaf) for leaf in leaves)
        expected = tuple(shape for shape, _ in self.shapes)
        if treedef != self.treedef or found != expected:
            raise ValueError(
                f"direction must be like params: expected {self.treedef} with shapes {expected}, "
                f"got {treedef} with shapes {found}"
            )
        leaves = [
            jnp.asarray(leaf, dtype) for leaf, (_, dtype) in zip(leaves, self.shapes, strict=True)
        ]
        products = [
            f.inner_products(leaf)
            for factors, leaf in zip(self.factors, leaves, strict=True)
            for f in factors
        ]
        if self.pulled is not None:
            # The derivative of the values along v̄: their product with g is taken without conjugate.
            pushed = self.pulled.push_forward([jnp.conj(leaf) for leaf in leaves])
            pairs = zip(self.pulled.factors, pushed, strict=True)
            products += [f.inner_products(jnp.conj(v)) for f, v in pairs]
        zeros = jnp.zeros(self.num_examples, self._accumulator())
        return functools.reduce(operator.add, products, zeros)

    def gram(self, other: "PerExampleGrads | None" = None) -> Array:
        """Returns ⟨g_i, h_j⟩ = Re Σ ḡ_i h_j for all pairs, (n, n'): the Gram matrix G Hᵀ.

        Args:
          other: H, the gradients of n' examples in the same parameters; None is G itself.

        Raises:
          ValueError: other has parameters of another structure or other shapes.
        """
        other = self if other is None else other
        if (self.treedef, self.shapes) != (other.treedef, other.shapes):
            raise ValueError(
                "other must have the same parameters: expected "
                f"{self.treedef} with {self.shapes}, got {other.treedef} with {other.shapes}"
            )
        products = [
            F.gram(mine, theirs)
            for mine, theirs in zip(self._leaf_factors(), other._leaf_factors(), strict=True)
            if mine and theirs
        ]
        zeros = jnp.zeros((self.num_examples, other.num_examples), self._accumulator())
        return functools.reduce(operator.add, products, zeros)

    def materialize(self) -> Params:
        """Returns the g_i themselves, leaves (n, *shape): n·p numbers, as ``vmap(grad)`` does."""
        leaves = [
            functools.reduce(operator.add, (f.materialize() for f in factors)) if factors else None
            for factors in self._leaf_factors()
        ]
        return self._like_params(leaves, lead=(self.num_examples,))

    def __repr__(self) -> str:
        """One line: the size of G and of what is kept of it."""
        kept = [*(f for factors in self.factors for f in factors)]
        kept += [] if self.pulled is None else self.pulled.factors
        arrays = [x for x in jax.tree.leaves(kept) if hasattr(x, "dtype")]
        memory = sum(x.size * x.dtype.itemsize for x in arrays)
        return (
            f"PerExampleGrads: {self.num_examples:,} examples × {self.num_params:,} parameters, "
            f"{len(kept)} factors, {format_bytes(memory)}"
        )

    @property
    def num_params(self) -> int:
        """p, the number of parameters."""
        return sum(math.prod(shape) for shape, _ in self.shapes)

    def __len__(self) -> int:
        """n, the number of examples."""
        return self.num_examples

    def _leaf_factors(self) -> list[list[Factor]]:
        """The factors of each leaf, with those that are pulled back among them."""
        factors = [list(f) for f in self.factors]
        if self.pulled is not None:
            for leaf, more in self.pulled.factors_of_leaves().items():
                factors[leaf].extend(more)
        return factors

    def _accumulator(self) -> jnp.dtype:
        """The dtype of norms and inner products."""
        return F.promote(*(F.accumulator(d) for _, d in self.shapes))

    def _like_params(
        self, leaves: Sequence[Array | None], lead: tuple[int, ...] = (), real: bool = False
    ) -> Params:
        """Returns arrays as a pytree in the dtypes of params; None is zeros."""
        cast = []
        for leaf, (shape, dtype) in zip(leaves, self.shapes, strict=True):
            dtype = jnp.finfo(dtype).dtype if real else dtype
            zeros = leaf is None
            cast.append(jnp.zeros((*lead, *shape), dtype) if zeros else leaf.astype(dtype))
        return jax.tree.unflatten(self.treedef, cast)


def _total(factors: Sequence[Factor], weights: Array | None) -> Array | None:
    if not factors:
        return None
    return functools.reduce(operator.add, (f.weighted_sum(weights) for f in factors))


def format_bytes(count: int) -> str:
    """Returns a number of bytes as a person reads it."""
    for unit, size in (("GB", 1 << 30), ("MB", 1 << 20), ("kB", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
