"""Rules: which factor the meeting of a parameter and an example leaves, one class a primitive.

A rule has three methods: `of` reads an equation, `keep` says what to keep of one example, and
`factor` makes the factor of v from what was kept of all. `RULES` finds them by primitive name.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import GatherScatterMode

from sgd_jax.per_example.factors import Dense, Factor, Outer
from sgd_jax.per_example.layout import Layout
from sgd_jax.per_example.sites import Rule, Site
from sgd_jax.typing import Array


@dataclasses.dataclass(frozen=True)
class Lift:
    """v itself is made to depend on the example; δ is then its gradient, materialized.

    The best there is for what acts entry by entry (biases, scales), and right for every primitive
    that JAX can differentiate.
    """

    name: str = "materialized"
    expands: bool = False

    @classmethod
    def of(cls, eqn: Any, operand: int) -> "Lift":
        """Returns the rule, which fits every operand."""
        del eqn, operand
        return cls()

    def keep(self, others: Sequence[Array], output: Array) -> None:
        """Keeps nothing."""

    def factor(self, site: Site, delta: Array, act: Any, value: Array) -> Factor:
        """Returns Σ δ over the scans that share v."""
        del act, value
        delta = site.arrange(delta, (), (), range(site.value.ndim)).sum(axis=2)
        return Dense(delta.reshape(delta.shape[0], *site.value_shape()))


@dataclasses.dataclass(frozen=True)
class Dot:
    """v in a matrix product, with any dimension numbers: g_i = Σ_t δ_t ⊗ a_t, batch by batch."""

    contract: tuple[int, ...]
    batch: tuple[int, ...]
    other_contract: tuple[int, ...]
    other_batch: tuple[int, ...]
    other_ndim: int
    is_left: bool
    """Whether v is the left operand of dot_general."""
    name: str = "outer product"
    expands: bool = False

    @classmethod
    def of(cls, eqn: Any, operand: int) -> "Dot":
        """Returns the rule for operand 0 or 1 of a dot_general equation."""
        contract, batch = eqn.params["dimension_numbers"]
        other = 1 - operand
        return cls(
            contract=tuple(contract[operand]),
            batch=tuple(batch[operand]),
            other_contract=tuple(contract[other]),
            other_batch=tuple(batch[other]),
            other_ndim=eqn.invars[other].aval.ndim,
            is_left=operand == 0,
        )

    def keep(self, others: Sequence[Array], output: Array) -> Array:
        """Keeps the other operand, a."""
        del output
        return others[0]

    def factor(self, site: Site, delta: Array, act: Any, value: Array) -> Factor:
        """Returns outer products of δ (rows: v's free dimensions) and a (columns: contracted)."""
        del value
        free = complement(site.value.ndim, self.contract + self.batch)
        other_free = complement(self.other_ndim, self.other_contract + self.other_batch)
        b, f, o = len(self.batch), len(free), len(other_free)
        batch = range(b)
        mine = range(b, b + f) if self.is_left else range(b + o, b + o + f)
        theirs = range(b + f, b + f + o) if self.is_left else range(b, b + o)
        left = site.arrange(delta, batch, theirs, mine)
        right = site.arrange(act, self.other_batch, other_free, self.other_contract)
        return Outer(left, right, site.layout(self.batch, free, self.contract))


@dataclasses.dataclass(frozen=True)
class Convolution:
    """v as the kernel of a convolution: outer products of features and patches.

    With y_o = Σ_k w_k x_{s·o + d·k}, g_i = Σ_o δ_o ⊗ (patch of x at o). If the input is dilated
    instead (a transposed convolution), the patches are those of δ, one at each position of x.
    """

    window_strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    groups: int
    lhs_spec: tuple[int, ...]
    rhs_spec: tuple[int, ...]
    out_spec: tuple[int, ...]
    name: str = "outer product of patches"
    expands: bool = True

    @classmethod
    def of(cls, eqn: Any, operand: int) -> "Convolution | None":
        """Returns the rule for the kernel; None for the input, or for grouped batches."""
        p = eqn.params
        if operand != 1 or p["batch_group_count"] != 1:
            return None
        numbers = p["dimension_numbers"]
        return cls(
            window_strides=tuple(p["window_strides"]),
            padding=tuple(map(tuple, p["padding"])),
            lhs_dilation=tuple(p["lhs_dilation"]),
            rhs_dilation=tuple(p["rhs_dilation"]),
            groups=p["feature_group_count"],
            lhs_spec=tuple(numbers.lhs_spec),
            rhs_spec=tuple(numbers.rhs_spec),
            out_spec=tuple(numbers.out_spec),
        )

    def keep(self, others: Sequence[Array], output: Array) -> Array:
        """Keeps the input."""
        del output
        return others[0]

    def factor(self, site: Site, delta: Array, act: Any, value: Array) -> Factor:
        """Returns groups of outer products of δ (rows: output features) and x (columns)."""
        del value
        out_feature, in_feature, *kernel_dims = self.rhs_spec
        shape = site.value.shape
        kernel = [shape[d] for d in kernel_dims]
        delta = _features_last(delta, len(site.levels), self.out_spec)
        act = _features_last(act, len(site.levels), self.lhs_spec)
        of_delta = self._scatters()
        if of_delta:
            delta = self._patches_of_output(delta, kernel, act.shape)
        else:
            act = self._patches_of_input(act, kernel)
        positions = range(len(kernel_dims) + 1)  # and the batch
        group, feature, offset = len(positions), len(positions) + 1, len(positions)
        split = [offset + 1], positions, [offset, offset + 2]
        plain = [group], positions, [feature]
        left = site.arrange(_split(delta, self.groups), *(split if of_delta else plain))
        right = site.arrange(_split(act, self.groups), *(plain if of_delta else split))
        # The output features of v as two dimensions: groups × features.
        lead = [*site.stacked_lengths(), *shape[:out_feature]]
        cut = [*lead, self.groups, shape[out_feature] // self.groups, *shape[out_feature + 1 :]]
        at = len(lead)
        stack = len(site.stacked_lengths())

        def place(d: int) -> int:
            return stack + d + (d > out_feature)

        groups = [*range(stack), at]
        offsets = [place(d) for d in kernel_dims]
        rows, columns = [at + 1], [place(in_feature)]
        if of_delta:
            layout = Layout.of(cut, groups, offsets + rows, columns)
        else:
            layout = Layout.of(cut, groups, rows, offsets + columns)
        # The barrier keeps XLA from computing the patches again inside of each product.
        left, right = jax.lax.optimization_barrier((left, right))
        return Outer(left, right, layout.reshaped(site.value_shape()))

    def _scatters(self) -> bool:
        """Whether patches of δ are taken: the input is dilated, and the window moves by one."""
        return any(d > 1 for d in self.lhs_dilation) and all(s == 1 for s in self.window_strides)

    def _patches_of_input(self, images: Array, kernel: Sequence[int]) -> Array:
        """(..., positions, feature) → (..., positions, offset in the kernel, feature)."""
        lead = images.ndim - len(kernel) - 1
        padding = [
            (low, high, dilation - 1)
            for (low, high), dilation in zip(self.padding, self.lhs_dilation, strict=True)
        ]
        images = _pad(images, lead, padding)
        counts = [
            (size - (k - 1) * dilation - 1) // stride + 1
            for size, k, dilation, stride in zip(
                images.shape[lead:-1], kernel, self.rhs_dilation, self.window_strides, strict=True
            )
        ]
        return _windows(images, lead, kernel, counts, self.window_strides, self.rhs_dilation)

    def _patches_of_output(
        self, delta: Array, kernel: Sequence[int], input_shape: Sequence[int]
    ) -> Array:
        """(..., outputs, feature) → (..., inputs, offset in the kernel, feature).

        Position q of the input meets output o = l·q + low − d·k at offset k, with dilations l of
        the input and d of the kernel and padding low.
        """
        lead = delta.ndim - len(kernel) - 1
        counts = input_shape[lead:-1]
        padding = []
        for k, count, size, (low, _), inner, outer in zip(
            kernel,
            counts,
            delta.shape[lead:-1],
            self.padding,
            self.rhs_dilation,
            self.lhs_dilation,
            strict=True,
        ):
            before = (k - 1) * inner - low
            padding.append((before, (count - 1) * outer + low + 1 - size, 0))
        delta = _pad(delta, lead, padding)
        windows = _windows(delta, lead, kernel, counts, self.lhs_dilation, self.rhs_dilation)
        return jnp.flip(
            windows.reshape(*windows.shape[:-2], *kernel, windows.shape[-1]),
            range(windows.ndim - 2, windows.ndim - 2 + len(kernel)),
        ).reshape(windows.shape)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of v picked by indices that depend on the example: an embedding, a slice of a stack."""

    row_dims: tuple[int, ...]
    """The dimensions of v that are indexed, in the order of the index vector."""
    offset_dims: tuple[int, ...]
    """The dimensions of the output that run over the other dimensions of v."""
    out_ndim: int
    drops: bool
    """Whether the gradient of an index out of bounds is dropped, or goes to the nearest row."""
    name: str = "rows by index"
    expands: bool = False
    columns: tuple[int, ...] = ()
    """Where in the index vector the indices of ``row_dims`` are."""

    @classmethod
    def of(cls, eqn: Any, operand: int) -> "Rows | None":
        """Returns the rule for gathering whole rows; None for gathers of partial windows.

        A clamped index into a dimension of which the slice takes all is always 0: it picks nothing.
        ``jax.vmap(lambda i: table[i])`` writes one for each dimension of the table.
        """
        numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
        shape, collapsed = eqn.invars[0].aval.shape, numbers.collapsed_slice_dims
        mapped = numbers.start_index_map
        clamps = GatherScatterMode.from_any(eqn.params["mode"]) == GatherScatterMode.CLIP
        whole = {d for d, size in enumerate(sizes) if size == shape[d] and d not in collapsed}
        rows = tuple(d for d in mapped if not (clamps and d in whole))
        if (
            operand != 0
            or numbers.operand_batching_dims
            or not set(collapsed) <= set(rows)
            or not rows
            or any(sizes[d] != 1 for d in rows)
            or any(d not in whole for d in range(len(shape)) if d not in rows)
        ):
            return None
        windows = [d for d in range(len(shape)) if d not in collapsed]
        offsets = zip(windows, numbers.offset_dims, strict=True)
        kept = tuple(offset for d, offset in offsets if d not in rows)
        columns = tuple(k for k, d in enumerate(mapped) if d in rows)
        # A promise of indices in bounds, when broken, reads the nearest row; its gradient is
        # dropped.
        return cls(rows, kept, eqn.outvars[0].aval.ndim, not clamps, columns=columns)

    def keep(self, others: Sequence[Array], output: Array) -> Array:
        """Keeps the index vectors, (picks..., number of row dimensions)."""
        del output
        return jnp.stack([others[0][..., k] for k in self.columns], axis=-1)

    def factor(self, site: Site, delta: Array, act: Any, value: Array) -> Factor:
        """Returns δ for every row picked; ``act`` is (n, scans..., picks..., row dimensions)."""
        del value
        sizes = [site.value.shape[d] for d in self.row_dims]
        rest = complement(site.value.ndim, self.row_dims)
        act = act.astype(jnp.result_type(act.dtype, jnp.int32))  # sizes may not fit in 8 bits
        rows = jnp.zeros(act.shape[:-1], act.dtype)
        inside = jnp.ones(act.shape[:-1], bool)
        for d, size in enumerate(sizes):
            index = act[..., d]
            inside &= (index >= 0) & (index < size)
            rows = rows * size + jnp.clip(index, 0, size - 1)
        rows = (jnp.where(inside, rows, -1) if self.drops else rows).astype(jnp.int32)
        picks = complement(self.out_ndim, self.offset_dims)
        left = site.arrange(rows, (), range(rows.ndim - 1 - len(site.levels)))
        right = site.arrange(delta, (), picks, self.offset_dims)
        layout = site.layout((), self.row_dims, rest)
        return Outer(jnp.broadcast_to(left, right.shape[:-1]), right, layout)


@dataclasses.dataclass(frozen=True)
class Slice(Rows):
    """One row of a stack picked by `lax.dynamic_slice`."""

    @classmethod
    def of(cls, eqn: Any, operand: int) -> "Slice | None":
        """Returns the rule for picking one row of a stack; None for longer windows."""
        shape, sizes = eqn.invars[0].aval.shape, eqn.params["slice_sizes"]
        rows = tuple(d for d, size in enumerate(sizes) if size != shape[d])
        if operand != 0 or not rows or any(sizes[d] != 1 for d in rows):
            return None
        return cls(rows, complement(len(shape), rows), len(shape), drops=False)

    def keep(self, others: Sequence[Array], output: Array) -> Array:
        """Keeps the start indices of the row dimensions as one vector."""
        del output
        return jnp.stack([others[d] for d in self.row_dims])


@dataclasses.dataclass(frozen=True)
class TriangularSolve:
    """v as the triangular matrix A of A X = B, or X A = B: g_i is minus an outer product.

    With X = A⁻¹B and δ the cotangent of X, Ā = −(A⁻ᵀδ) Xᵀ on the triangle of A.
    """

    left_side: bool
    lower: bool
    transpose_a: bool
    conjugate_a: bool
    unit_diagonal: bool
    name: str = "outer product of a solution"
    expands: bool = False

    @classmethod
    def of(cls, eqn: Any, operand: int) -> "TriangularSolve | None":
        """Returns the rule for one real matrix A; None for B, or for a batch of matrices."""
        a = eqn.invars[0].aval
        if operand != 0 or a.ndim != 2 or jnp.issubdtype(a.dtype, jnp.complexfloating):
            return None
        names = ("left_side", "lower", "transpose_a", "conjugate_a", "unit_diagonal")
        return cls(*(eqn.params[name] for name in names))

    def keep(self, others: Sequence[Array], output: Array) -> Array:
        """Keeps the solution X."""
        del others
        return output

    def factor(self, site: Site, delta: Array, act: Any, value: Array) -> Factor:
        """Returns −(A⁻ᵀδ_i) ⊗ X_i, scaled by the triangle."""
        lead = len(site.stacked_lengths())
        uses, dim = (1, 0) if self.left_side else (0, 1)
        left = site.arrange(delta, (), [uses], [dim])  # (n, stack, t, size)
        right = site.arrange(act, (), [uses], [dim])
        matrices = value.reshape(-1, *value.shape[lead:])

        def solve(matrix: Array, cotangents: Array) -> Array:
            # On rows: δᵀ op(A)⁻¹ for op(A) X = B, and δ op(A)⁻ᵀ for X op(A) = B.
            return jax.lax.linalg.triangular_solve(
                matrix,
                cotangents,
                left_side=False,
                lower=self.lower,
                transpose_a=self.transpose_a == self.left_side,
                unit_diagonal=self.unit_diagonal,
            )

        left = -jax.vmap(jax.vmap(solve), in_axes=(None, 0))(matrices, left)
        size = site.value.shape[0]
        triangle = jnp.tri(size, k=-1 if self.unit_diagonal else 0, dtype=left.dtype)
        triangle = jnp.broadcast_to(triangle if self.lower else triangle.T, matrices.shape)
        if self.left_side == self.transpose_a:
            left, right = right, left
        return Outer(left, right, site.layout((), [0], [1]), triangle)


RULES: dict[str, type[Rule]] = {
    "dot_general": Dot,
    "conv_general_dilated": Convolution,
    "gather": Rows,
    "dynamic_slice": Slice,
    "triangular_solve": TriangularSolve,
}
"""The primitives that leave a factor smaller than the parameter; each rule may decline."""

ELEMENTWISE = frozenset(
    {"add", "add_any", "sub", "mul", "div", "max", "min", "pow", "atan2", "rem", "clamp"}
    | {"select_n", "concatenate", "pad", "dynamic_update_slice", "scatter", "scatter-add"}
)
"""The primitives where materializing v's gradient is the rule, not a fallback."""


def rule_for(eqn: Any, operand: int) -> Rule | None:
    """Returns the factoring rule for one operand of an equation, or None."""
    rule = RULES.get(eqn.primitive.name)
    return None if rule is None else rule.of(eqn, operand)


def complement(ndim: int, dims: Sequence[int]) -> tuple[int, ...]:
    """Returns the dimensions of ``ndim`` that are not in ``dims``."""
    return tuple(d for d in range(ndim) if d not in dims)


def _features_last(array: Array, num_levels: int, spec: Sequence[int]) -> Array:
    """Brings what follows n and the scans into the order batch, positions, features."""
    batch, feature, *positions = (1 + num_levels + d for d in spec)
    return array.transpose(*range(1 + num_levels), batch, *positions, feature)


def _split(array: Array, groups: int) -> Array:
    """Splits the last axis into groups × features."""
    return array.reshape(*array.shape[:-1], groups, array.shape[-1] // groups)


def _pad(array: Array, lead: int, padding: Sequence[tuple[int, int, int]]) -> Array:
    """Pads or crops (negative) the axes between the leading ones and the last."""
    config = [(0, 0, 0)] * lead + list(padding) + [(0, 0, 0)]
    return jax.lax.pad(array, jnp.zeros([], array.dtype), config)


def _windows(
    images: Array,
    lead: int,
    kernel: Sequence[int],
    counts: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
) -> Array:
    """(leading..., positions..., feature) → (leading..., counts..., offset in the kernel, feature).

    One axis after the other, so that the number of operations is the sum of the kernel's sizes and
    not their product.
    """
    dims = len(kernel)
    for d, (k, count, stride, dilation) in enumerate(
        zip(kernel, counts, strides, dilations, strict=True)
    ):
        axis = lead + d
        images = _windows_along(images, axis, (k, count, stride, dilation), lead + dims + d)
    return images.reshape(*images.shape[: lead + dims], math.prod(kernel), images.shape[-1])


def _windows_along(
    images: Array, axis: int, geometry: tuple[int, int, int, int], new_axis: int
) -> Array:
    """Replaces an axis by its ``count`` window positions; offsets go to ``new_axis``.

    By one gather, faster than a slice an offset and compiled in a fraction of the time.
    """
    k, count, stride, dilation = geometry
    if k == stride and dilation == 1:
        images = jax.lax.slice_in_dim(images, 0, count * k, axis=axis)
        shape = (*images.shape[:axis], count, k, *images.shape[axis + 1 :])
        return jnp.moveaxis(images.reshape(shape), axis + 1, new_axis)
    index = (jnp.arange(count) * stride)[:, None] + (jnp.arange(k) * dilation)[None]  # (count, k)
    return jnp.moveaxis(jnp.take(images, index, axis=axis), axis + 1, new_axis)
