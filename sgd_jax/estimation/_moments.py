"""Moments of the per-example gradients of a data set: what they tell, and how two sets merge."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from sgd_jax.typing import Array, Params, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GradientMoments:
    """Sufficient statistics of the gradients g_1 … g_n of n examples, or of each of H strata.

    Population moments, with 1/n: Σ = 1/n Σ_i (g_i − G)(g_i − G)ᵀ, G the mean. Made by
    `gradient_moments`; a pytree, so it is saved, vmapped and scanned like any other. Of H strata,
    every array has a leading axis H.
    """

    count: Array
    """n, int32 scalar."""
    cost: Array
    """C, the mean cost; scalar."""
    mean: Params
    """G, the mean gradient; like params."""
    trace_per_leaf: PyTree
    """tr Σ of the coordinates of each leaf: a scalar for each leaf of params."""
    mean_norm: Array
    """1/n Σ_i ‖g_i‖, over all parameters; scalar."""
    variance: Params | None = None
    """The diagonal of Σ, like params; None unless asked for."""
    squared_norms: Array | None = None
    """‖g_i‖² of each example in order, (n,); None unless asked for."""
    alignments: Array | None = None
    """⟨g_i, G⟩ of each example in order, (n,); None unless asked for. A merge moves G: drops it."""

    @property
    def trace(self) -> Array:
        """The trace tr Σ = 1/n Σ_i ‖g_i − G‖²: how far examples are from their mean, squared."""
        return functools.reduce(jnp.add, jax.tree.leaves(self.trace_per_leaf))

    @property
    def squared_norm(self) -> Array:
        """‖G‖², of the mean gradient."""
        leaves = jax.tree.leaves(self.squared_norm_per_leaf)
        return functools.reduce(jnp.add, leaves)

    @property
    def squared_norm_per_leaf(self) -> PyTree:
        """‖G‖² of the coordinates of each leaf."""
        axes = self.count.ndim
        return jax.tree.map(
            lambda g: jnp.sum(jnp.square(g), axis=tuple(range(axes, g.ndim))), self.mean
        )

    @property
    def mean_squared_norm(self) -> Array:
        """1/n Σ_i ‖g_i‖² = tr Σ + ‖G‖²."""
        return self.trace + self.squared_norm

    def merge(self, other: "GradientMoments") -> "GradientMoments":
        """Returns the moments of both sets of examples together, as if counted at once.

        With n = n_a + n_b and D = G_b − G_a: G = G_a + (n_b/n) D and
        tr Σ = (n_a tr Σ_a + n_b tr Σ_b)/n + n_a n_b/n² ‖D‖². Every term is ≥ 0: nothing cancels.
        Associative and commutative to rounding. ``squared_norms`` are joined, self first, and
        ``variance`` merged, where both have them; ``alignments`` are dropped.

        Args:
          other: moments in the same parameters; both of a whole set, not of strata.

        Raises:
          ValueError: moments of strata, or of other parameters.

        Source: Chan, Golub and LeVeque 1979.
        """
        if self.count.ndim or other.count.ndim:
            raise ValueError("merge takes moments of whole sets; of strata use jax.vmap, or pooled")
        if jax.tree.structure(self.mean) != jax.tree.structure(other.mean):
            raise ValueError("merge takes moments in the same parameters; their structures differ")
        merged = merge(self, other)
        if self.squared_norms is None or other.squared_norms is None:
            return merged
        norms = jnp.concatenate([self.squared_norms, other.squared_norms])
        return dataclasses.replace(merged, squared_norms=norms)

    def pooled(self) -> "GradientMoments":
        """Returns the moments of all strata together; ``squared_norms`` stay as they are.

        Raises:
          ValueError: these are not moments of strata.
        """
        if self.count.ndim != 1:
            raise ValueError("pooled takes moments of strata; these are of one set")
        strata = dataclasses.replace(self, squared_norms=None)
        first = jax.tree.map(lambda leaf: leaf[0], strata)
        rest = jax.tree.map(lambda leaf: leaf[1:], strata)
        total = jax.lax.scan(lambda a, b: (merge(a, b), None), first, rest)[0]
        return dataclasses.replace(total, squared_norms=self.squared_norms)


def merge_across(moments: GradientMoments, axis_name: str | tuple[str, ...]) -> GradientMoments:
    """Returns the moments of the examples of all devices along a mesh axis, the same on each.

    The same centred merge as `GradientMoments.merge`, by sums over the axis (psum) instead of two
    at a time: G = Σ_k n_k G_k/n and tr Σ = Σ_k n_k (tr Σ_k + ‖G_k − G‖²)/n. For use inside
    `jax.shard_map` or `jax.vmap(..., axis_name=...)`. ``squared_norms`` are not moved: they stay
    those of the device's own examples. ``alignments`` are dropped.

    Args:
      moments: of this device's examples; of strata too.
      axis_name: one or more mesh axes.
    """
    count = jax.lax.psum(moments.count, axis_name)
    share = _share(moments.count, count, moments.cost.dtype)

    def average(value: Array) -> Array:
        return jax.lax.psum(_scaled(share, value), axis_name)

    mean = jax.tree.map(average, moments.mean)
    shift = jax.tree.map(jnp.subtract, moments.mean, mean)
    offset = dataclasses.replace(moments, mean=shift).squared_norm_per_leaf
    variance = moments.variance
    if variance is not None:
        spread = jax.tree.map(lambda v, d: v + jnp.square(d), variance, shift)
        variance = jax.tree.map(average, spread)
    return GradientMoments(
        count=count,
        cost=average(moments.cost),
        mean=mean,
        trace_per_leaf=jax.tree.map(lambda t, d: average(t + d), moments.trace_per_leaf, offset),
        mean_norm=average(moments.mean_norm),
        variance=variance,
        squared_norms=moments.squared_norms,
    )


def merge(a: GradientMoments, b: GradientMoments) -> GradientMoments:
    """Returns the moments of two sets, without what is kept per example; empty ones add nothing."""
    count = a.count + b.count
    share = _share(b.count, count, a.cost.dtype)

    def blend(x: Array, y: Array) -> Array:
        return x + share.astype(x.dtype) * (y - x)

    shift = jax.tree.map(jnp.subtract, b.mean, a.mean)
    spread = share * (1 - share)

    def add_shift(trace: Array, shift: Array) -> Array:
        return trace + (spread * jnp.sum(jnp.square(shift))).astype(trace.dtype)

    trace = jax.tree.map(blend, a.trace_per_leaf, b.trace_per_leaf)
    variance = None
    if a.variance is not None and b.variance is not None:
        variance = jax.tree.map(blend, a.variance, b.variance)
        variance = jax.tree.map(
            lambda v, d: v + spread.astype(v.dtype) * jnp.square(d), variance, shift
        )
    return GradientMoments(
        count=count,
        cost=blend(a.cost, b.cost),
        mean=jax.tree.map(blend, a.mean, b.mean),
        trace_per_leaf=jax.tree.map(add_shift, trace, shift),
        mean_norm=blend(a.mean_norm, b.mean_norm),
        variance=variance,
    )


def _scaled(share: Array, value: Array) -> Array:
    """``share`` times ``value``, along the leading axes that share has."""
    return share.reshape(share.shape + (1,) * (value.ndim - share.ndim)).astype(value.dtype) * value


def _share(part: Array, whole: Array, dtype: Any) -> Array:
    """What ``part`` is of the count ``whole``, 0 of none; cast, for strict promotion."""
    return part.astype(dtype) / jnp.maximum(whole, 1).astype(dtype)
