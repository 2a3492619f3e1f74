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
from jax.extend.core import Jaxpr, Literal, Var

from sgd_jax._chunks import vary_like
from sgd_jax.per_example.sites import Origin, Rule

Values: TypeAlias = dict[int, Any]
"""Something for each site, by its number."""


class Env:
    """The values of a jaxpr's variables."""

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
    """The operands beside it."""
    rule: Rule
    site: int

    def run(self, env: Env, probes: Values, acts: Values) -> None:
        """Evaluates the equation, adds the probe, keeps what the rule asks for."""
        (output,) = self.call(*env.read(self.inputs))
        env.write(self.outputs, [output + probes[self.site]])
        acts[self.site] = self.rule.keep(env.read(self.others), output)

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
    counters: dict[int, int]
    """Carried integers that count the iterations: position → step."""
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
        order = jnp.arange(self.length)
        order = order[::-1] if self.reverse else order
        # What differs from iteration to iteration, by position among carried values and slices.
        known = {self.num_carry + k: x for k, x in enumerate(xs) if x is not None}
        for position in range(self.num_carry):
            if position in self.counters:
                start = jnp.asarray(carry[position])
                known[position] = start + order.astype(start.dtype) * self.counters[position]
            if position not in self.fixed_carry:
                carry[position] = None
        same = dict(enumerate(carry))

        def body(known: Mapping[int, Any]) -> Values:
            inner: Values = {}
            both = {**same, **known}
            rest = [both.get(k) for k in range(self.num_carry + len(xs))]
            self.program.values(self.consts, [*consts, *rest], inner)
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
    platforms: Sequence[Sequence[str] | None] | None
    """The platforms that each branch is for, if the platform chooses and not an index."""

    def run(self, env: Env, probes: Values, acts: Values) -> None:
        """Runs the branch that is chosen; the sites of the others keep zeros."""
        index, *operands = env.read(self.inputs)

        def branch(k: int) -> Callable[..., Any]:
            return lambda operands, probes: self.programs[k].run(self.consts[k], operands, probes)

        shapes = [jax.eval_shape(branch(k), operands, probes)[1] for k in range(len(self.programs))]

        def complete(k: int) -> Callable[..., Any]:
            def run(operands: Any, probes: Values) -> tuple[list[Any], Values]:
                outputs, kept = branch(k)(operands, probes)
                for other, shape in enumerate(shapes):
                    if other != k:
                        kept = {**kept, **jax.tree.map(_zeros_of, shape)}
                return [jnp.asarray(o) for o in outputs], kept

            return run

        branches = [complete(k) for k in range(len(self.programs))]
        outputs, kept = self._choose(index, branches, operands, probes)
        env.write(self.outputs, outputs)
        acts.update(kept)

    def _choose(self, index: Any, branches: Sequence[Callable[..., Any]], *operands: Any) -> Any:
        if self.platforms is None:
            return jax.lax.switch(index, branches, *operands)
        default, by_platform = None, {}
        for names, branch in zip(self.platforms, branches, strict=True):
            if names is None:
                default = branch
            by_platform.update((name, branch) for name in names or ())
        return jax.lax.platform_dependent(*operands, default=default, **by_platform)

    def find(self, env: Env, found: Values) -> None:
        """Runs the parameter-only part of every branch."""
        _, *operands = env.read_known(self.inputs)
        for program, consts in zip(self.programs, self.consts, strict=True):
            program.values(consts, operands, found)


@dataclasses.dataclass
class Linearized(Step):
    """A function with a derivative rule of its own, in whose tangent the sites are found.

    With y = f(w, x) and its rule ẏ = J(w, x) ẇ, linear in ẇ, the program is J: y is evaluated as
    it stands, and J carries the probes. A custom_jvp states J; for a custom_vjp, J is the transpose
    of its backward rule.
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
    sites: range

    def run(self, env: Env, probes: Values, acts: Values) -> None:
        """Evaluates the function, and adds J in the probes to its tangent.

        J is not evaluated at ẇ = 0 for its value: 0 · ∞ would make the cost NaN where the function
        itself is finite.
        """
        inputs = env.read(self.inputs)
        zeros = [jnp.zeros_like(v) for v in env.read(self.tangents)]
        own = {site: probes[site] for site in self.sites}

        def tangents(inputs: Sequence[Any], own: Values) -> tuple[list[Any], Values]:
            return self.program.run(self.consts, [*inputs, *zeros], own)

        @jax.custom_jvp
        def attach(outputs: list[Any], inputs: Sequence[Any], own: Values) -> list[Any]:
            del inputs, own
            return outputs

        @attach.defjvp
        def _(primals: Any, moved: Any) -> tuple[list[Any], list[Any]]:
            (outputs, inputs, own), (result, _, own_moved) = primals, moved
            _, added = jax.jvp(lambda own: tangents(inputs, own)[0], (own,), (own_moved,))
            result = list(result)
            for position, tangent in zip(self.differentiable, added, strict=True):
                result[position] = result[position] + tangent
            return outputs, result

        env.write(self.outputs, attach(list(self.call(*inputs)), inputs, own))
        acts.update(tangents(inputs, own)[1])

    def find(self, env: Env, found: Values) -> None:
        """Runs the parameter-only part of the tangent, with the parameters as tangents."""
        known = env.read_known(self.inputs)
        at = [None if v in self.tangents else x for v, x in zip(self.inputs, known, strict=True)]
        self.program.values(self.consts, [*at, *env.read(self.tangents)], found)


def _zeros_of(shape: Any) -> Any:
    return vary_like(shape, jnp.zeros(shape.shape, shape.dtype))


def _write_known(env: Env, variables: Sequence[Any], values: Sequence[Any]) -> None:
    for variable, value in zip(variables, values, strict=True):
        if value is not None:
            env.write([variable], [value])
