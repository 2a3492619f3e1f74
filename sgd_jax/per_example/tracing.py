"""Finds the sites of a traced cost function and plans its `Program`."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, DropVar, Jaxpr, Literal, Var

from sgd_jax.per_example.interpreter import (
    Call,
    Cond,
    Linearized,
    Meeting,
    Plain,
    Program,
    Scan,
    Step,
)
from sgd_jax.per_example.linearity import (
    NOT_LINEAR,
    OPENS,
    alone,
    has_backward_rule,
    open_jaxpr,
    pullback_is_linear,
    scan_counts,
    transposable,
)
from sgd_jax.per_example.products import shape_of, with_products
from sgd_jax.per_example.rules import ELEMENTWISE, Lift, rule_for
from sgd_jax.per_example.sites import Kind, Level, Origin, Rule, Site

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
        jaxpr = with_products(jaxpr)
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
                number = self._lift(origin, aval, levels, "output", "")
                program.lifted_outputs[position] = number

    def _step(
        self, jaxpr: Jaxpr, eqn: Any, operands: list[Origin], levels: tuple[Level, ...]
    ) -> tuple[Step, list[Origin]]:
        kinds = {o.kind for o in operands}
        if Kind.PARAMETER not in kinds:
            return self._one_kind(jaxpr, eqn, operands, levels)
        if Kind.EXAMPLE not in kinds:
            if has_backward_rule(eqn) and not _is_linear(jaxpr, eqn):
                return self._lift_operands(
                    jaxpr, eqn, operands, levels, "its backward rule is not linear"
                )
            return self._one_kind(jaxpr, eqn, operands, levels)
        walk = _WALKS.get(eqn.primitive.name)
        if walk is not None:
            return self._walked(walk, jaxpr, eqn, operands, levels)
        parameters = [k for k, o in enumerate(operands) if o.kind is Kind.PARAMETER]
        if len(parameters) == 1 and (rule := rule_for(eqn, parameters[0])) is not None:
            return self._meet(jaxpr, eqn, operands, parameters[0], rule, levels)
        return self._lift_operands(jaxpr, eqn, operands, levels)

    def _walked(
        self,
        walk: Callable[..., tuple[Step, list[Origin]]],
        jaxpr: Jaxpr,
        eqn: Any,
        operands: list[Origin],
        levels: tuple[Level, ...],
    ) -> tuple[Step, list[Origin]]:
        """Walks into a call; one that cannot be read falls back as a whole."""
        start, source = len(self.sites), self._call_source
        try:
            return walk(self, jaxpr, eqn, operands, levels)
        except NOT_LINEAR as error:
            del self.sites[start:]
            self._call_source = source
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            return self._lift_operands(jaxpr, eqn, operands, levels, reason)

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
        for variable in eqn.outvars:
            flows = (
                Kind.PARAMETER in kinds
                and jnp.issubdtype(variable.aval.dtype, jnp.inexact)
                and eqn.primitive.name != "stop_gradient"
            )
            kind = Kind.PARAMETER if flows else Kind.CONSTANT
            results.append(Origin(kind, leaves if flows else frozenset(), stacked))
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
        call, inputs, outputs = _as_function(jaxpr, eqn)
        others = [a for k, a in enumerate(eqn.invars) if k != operand]
        number = self._add(
            Site(
                rule=rule,
                origin=origin,
                value=shape_of(variable.aval),
                probe=shape_of(eqn.outvars[0].aval),
                levels=_levels(levels, origin),
                primitive=eqn.primitive.name,
                source=self._source(eqn),
            )
        )
        return Meeting(call, inputs, outputs, variable, others, rule, number), [EXAMPLE]

    def _lift_operands(
        self,
        jaxpr: Jaxpr,
        eqn: Any,
        operands: list[Origin],
        levels: tuple[Level, ...],
        fallback: str | None = None,
    ) -> tuple[Step, list[Origin]]:
        name = eqn.primitive.name
        source = self._source(eqn)
        if fallback is None:
            fallback = "" if name in ELEMENTWISE else "no rule"
        lifted: dict[Var, int] = {}
        for atom, origin in zip(eqn.invars, operands, strict=True):
            if origin.kind is Kind.PARAMETER and atom not in lifted:
                lifted[atom] = self._lift(origin, atom.aval, levels, name, source, fallback)
        call, inputs, outputs = _as_function(jaxpr, eqn)
        return Plain(call, inputs, outputs, lifted, True), [EXAMPLE] * len(eqn.outvars)

    def _lift(
        self,
        origin: Origin,
        aval: Any,
        levels: tuple[Level, ...],
        primitive: str,
        source: str,
        fallback: str = "",
    ) -> int:
        shape = shape_of(aval)
        levels = _levels(levels, origin)
        return self._add(Site(Lift(), origin, shape, shape, levels, primitive, source, fallback))

    def _add(self, site: Site) -> int:
        self.sites.append(site)
        return len(self.sites) - 1

    def _source(self, eqn: Any) -> str:
        """The line of an equation; within a library's function, the line that called it."""
        return source_info_util.summarize(eqn.source_info) or self._call_source

    def _call(
        self, jaxpr: Jaxpr, eqn: Any, operands: list[Origin], levels: tuple[Level, ...]
    ) -> tuple[Step, list[Origin]]:
        inner, consts = open_jaxpr(eqn.params["jaxpr" if "jaxpr" in eqn.params else "call_jaxpr"])
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
        inner, consts = open_jaxpr(eqn.params["jaxpr"])
        num_consts, num_carry = scan_counts(eqn.params)
        length, first_x = eqn.params["length"], num_consts + num_carry
        carried = inner.invars[num_consts:first_x]
        fixed = frozenset(k for k in range(num_carry) if inner.outvars[k] is carried[k])
        counters = {
            k: step
            for k in range(num_carry)
            if operands[num_consts + k].kind is Kind.CONSTANT
            and (step := _counted(inner, carried[k], inner.outvars[k])) is not None
        }
        lifted = {}
        source = self._source(eqn)
        origins: list[Origin] = []
        for k, (atom, origin) in enumerate(zip(eqn.invars, operands, strict=True)):
            position = k - num_consts
            is_carry = num_consts <= k < first_x and position not in fixed
            if is_carry and position not in counters:
                if origin.kind is Kind.PARAMETER:
                    lifted[position] = self._lift(origin, atom.aval, levels, "scan carry", source)
                origins.append(EXAMPLE)
            elif origin.kind is Kind.EXAMPLE:
                origins.append(EXAMPLE)
            else:
                own = is_carry or k >= first_x
                origins.append(dataclasses.replace(origin, stacked=(*origin.stacked, own)))
        start = len(self.sites)
        inside = (*levels, Level(length, False))
        program = self.plan(inner, origins, inside)
        known = fixed | counters.keys()
        self.lift_outputs(program, [k for k in range(len(inner.outvars)) if k not in known], inside)
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
            counters=counters,
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
        opened = [open_jaxpr(branch) for branch in eqn.params["branches"]]
        programs = [self.plan(inner, operands[1:], levels) for inner, _ in opened]
        for program in programs:
            self.lift_outputs(program, range(len(eqn.outvars)), levels)
        consts = [consts for _, consts in opened]
        platforms = eqn.params.get("branches_platforms")
        step = Cond(programs, consts, list(eqn.invars), list(eqn.outvars), platforms)
        return step, [EXAMPLE] * len(eqn.outvars)

    def _custom_rule(
        self, jaxpr: Jaxpr, eqn: Any, operands: list[Origin], levels: tuple[Level, ...]
    ) -> tuple[Step, list[Origin]]:
        call, inputs, outputs = _as_function(jaxpr, eqn)
        by_variable = {
            a: o for a, o in zip(eqn.invars, operands, strict=True) if not isinstance(a, Literal)
        }
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
            (moved,) = transposable(pullback, results)(directions)
            return moved

        shapes = [shape_of(v.aval) for v in inputs]
        closed = jax.make_jaxpr(tangent)(*shapes, *(shape_of(v.aval) for v in tangents))
        # If the rule computes with the parameter itself, that counts as the example's: then its
        # tangent is parameter-only, and derivatives of any order are right.
        at = [EXAMPLE if v in tangents else by_variable[v] for v in inputs]
        start = len(self.sites)
        program = self.plan(closed.jaxpr, [*at, *(by_variable[v] for v in tangents)], levels)
        self.lift_outputs(program, range(len(differentiable)), levels)
        sites = self.sites[start:]
        reached = frozenset().union(*(site.origin.leaves for site in sites))
        if not reached >= frozenset().union(*(by_variable[v].leaves for v in tangents)):
            # The tangent may be zero, or the rule may have lost it, as one with symbolic zeros
            # does when it is asked for the tangent of one operand alone.
            raise ValueError("its derivative rule leaves out a parameter")
        if all(isinstance(site.rule, Lift) for site in sites):  # nothing is won
            del self.sites[start:]
            reasons = [site.fallback for site in sites if site.fallback]
            return self._lift_operands(jaxpr, eqn, operands, levels, "".join(reasons[:1]))
        step = Linearized(
            program=program,
            call=call,
            consts=closed.consts,
            inputs=inputs,
            tangents=tangents,
            outputs=outputs,
            differentiable=differentiable,
            sites=range(start, len(self.sites)),
        )
        return step, [EXAMPLE] * len(eqn.outvars)


