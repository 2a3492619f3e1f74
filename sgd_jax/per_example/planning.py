"""Finds the sites of a traced cost function and plans its `Program`."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, DropVar, Jaxpr, Literal, Var, jaxpr_as_fun

from sgd_jax.per_example.program import (
    Call,
    Cond,
    Linearized,
    Meeting,
    Plain,
    Program,
    Scan,
    Step,
)
from sgd_jax.per_example.sites import (
    ELEMENTWISE,
    Convolution,
    Kind,
    Level,
    Lift,
    Origin,
    Rows,
    Rule,
    Site,
    rule_for,
)
from sgd_jax.per_example.views import View, view_through

CONSTANT = Origin(Kind.CONSTANT)
EXAMPLE = Origin(Kind.EXAMPLE)


def plan(closed: ClosedJaxpr, origins: Sequence[Origin]) -> tuple[Program, list[Site]]:
    """Returns the program of a jaxpr whose first output is the cost, and its sites in order."""
    planner = _Planner()
    program = planner.plan(closed.jaxpr, origins, levels=())
    planner.lift_outputs(program, [0], ())
    return program, planner.sites


class _Planner:
    """Finds the sites of a jaxpr and of everything it calls."""

    def __init__(self) -> None:
        self.sites: list[Site] = []
        self._call_source = ""

    def plan(self, jaxpr: Jaxpr, origins: Sequence[Origin], levels: tuple[Level, ...]) -> Program:
        known = dict(zip(jaxpr.invars, origins, strict=True))
        unstacked = (False,) * len(levels)
        constant = dataclasses.replace(CONSTANT, stacked=unstacked)
        known.update((v, constant) for v in jaxpr.constvars)

        def origin(atom: Any) -> Origin:
            return constant if isinstance(atom, Literal) else known[atom]

        steps: list[Step] = []
        for eqn in jaxpr.eqns:
            operands = [origin(a) for a in eqn.invars]
            step, outputs = self._step(jaxpr, eqn, operands, levels)
            steps.append(step)
            known.update(zip(eqn.outvars, outputs, strict=True))
        return Program(jaxpr, steps, [origin(a) for a in jaxpr.outvars], {})

    def lift_outputs(
        self, program: Program, positions: Iterable[int], levels: tuple[Level, ...]
    ) -> None:
        """Makes parameter-only outputs depend on the example."""
        for position in positions:
            origin = program.outputs[position]
            if origin.kind is Kind.PARAMETER:
                aval = program.jaxpr.outvars[position].aval
                number = self._lift(origin, aval, levels, "output", "", True)
                program.lifted_outputs[position] = number

    def _step(
        self, jaxpr: Jaxpr, eqn: Any, operands: list[Origin], levels: tuple[Level, ...]
    ) -> tuple[Step, list[Origin]]:
        kinds = {o.kind for o in operands}
        if Kind.PARAMETER not in kinds or Kind.EXAMPLE not in kinds:
            return self._one_kind(jaxpr, eqn, operands, levels)
        walk = _WALKS.get(eqn.primitive.name)
        if walk is not None:
            return walk(self, jaxpr, eqn, operands, levels)
        parameters = [k for k, o in enumerate(operands) if o.kind is Kind.PARAMETER]
        if len(parameters) == 1 and (rule := rule_for(eqn, parameters[0])) is not None:
            return self._meet(jaxpr, eqn, operands, parameters[0], rule, levels)
        return self._lift_operands(jaxpr, eqn, operands, levels)

    def _one_kind(
        self, jaxpr: Jaxpr, eqn: Any, operands: list[Origin], levels: tuple[Level, ...]
    ) -> tuple[Step, list[Origin]]:
        """An equation in which no parameter meets the example."""
        kinds = {o.kind for o in operands}
        call, inputs, outputs = _as_function(jaxpr, eqn)
        step = Plain(call, inputs, outputs, {}, Kind.EXAMPLE in kinds)
        if Kind.EXAMPLE in kinds:
            return step, [EXAMPLE] * len(eqn.outvars)
        stacked = tuple(any(o.stacked[d] for o in operands) for d in range(len(levels)))
        leaves = frozenset().union(*(o.leaves for o in operands))
        results = []
        for k, variable in enumerate(eqn.outvars):
            flows = (
                Kind.PARAMETER in kinds
                and jnp.issubdtype(variable.aval.dtype, jnp.inexact)
                and eqn.primitive.name != "stop_gradient"
            )
            if not flows:
                results.append(Origin(Kind.CONSTANT, stacked=stacked))
                continue
            view = _shifted(eqn, operands) or _view(eqn, k, [o.view for o in operands])
            # A call of several parameters may return a view of one of them.
            shown = leaves if view is None else frozenset([view.leaf])
            results.append(Origin(Kind.PARAMETER, shown, view, stacked))
        return step, results

    def _meet(
        self,
        jaxpr: Jaxpr,
        eqn: Any,
        operands: list[Origin],
        operand: int,
        rule: Rule,
        levels: tuple[Level, ...],
    ) -> tuple[Step, list[Origin]]:
        origin, variable = operands[operand], eqn.invars[operand]
        if (
            isinstance(rule, Convolution)
            and origin.view is not None
            and rule.split_features(origin.view, variable.aval.shape) is None
        ):
            origin = dataclasses.replace(origin, view=None)
        call, inputs, outputs = _as_function(jaxpr, eqn)
        others = [a for k, a in enumerate(eqn.invars) if k != operand]
        is_slice = isinstance(rule, Rows) and eqn.primitive.name == "dynamic_slice"
        if isinstance(rule, Rows) and is_slice:
            others = [others[d] for d in rule.row_dims]
        number = self._add(
            Site(
                rule=rule,
                origin=origin,
                value=_shape(variable.aval),
                probe=_shape(eqn.outvars[0].aval),
                levels=_levels(levels, origin),
                primitive=eqn.primitive.name,
                source=self._source(eqn),
            )
        )
        return Meeting(call, inputs, outputs, variable, others, is_slice, number), [EXAMPLE]

    def _lift_operands(
        self, jaxpr: Jaxpr, eqn: Any, operands: list[Origin], levels: tuple[Level, ...]
    ) -> tuple[Step, list[Origin]]:
        name = eqn.primitive.name
        source = self._source(eqn)
        lifted: dict[Var, int] = {}
        for atom, origin in zip(eqn.invars, operands, strict=True):
            if origin.kind is Kind.PARAMETER and atom not in lifted:
                has_rule = name in ELEMENTWISE
                lifted[atom] = self._lift(origin, atom.aval, levels, name, source, has_rule)
        call, inputs, outputs = _as_function(jaxpr, eqn)
        return Plain(call, inputs, outputs, lifted, True), [EXAMPLE] * len(eqn.outvars)

    def _lift(
        self,
        origin: Origin,
        aval: Any,
        levels: tuple[Level, ...],
        primitive: str,
        source: str,
        has_rule: bool,
    ) -> int:
        shape = _shape(aval)
        levels = _levels(levels, origin)
        return self._add(Site(Lift(), origin, shape, shape, levels, primitive, source, has_rule))

    def _add(self, site: Site) -> int:
        self.sites.append(site)
        return len(self.sites) - 1

    def _source(self, eqn: Any) -> str:
        """The line of an equation; within a library's function, the line that called it."""
        return source_info_util.summarize(eqn.source_info) or self._call_source

    def _call(
        self, jaxpr: Jaxpr, eqn: Any, operands: list[Origin], levels: tuple[Level, ...]
    ) -> tuple[Step, list[Origin]]:
        inner, consts = _open(eqn.params["jaxpr" if "jaxpr" in eqn.params else "call_jaxpr"])
        outer, self._call_source = self._call_source, self._source(eqn)
        program = self.plan(inner, operands, levels)
        self._call_source = outer

        def wrap(body: Callable[..., Any]) -> Callable[..., Any]:
            if eqn.primitive.name not in _REMAT:
                return body
            policy, prevent_cse = eqn.params["policy"], eqn.params["prevent_cse"]
            return jax.checkpoint(body, policy=policy, prevent_cse=prevent_cse)

        step = Call(program, consts, list(eqn.invars), list(eqn.outvars), wrap)
        return step, program.outputs

    def _scan(
        self, jaxpr: Jaxpr, eqn: Any, operands: list[Origin], levels: tuple[Level, ...]
    ) -> tuple[Step, list[Origin]]:
        inner, consts = _open(eqn.params["jaxpr"])
        num_consts, num_carry = _scan_counts(eqn.params)
        length, first_x = eqn.params["length"], num_consts + num_carry
        fixed = frozenset(
            k for k in range(num_carry) if inner.outvars[k] is inner.invars[num_consts + k]
        )
        lifted = {}
        source = self._source(eqn)
        origins: list[Origin] = []
        for k, (atom, origin) in enumerate(zip(eqn.invars, operands, strict=True)):
            if num_consts <= k < first_x and k - num_consts not in fixed:
                if origin.kind is Kind.PARAMETER:
                    site = self._lift(origin, atom.aval, levels, "scan carry", source, True)
                    lifted[k - num_consts] = site
                origins.append(EXAMPLE)
            elif origin.kind is Kind.EXAMPLE:
                origins.append(EXAMPLE)
            elif k < first_x:
                origins.append(dataclasses.replace(origin, stacked=(*origin.stacked, False)))
            else:
                view = origin.view.unstack() if origin.view else None
                stacked = (*origin.stacked, True)
                origins.append(dataclasses.replace(origin, view=view, stacked=stacked))
        start = len(self.sites)
        inside = (*levels, Level(length, False))
        program = self.plan(inner, origins, inside)
        positions = [k for k in range(len(inner.outvars)) if k not in fixed]
        self.lift_outputs(program, positions, inside)
        sites = range(start, len(self.sites))
        depth = len(levels)
        step = Scan(
            program=program,
            consts=consts,
            inputs=list(eqn.invars),
            outputs=list(eqn.outvars),
            num_consts=num_consts,
            num_carry=num_carry,
            fixed_carry=fixed,
            lifted=lifted,
            sites=sites,
            stacked={s: self.sites[s].levels[depth].stacked for s in sites},
            length=length,
            reverse=eqn.params["reverse"],
            unroll=eqn.params["unroll"],
        )
        outputs = [
            operands[num_consts + k] if k in fixed else EXAMPLE for k in range(len(inner.outvars))
        ]
        return step, outputs

    def _cond(
        self, jaxpr: Jaxpr, eqn: Any, operands: list[Origin], levels: tuple[Level, ...]
    ) -> tuple[Step, list[Origin]]:
        opened = [_open(branch) for branch in eqn.params["branches"]]
        programs = [self.plan(inner, operands[1:], levels) for inner, _ in opened]
        for program in programs:
            self.lift_outputs(program, range(len(eqn.outvars)), levels)
        consts = [consts for _, consts in opened]
        step = Cond(programs, consts, list(eqn.invars), list(eqn.outvars))
        return step, [EXAMPLE] * len(eqn.outvars)

    def _custom_rule(
        self, jaxpr: Jaxpr, eqn: Any, operands: list[Origin], levels: tuple[Level, ...]
    ) -> tuple[Step, list[Origin]]:
        call, inputs, outputs = _as_function(jaxpr, eqn)
        by_variable = dict(zip(eqn.invars, operands, strict=True))
        tangents = [v for v in inputs if by_variable[v].kind is Kind.PARAMETER]
        differentiable = [
            k for k, v in enumerate(outputs) if jnp.issubdtype(v.aval.dtype, jnp.inexact)
        ]

        def tangent(*args: Any) -> list[Any]:
            values = dict(zip(inputs, args[: len(inputs)], strict=True))

            def function(*moved: Any) -> list[Any]:
                merged = {**values, **dict(zip(tangents, moved, strict=True))}
                results = call(*(merged[v] for v in inputs))
                return [results[k] for k in differentiable]

            at = tuple(values[v] for v in tangents)
            directions = tuple(args[len(inputs) :])
            if eqn.primitive.name == "custom_jvp_call":
                return jax.jvp(function, at, directions)[1]
            results, pullback = jax.vjp(function, *at)
            backward = jax.make_jaxpr(pullback)(results).jaxpr
            if not all(_zeros(backward, [True] * len(backward.invars))):
                raise ValueError("the backward rule may add something of its own")
            (moved,) = jax.linear_transpose(pullback, results)(directions)
            return moved

        shapes = [_shape(v.aval) for v in inputs]
        try:
            closed = jax.make_jaxpr(tangent)(*shapes, *(_shape(v.aval) for v in tangents))
        except (NotImplementedError, AssertionError, TypeError, ValueError):
            # A backward rule not linear in the cotangent (it clips it, or adds to it) has no J.
            return self._lift_operands(jaxpr, eqn, operands, levels)
        # Where the rule computes with the parameter itself, that counts as the example's: then its
        # tangent is parameter-only, and derivatives of any order are right.
        at = [EXAMPLE if v in tangents else by_variable[v] for v in inputs]
        program = self.plan(closed.jaxpr, [*at, *(by_variable[v] for v in tangents)], levels)
        self.lift_outputs(program, range(len(differentiable)), levels)
        step = Linearized(program, call, closed.consts, inputs, tangents, outputs, differentiable)
        return step, [EXAMPLE] * len(eqn.outvars)


