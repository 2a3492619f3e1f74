"""Where the entries of a value lie in a parameter.

Between a parameter and the place where it meets an example stand operations that only move, cast or
scale entries: transpose, reshape, squeeze, slice, convert, a constant factor, the slice that a scan
takes of a stack. A `View` is their composition, known while tracing. Nothing needs to be pulled
back through a view, and norms and products of gradients may be taken on its near side.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend.core import Literal

from sgd_jax.typing import Array


@dataclasses.dataclass(frozen=True)
class Axis:
    """A factor of a parameter's axis, and the window [start, start + size) of it that is used."""

    full: int
    start: int
    size: int


@dataclasses.dataclass(frozen=True)
class View:
    """A value whose entries are entries of a parameter leaf, times a constant.

    The leaf, reshaped to the full sizes of ``axes`` and cut to their windows, holds the entries.
    Dimension d of the value runs over the axes numbered ``dims[d]``, slowest first; the axes in
    ``stack`` are run over by the scans around the value, outermost first.
    """

    leaf: int
    axes: tuple[Axis, ...]
    dims: tuple[tuple[int, ...], ...]
    stack: tuple[int, ...] = ()
    scale: float = 1.0

    @classmethod
    def whole(cls, leaf: int, shape: Sequence[int], num_stacked: int = 0) -> "View":
        """The leaf itself; its first ``num_stacked`` axes are run over by scans."""
        axes = tuple(Axis(size, 0, size) for size in shape)
        dims = tuple((d,) if size != 1 else () for d, size in enumerate(shape))
        return cls(leaf, axes, dims[num_stacked:], tuple(range(num_stacked)))

    def transpose(self, permutation: Sequence[int]) -> "View":
        """The value with its dimensions permuted."""
        return dataclasses.replace(self, dims=tuple(self.dims[d] for d in permutation))

    def squeeze(self, dimensions: Sequence[int]) -> "View":
        """The value without dimensions of size 1."""
        kept = tuple(axes for d, axes in enumerate(self.dims) if d not in dimensions)
        return dataclasses.replace(self, dims=kept)

    def scaled(self, factor: float) -> "View":
        """The value times a constant."""
        return dataclasses.replace(self, scale=self.scale * factor)

    def unstack(self) -> "View | None":
        """One slice of the value along its first dimension, as a scan takes it."""
        first, *rest = self.dims
        if len(first) > 1:
            return None
        if not first:  # a stack of one layer: its axis has size 1, wherever it is
            return dataclasses.replace(self, dims=tuple(rest), stack=(*self.stack, -1))
        return dataclasses.replace(self, dims=tuple(rest), stack=(*self.stack, first[0]))

    def slice(self, starts: Sequence[int], sizes: Sequence[int]) -> "View | None":
        """A window of the value; None where a dimension is made of several axes."""
        axes, dims = list(self.axes), list(self.dims)
        for d, (start, size) in enumerate(zip(starts, sizes, strict=True)):
            if size == self._size(d):
                continue
            if len(dims[d]) != 1:
                return None
            axis = axes[dims[d][0]]
            axes[dims[d][0]] = Axis(axis.full, axis.start + start, size)
            if size == 1:
                dims[d] = ()
        return dataclasses.replace(self, axes=tuple(axes), dims=tuple(dims))

    def reshape(self, sizes: Sequence[int]) -> "View | None":
        """The value reshaped; None where that cuts an axis unevenly, or cuts a window."""
        if 0 in sizes:
            return None
        view, queue, dims = self, [a for axes in self.dims for a in axes], []
        for size in sizes:
            dim: list[int] = []
            while size > 1:
                axis = queue.pop(0)
                axis_size = view.axes[axis].size
                if size % axis_size:  # the axis reaches into the next dimension: cut it in two
                    if axis_size % size or view.axes[axis].full != axis_size:
                        return None
                    view = view._cut(axis, size)
                    renumber = [a + (a > axis) for a in range(len(view.axes))]
                    queue = [axis + 1, *(renumber[a] for a in queue)]
                    dims = [tuple(renumber[a] for a in done) for done in dims]
                    dim = [renumber[a] for a in dim]
                    axis_size = size
                dim.append(axis)
                size //= axis_size
            dims.append(tuple(dim))
        return dataclasses.replace(view, dims=tuple(dims))

    def _size(self, d: int) -> int:
        return math.prod(self.axes[a].size for a in self.dims[d])

    def _cut(self, axis: int, outer: int) -> "View":
        """Replaces a whole axis by two: ``outer`` blocks, then the entries in a block."""
        inner = self.axes[axis].size // outer
        pair = (Axis(outer, 0, outer), Axis(inner, 0, inner))
        axes = self.axes[:axis] + pair + self.axes[axis + 1 :]
        stack = tuple(a + (a > axis) for a in self.stack)
        return dataclasses.replace(self, axes=axes, stack=stack)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How stacks of matrices (group, left, right) lie in a parameter leaf.

    Each axis of the leaf belongs to one of the three; axes of window size 1 may be left out.
    """

    shape: tuple[int, ...]
    axes: tuple[Axis, ...]
    group: tuple[int, ...]
    left: tuple[int, ...]
    right: tuple[int, ...]

    @classmethod
    def of(
        cls,
        view: View,
        shape: Sequence[int],
        group: Sequence[int] = (),
        left: Sequence[int] = (),
        right: Sequence[int] = (),
    ) -> "Layout":
        """The layout whose parts run over the given dimensions of a view of a leaf of ``shape``."""

        def axes(dims: Sequence[int]) -> tuple[int, ...]:
            return tuple(a for d in dims for a in view.dims[d])

        stack = tuple(a for a in view.stack if a >= 0)
        return cls(tuple(shape), view.axes, stack + axes(group), axes(left), axes(right))

    def sizes(self) -> tuple[int, int, int]:
        """The sizes of group, left and right."""
        parts = (self.group, self.left, self.right)
        group, left, right = (math.prod(self.axes[a].size for a in part) for part in parts)
        return group, left, right

    def swapped(self) -> "Layout":
        """The layout of the transposed matrices."""
        return dataclasses.replace(self, left=self.right, right=self.left)

    def is_disjoint(self, other: "Layout") -> bool:
        """Whether no entry of the leaf can lie in both: windows of one axis that do not overlap."""
        if [a.full for a in self.axes] != [a.full for a in other.axes]:
            return False
        return any(
            a.start + a.size <= b.start or b.start + b.size <= a.start
            for a, b in zip(self.axes, other.axes, strict=True)
        )

    def to_leaf(self, matrices: Array) -> Array:
        """Puts (..., group, left, right) into arrays of the leaf's shape, zero elsewhere."""
        lead = matrices.shape[:-3]
        order = self._order()
        values = matrices.reshape(lead + tuple(self.axes[a].size for a in order))
        back = [len(lead) + order.index(a) for a in range(len(self.axes))]
        values = values.transpose(*range(len(lead)), *back)
        padding = [(a.start, a.full - a.start - a.size) for a in self.axes]
        if any(low or high for low, high in padding):
            values = jnp.pad(values, [(0, 0)] * len(lead) + padding)
        return values.reshape(lead + self.shape)

    def from_leaf(self, values: Array) -> Array:
        """Takes (..., group, left, right) out of arrays of the leaf's shape: undoes `to_leaf`."""
        lead = values.shape[: values.ndim - len(self.shape)]
        values = values.reshape(lead + tuple(a.full for a in self.axes))
        windows = tuple(slice(a.start, a.start + a.size) for a in self.axes)
        values = values[(slice(None),) * len(lead) + windows]
        values = values.transpose(*range(len(lead)), *(len(lead) + a for a in self._order()))
        return values.reshape(lead + self.sizes())

    def _order(self) -> tuple[int, ...]:
        used = self.group + self.left + self.right
        return tuple(a for a in range(len(self.axes)) if a not in used) + used


