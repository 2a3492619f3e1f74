"""Pulls factors back from computed values to the parameters they were computed from.

Between a parameter and the place where it meets an example stand operations on parameters alone: a
transpose, a cast, a mask, a scale, the product of two low-rank matrices. They are recorded once, as
a `Tape`; a factor at a value is then pulled back through them one at a time. An operation that only
moves or scales entries leaves a factor a factor. One without a rule stops it there: its gradients
are pulled back by the VJP of the rest, after they have been summed or formed.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, DropVar, Jaxpr, Literal, Var

from sgd_jax.per_example.factors import Dense, Factor, Outer, einsum, promote
from sgd_jax.per_example.layout import Axis, Layout
from sgd_jax.per_example.linearity import alone, open_jaxpr
from sgd_jax.per_example.rules import complement
from sgd_jax.typing import Array


@dataclasses.dataclass(eq=False)
class Slot:
    """A value on the tape."""

    number: int
    value: Any
    leaves: frozenset[int] = frozenset()
    """The parameters it depends on differentiably."""
    varies: frozenset[int] | None = None
    """The dimensions along which its entries may differ; None for all."""
    static: np.ndarray | None = None
    """Its value, if it is a small integer array known while tracing."""
    made_by: "Entry | None" = None

    def varying(self) -> frozenset[int]:
        """Returns the dimensions along which its entries may differ."""
        dims = range(np.ndim(self.value)) if self.varies is None else self.varies
        return frozenset(d for d in dims if np.shape(self.value)[d] != 1)


@dataclasses.dataclass(eq=False)
class Entry:
    """An equation on the tape."""

    name: str
    params: Mapping[str, Any]
    call: Callable[..., Sequence[Any]]
    inputs: list[Slot]
    outputs: list[Slot]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Landed:
    """Where the factors of one site went: to parameters, and to values where they stopped."""

    leaves: dict[int, list[Factor]]
    stopped: dict[int, list[Factor]]
    """By the number of the slot."""


class Tape:
    """What was computed from parameters alone, in order."""

    def __init__(self, jaxpr: ClosedJaxpr, leaves: Sequence[Array]) -> None:
        self.jaxpr = jaxpr
        self.slots: list[Slot] = []
        inputs = [self._add(leaf, frozenset([k])) for k, leaf in enumerate(leaves)]
        self.inputs = inputs
        self.outputs = self._record(jaxpr.jaxpr, jaxpr.consts, inputs)

    def pull(self, slot: Slot, factor: Factor) -> Landed:
        """Pulls a factor of the value in a slot back as far as rules carry it."""
        waiting: dict[int, list[Factor]] = {slot.number: [factor]}
        landed = Landed({}, {})
        while waiting:
            number = max(waiting)
            factors, slot = waiting.pop(number), self.slots[number]
            if slot.made_by is None:
                (leaf,) = slot.leaves
                landed.leaves.setdefault(leaf, []).extend(factors)
                continue
            for factor in factors:
                pulled = _pull_through(slot.made_by, slot, factor)
                if pulled is None:
                    landed.stopped.setdefault(number, []).append(factor)
                    continue
                for source, factors_of_source in pulled:
                    waiting.setdefault(source.number, []).extend(factors_of_source)
        return landed

    def _add(self, value: Any, leaves: frozenset[int] = frozenset()) -> Slot:
        slot = Slot(len(self.slots), value, leaves)
        self.slots.append(slot)
        return slot

    def _constant(self, value: Any) -> Slot:
        slot = self._add(value)
        slot.varies = frozenset() if np.ndim(value) == 0 else None
        if not isinstance(value, jax.core.Tracer) and _is_small_integer(value):
            slot.static = np.asarray(value)
        return slot

    def _record(self, jaxpr: Jaxpr, consts: Sequence[Any], inputs: Sequence[Slot]) -> list[Slot]:
        known: dict[Any, Slot] = dict(zip(jaxpr.invars, inputs, strict=True))
        known.update((v, self._constant(c)) for v, c in zip(jaxpr.constvars, consts, strict=True))

        def read(atom: Any) -> Slot:
            return self._constant(atom.val) if isinstance(atom, Literal) else known[atom]

        for eqn in jaxpr.eqns:
            operands = [read(a) for a in eqn.invars]
            if eqn.primitive.name in ("jit", "pjit"):
                inner, inner_consts = open_jaxpr(eqn.params["jaxpr"])
                outputs = self._record(inner, inner_consts, operands)
            else:
                outputs = self._evaluate(jaxpr, eqn, operands)
            known.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _evaluate(self, jaxpr: Jaxpr, eqn: Any, operands: list[Slot]) -> list[Slot]:
        call = _as_call(jaxpr, eqn)
        values = call(*(s.value for s in operands))
        statics: Sequence[Any] = [None] * len(values)
        if all(s.static is not None and not s.leaves for s in operands):
            if eqn.primitive.name in _VARYING:
                statics = [operands[0].static]
            else:
                with jax.ensure_compile_time_eval():
                    statics = call(*(s.static for s in operands))
        leaves = frozenset().union(*(s.leaves for s in operands))
        entry = Entry(eqn.primitive.name, eqn.params, call, operands, [])
        for value, static in zip(values, statics, strict=True):
            flows = (
                jnp.issubdtype(value.dtype, jnp.inexact) and eqn.primitive.name != "stop_gradient"
            )
            slot = self._constant(value)
            slot.leaves = leaves if flows else frozenset()
            slot.varies = _varying(entry, value)
            slot.made_by = entry if slot.leaves else None
            if static is not None and _is_small_integer(static):
                slot.static = np.asarray(static)
            entry.outputs.append(slot)
        return entry.outputs


_VARYING = frozenset(("pvary", "pcast"))
"""What marks a value as varying over a mesh: the value is the same."""


def _is_small_integer(value: Any) -> bool:
    dtype = jnp.result_type(value)
    is_integer = jnp.issubdtype(dtype, jnp.integer) or dtype == jnp.bool_
    return is_integer and np.size(value) <= 1 << 12


def _as_call(jaxpr: Any, eqn: Any) -> Callable[..., Sequence[Any]]:
    """Returns an equation as a function of all its operands, literals among them."""
    variables = list(dict.fromkeys(a for a in eqn.invars if isinstance(a, Var)))
    outputs: list[Any] = list(eqn.outvars)
    function = alone(jaxpr, eqn, variables, [v for v in outputs if not isinstance(v, DropVar)])
    first = [next(k for k, a in enumerate(eqn.invars) if a is v) for v in variables]

    def call(*values: Any) -> Sequence[Any]:
        found = iter(function(*(values[k] for k in first)))
        return [_zeros_like(v.aval) if isinstance(v, DropVar) else next(found) for v in outputs]

    return call


def _zeros_like(aval: Any) -> Array:
    return jnp.zeros(aval.shape, aval.dtype)


def _varying(entry: Entry, value: Any) -> frozenset[int] | None:
    """Returns the dimensions along which an output may vary, None if nothing is known."""
    if np.ndim(value) == 0:
        return frozenset()
    if entry.name == "broadcast_in_dim":
        places = entry.params["broadcast_dimensions"]
        return frozenset(places[d] for d in entry.inputs[0].varying())
    same_shape = all(np.shape(s.value) in ((), np.shape(value)) for s in entry.inputs)
    if same_shape and entry.name in _ELEMENTWISE | _IDENTITY and entry.inputs:
        return frozenset().union(*(s.varying() for s in entry.inputs))
    return None


# Rules: each takes an entry, the slot of the output that holds the factor, the operand's position
# and the factor, and returns the factors of that operand, or None.

_Pull = Callable[[Entry, Slot, int, Factor], "list[Factor] | None"]


def _pull_through(
    entry: Entry, output: Slot, factor: Factor
) -> list[tuple[Slot, list[Factor]]] | None:
    """Returns the factors of every differentiable operand, or None if one of them has no rule."""
    rule = _RULES.get(entry.name)
    pulled = []
    for position, source in enumerate(entry.inputs):
        if not source.leaves:
            continue
        factors = rule(entry, output, position, factor) if rule else None
        if factors is None:
            factors = _materialized(entry, output, position, factor)
        if factors is None:
            return None
        pulled.append((source, factors))
    return pulled


def _materialized(entry: Entry, output: Slot, position: int, factor: Factor) -> list[Factor] | None:
    """Pulls materialized gradients back one by one, if that does not make them larger."""
    if not isinstance(factor, Dense) or output.value.size == 1 or entry.name in _GROWS:
        return None
    active = [s.value.size for s in entry.inputs if s.leaves]
    if sum(active) > output.value.size:
        return None
    which = entry.outputs.index(output)

    def function(moved: Array) -> Array:
        values = [moved if k == position else s.value for k, s in enumerate(entry.inputs)]
        return entry.call(*values)[which]

    _, pull = jax.vjp(function, entry.inputs[position].value)
    dtype = output.value.dtype
    return [Dense(jax.vmap(lambda value: pull(value)[0])(factor.values.astype(dtype)))]


_GROWS = frozenset(("custom_vjp_call", "custom_jvp_call", "while", "scan", "cond"))
"""Calls whose derivative is pulled back once, after summing, and not for every example."""


def _identity(entry: Entry, output: Slot, position: int, factor: Factor) -> list[Factor] | None:
    """The operand at the place of the output: unchanged, cast, negated or broadcast."""
    if entry.name == "optimization_barrier" and entry.outputs[position] is not output:
        return []
    source = entry.inputs[position].value
    if jnp.iscomplexobj(output.value) and not jnp.iscomplexobj(source):
        factor = _real(factor)
    elif jnp.iscomplexobj(source) and not jnp.iscomplexobj(output.value):
        return None
    if entry.name == "neg" or (entry.name == "sub" and position == 1):
        factor = scaled(factor, -1.0)
    return _unbroadcast(factor, output.value.shape, source.shape)


def _real(factor: Factor) -> Factor:
    """The real part of a factor: Re δ ⊗ Re a − Im δ ⊗ Im a."""
    if not isinstance(factor, Outer):
        return Dense(factor.materialize().real)
    if factor.scale is not None or factor.is_indexed:
        return (
            dataclasses.replace(factor, right=factor.right.real)
            if (factor.is_indexed and factor.scale is None)
            else Dense(factor.materialize().real)
        )
    left = jnp.concatenate([factor.left.real, -factor.left.imag], axis=2)
    right = jnp.concatenate([factor.right.real, factor.right.imag], axis=2)
    return Outer(left, right, factor.layout)


def scaled(factor: Factor, number: Any) -> Factor:
    """Returns a factor times a number."""
    if isinstance(factor, Outer):
        return dataclasses.replace(factor, right=_product(factor.right, jnp.asarray(number)))
    return Dense(_product(factor.materialize(), jnp.asarray(number)))


def _relaid(change: Callable[[Entry, Slot, int], Callable[[Layout], Layout | None]]) -> _Pull:
    """A rule that moves entries: arrays by the VJP, factors by their layout alone."""

    def pull(entry: Entry, output: Slot, position: int, factor: Factor) -> list[Factor] | None:
        if not isinstance(factor, Outer):
            return None
        layout = change(entry, output, position)(factor.layout)
        return None if layout is None else [dataclasses.replace(factor, layout=layout)]

    return pull


def _reshape(entry: Entry, output: Slot, position: int) -> Callable[[Layout], Layout | None]:
    return lambda layout: layout.reshaped(entry.inputs[position].value.shape)


def _transpose(entry: Entry, output: Slot, position: int) -> Callable[[Layout], Layout | None]:
    permutation = entry.params["permutation"]
    inverse = [permutation.index(d) for d in range(len(permutation))]
    return lambda layout: layout.transposed(inverse)


def _slice(entry: Entry, output: Slot, position: int) -> Callable[[Layout], Layout | None]:
    shape, starts = entry.inputs[0].value.shape, entry.params["start_indices"]
    strides = entry.params["strides"] or (1,) * len(shape)
    if any(full % stride for full, stride in zip(shape, strides, strict=True)):
        return lambda layout: None
    # Every entry of a stride is a window of one in an axis of its own.
    opened = [
        s for full, stride in zip(shape, strides, strict=True) for s in (full // stride, stride)
    ]
    single = [s for size in output.value.shape for s in (size, 1)]
    offsets = [
        s
        for start, stride in zip(starts, strides, strict=True)
        for s in (start // stride, start % stride)
    ]

    def change(layout: Layout) -> Layout | None:
        windowed = layout.reshaped(single).windowed(opened, offsets)
        return None if windowed is None else windowed.reshaped(shape)

    return change


def _split(entry: Entry, output: Slot, position: int) -> Callable[[Layout], Layout | None]:
    axis, sizes = entry.params["axis"], entry.params["sizes"]
    start = sum(sizes[: entry.outputs.index(output)])
    shape = entry.inputs[0].value.shape
    starts = [start if d == axis else 0 for d in range(len(shape))]
    return lambda layout: layout.windowed(shape, starts)


def _dynamic_slice(entry: Entry, output: Slot, position: int) -> Callable[[Layout], Layout | None]:
    shape, sizes = entry.inputs[0].value.shape, output.value.shape
    known = [s.static for s in entry.inputs[1:] if s.static is not None]
    if position != 0 or len(known) < len(shape):
        return lambda layout: None
    starts = [
        min(max(int(start), 0), full - size)
        for start, full, size in zip(known, shape, sizes, strict=True)
    ]
    return lambda layout: layout.windowed(shape, starts)


def _gather(entry: Entry, output: Slot, position: int, factor: Factor) -> list[Factor] | None:
    """Consecutive slices along the first dimension, as a loop over stacked layers takes them."""
    numbers, sizes = entry.params["dimension_numbers"], entry.params["slice_sizes"]
    source, index = entry.inputs[0].value, entry.inputs[1].static
    if not isinstance(factor, Outer) or position != 0 or index is None:
        return None
    dims = range(1, source.ndim)
    takes_slices = (
        not numbers.operand_batching_dims
        and all(sizes[d] == source.shape[d] for d in dims)
        and sizes[0] == 1
        and index.ndim == 2
        and tuple(numbers.offset_dims) == tuple(range(1, output.value.ndim))
        and 0 in numbers.start_index_map
    )
    if not takes_slices:
        return None
    column = numbers.start_index_map.index(0)
    others = np.delete(index, column, axis=1)
    if np.any(others):
        return None
    first, layers = index[:, column], np.clip(index[:, column], 0, source.shape[0] - 1)
    layers = layers if np.array_equal(first, layers) else np.empty(0, int)
    count = len(layers)
    steps = np.diff(layers)
    flat = factor.layout.reshaped((count, *source.shape[1:])) if count else None
    if flat is None or math.prod(output.value.shape) != count * math.prod(source.shape[1:]):
        return None
    if count > 1 and np.all(steps == -1):
        flipped = _flipped(dataclasses.replace(factor, layout=flat), [0])
        if flipped is None:
            return None
        factor, flat, layers = flipped, flipped.layout, layers[::-1]
    elif count > 1 and not np.all(steps == 1):
        return None
    layout = flat.windowed(source.shape, [int(layers[0])] + [0] * len(dims))
    return None if layout is None else [dataclasses.replace(factor, layout=layout)]


def _flipped(factor: Outer, dims: Sequence[int]) -> Outer | None:
    """Reverses a factor along dimensions that are whole axes of one part."""
    aligned = factor.layout.aligned()
    if aligned is None or factor.is_indexed:
        return None
    layout, axes_of = aligned
    factor = dataclasses.replace(factor, layout=layout)
    for d in dims:
        for axis in axes_of[d]:
            if layout.axes[axis].size != layout.axes[axis].full:
                return None
            factor = _on_axis(factor, axis, lambda x, at: jnp.flip(x, at))
    return factor


def _on_axis(factor: Outer, axis: int, change: Callable[[Array, int], Array]) -> Outer:
    """Changes the arrays of a factor along one axis of its layout; the layout is left alone."""
    group, left, right = factor.layout.parts()
    arrays = {"left": factor.left, "right": factor.right, "scale": factor.scale}
    places = {
        "left": {**dict.fromkeys(group, (1, group)), **dict.fromkeys(left, (3, left))},
        "right": {**dict.fromkeys(group, (1, group)), **dict.fromkeys(right, (3, right))},
        "scale": {
            **dict.fromkeys(group, (0, group)),
            **dict.fromkeys(left, (1, left)),
            **dict.fromkeys(right, (2, right)),
        },
    }
    for name, array in arrays.items():
        if array is None or axis not in places[name]:
            continue
        at, part = places[name][axis]
        sizes = factor.layout.part_shape(part)
        opened = array.reshape(*array.shape[:at], *sizes, *array.shape[at + 1 :])
        changed = change(opened, at + part.index(axis))
        shape = changed.shape[at : at + len(part)]
        arrays[name] = changed.reshape(*array.shape[:at], math.prod(shape), *array.shape[at + 1 :])
    return dataclasses.replace(factor, **arrays)


def _reverse(entry: Entry, output: Slot, position: int, factor: Factor) -> list[Factor] | None:
    if not isinstance(factor, Outer):
        return None
    flipped = _flipped(factor, entry.params["dimensions"])
    return None if flipped is None else [flipped]


def _windows(starts: Sequence[int], shape: Sequence[int], factor: Factor) -> list[Factor] | None:
    """The part of a factor that lies in the window of ``shape`` from ``starts`` on."""
    if not isinstance(factor, Outer):
        window = tuple(slice(s, s + z) for s, z in zip(starts, shape, strict=True))
        return [Dense(factor.materialize()[(slice(None), *window)])]
    if factor.is_indexed:
        return None
    aligned = factor.layout.aligned()
    if aligned is None:
        return None
    layout, axes_of = aligned
    factor = dataclasses.replace(factor, layout=layout)
    for d, (start, size) in enumerate(zip(starts, shape, strict=True)):
        layout = factor.layout
        if size == layout.shape[d]:
            continue
        if not axes_of[d]:
            return None
        axis, *rest = axes_of[d]
        inner = math.prod(layout.axes[a].full for a in rest)
        if start % inner or size % inner:
            return None
        start, size = start // inner, size // inner
        window = layout.axes[axis]
        low, high = max(start, window.start), min(start + size, window.start + window.size)
        if low >= high:
            return []
        offset = low - window.start
        factor = _on_axis(
            factor,
            axis,
            lambda x, at, o=offset, n=high - low: jax.lax.slice_in_dim(x, o, o + n, axis=at),
        )
        axes = list(layout.axes)
        axes[axis] = Axis(size, low - start, high - low)
        new_shape = tuple(size * inner if k == d else s for k, s in enumerate(layout.shape))
        layout = dataclasses.replace(layout, axes=tuple(axes), shape=new_shape)
        factor = dataclasses.replace(factor, layout=layout)
    return [factor]


def _concatenate(entry: Entry, output: Slot, position: int, factor: Factor) -> list[Factor] | None:
    axis = entry.params["dimension"]
    sizes = [s.value.shape[axis] for s in entry.inputs]
    starts = [0] * output.value.ndim
    starts[axis] = sum(sizes[:position])
    return _windows(starts, entry.inputs[position].value.shape, factor)


def _pad(entry: Entry, output: Slot, position: int, factor: Factor) -> list[Factor] | None:
    config = entry.params["padding_config"]
    if position != 0 or any(low < 0 or high < 0 or inner for low, high, inner in config):
        return None
    return _windows([low for low, _, _ in config], entry.inputs[0].value.shape, factor)


def _elementwise(entry: Entry, output: Slot, position: int, factor: Factor) -> list[Factor] | None:
    """A function of entries: gradients times its derivative, entry by entry."""
    values, shape = [s.value for s in entry.inputs], output.value.shape
    if entry.name == "mul" or (entry.name == "div" and position == 0):
        other = entry.inputs[1 - position]
        derivative = other.value if entry.name == "mul" else 1 / other.value
        varies = other.varying()
    elif any(jnp.iscomplexobj(v) for v in values):
        return None
    else:

        def function(moved: Array) -> Array:
            return entry.call(*(moved if k == position else v for k, v in enumerate(values)))[0]

        source = values[position]
        _, derivative = jax.jvp(function, (source,), (jnp.ones_like(source),))
        varies = frozenset(range(len(shape)))
    if jnp.shape(derivative) != shape:
        derivative = jax.lax.broadcast_in_dim(
            derivative, shape, range(len(shape) - jnp.ndim(derivative), len(shape))
        )
    times = _times(factor, derivative, varies)
    if times is None:
        return None
    return _unbroadcast(times[0], shape, values[position].shape)


def _custom(entry: Entry, output: Slot, position: int, factor: Factor) -> list[Factor] | None:
    """A call with its own derivative rule, if its pullback acts entry by entry."""
    source = entry.inputs[position].value
    if len(entry.outputs) > 1 or source.shape != output.value.shape:
        return None

    def function(moved: Array) -> Array:
        values = [moved if k == position else s.value for k, s in enumerate(entry.inputs)]
        return entry.call(*values)[0]

    _, pull = jax.vjp(function, source)
    like = output.value
    pullback = jax.make_jaxpr(pull)(jax.ShapeDtypeStruct(like.shape, like.dtype)).jaxpr
    if jnp.iscomplexobj(like) or not _acts_entry_by_entry(pullback, like.shape):
        return None
    (derivative,) = pull(jnp.ones_like(like))
    return _times(factor, derivative, frozenset(range(like.ndim)))


def _acts_entry_by_entry(jaxpr: Any, shape: tuple[int, ...]) -> bool:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("jit", "pjit"):
            if not _acts_entry_by_entry(open_jaxpr(eqn.params["jaxpr"])[0], shape):
                return False
            continue
        fills = eqn.primitive.name == "broadcast_in_dim" and eqn.invars[0].aval.shape == ()
        known = eqn.primitive.name in _ELEMENTWISE | _IDENTITY | _COMPARISONS or fills
        if not known or any(v.aval.shape not in ((), shape) for v in eqn.outvars):
            return False
    return True


def _times(factor: Factor, array: Array, varies: frozenset[int]) -> list[Factor] | None:
    """A factor times an array, entry by entry, that varies along some dimensions."""
    if not isinstance(factor, Outer):
        return [Dense(_product(factor.materialize(), array))]
    aligned = factor.layout.aligned()
    if aligned is None:
        return None
    layout, axes_of = aligned
    touched = {a for d in varies for a in axes_of[d] if layout.axes[a].size > 1}
    matrices = layout.from_array(array)  # (h, a, b)
    if not touched & set(layout.left) or not touched & set(layout.right):
        in_left = bool(touched & set(layout.left))
        if in_left and factor.is_indexed:
            column = matrices[:, :, 0]  # (h, a)
            picked = jax.vmap(lambda index: jnp.take_along_axis(column, index, axis=1))(
                jnp.maximum(factor.left, 0).reshape(*factor.left.shape[:2], -1)
            )
            return [dataclasses.replace(factor, right=_product(factor.right, picked[..., None]))]
        if in_left:
            left = _product(factor.left, matrices[None, :, None, :, 0])
            return [dataclasses.replace(factor, left=left)]
        right = _product(factor.right, matrices[None, :, None, 0])
        return [dataclasses.replace(factor, right=right)]
    scale = matrices if factor.scale is None else factor.scale * matrices
    return [dataclasses.replace(factor, scale=scale)]


def _product(x: Array, scale: Array) -> Array:
    """Returns x times a scale in the precision of x, complex if the scale is."""
    dtype = promote(x.dtype, jnp.complex64) if jnp.iscomplexobj(scale) else x.dtype
    scale = jnp.expand_dims(scale, range(x.ndim - scale.ndim))
    return x.astype(dtype) * scale.astype(dtype)


def _broadcast(entry: Entry, output: Slot, position: int, factor: Factor) -> list[Factor] | None:
    """Sums over the dimensions that broadcasting made."""
    source, shape = entry.inputs[0].value, output.value.shape
    places = entry.params["broadcast_dimensions"]
    kept = {d for k, d in enumerate(places) if source.shape[k] == shape[d]}
    summed = [d for d in range(len(shape)) if d not in kept and shape[d] != 1]
    return _summed(factor, summed, source.shape)


def _unbroadcast(
    factor: Factor, shape: Sequence[int], source: Sequence[int]
) -> list[Factor] | None:
    """Sums over the dimensions along which an operand of shape ``source`` was repeated."""
    lead = len(shape) - len(source)
    summed = [d for d, s in enumerate(shape) if s != 1 and (d < lead or source[d - lead] == 1)]
    return _summed(factor, summed, tuple(source)) if summed or lead else [factor]


def _tile(entry: Entry, output: Slot, position: int, factor: Factor) -> list[Factor] | None:
    """Sums over the repetitions."""
    source, reps = entry.inputs[0].value.shape, entry.params["reps"]
    shape = [size for pair in zip(reps, source, strict=True) for size in pair]
    summed = [2 * d for d, r in enumerate(reps) if r != 1]
    if isinstance(factor, Outer):
        factor = dataclasses.replace(factor, layout=factor.layout.reshaped(shape))
    else:
        values = factor.materialize()
        factor = Dense(values.reshape(values.shape[0], *shape))
    return _summed(factor, summed, source)


def _summed(factor: Factor, dims: Sequence[int], shape: Sequence[int]) -> list[Factor] | None:
    """A factor summed over dimensions, as one of an array of ``shape``."""
    if not isinstance(factor, Outer):
        values = jnp.sum(factor.materialize(), axis=[1 + d for d in dims])
        return [Dense(values.reshape(values.shape[0], *shape))]
    if not dims:
        return [dataclasses.replace(factor, layout=factor.layout.reshaped(shape))]
    aligned = factor.layout.aligned()
    if aligned is None or factor.is_indexed:
        return None
    layout, axes_of = aligned
    factor = dataclasses.replace(factor, layout=layout)
    summed = [a for d in dims for a in axes_of[d]]
    gone = {a for a in summed if layout.axes[a].size > 1}
    if factor.scale is not None:
        unscaled = _without_scale(factor, gone)
        if unscaled is None:
            return None
        factor = unscaled
    for axis in sorted(gone):
        if axis in layout.group:
            factor = _group_to_terms(factor, axis)
        else:
            factor = _on_axis(factor, axis, lambda x, at: jnp.sum(x, axis=at, keepdims=True))
        axes = list(factor.layout.axes)
        axes[axis] = Axis(1, 0, 1)
        factor = dataclasses.replace(
            factor, layout=dataclasses.replace(factor.layout, axes=tuple(axes))
        )
    kept = [a for a in range(len(layout.axes)) if a not in summed]
    factor = dataclasses.replace(factor, layout=factor.layout.reordered(tuple(shape), kept))
    _, a, b = factor.layout.sizes()
    return [Dense(factor.materialize()) if min(a, b) == 1 else factor]


def _without_scale(factor: Outer, gone: set[int]) -> Outer | None:
    """The sum over one whole side of a scaled factor, spread over that side: no scale is left.

    Σ_k scale_jk left_j right_k = left_j (scale right)_j.
    """
    layout, scale = factor.layout, factor.scale
    left, right = ({a for a in p if layout.axes[a].size > 1} for p in (layout.left, layout.right))
    if scale is not None and right <= gone:
        applied = einsum("hab,nhtb->nhta", scale, factor.right).astype(factor.left.dtype)
        ones = jnp.ones_like(factor.right) / factor.right.shape[-1]
        return Outer(factor.left * applied, ones, layout)
    if left <= gone:
        swapped = _without_scale(factor.swapped(), gone)
        return None if swapped is None else swapped.swapped()
    return None


def _group_to_terms(factor: Outer, axis: int) -> Outer:
    """The same sum with an axis of the group, which is summed over, among the terms."""
    group = factor.layout.group
    sizes = factor.layout.part_shape(group)
    at = group.index(axis)

    def move(x: Array) -> Array:
        opened = x.reshape(x.shape[0], *sizes, *x.shape[2:])
        moved = jnp.moveaxis(opened, 1 + at, len(group))  # before the terms
        rest = math.prod(sizes) // sizes[at]
        return moved.reshape(x.shape[0], rest, sizes[at] * x.shape[2], x.shape[3])

    return Outer(move(factor.left), move(factor.right), factor.layout)


def _reduce_sum(entry: Entry, output: Slot, position: int, factor: Factor) -> list[Factor] | None:
    """Gradients of a sum: the same for every entry that was summed, as an outer product of ones."""
    source, axes = entry.inputs[0].value, tuple(entry.params["axes"])
    if all(source.shape[d] == 1 for d in axes):
        return _summed(factor, (), source.shape)
    if not isinstance(factor, Dense):
        return None
    rest = complement(source.ndim, axes)
    if output.value.size == 1:
        return None  # one number an example: pulled back, it stays one number
    n = factor.values.shape[0]
    left = factor.values.reshape(n, 1, 1, math.prod(factor.values.shape[1:]))
    ones = jnp.ones((n, 1, 1, math.prod(source.shape[d] for d in axes)), left.dtype)
    return [Outer(left, ones, Layout.of(source.shape, (), rest, axes))]


def _cumsum(entry: Entry, output: Slot, position: int, factor: Factor) -> list[Factor] | None:
    """A running sum along a whole axis of one side: the running sum from its other end."""
    if not isinstance(factor, Outer) or factor.is_indexed or factor.scale is not None:
        return None
    aligned = factor.layout.aligned()
    if aligned is None or len(aligned[1][entry.params["axis"]]) != 1:
        return None
    layout, axes_of = aligned
    (axis,) = axes_of[entry.params["axis"]]
    if layout.axes[axis].size != layout.axes[axis].full or axis in layout.group:
        return None
    reverse = not entry.params["reverse"]
    factor = dataclasses.replace(factor, layout=layout)
    return [_on_axis(factor, axis, lambda x, at: jax.lax.cumsum(x, at, reverse=reverse))]


def _dot(entry: Entry, output: Slot, position: int, factor: Factor) -> list[Factor] | None:
    """A product of two computed matrices: one side of the factor is multiplied by the other one.

    With v = A B, g_A = g_v Bᵀ and g_B = Aᵀ g_v, batch by batch.
    """
    contract, batch = entry.params["dimension_numbers"]
    if not isinstance(factor, Outer) or factor.is_indexed or factor.scale is not None:
        return None
    aligned = factor.layout.aligned()
    if aligned is None:
        return None
    layout, axes_of = aligned
    mine, theirs = entry.inputs[position].value, entry.inputs[1 - position].value
    my_batch, my_contract = batch[position], contract[position]
    their_batch, their_contract = batch[1 - position], contract[1 - position]
    free = complement(mine.ndim, (*my_batch, *my_contract))
    other_free = complement(theirs.ndim, (*their_batch, *their_contract))
    counts = [len(my_batch), len(free if position == 0 else other_free)]
    ends = [0, counts[0], sum(counts), output.value.ndim]
    parts = [
        [a for d in range(start, end) for a in axes_of[d]]
        for start, end in itertools.pairwise(ends)
    ]
    group, my_axes, their_axes = parts if position == 0 else (parts[0], parts[2], parts[1])
    factor = dataclasses.replace(factor, layout=layout)
    if set(layout.right) != set(their_axes):
        factor, layout = factor.swapped(), layout.swapped()
    if [*map(list, layout.parts())] != [group, my_axes, their_axes]:
        return None
    if any(layout.axes[a].size != layout.axes[a].full for a in (*group, *their_axes)):
        return None

    def size(dims: Sequence[int]) -> int:
        return math.prod(theirs.shape[d] for d in dims)

    matrix = theirs.transpose(*their_batch, *other_free, *their_contract)
    matrix = matrix.reshape(size(their_batch), size(other_free), size(their_contract))
    right = einsum("nhtb,hbk->nhtk", factor.right, matrix).astype(factor.dtype)
    order = [*my_batch, *free, *my_contract]
    axes = [layout.axes[a] for a in (*group, *my_axes)]
    axes += [Axis(mine.shape[d], 0, mine.shape[d]) for d in my_contract]
    ends = [0, len(group), len(group) + len(my_axes), len(axes)]
    spans = (tuple(range(*pair)) for pair in itertools.pairwise(ends))
    pulled = Layout(tuple(mine.shape[d] for d in order), tuple(axes), *spans)
    place = pulled.transposed([order.index(d) for d in range(mine.ndim)])
    return None if place is None else [Outer(factor.left, right, place)]


_IDENTITY = frozenset(
    [
        "convert_element_type",
        "copy",
        "copy_p",
        "neg",
        "add",
        "add_any",
        "sub",
        "name",
        "reduce_precision",
        "optimization_barrier",
        "sharding_constraint",
    ]
)
_ELEMENTWISE = frozenset(
    [
        "mul",
        "div",
        "pow",
        "integer_pow",
        "max",
        "min",
        "select_n",
        "exp",
        "exp2",
        "log",
        "log1p",
        "expm1",
        "tanh",
        "logistic",
        "sqrt",
        "rsqrt",
        "cbrt",
        "sin",
        "cos",
        "tan",
        "abs",
        "square",
        "erf",
        "erfc",
        "clamp",
        "asinh",
        "acosh",
        "atanh",
        "sinh",
        "cosh",
        "atan",
        "rem",
        "sign",
    ]
)
_COMPARISONS = frozenset(("lt", "le", "gt", "ge", "eq", "ne", "and", "or", "not", "is_finite"))

_RULES: dict[str, _Pull] = {
    **dict.fromkeys(_IDENTITY, _identity),
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(("reshape", "squeeze", "expand_dims"), _relaid(_reshape)),
    "transpose": _relaid(_transpose),
    "slice": _relaid(_slice),
    "split": _relaid(_split),
    "dynamic_slice": _relaid(_dynamic_slice),
    "gather": _gather,
    "rev": _reverse,
    "concatenate": _concatenate,
    "tile": _tile,
    "cumsum": _cumsum,
    "custom_jvp_call": _custom,
    "custom_vjp_call": _custom,
    "pad": _pad,
    "broadcast_in_dim": _broadcast,
    "reduce_sum": _reduce_sum,
    "dot_general": _dot,
}
"""How a factor passes back through an operation on parameters, by primitive name."""