_REMAT = ("remat", "remat2", "checkpoint")

_WALKS: Mapping[str, Any] = {
    **dict.fromkeys(
        ("jit", "pjit", "closed_call", "core_call", "core_closed_call", "xla_call", *_REMAT),
        _Planner._call,
    ),
    "scan": _Planner._scan,
    "cond": _Planner._cond,
    "custom_jvp_call": _Planner._custom_rule,
    "custom_vjp_call": _Planner._custom_rule,
}
"""The calls that are walked into, where parameters and examples enter both."""


def _as_function(jaxpr: Jaxpr, eqn: Any) -> tuple[Callable[..., Any], list[Var], list[Any]]:
    """One equation as a function of its variables, with those variables and its outputs."""
    inputs = list(dict.fromkeys(a for a in eqn.invars if not isinstance(a, Literal)))
    outputs = [v for v in eqn.outvars if not isinstance(v, DropVar)]
    alone = jaxpr.replace(
        constvars=[],
        invars=inputs,
        outvars=outputs,
        eqns=[eqn],
        debug_info=jaxpr.debug_info.with_unknown_names(),
    )
    return jaxpr_as_fun(ClosedJaxpr(alone, ())), inputs, outputs


def _zeros(jaxpr: Jaxpr, zeros: Sequence[bool]) -> list[bool]:
    """Which outputs of a jaxpr are surely zero where the marked inputs are."""
    known = dict(zip(jaxpr.invars, zeros, strict=True))

    def is_zero(atom: Any) -> bool:
        return not atom.val if isinstance(atom, Literal) else known.get(atom, False)

    for eqn in jaxpr.eqns:
        name, operands = eqn.primitive.name, [is_zero(a) for a in eqn.invars]
        if name in ("jit", "pjit"):
            outputs = _zeros(_open(eqn.params["jaxpr"])[0], operands)
        else:
            positions = _ZERO_WITH_ALL.get(name)
            zero = name in _ZERO_WITH_ANY and any(operands)
            zero = zero or (positions is not None and all(operands[positions]))
            outputs = [zero] * len(eqn.outvars)
        known.update(zip(eqn.outvars, outputs, strict=True))
    return [is_zero(atom) for atom in jaxpr.outvars]


