"""A cost function, traced for one example, as a program that can be run in two ways.

`Program.run` evaluates it for one example, with a probe, a zero, added at every site: the gradient
in the probes gives every δ. `Program.values` evaluates its parameter-only part alone and returns
the value v at every site. Calls are walked into, so that a site may lie in jit, remat, scan or
cond.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, DropVar, Jaxpr, Literal, Var, jaxpr_as_fun

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

Values: TypeAlias = dict[int, Any]
"""Something for each site, by its number."""


class Env:
    """What each variable of a jaxpr holds."""

    def __init__(self, variables: Iterable[Any] = (), values: Iterable[Any] = ()) -> None:
        self._values: dict[Any, Any] = {}
        self.write(variables, values)

    def write(self, variables: Iterable[Any], values: Iterable[Any]) -> None:
        """Sets variables."""
        self._values.update(zip(variables, values, strict=True))

    def read(self, atoms: Iterable[Any]) -> list[Any]:
        """What variables and literals hold."""
        return [a.val if isinstance(a, Literal) else self._values[a] for a in atoms]

    def read_known(self, atoms: Iterable[Any]) -> list[Any]:
        """As `read`, with None for what is not known."""
        return [a.val if isinstance(a, Literal) else self._values.get(a) for a in atoms]


@dataclasses.dataclass
class Program:
    """A jaxpr whose meetings of parameters and examples are known."""

    jaxpr: Jaxpr
    steps: list["Step"]
    outputs: list[Origin]
    lifted_outputs: dict[int, int]
    """Outputs that are parameter-only but go where values depend on the example: site numbers."""

    def run(
        self, consts: Sequence[Any], args: Sequence[Any], probes: Values
    ) -> tuple[list[Any], Values]:
        """Returns the outputs for one example, and the other operand at every site."""
        env = Env(self.jaxpr.constvars, consts)
        env.write(self.jaxpr.invars, args)
        acts: Values = {}
        for step in self.steps:
            step.run(env, probes, acts)
        outputs = env.read(self.jaxpr.outvars)
        for position, site in self.lifted_outputs.items():
            outputs[position] = outputs[position] + probes[site]
            acts[site] = None
        return outputs, acts

    def values(self, consts: Sequence[Any], args: Sequence[Any], found: Values) -> list[Any]:
        """Returns the outputs that do not depend on the example, None for those that do.

        ``args`` are None where they depend on the example; v of each site goes into ``found``.
        """
        env = Env(self.jaxpr.constvars, consts)
        env.write(self.jaxpr.invars, args)
        for step in self.steps:
            step.find(env, found)
        outputs = env.read_known(self.jaxpr.outvars)
        for position, site in self.lifted_outputs.items():
            found[site] = outputs[position]
        return outputs


class Step:
    """One equation, or what became of it."""

    def run(self, env: Env, probes: Values, acts: Values) -> None:
        """Evaluates the equation for one example."""
        raise NotImplementedError

    def find(self, env: Env, found: Values) -> None:
        """Evaluates it as far as it is parameter-only, and notes v at its sites."""
        raise NotImplementedError


@dataclasses.dataclass
class Plain(Step):
    """An equation as it stands; parameter-only operands that meet the example in it are lifted."""

    call: Callable[..., Sequence[Any]]
    inputs: list[Var]
    outputs: list[Any]
    lifted: dict[Var, int]
    depends: bool
    """Whether any operand depends on the example."""

    def run(self, env: Env, probes: Values, acts: Values) -> None:
        """Evaluates the equation on lifted operands."""
        operands = env.read(self.inputs)
        for k, variable in enumerate(self.inputs):
            if variable in self.lifted:
                site = self.lifted[variable]
                operands[k] = operands[k] + probes[site]
                acts[site] = None
        env.write(self.outputs, self.call(*operands))

    def find(self, env: Env, found: Values) -> None:
        """Evaluates the equation unless it needs the example."""
        for variable, site in self.lifted.items():
            found[site] = env.read([variable])[0]
        if not self.depends:
            env.write(self.outputs, self.call(*env.read(self.inputs)))


@dataclasses.dataclass
class Meeting(Step):
    """An equation whose parameter-only operand has a factoring rule; the probe is on its output."""

    call: Callable[..., Sequence[Any]]
    inputs: list[Var]
    outputs: list[Any]
    operand: Any
    others: list[Any]
    """What the rule wants to see of the other operands."""
    stacks_others: bool
    """Whether they are the scalars of an index vector."""
    site: int

    def run(self, env: Env, probes: Values, acts: Values) -> None:
        """Evaluates the equation, adds the probe, keeps the other operand."""
        outputs = self.call(*env.read(self.inputs))
        env.write(self.outputs, [output + probes[self.site] for output in outputs])
        others = env.read(self.others)
        acts[self.site] = jnp.stack(others) if self.stacks_others else others[0]

    def find(self, env: Env, found: Values) -> None:
        """Notes v."""
        found[self.site] = env.read([self.operand])[0]


@dataclasses.dataclass
class Call(Step):
    """A call that is walked into: jit and its kin, and remat, which stays a remat."""

    program: Program
    consts: Sequence[Any]
    inputs: list[Any]
    outputs: list[Any]
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]]

    def run(self, env: Env, probes: Values, acts: Values) -> None:
        """Runs the body."""

        def body(args: Sequence[Any], probes: Values) -> tuple[list[Any], Values]:
            return self.program.run(self.consts, args, probes)

        outputs, inner = self.wrap(body)(env.read(self.inputs), probes)
        env.write(self.outputs, outputs)
        acts.update(inner)

    def find(self, env: Env, found: Values) -> None:
        """Runs the parameter-only part of the body."""
        _write_known(
            env, self.outputs, self.program.values(self.consts, env.read_known(self.inputs), found)
        )


@dataclasses.dataclass
class Scan(Step):
    """A scan that parameters enter: probes are scanned over, and what sites keep is stacked."""

    program: Program
    consts: Sequence[Any]
    inputs: list[Any]
    outputs: list[Any]
    num_consts: int
    num_carry: int
    fixed_carry: frozenset[int]
    """Carried values that the body passes on unchanged."""
    lifted: dict[int, int]
    """Parameter-only initial carries: position → site."""
    sites: range
    stacked: dict[int, bool]
    """For each site of the body: whether v differs from iteration to iteration."""
    length: int
    reverse: bool
    unroll: int

    def run(self, env: Env, probes: Values, acts: Values) -> None:
        """Runs the scan."""
        consts, carry, xs = self._split(env.read(self.inputs))
        for position, site in self.lifted.items():
            carry[position] = carry[position] + probes[site]
            acts[site] = None

        def body(carry: Any, step: Any) -> tuple[Any, Any]:
            xs, inner_probes = step
            outputs, inner = self.program.run(
                self.consts, [*consts, *carry, *xs], {**probes, **inner_probes}
            )
            return outputs[: self.num_carry], (outputs[self.num_carry :], inner)

        inner_probes = {site: probes[site] for site in self.sites}
        carry, (ys, inner) = jax.lax.scan(
            body, carry, (xs, inner_probes), self.length, self.reverse, self.unroll
        )
        env.write(self.outputs, [*carry, *ys])
        acts.update(inner)

    def find(self, env: Env, found: Values) -> None:
        """Runs the parameter-only part of the body for all iterations at once."""
        consts, carry, xs = self._split(env.read_known(self.inputs))
        for position, site in self.lifted.items():
            found[site] = carry[position]
        for position in range(self.num_carry):
            if position not in self.fixed_carry:
                carry[position] = None

        known = {k: x for k, x in enumerate(xs) if x is not None}

        def body(known: Mapping[int, Any]) -> Values:
            inner: Values = {}
            slices = [known.get(k) for k in range(len(xs))]
            self.program.values(self.consts, [*consts, *carry, *slices], inner)
            return inner

        out_axes = {site: 0 if self.stacked[site] else None for site in self.sites}
        found.update(jax.vmap(body, out_axes=out_axes)(known) if known else body(known))
        for position in self.fixed_carry:
            _write_known(env, [self.outputs[position]], [carry[position]])

    def _split(self, values: list[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        a, b = self.num_consts, self.num_consts + self.num_carry
        return values[:a], values[a:b], values[b:]


@dataclasses.dataclass
class Cond(Step):
    """A choice between branches that parameters enter: every branch answers for all sites."""

    programs: list[Program]
    consts: list[Sequence[Any]]
    inputs: list[Any]
    outputs: list[Any]

    def run(self, env: Env, probes: Values, acts: Values) -> None:
        """Runs the branch that is chosen; the sites of the others keep zeros."""
        index, *operands = env.read(self.inputs)

        def branch(k: int) -> Callable[..., Any]:
            def run(operands: Any, probes: Values) -> tuple[list[Any], Values]:
                return self.programs[k].run(self.consts[k], operands, probes)

            return run

        shapes = [jax.eval_shape(branch(k), operands, probes)[1] for k in range(len(self.programs))]

        def complete(k: int) -> Callable[..., Any]:
            def run(operands: Any, probes: Values) -> tuple[list[Any], Values]:
                outputs, inner = branch(k)(operands, probes)
                for other, shape in enumerate(shapes):
                    if other != k:
                        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shape)
                        inner = {**inner, **zeros}
                return [jnp.asarray(o) for o in outputs], inner

            return run

        branches = [complete(k) for k in range(len(self.programs))]
        outputs, inner = jax.lax.switch(index, branches, operands, probes)
        env.write(self.outputs, outputs)
        acts.update(inner)

    def find(self, env: Env, found: Values) -> None:
        """Runs the parameter-only part of every branch."""
        _, *operands = env.read_known(self.inputs)
        for program, consts in zip(self.programs, self.consts, strict=True):
            program.values(consts, operands, found)


@dataclasses.dataclass
class Linearized(Step):
    """A function with a derivative rule of its own, in whose tangent the sites are found.

    With y = f(w, x) and its rule ẏ = J(w, x) ẇ, linear in ẇ, the program is J: y is evaluated as
    it stands, and J at ẇ = 0, which is zero, carries the probes. A custom_jvp states J; for a
    custom_vjp, J is the transpose of its backward rule.
    """

    program: Program
    call: Callable[..., Sequence[Any]]
    consts: Sequence[Any]
    inputs: list[Var]
    tangents: list[Var]
    """The parameter-only inputs, whose tangents are the last arguments of the program."""
    outputs: list[Any]
    differentiable: list[int]
    """The outputs that have tangents."""

    def run(self, env: Env, probes: Values, acts: Values) -> None:
        """Evaluates the function, and adds the probes through its tangent."""
        inputs = env.read(self.inputs)
        zeros = [jnp.zeros_like(v) for v in env.read(self.tangents)]
        tangents, inner = self.program.run(self.consts, [*inputs, *zeros], probes)
        outputs = list(self.call(*inputs))
        for position, tangent in zip(self.differentiable, tangents, strict=True):
            outputs[position] = outputs[position] + tangent
        env.write(self.outputs, outputs)
        acts.update(inner)

    def find(self, env: Env, found: Values) -> None:
        """Runs the parameter-only part of the tangent, with the parameters as tangents."""
        fixed = [
            None if v is None else jax.lax.stop_gradient(v) for v in env.read_known(self.inputs)
        ]
        self.program.values(self.consts, [*fixed, *env.read(self.tangents)], found)


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
            view = _view(eqn, k, [o.view for o in operands])
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
                source=source_info_util.summarize(eqn.source_info),
            )
        )
        return Meeting(call, inputs, outputs, variable, others, is_slice, number), [EXAMPLE]

    def _lift_operands(
        self, jaxpr: Jaxpr, eqn: Any, operands: list[Origin], levels: tuple[Level, ...]
    ) -> tuple[Step, list[Origin]]:
        name = eqn.primitive.name
        source = source_info_util.summarize(eqn.source_info)
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

    def _call(
        self, jaxpr: Jaxpr, eqn: Any, operands: list[Origin], levels: tuple[Level, ...]
    ) -> tuple[Step, list[Origin]]:
        inner, consts = _open(eqn.params["jaxpr" if "jaxpr" in eqn.params else "call_jaxpr"])
        program = self.plan(inner, operands, levels)

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
        source = source_info_util.summarize(eqn.source_info)
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
            (moved,) = jax.linear_transpose(pullback, results)(directions)
            return moved

        shapes = [_shape(v.aval) for v in inputs]
        try:
            closed = jax.make_jaxpr(tangent)(*shapes, *(_shape(v.aval) for v in tangents))
        except (NotImplementedError, AssertionError, TypeError, ValueError):
            # A backward rule that is not linear in the cotangent (it clips it, say) has no J.
            return self._lift_operands(jaxpr, eqn, operands, levels)
        fixed = [
            dataclasses.replace(CONSTANT, stacked=by_variable[v].stacked)
            if by_variable[v].kind is Kind.PARAMETER
            else by_variable[v]
            for v in inputs
        ]
        program = self.plan(closed.jaxpr, [*fixed, *(by_variable[v] for v in tangents)], levels)
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


def _open(jaxpr: Any) -> tuple[Jaxpr, Sequence[Any]]:
    """A jaxpr and its constants, closed or not."""
    return (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, ClosedJaxpr) else (jaxpr, ())


def _scan_counts(params: Mapping[str, Any]) -> tuple[int, int]:
    """The numbers of constants and of carried values of a scan, in any supported JAX."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


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
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def _write_known(env: Env, variables: Sequence[Any], values: Sequence[Any]) -> None:
    for variable, value in zip(variables, values, strict=True):
        if value is not None:
            env.write([variable], [value])