_REMAT = ("remat", "remat2", "checkpoint")

_WALKS: Mapping[str, Any] = {
    **dict.fromkeys((*OPENS, "xla_call", "core_closed_call"), _Planner._call),
    "scan": _Planner._scan,
    "cond": _Planner._cond,
    "custom_jvp_call": _Planner._custom_rule,
    "custom_vjp_call": _Planner._custom_rule,
}
"""The calls that are walked into if parameters and examples enter both."""


def _is_linear(jaxpr: Jaxpr, eqn: Any) -> bool:
    """Whether the gradient of a sum through an equation is surely the sum of the gradients."""
    call, inputs, outputs = _as_function(jaxpr, eqn)
    kept = [k for k, v in enumerate(outputs) if jnp.issubdtype(v.aval.dtype, jnp.inexact)]

    def function(*args: Any) -> list[Any]:
        results = call(*args)
        return [results[k] for k in kept]

    return pullback_is_linear(function, [shape_of(v.aval) for v in inputs])


def _as_function(jaxpr: Jaxpr, eqn: Any) -> tuple[Callable[..., Any], list[Var], list[Any]]:
    """Returns one equation as a function of its variables, with those variables and its outputs."""
    inputs = list(dict.fromkeys(a for a in eqn.invars if not isinstance(a, Literal)))
    outputs = [v for v in eqn.outvars if not isinstance(v, DropVar)]
    return alone(jaxpr, eqn, inputs, outputs), inputs, outputs


def _counted(body: Jaxpr, before: Any, after: Any) -> int | None:
    """Returns by how much a loop counts a carried integer up each iteration, or None."""
    for eqn in body.eqns:
        if after in eqn.outvars and eqn.primitive.name in ("add", "sub"):
            for k, atom in enumerate(eqn.invars):
                other = eqn.invars[1 - k]
                is_integer = jnp.issubdtype(before.aval.dtype, jnp.integer)
                if atom is before and isinstance(other, Literal) and is_integer:
                    if before.aval.shape or (eqn.primitive.name == "sub" and k == 1):
                        return None
                    return int(other.val) if eqn.primitive.name == "add" else -int(other.val)
    return None


def _levels(levels: tuple[Level, ...], origin: Origin) -> tuple[Level, ...]:
    return tuple(
        Level(level.length, stacked) for level, stacked in zip(levels, origin.stacked, strict=True)
    )