_ZERO_WITH_ANY = frozenset(("mul", "dot_general", "conv_general_dilated"))
"""The primitives whose output is zero where any operand is."""

_ZERO_WITH_ALL: Mapping[str, slice] = {
    **dict.fromkeys(
        (
            *("add", "add_any", "sub", "neg", "concatenate", "pad", "transpose", "reshape"),
            *("squeeze", "broadcast_in_dim", "slice", "rev", "convert_element_type", "copy"),
            *("copy_p", "reduce_sum", "cumsum", "split", "real", "imag", "complex", "conj"),
        ),
        slice(None),
    ),
    **dict.fromkeys(("div", "gather", "dynamic_slice"), slice(1)),
    **dict.fromkeys(("scatter-add", "scatter_add"), slice(0, 3, 2)),
    "dynamic_update_slice": slice(2),
    "select_n": slice(1, None),
}
"""The primitives whose output is zero where all of these operands are."""


def _open(jaxpr: Any) -> tuple[Jaxpr, Sequence[Any]]:
    """A jaxpr and its constants, closed or not."""
    return (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, ClosedJaxpr) else (jaxpr, ())


def _scan_counts(params: Mapping[str, Any]) -> tuple[int, int]:
    """The numbers of constants and of carried values of a scan, in any supported JAX."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def _shifted(eqn: Any, operands: Sequence[Origin]) -> View | None:
    """The view that a sum of a view and a constant makes: a shift leaves gradients alone."""
    if eqn.primitive.name not in ("add", "sub"):
        return None
    for k, origin in enumerate(operands):
        same_shape = eqn.invars[k].aval.shape == eqn.outvars[0].aval.shape
        if origin.view is not None and operands[1 - k].kind is Kind.CONSTANT and same_shape:
            return origin.view.scaled(-1.0 if eqn.primitive.name == "sub" and k else 1.0)
    return None


def _view(eqn: Any, output: int, views: Sequence[View | None]) -> View | None:
    """The view an output of a parameter-only equation makes, seen through calls of jit."""
    if eqn.primitive.name not in ("jit", "pjit"):
        return view_through(eqn, views) if output == 0 else None
    inner, _ = _open(eqn.params["jaxpr"])
    known: dict[Any, View | None] = dict(zip(inner.invars, views, strict=True))
    for inside in inner.eqns:
        operands = [None if isinstance(a, Literal) else known.get(a) for a in inside.invars]
        for k, variable in enumerate(inside.outvars):
            known[variable] = _view(inside, k, operands)
    result = inner.outvars[output]
    return None if isinstance(result, Literal) else known.get(result)


def _levels(levels: tuple[Level, ...], origin: Origin) -> tuple[Level, ...]:
    return tuple(
        Level(level.length, stacked) for level, stacked in zip(levels, origin.stacked, strict=True)
    )


def _shape(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(
        aval.shape, aval.dtype, manual_axis_type=getattr(aval, "manual_axis_type", None)
    )