def view_through(eqn: Any, views: Sequence[View | None]) -> View | None:
    """The view that an equation makes of views of its operands; None where it is no mere view."""
    name, params = eqn.primitive.name, eqn.params
    shape = eqn.outvars[0].aval.shape
    if name in ("mul", "div"):
        return _scaled(name, eqn.invars, views)
    if not views or views[0] is None:
        return None
    view: View = views[0]
    if name in ("convert_element_type", "copy", "copy_p"):
        return view if jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating) else None
    if name == "neg":
        return view.scaled(-1.0)
    if name == "transpose":
        return view.transpose(params["permutation"])
    if name == "squeeze":
        return view.squeeze(params["dimensions"])
    if name == "expand_dims" or (name == "reshape" and params.get("dimensions") is None):
        return view.reshape(shape)
    if name == "broadcast_in_dim":
        grows = math.prod(shape) != math.prod(eqn.invars[0].aval.shape)
        return None if grows else view.reshape(shape)
    if name == "slice" and all(s == 1 for s in params["strides"] or ()):
        return view.slice(params["start_indices"], shape)
    if name == "dynamic_slice" and all(isinstance(v, Literal) for v in eqn.invars[1:]):
        limits = [full - size for full, size in zip(eqn.invars[0].aval.shape, shape, strict=True)]
        starts = [
            min(max(int(v.val), 0), limit) for v, limit in zip(eqn.invars[1:], limits, strict=True)
        ]
        return view.slice(starts, shape)
    return None


def _scaled(name: str, operands: Sequence[Any], views: Sequence[View | None]) -> View | None:
    """A view times or over a scalar literal, or a scalar literal times a view."""
    a, b = operands
    if views[0] is not None and isinstance(b, Literal) and jnp.ndim(b.val) == 0:
        if name == "div" and b.val == 0:
            return None
        return views[0].scaled(float(b.val) if name == "mul" else 1 / float(b.val))
    if name == "mul" and views[1] is not None and isinstance(a, Literal) and jnp.ndim(a.val) == 0:
        return views[1].scaled(float(a.val))
    return None
