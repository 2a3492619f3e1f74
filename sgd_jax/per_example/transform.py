"""Per-example gradients of any JAX function: from the function to the matrix G."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp

from sgd_jax import _validate
from sgd_jax._chunks import vary_like
from sgd_jax.per_example import factors as F  # noqa: N812
from sgd_jax.per_example.chunked import ChunkedPerExampleGrads
from sgd_jax.per_example.factors import Dense, Factor, Outer
from sgd_jax.per_example.grads import PerExampleGrads, Pulled
from sgd_jax.per_example.interpreter import Program, Values
from sgd_jax.per_example.pullback import Landed, Tape
from sgd_jax.per_example.rules import Lift
from sgd_jax.per_example.sites import Kind, Origin, Site
from sgd_jax.per_example.tracing import EXAMPLE, plan
from sgd_jax.typing import Array, Example, Examples, Params, Strategy


def per_example_grad(
    fun: Callable[..., Any], *, strategy: Strategy = "auto", chunk_size: int | None = None
) -> Callable[[Params, Examples], PerExampleGrads | ChunkedPerExampleGrads]:
    """Returns a function that takes the gradient of every example's cost.

    Row i of G is g_i = ∇_params fun(params, example_i), so ``grads.mean()`` is the gradient of the
    mean cost. See `per_example_value_and_grad` for arguments, errors and guarantees.

    >>> import jax.numpy as jnp
    >>> fun = lambda w, x: jnp.dot(w, x) ** 2 / 2  # g_i = (w·x_i) x_i
    >>> grads = per_example_grad(fun)(jnp.array([1.0, 0.0]), jnp.array([[1.0, 2.0], [3.0, 0.0]]))
    >>> grads.mean().tolist(), grads.squared_norms().tolist()
    ([5.0, 1.0], [5.0, 81.0])
    """
    value_and_grad = per_example_value_and_grad(fun, strategy=strategy, chunk_size=chunk_size)
    return lambda params, examples: value_and_grad(params, examples)[1]


def per_example_value_and_grad(
    fun: Callable[..., Any],
    *,
    strategy: Strategy = "auto",
    has_aux: bool = False,
    chunk_size: int | None = None,
) -> Callable[[Params, Examples], tuple[Any, PerExampleGrads | ChunkedPerExampleGrads]]:
    """Returns a function that takes every example's cost and its gradient.

    The gradients come as one object, `PerExampleGrads`, at about the price of the gradient of the
    mean cost: ``fun`` is traced for one example, and where a weight meets an example by a matrix
    product, a convolution or an index, the two factors of g_i are kept instead of g_i. Call it
    under `jax.jit`.

    Since ``fun`` sees ONE example, no example can leak into another's gradient: normalization over
    the batch, or a contrast within it, cannot be written.

    Args:
      fun: the cost of ONE example, ``(params, example) -> scalar``, differentiable in params by
        reverse mode; with ``has_aux``, ``(params, example) -> (scalar, aux)``. Randomness is data:
        put one key per example into examples.
      strategy: ``"auto"`` factors what it can and writes down the rest, parameter by parameter,
        and forms g_i where that is much smaller than its factors (kernels of convolutions);
        ``"factored"`` raises where a use of a parameter has no rule; ``"materialized"`` is
        ``jax.vmap(jax.grad(fun))`` behind the same interface.
      has_aux: whether fun returns more than the cost.
      chunk_size: keep nothing, and let every method of the gradients go through the examples again,
        ``chunk_size`` of them at a time: then any n fits, at one more pass over the examples for
        each method called. None keeps the factors of all n examples.

    Returns:
      A function ``(params, examples) -> (costs, grads)``, costs (n,), or
      ``((costs, aux), grads)``, aux with leading axis n. Every leaf of examples has leading axis n.

    Raises:
      ValueError: an unknown strategy; n = 0 or leading axes that differ; a cost that is no scalar;
        with ``"factored"``, a use without a rule, naming parameter, primitive and source line.
      TypeError: a leaf of params, or the cost, is not real floating point.

    Source: Goodfellow 2015 (arXiv 1510.01799) for a dense layer's norms.
    """
    if strategy not in get_args(Strategy):
        raise ValueError(f"strategy must be one of {get_args(Strategy)}, got {strategy!r}")
    if chunk_size is not None:
        size = _validate.positive_int("chunk_size", chunk_size)
        whole = per_example_value_and_grad(fun, strategy=strategy, has_aux=has_aux)

        def grads_of(params: Params, examples: Examples) -> Any:
            return whole(params, examples)[1]

        def in_chunks(
            params: Params, examples: Examples
        ) -> tuple[Any, PerExampleGrads | ChunkedPerExampleGrads]:
            _validate.floating_params(params)
            n = _validate.num_examples(examples)
            grads = ChunkedPerExampleGrads(params, examples, grads_of, n, size)
            return grads.map_chunks(lambda chunk: whole(params, chunk)[0]), grads

        return in_chunks

    def value_and_grad(params: Params, examples: Examples) -> tuple[Any, PerExampleGrads]:
        if strategy == "materialized":
            (costs, aux), grads = _materialized(fun, params, examples, has_aux)
        else:
            (costs, aux), grads = _factored(fun, params, examples, has_aux, strategy)
        return ((costs, aux) if has_aux else costs), grads

    return value_and_grad


@dataclasses.dataclass(frozen=True)
class Trace:
    """A cost function traced for one example."""

    program: Program
    sites: list[Site]
    consts: Sequence[Any]
    num_example_leaves: int

    def values(self, leaves: Sequence[Array]) -> list[Array]:
        """Returns v at every site."""
        found: Values = {}
        nothing = [None] * self.num_example_leaves
        self.program.values(self.consts, [*leaves, *nothing], found)
        return [jnp.asarray(found[k]) for k in range(len(self.sites))]


@dataclasses.dataclass(frozen=True)
class Collected:
    """What one backward pass finds: cost, δ and the other operand at every site."""

    trace: Trace
    tape: Tape
    costs: Array
    aux: Any
    deltas: Values
    acts: Values

    def land(self, site: int, forms: bool) -> Landed:
        """Returns the factors of one site, pulled back as far as rules carry them.

        With ``forms``, g_i is materialized if that costs less, see `factors.prefers_forming`.
        """
        delta, act = self.deltas[site], self.acts[site]
        pulled = functools.partial(self._pulled, site)
        expands = forms and self.trace.sites[site].rule.expands
        if expands and _any_is_larger_than_formed(jax.eval_shape(pulled, delta, act)):
            # Formed in a loop over a few groups of examples: their patches then need not exist all
            # at once.
            def form(example: tuple[Array, Any]) -> Landed:
                one_delta, one_act = (x[None] for x in example)
                return _map_factors(pulled(one_delta, one_act), lambda f: f.materialize()[0])

            group = -(-delta.shape[0] // _NUM_GROUPS)
            formed = jax.lax.map(form, (delta, act), batch_size=group)
            return _map_factors(formed, lambda values: Dense(values))
        landed = pulled(delta, act)
        return _form_if_cheaper(landed) if forms else landed

    def _pulled(self, site: int, delta: Array, act: Any) -> Landed:
        """The factors of the examples that delta and act are of."""
        slot = self.tape.outputs[site]
        made = self.trace.sites[site].rule.factor(self.trace.sites[site], delta, act, slot.value)
        return _canonical(self.tape.pull(slot, made))

    def factors(self, forms: bool) -> tuple[tuple[tuple[Factor, ...], ...], Pulled | None]:
        """Returns the factors of every parameter, and those that stopped before."""
        factors: list[list[Factor]] = [[] for _ in self.tape.inputs]
        stopped: list[tuple[int, Factor]] = []
        for k in range(len(self.trace.sites)):
            landed = self.land(k, forms)
            for leaf, found in landed.leaves.items():
                factors[leaf].extend(found)
            stopped += [(slot, f) for slot, found in landed.stopped.items() for f in found]
        return tuple(_join_dense(f) for f in factors), self._pull_later(stopped)

    def _pull_later(self, stopped: Sequence[tuple[int, Factor]]) -> Pulled | None:
        """Factors of computed values, with the pullback of the computation."""
        if not stopped:
            return None
        numbers = [number for number, _ in stopped]
        touched = sorted(frozenset().union(*(self.tape.slots[k].leaves for k in numbers)))
        leaves = [slot.value for slot in self.tape.inputs]

        def values(chosen: list[Array]) -> tuple[Array, ...]:
            replaced = list(leaves)
            for leaf, value in zip(touched, chosen, strict=True):
                replaced[leaf] = value
            again = Tape(self.tape.jaxpr, replaced)
            return tuple(again.slots[k].value for k in numbers)

        at, pull = jax.vjp(values, [leaves[leaf] for leaf in touched])
        shapes = tuple((value.shape, value.dtype) for value in at)
        return Pulled(tuple(f for _, f in stopped), pull, tuple(touched), shapes)


_NUM_GROUPS = 8


def flat(fun: Callable[..., Any], treedef: Any, has_aux: bool) -> Callable[..., Any]:
    """Returns ``fun`` as a function of the leaves of params, always with aux."""

    def function(leaves: Sequence[Array], example: Example) -> tuple[Array, Any]:
        result = fun(jax.tree.unflatten(treedef, leaves), example)
        return result if has_aux else (result, None)

    return function


def trace_example(
    function: Callable[..., Any], leaves: Sequence[Array], example: Example
) -> tuple[Trace, Any]:
    """Traces a cost function for one example; also returns the structure of aux."""
    closed, (cost, aux) = jax.make_jaxpr(function, return_shape=True)(leaves, example)
    _validate.scalar_cost(cost)
    parameters = [Origin(Kind.PARAMETER, frozenset([k])) for k in range(len(leaves))]
    num_example_leaves = len(jax.tree.leaves(example))
    program, sites = plan(closed, [*parameters, *[EXAMPLE] * num_example_leaves])
    trace = Trace(program, sites, closed.consts, num_example_leaves)
    return trace, jax.tree.structure(aux)


def find_sites(fun: Callable[..., Any], params: Params, examples: Examples) -> list[Site]:
    """Returns where parameters meet an example, from one trace of ``fun`` on shapes."""
    # Shapes alone: what varies over a mesh inside of shard_map has no meaning out of it.
    leaves, treedef = jax.tree.flatten(
        jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), params
        )
    )
    example = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf)[1:], jnp.result_type(leaf)), examples
    )
    return trace_example(flat(fun, treedef, has_aux=False), leaves, example)[0].sites


def weighted_value_and_grad(
    fun: Callable[..., Any],
) -> Callable[[Params, Examples, Array], tuple[Array, Params]]:
    """Returns ``(params, examples, weights) -> (costs, Σ_i c_i g_i)``, the sum from the factors.

    As ``per_example_value_and_grad`` and ``sum``, but nothing is formed for the sake of norms.
    """

    def value_and_grad(params: Params, examples: Examples, weights: Array) -> tuple[Array, Params]:
        (costs, _), grads = _factored(fun, params, examples, has_aux=False, strategy=None)
        return costs, grads.sum(weights)

    return value_and_grad


def collect(function: Callable[..., Any], leaves: Sequence[Array], examples: Examples) -> Collected:
    """Runs one backward pass: the cost, δ and the other operand at every site, of every example."""
    examples = jax.tree.map(jnp.asarray, examples)  # NumPy's float64 is float32 to JAX
    traces = []

    def one(example: Example) -> Any:
        trace, aux_treedef = trace_example(function, leaves, example)
        traces.append((trace, aux_treedef))
        flat_example = jax.tree.leaves(example)

        def probed(probes: Values) -> tuple[Array, Any]:
            args = [*leaves, *flat_example]
            (cost, *aux), acts = trace.program.run(trace.consts, args, probes)
            return cost, (aux, acts)

        probes = {
            k: vary_like(examples, jnp.zeros(site.probe_shape(), site.probe.dtype))
            for k, site in enumerate(trace.sites)
        }
        (cost, (aux, acts)), deltas = jax.value_and_grad(probed, has_aux=True)(probes)
        return cost, aux, deltas, acts

    costs, aux, deltas, acts = jax.vmap(one)(examples)
    trace, aux_treedef = traces[-1]
    tape = Tape(jax.make_jaxpr(trace.values)(leaves), leaves)
    return Collected(trace, tape, costs, jax.tree.unflatten(aux_treedef, aux), deltas, acts)


def _leaves(params: Params, examples: Examples) -> tuple[list[Array], Any, int]:
    """Returns the checked leaves of params, their structure, and n."""
    _validate.floating_params(params)
    n = _validate.num_examples(examples)
    leaves, treedef = jax.tree.flatten(params)
    return vary_like(examples, leaves), treedef, n


def _factored(
    fun: Callable[..., Any],
    params: Params,
    examples: Examples,
    has_aux: bool,
    strategy: Strategy | None,
) -> tuple[tuple[Array, Any], PerExampleGrads]:
    """Costs and aux, and gradients in factors; with strategy None, as the sum alone wants them."""
    leaves, treedef, n = _leaves(params, examples)
    collected = collect(flat(fun, treedef, has_aux), leaves, examples)
    if strategy == "factored":
        _refuse_fallbacks(collected, params)
    factors, pulled = collected.factors(forms=strategy == "auto")
    shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
    grads = PerExampleGrads(factors, pulled, treedef, shapes, n)
    return (collected.costs, collected.aux), grads


def _materialized(
    fun: Callable[..., Any], params: Params, examples: Examples, has_aux: bool
) -> tuple[tuple[Array, Any], PerExampleGrads]:
    """Costs and aux, and gradients by ``vmap(grad)``."""
    leaves, treedef, n = _leaves(params, examples)
    function = flat(fun, treedef, has_aux)

    def checked(leaves: Sequence[Array], example: Example) -> tuple[Array, Any]:
        cost, aux = function(leaves, example)
        _validate.scalar_cost(jax.typeof(cost))
        return cost, aux

    gradient = jax.vmap(jax.value_and_grad(checked, has_aux=True), in_axes=(None, 0))
    answer, values = gradient(leaves, examples)
    shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
    return answer, PerExampleGrads(tuple((Dense(v),) for v in values), None, treedef, shapes, n)


def _map_factors(landed: Landed, change: Callable[[Any], Any]) -> Landed:
    return Landed(
        {k: [change(f) for f in factors] for k, factors in landed.leaves.items()},
        {k: [change(f) for f in factors] for k, factors in landed.stopped.items()},
    )


def _canonical(landed: Landed) -> Landed:
    """Layouts with as few axes as possible, so that equal ones are found equal."""

    def change(factor: Factor) -> Factor:
        if not isinstance(factor, Outer):
            return factor
        return dataclasses.replace(factor, layout=factor.layout.canonical())

    return _map_factors(landed, change)


def _any_is_larger_than_formed(landed: Landed) -> bool:
    both = (*landed.leaves.values(), *landed.stopped.values())
    return any(F.is_larger_than_formed(f) for factors in both for f in factors)


def _form_if_cheaper(landed: Landed) -> Landed:
    return _map_factors(landed, lambda f: Dense(f.materialize()) if F.prefers_forming(f) else f)


def _join_dense(factors: Sequence[Factor]) -> tuple[Factor, ...]:
    """Adds up what is materialized anyway, so that it is kept once."""
    dense = [f for f in factors if isinstance(f, Dense)]
    if len(dense) < 2:
        return tuple(factors)
    total = Dense(functools.reduce(operator.add, (f.values for f in dense)))
    return (*(f for f in factors if not isinstance(f, Dense)), total)


def _refuse_fallbacks(collected: Collected, params: Params) -> None:
    """Raises if a large parameter meets the example without leaving a factor."""
    names = leaf_names(params)
    for k, site in enumerate(collected.trace.sites):
        reason = missing_factor(collected, k)
        if reason:
            parameters = " ".join(names[leaf] for leaf in sorted(site.origin.leaves))
            raise ValueError(
                f'strategy="factored", but {parameters} meets the example in {site.primitive} at '
                f'{site.source}, which {reason}; strategy="auto" materializes the gradients of '
                "that parameter alone"
            )


def missing_factor(collected: Collected, number: int) -> str:
    """Returns why a site leaves no factor of its parameter, or an empty string if it does.

    What acts entry by entry on a vector (biases, scales) is materialized as a rule.
    """
    site = collected.trace.sites[number]
    if site.fallback:
        return "has no rule" if site.fallback == "no rule" else f"has no rule ({site.fallback})"
    size = sum(collected.tape.inputs[leaf].value.size for leaf in site.origin.leaves)
    if size <= _LARGE:
        return ""
    landed = jax.eval_shape(lambda: collected.land(number, forms=False))
    if any(not isinstance(f, Dense) for found in landed.stopped.values() for f in found):
        return "is pulled back from a computed value"
    is_matrix = sum(length > 1 for length in site.value.shape) > 1
    if isinstance(site.rule, Lift) and is_matrix:
        return "is no product"
    return ""


_LARGE = 1 << 12
"""Materialized gradients of parameters of up to this many entries are nothing to refuse."""


def leaf_names(params: Params) -> list[str]:
    """Returns the name of every leaf."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    return ["params" + jax.tree_util.keystr(path) for path in paths]
