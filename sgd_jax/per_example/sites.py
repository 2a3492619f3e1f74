"""Sites: where a parameter meets an example.

A value is *parameter-only* if it depends on parameters and not on the example. A site is an operand
of an equation: a parameter-only value v in an equation that also takes a value that depends on the
example. Example i's gradient with respect to v at that site is the transpose of the equation,
applied to the cotangent δ_i of its output; a rule knows what it looks like without forming it.
"""

import dataclasses
import enum
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax

from sgd_jax.per_example.factors import Factor
from sgd_jax.per_example.layout import Layout
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
    stacked: tuple[bool, ...] = ()
    """For each scan around it, outermost first: does it differ from iteration to iteration?"""


class Level(NamedTuple):
    """A scan around a site."""

    length: int
    stacked: bool
    """Whether each iteration has its own v, or all share one."""


class Rule(Protocol):
    """What one kind of meeting leaves of the per-example gradients.

    A rule is found by the name of the primitive; see `sgd_jax.per_example.rules`.
    """

    @property
    def name(self) -> str:
        """The words of `explain` for it."""
        ...

    @property
    def expands(self) -> bool:
        """Whether the factor is much larger than what is kept, as patches of an image are."""
        ...

    @classmethod
    def of(cls, eqn: Any, operand: int) -> "Rule | None":
        """Returns the rule for one operand of an equation, or None if it has none."""
        ...

    def keep(self, others: Sequence[Array], output: Array) -> Array | None:
        """Returns what to keep of the other operands, or of the output, for one example."""
        ...

    def factor(self, site: "Site", delta: Array, act: Any, value: Array) -> Factor:
        """Returns the factor of v.

        Args:
          site: the shapes.
          delta: δ of all examples, (n, scans..., *output).
          act: what `keep` returned, stacked likewise.
          value: v, (stacked scans..., *shape).
        """
        ...


@dataclasses.dataclass(frozen=True)
class Site:
    """A parameter-only value v meets an example here."""

    rule: Rule
    origin: Origin
    value: jax.ShapeDtypeStruct
    """v."""
    probe: jax.ShapeDtypeStruct
    """What gets a zero added to it, whose gradient is δ: the equation's output, or v itself."""
    levels: tuple[Level, ...]
    primitive: str
    source: str
    fallback: str = ""
    """Why v is lifted although it is no mere bias or scale; empty if it has a rule."""

    def stacked_lengths(self) -> tuple[int, ...]:
        """Returns the lengths of the scans in which every iteration has its own v."""
        return tuple(level.length for level in self.levels if level.stacked)

    def value_shape(self) -> tuple[int, ...]:
        """Returns the shape of v over all the scans that stack it."""
        return self.stacked_lengths() + self.value.shape

    def probe_shape(self) -> tuple[int, ...]:
        """Returns the shape of δ for one example: scans first."""
        return tuple(level.length for level in self.levels) + self.probe.shape

    def layout(
        self, group: Sequence[int] = (), left: Sequence[int] = (), right: Sequence[int] = ()
    ) -> Layout:
        """Returns the layout in the stacked v whose parts run over the given dimensions of v."""
        lead = len(self.stacked_lengths())
        group, left, right = ([lead + d for d in part] for part in (group, left, right))
        return Layout.of(self.value_shape(), [*range(lead), *group], left, right)

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
