"""Sites: where a parameter meets an example, and which factor the meeting leaves.

A value is *parameter-only* if it depends on parameters and not on the example. A site is an operand
of an equation: a parameter-only value v in an equation that also takes a value that depends on the
example. Example i's gradient with respect to v at that site is the transpose of the equation,
applied to the cotangent δ_i of its output; a `Rule` knows what it looks like without forming it.
"""

import dataclasses
import enum
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.lax import GatherScatterMode

from sgd_jax.per_example.factors import Dense, Factor, Outer
from sgd_jax.per_example.views import Layout, View
from sgd_jax.typing import Array


class Kind(enum.Enum):
    """What a value depends on."""

    CONSTANT = enum.auto()
    """Neither, or nothing that a gradient could flow through."""
    PARAMETER = enum.auto()
    """Parameters alone."""
    EXAMPLE = enum.auto()
    """The example, or the iteration of a scan."""


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a value comes from."""

    kind: Kind
    leaves: frozenset[int] = frozenset()
    """The parameters it depends on, while it is parameter-only."""
    view: View | None = None
    """How its entries lie in the one parameter it shows, where it is a mere view."""
    stacked: tuple[bool, ...] = ()
    """For each scan around it, outermost first: does it differ from iteration to iteration?"""


class Level(NamedTuple):
    """A scan around a site."""

    length: int
    stacked: bool
    """Whether each iteration has its own slice of the parameter, or all share one."""


@dataclasses.dataclass(frozen=True)
class Site:
    """A parameter-only value v meets an example here."""

    rule: "Rule"
    origin: Origin
    value: jax.ShapeDtypeStruct
    """v."""
    probe: jax.ShapeDtypeStruct
    """What gets a zero added to it, whose gradient is δ: the equation's output, or v itself."""
    levels: tuple[Level, ...]
    primitive: str
    source: str
    has_rule: bool = True
    """False where v is lifted because nothing is known of the primitive."""

    def stacked_lengths(self) -> tuple[int, ...]:
        """The lengths of the scans in which every iteration has its own v."""
        return tuple(level.length for level in self.levels if level.stacked)

    def probe_shape(self) -> tuple[int, ...]:
        """The shape of δ for one example: scans first."""
        return tuple(level.length for level in self.levels) + self.probe.shape

    def arrange(self, array: Array, *parts: Sequence[int]) -> Array:
        """Groups an array's dimensions: (n, stacked scans + parts[0], shared scans + parts[1], …).

        The array is (n, scans..., dimensions...); each part names dimensions, which are merged into
        one axis of the result in the order given.
        """
        scans = range(1, 1 + len(self.levels))
        stacked = [a for a, level in zip(scans, self.levels, strict=True) if level.stacked]
        shared = [a for a in scans if a not in stacked]
        axes = [[1 + len(self.levels) + d for d in part] for part in parts]
        axes[0], axes[1] = stacked + axes[0], shared + axes[1]
        shape = [math.prod(array.shape[a] for a in part) for part in axes]
        return array.transpose(0, *itertools.chain(*axes)).reshape(array.shape[0], *shape)


@dataclasses.dataclass(frozen=True)
class Lift:
    """v itself is made to depend on the example; δ is then its gradient, written down.

    The best there is for what acts entry by entry (biases, scales), and right for every primitive
    that JAX can differentiate.
    """

    name: str = "direct"

    def factor(
        self, site: Site, view: View, leaf_shape: Sequence[int], delta: Array, act: Any
    ) -> Factor:
        """Σ δ over the scans that share v, put into the leaf."""
        del act
        layout = Layout.of(view, leaf_shape, left=range(site.value.ndim))
        delta = site.arrange(delta, (), (), range(site.value.ndim)).sum(axis=2)
        group, left, right = layout.sizes()
        return Dense(layout.to_leaf(delta.reshape(delta.shape[0], group, left, right)))


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

    def factor(
        self, site: Site, view: View, leaf_shape: Sequence[int], delta: Array, act: Any
    ) -> Factor:
        """Outer products of δ (rows: the free dimensions of v) and a (columns: contracted)."""
        free = _complement(site.value.ndim, self.contract + self.batch)
        other_free = _complement(self.other_ndim, self.other_contract + self.other_batch)
        layout = Layout.of(view, leaf_shape, self.batch, free, self.contract)
        b, f, o = len(self.batch), len(free), len(other_free)
        batch = range(b)
        mine = range(b, b + f) if self.is_left else range(b + o, b + o + f)
        theirs = range(b + f, b + f + o) if self.is_left else range(b, b + o)
        left = site.arrange(delta, batch, theirs, mine)
        right = site.arrange(act, self.other_batch, other_free, self.other_contract)
        return Outer(left, right, layout)


