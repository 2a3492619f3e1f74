"""Where stacks of matrices lie in an array.

A factor of per-example gradients is a stack of products of matrices, (group, left, right). A
`Layout` says which entries of an array, a parameter or a value computed from it, these matrices
are. Operations that only move entries, such as transpose, reshape or slice, act on the layout and
leave the numbers where they are.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp

from sgd_jax.typing import Array


class Axis(NamedTuple):
    """A factor of an array's shape, and the window [start, start + size) of it that is used."""

    full: int
    start: int
    size: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """How stacks of matrices (group, left, right) lie in an array of ``shape``.

    The array, reshaped to the full sizes of ``axes`` and cut to their windows, holds the entries of
    the matrices; outside the windows it is zero. Every axis with a window of more than one entry
    belongs to group, left or right, each of which runs over its axes slowest first.
    """

    shape: tuple[int, ...]
    axes: tuple[Axis, ...]
    group: tuple[int, ...]
    left: tuple[int, ...]
    right: tuple[int, ...]

    @classmethod
    def of(
        cls,
        shape: Sequence[int],
        group: Sequence[int] = (),
        left: Sequence[int] = (),
        right: Sequence[int] = (),
    ) -> "Layout":
        """Returns the layout whose parts run over the given dimensions of ``shape``."""
        axes = tuple(Axis(size, 0, size) for size in shape)
        return cls(tuple(shape), axes, tuple(group), tuple(left), tuple(right))

    def parts(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Returns the axes of group, left and right."""
        return self.group, self.left, self.right

    def sizes(self) -> tuple[int, int, int]:
        """Returns the sizes of group, left and right."""
        group, left, right = (math.prod(self.part_shape(part)) for part in self.parts())
        return group, left, right

    def part_shape(self, part: Sequence[int]) -> tuple[int, ...]:
        """Returns the window sizes of some axes."""
        return tuple(self.axes[a].size for a in part)

    def swapped(self) -> "Layout":
        """Returns the layout of the transposed matrices."""
        return dataclasses.replace(self, left=self.right, right=self.left)

    def reshaped(self, shape: Sequence[int]) -> "Layout":
        """Returns the layout in the array reshaped to ``shape``."""
        return dataclasses.replace(self, shape=tuple(shape))

    def transposed(self, permutation: Sequence[int]) -> "Layout | None":
        """Returns the layout in the transposed array; None if a window crosses dimensions."""
        aligned = self.aligned()
        if aligned is None:
            return None
        layout, dims = aligned
        order = [a for d in permutation for a in dims[d]]
        shape = tuple(self.shape[d] for d in permutation)
        return layout.reordered(shape, order)

    def windowed(self, shape: Sequence[int], starts: Sequence[int]) -> "Layout | None":
        """Returns the layout in an array of ``shape`` that holds this one from ``starts`` on.

        None if the window divides an axis unevenly.
        """
        aligned = self.aligned()
        if aligned is None:
            return None
        layout, dims = aligned
        axes: list[Axis] = []
        place: dict[int, int] = {}
        for full, start, dim in zip(shape, starts, dims, strict=True):
            inner = math.prod(layout.axes[a].full for a in dim[1:])
            if full % inner or start % inner:
                return None
            if not dim:  # of size 1: no axis shows it
                axes.append(Axis(full, start, 1))
            for a in dim:
                place[a] = len(axes)
                axes.append(layout.axes[a])
            if dim:
                first = axes[place[dim[0]]]
                axes[place[dim[0]]] = Axis(full // inner, first.start + start // inner, first.size)
        parts = [tuple(place[a] for a in part) for part in layout.parts()]
        return Layout(tuple(shape), tuple(axes), *parts)

    def aligned(self) -> "tuple[Layout, tuple[tuple[int, ...], ...]] | None":
        """Returns this layout with axes cut so that each lies in one dimension, and those of each.

        None if a window cannot be cut at the border of a dimension.
        """
        layout, dims, next_axis = self, [], 0
        for size in self.shape:
            dim: list[int] = []
            while size > 1:
                full = layout.axes[next_axis].full
                if full == 1:  # holds no entries: left out
                    next_axis += 1
                    continue
                if size % full:
                    if full % size or (cut := layout._cut(next_axis, size)) is None:
                        return None
                    layout, full = cut, size
                dim.append(next_axis)
                next_axis += 1
                size //= full
            dims.append(tuple(dim))
        kept = [a for dim in dims for a in dim]
        place = {a: k for k, a in enumerate(kept)}
        layout = layout.reordered(self.shape, kept)
        return layout, tuple(tuple(place[a] for a in dim) for dim in dims)

    def is_disjoint(self, other: "Layout") -> bool:
        """Whether no entry of the array can lie in both: windows of one axis do not overlap."""
        if [a.full for a in self.axes] != [a.full for a in other.axes]:
            return False
        return any(
            a.start + a.size <= b.start or b.start + b.size <= a.start
            for a, b in zip(self.axes, other.axes, strict=True)
        )

    def canonical(self) -> "Layout":
        """Returns an equal layout with as few axes as possible."""
        layout = self
        k = 0
        while k + 1 < len(layout.axes):
            merged = layout._merged(k)
            if merged is None:
                k += 1
            else:
                layout, k = merged, max(k - 1, 0)
        return layout

    def to_array(self, matrices: Array) -> Array:
        """Puts (..., group, left, right) into arrays of ``shape``, zero elsewhere."""
        lead = matrices.shape[:-3]
        order = self._order()
        values = matrices.reshape(lead + self.part_shape(order))
        back = [len(lead) + order.index(a) for a in range(len(self.axes))]
        values = values.transpose(*range(len(lead)), *back)
        padding = [(a.start, a.full - a.start - a.size) for a in self.axes]
        if any(low or high for low, high in padding):
            values = jnp.pad(values, [(0, 0)] * len(lead) + padding)
        return values.reshape(lead + self.shape)

    def from_array(self, values: Array) -> Array:
        """Takes (..., group, left, right) out of arrays of ``shape``: undoes `to_array`."""
        lead = values.shape[: values.ndim - len(self.shape)]
        values = values.reshape(lead + tuple(a.full for a in self.axes))
        windows = tuple(slice(a.start, a.start + a.size) for a in self.axes)
        values = values[(slice(None),) * len(lead) + windows]
        values = values.transpose(*range(len(lead)), *(len(lead) + a for a in self._order()))
        return values.reshape(lead + self.sizes())

    def _order(self) -> tuple[int, ...]:
        used = self.group + self.left + self.right
        return tuple(a for a in range(len(self.axes)) if a not in used) + used

    def reordered(self, shape: tuple[int, ...], order: Sequence[int]) -> "Layout":
        """Returns the layout with axes in another order; those left out must have full size 1."""
        place = {a: k for k, a in enumerate(order)}
        parts = [tuple(place[a] for a in part if a in place) for part in self.parts()]
        return Layout(shape, tuple(self.axes[a] for a in order), *parts)

    def _cut(self, axis: int, outer: int) -> "Layout | None":
        """Returns the layout with an axis replaced by two: ``outer`` blocks, entries in a block."""
        full, start, size = self.axes[axis]
        inner = full // outer
        first, last = start // inner, (start + size - 1) // inner
        if start % inner == 0 and size % inner == 0:
            pair = (Axis(outer, first, size // inner), Axis(inner, 0, inner))
        elif first == last:
            pair = (Axis(outer, first, 1), Axis(inner, start % inner, size))
        else:
            return None

        def renumber(part: Sequence[int]) -> tuple[int, ...]:
            return tuple(b for a in part for b in ((a, a + 1) if a == axis else (a + (a > axis),)))

        axes = (*self.axes[:axis], *pair, *self.axes[axis + 1 :])
        return Layout(self.shape, axes, *(renumber(part) for part in self.parts()))

    def _merged(self, k: int) -> "Layout | None":
        """Returns the layout with axes k and k + 1 merged, if they follow each other in a part."""
        outer, inner = self.axes[k], self.axes[k + 1]
        if inner.size != inner.full and outer.size > 1:
            return None
        axis = Axis(
            outer.full * inner.full,
            outer.start * inner.full + inner.start,
            outer.size * inner.size,
        )
        if outer.size == 1 or inner.size == 1:
            gone = k if outer.size == 1 else k + 1
            parts = [tuple(a for a in part if a != gone) for part in self.parts()]
        else:
            homes = [part for part in self.parts() if k in part]
            if not homes or k + 1 not in homes[0]:
                return None
            if homes[0].index(k + 1) != homes[0].index(k) + 1:
                return None
            parts = [tuple(a for a in part if a != k + 1) for part in self.parts()]
        axes = (*self.axes[:k], axis, *self.axes[k + 2 :])
        parts = [tuple(a - (a > k) for a in part) for part in parts]
        return Layout(self.shape, axes, *parts)