@dataclasses.dataclass(frozen=True)
class Convolution:
    """v as the kernel of a convolution: outer products of δ and the patches of the input."""

    window_strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    groups: int
    lhs_spec: tuple[int, ...]
    rhs_spec: tuple[int, ...]
    out_spec: tuple[int, ...]
    name: str = "outer product of patches"

    def factor(
        self, site: Site, view: View, leaf_shape: Sequence[int], delta: Array, act: Any
    ) -> Factor:
        """Groups of outer products of δ (rows: output features) and patches (columns)."""
        out_feature, in_feature, *kernel_dims = self.rhs_spec
        columns = [d + (d > out_feature) for d in (*kernel_dims, in_feature)]
        split = self.split_features(view, site.value.shape)
        assert split is not None  # the planner asked before it kept the view
        layout = Layout.of(split, leaf_shape, [out_feature], [out_feature + 1], columns)
        delta = _features_last(delta, len(site.levels), self.out_spec)
        act = _features_last(act, len(site.levels), self.lhs_spec)
        positions = range(len(kernel_dims) + 1)  # and the batch
        group, feature, offset = len(positions), len(positions) + 1, len(positions)
        left = site.arrange(_split(delta, self.groups), [group], positions, [feature])
        patches = self._patches(act, [site.value.shape[d] for d in kernel_dims])
        patches = _split(patches, self.groups)
        right = site.arrange(patches, [offset + 1], positions, [offset, offset + 2])
        return Outer(left, right, layout)

    def split_features(self, view: View, shape: Sequence[int]) -> View | None:
        """The kernel with its output features seen as two dimensions, groups × features."""
        d = self.rhs_spec[0]
        return view.reshape([*shape[:d], self.groups, shape[d] // self.groups, *shape[d + 1 :]])

    def _patches(self, images: Array, kernel: Sequence[int]) -> Array:
        """(..., positions, feature) → (..., positions, offset in the kernel, feature)."""
        lead = images.ndim - len(kernel) - 1
        padding = [
            (low, high, dilation - 1)
            for (low, high), dilation in zip(self.padding, self.lhs_dilation, strict=True)
        ]
        config = [(0, 0, 0)] * lead + padding + [(0, 0, 0)]
        images = jax.lax.pad(images, jnp.zeros([], images.dtype), config)
        strides, dilations = self.window_strides, self.rhs_dilation
        counts = [
            (size - (k - 1) * dilation - 1) // stride + 1
            for size, k, dilation, stride in zip(
                images.shape[lead:-1], kernel, dilations, strides, strict=True
            )
        ]

        def shifted(offset: Sequence[int]) -> Array:
            starts = [o * dilation for o, dilation in zip(offset, dilations, strict=True)]
            ends = [
                start + (count - 1) * stride + 1
                for start, count, stride in zip(starts, counts, strides, strict=True)
            ]
            return jax.lax.slice(
                images,
                (0,) * lead + (*starts, 0),
                (*images.shape[:lead], *ends, images.shape[-1]),
                (1,) * lead + (*strides, 1),
            )

        offsets = itertools.product(*(range(k) for k in kernel))
        return jnp.stack([shifted(offset) for offset in offsets], axis=-2)


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

    def factor(
        self, site: Site, view: View, leaf_shape: Sequence[int], delta: Array, act: Any
    ) -> Factor:
        """δ for every row picked; ``act`` holds index vectors, (n, scans..., picks..., k)."""
        sizes = [site.value.shape[d] for d in self.row_dims]
        rest = _complement(site.value.ndim, self.row_dims)
        layout = Layout.of(view, leaf_shape, (), self.row_dims, rest)
        act = act.astype(jnp.result_type(act.dtype, jnp.int32))  # sizes may not fit in 8 bits
        rows = jnp.zeros(act.shape[:-1], act.dtype)
        inside = jnp.ones(act.shape[:-1], bool)
        for d, size in enumerate(sizes):
            index = act[..., d]
            inside &= (index >= 0) & (index < size)
            rows = rows * size + jnp.clip(index, 0, size - 1)
        rows = (jnp.where(inside, rows, -1) if self.drops else rows).astype(jnp.int32)
        picks = _complement(self.out_ndim, self.offset_dims)
        left = site.arrange(rows, (), range(rows.ndim - 1 - len(site.levels)))
        right = site.arrange(delta, (), picks, self.offset_dims)
        return Outer(jnp.broadcast_to(left, right.shape[:-1]), right, layout)


Rule: TypeAlias = Lift | Dot | Convolution | Rows
"""What one kind of meeting leaves of the per-example gradients.

Its ``factor`` makes the factor, in the layout of the leaf, from δ and the other operand of all
examples.
"""


def dot_rule(eqn: Any, operand: int) -> Rule:
    """The rule for operand 0 or 1 of a dot_general equation."""
    contract, batch = eqn.params["dimension_numbers"]
    other = 1 - operand
    return Dot(
        contract=tuple(contract[operand]),
        batch=tuple(batch[operand]),
        other_contract=tuple(contract[other]),
        other_batch=tuple(batch[other]),
        other_ndim=eqn.invars[other].aval.ndim,
        is_left=operand == 0,
    )


def convolution_rule(eqn: Any, operand: int) -> Rule | None:
    """The rule for the kernel of a convolution; None for its input, or grouped batches."""
    p = eqn.params
    if operand != 1 or p["batch_group_count"] != 1:
        return None
    numbers = p["dimension_numbers"]
    return Convolution(
        window_strides=tuple(p["window_strides"]),
        padding=tuple(map(tuple, p["padding"])),
        lhs_dilation=tuple(p["lhs_dilation"]),
        rhs_dilation=tuple(p["rhs_dilation"]),
        groups=p["feature_group_count"],
        lhs_spec=tuple(numbers.lhs_spec),
        rhs_spec=tuple(numbers.rhs_spec),
        out_spec=tuple(numbers.out_spec),
    )


def gather_rule(eqn: Any, operand: int) -> Rule | None:
    """The rule for gathering whole rows; None for gathers of partial windows."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    shape = eqn.invars[0].aval.shape
    rows = tuple(numbers.start_index_map)
    whole = all(sizes[d] == shape[d] for d in range(len(shape)) if d not in rows)
    if (
        operand != 0
        or numbers.operand_batching_dims
        or sorted(numbers.collapsed_slice_dims) != sorted(rows)
        or not whole
    ):
        return None
    # A promise of indices in bounds, when broken, reads the nearest row; its gradient is dropped.
    drops = GatherScatterMode.from_any(eqn.params["mode"]) != GatherScatterMode.CLIP
    return Rows(rows, tuple(numbers.offset_dims), eqn.outvars[0].aval.ndim, drops)


def dynamic_slice_rule(eqn: Any, operand: int) -> Rule | None:
    """The rule for picking one row of a stack; None for longer windows."""
    shape, sizes = eqn.invars[0].aval.shape, eqn.params["slice_sizes"]
    rows = tuple(d for d, size in enumerate(sizes) if size != shape[d])
    if operand != 0 or not rows or any(sizes[d] != 1 for d in rows):
        return None
    return Rows(rows, _complement(len(shape), rows), len(shape), drops=False)


RULES = {
    "dot_general": dot_rule,
    "conv_general_dilated": convolution_rule,
    "gather": gather_rule,
    "dynamic_slice": dynamic_slice_rule,
}
"""The primitives that leave a factor smaller than the parameter; each rule may decline."""

ELEMENTWISE = frozenset(
    {"add", "add_any", "sub", "mul", "div", "max", "min", "pow", "atan2", "rem", "clamp"}
    | {"select_n", "concatenate", "pad", "dynamic_update_slice", "scatter", "scatter-add"}
)
"""The primitives where writing v's gradient down is the rule, not a fallback."""


def rule_for(eqn: Any, operand: int) -> Rule | None:
    """The factoring rule for one operand of an equation, or None."""
    make = RULES.get(eqn.primitive.name)
    return None if make is None else make(eqn, operand)


def _complement(ndim: int, dims: Sequence[int]) -> tuple[int, ...]:
    return tuple(d for d in range(ndim) if d not in dims)


def _features_last(array: Array, num_levels: int, spec: Sequence[int]) -> Array:
    """Brings what follows n and the scans into the order batch, positions, features."""
    batch, feature, *positions = (1 + num_levels + d for d in spec)
    return array.transpose(*range(1 + num_levels), batch, *positions, feature)


def _split(array: Array, groups: int) -> Array:
    """Splits the last axis into groups × features."""
    return array.reshape(*array.shape[:-1], groups, array.shape[-1] // groups)
