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
from sgd_jax.per_example.factors import Dense, Factor
from sgd_jax.per_example.matrix import PerExampleGrads, Pulled
from sgd_jax.per_example.planning import EXAMPLE, plan
from sgd_jax.per_example.program import Program, Values
from sgd_jax.per_example.sites import Kind, Lift, Origin, Site
from sgd_jax.per_example.views import View
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
        _validate.floating_params(params)
        n = _validate.num_examples(examples)
        leaves, treedef = jax.tree.flatten(params)
        leaves = vary_like(examples, leaves)
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        function = _flat(fun, treedef, has_aux)
        make = _materialized if strategy == "materialized" else _factored
        costs, aux, factors, pulled = make(function, leaves, examples, strategy, params)
        grads = PerExampleGrads(factors, pulled, treedef, shapes, n)
        return ((costs, aux) if has_aux else costs), grads

    return value_and_grad


def explain(fun: Callable[..., Any], params: Params, examples: Examples) -> str:
    """Returns a table of how the gradients of each parameter are kept.

    One line for each place where a parameter meets an example: the parameter, the primitive and
    source line, the rule (``fallback`` where there is none, so that the gradient is written down),
    and the memory that the factor of n examples takes beside that of n written gradients.

    Args:
      fun: the cost of ONE example, ``(params, example) -> scalar``.
      params: the parameters, or their shapes (`jax.ShapeDtypeStruct`).
      examples: n examples, or their shapes.
    """
    _validate.floating_params(params)
    n = _validate.num_examples(examples)
    leaves, treedef = jax.tree.flatten(jax.eval_shape(lambda tree: tree, params))
    function = _flat(fun, treedef, has_aux=False)
    traces: list[_Trace] = []

    def kept(leaves: list[Array], examples: Examples) -> list[Factor]:
        trace, _, _, deltas, acts = _collect(function, leaves, examples)
        traces.append(trace)
        return [
            _compact_factor(site, leaves, deltas[k], acts[k]) for k, site in enumerate(trace.sites)
        ]

    factors = jax.eval_shape(kept, leaves, examples)
    names = _names(params)
    rows = [("parameter", "meets the example in", "rule", "factor", "written down")]
    used: set[int] = set()
    for site, factor in zip(traces[0].sites, factors, strict=True):
        touched = sorted(site.origin.leaves)
        used.update(touched)
        rule = site.rule.name if site.has_rule else "fallback: written down"
        if isinstance(factor, Dense) and not isinstance(site.rule, Lift):
            rule += ", formed"
        if site.origin.view is None:
            rule += ", pulled back"
        memory = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(factor))
        written = sum(leaves[leaf].size * leaves[leaf].dtype.itemsize for leaf in touched) * n
        where = f"{site.primitive} {site.source}".strip()
        name = " ".join(names[leaf] for leaf in touched)
        rows.append((name, where, rule, _bytes(memory), _bytes(written)))
    rows += [
        (name, "nothing", "gradient is zero", _bytes(0), _bytes(0))
        for leaf, name in enumerate(names)
        if leaf not in used
    ]
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class _Trace:
    """A cost function traced for one example."""

    program: Program
    sites: list[Site]
    consts: Sequence[Any]
    num_example_leaves: int

    def values(self, leaves: Sequence[Array], numbers: Sequence[int]) -> tuple[Array, ...]:
        """The values v at some sites."""
        found: Values = {}
        nothing = [None] * self.num_example_leaves
        self.program.values(self.consts, [*leaves, *nothing], found)
        return tuple(found[k] for k in numbers)


def _flat(fun: Callable[..., Any], treedef: Any, has_aux: bool) -> Callable[..., Any]:
    """``fun`` on the leaves of params, always with aux."""

    def function(leaves: Sequence[Array], example: Example) -> tuple[Array, Any]:
        result = fun(jax.tree.unflatten(treedef, leaves), example)
        return result if has_aux else (result, None)

    return function


def _trace(
    function: Callable[..., Any], leaves: Sequence[Array], example: Example
) -> tuple[_Trace, Any]:
    """Traces a cost function for one example; also returns the structure of aux."""
    closed, (cost, aux) = jax.make_jaxpr(function, return_shape=True)(leaves, example)
    _validate.scalar_cost(cost)
    parameters = [
        Origin(Kind.PARAMETER, frozenset([k]), View.whole(k, leaf.shape))
        for k, leaf in enumerate(leaves)
    ]
    num_example_leaves = len(jax.tree.leaves(example))
    program, sites = plan(closed, [*parameters, *[EXAMPLE] * num_example_leaves])
    trace = _Trace(program, sites, closed.consts, num_example_leaves)
    return trace, jax.tree.structure(aux)


def _collect(
    function: Callable[..., Any], leaves: Sequence[Array], examples: Examples
) -> tuple[_Trace, Array, Any, Values, Values]:
    """One backward pass: the cost, δ and the other operand at every site, for every example."""
    traces = []

    def one(example: Example) -> Any:
        trace, aux_treedef = _trace(function, leaves, example)
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
    return trace, costs, jax.tree.unflatten(aux_treedef, aux), deltas, acts


def _factored(
    function: Callable[..., Any],
    leaves: Sequence[Array],
    examples: Examples,
    strategy: Strategy,
    params: Params,
) -> tuple[Array, Any, tuple[tuple[Factor, ...], ...], Pulled | None]:
    """Costs, aux, and the factors of the gradients of all examples."""
    trace, costs, aux, deltas, acts = _collect(function, leaves, examples)
    if strategy == "factored":
        _refuse_fallbacks(trace.sites, params)
    factors: list[list[Factor]] = [[] for _ in leaves]
    at_once, later = [], []
    for k, site in enumerate(trace.sites):
        make = _compact_factor if strategy == "auto" else _factor
        made = make(site, leaves, deltas[k], acts[k])
        if site.origin.view is not None:
            (leaf,) = site.origin.leaves
            factors[leaf].append(made)
            continue
        # What is no larger in the parameters themselves is pulled back at once.
        written = sum(leaves[leaf].size for leaf in site.origin.leaves)
        small = isinstance(site.rule, Lift) and _size(site) >= written
        (at_once if small else later).append((k, made))
    if at_once:
        pulled = _pulled(trace, leaves, at_once)
        for leaf, more in pulled.factors_of_leaves().items():
            factors[leaf].extend(more)
    joined = tuple(_join_dense(f) for f in factors)
    return costs, aux, joined, _pulled(trace, leaves, later) if later else None


def _materialized(
    function: Callable[..., Any],
    leaves: Sequence[Array],
    examples: Examples,
    strategy: Strategy,
    params: Params,
) -> tuple[Array, Any, tuple[tuple[Factor, ...], ...], None]:
    """Costs, aux and gradients by ``vmap(grad)``."""
    del strategy, params

    def checked(leaves: Sequence[Array], example: Example) -> tuple[Array, Any]:
        cost, aux = function(leaves, example)
        _validate.scalar_cost(jax.typeof(cost))
        return cost, aux

    gradient = jax.vmap(jax.value_and_grad(checked, has_aux=True), in_axes=(None, 0))
    (costs, aux), values = gradient(leaves, examples)
    return costs, aux, tuple((Dense(v),) for v in values), None


def _factor(site: Site, leaves: Sequence[Array], delta: Array, act: Any) -> Factor:
    """The factor that a site leaves: of its parameter, or of its value where that is no view."""
    view = site.origin.view
    if view is None:
        lengths = site.stacked_lengths()
        shape, dtype = lengths + site.value.shape, site.value.dtype
        view = View.whole(0, shape, len(lengths))
    else:
        shape, dtype = leaves[view.leaf].shape, leaves[view.leaf].dtype
    if view.scale != 1:
        delta = delta * view.scale

    def cast(x: Array) -> Array:
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(cast, site.rule.factor(site, view, shape, delta, act))


def _compact_factor(site: Site, leaves: Sequence[Array], delta: Array, act: Any) -> Factor:
    """The factor, with g_i formed where that is much smaller.

    Formed in a loop over a few groups of examples: their factors then need not exist all at once,
    and XLA cannot merge what computes δ and a into the product, and compute it many times over.
    """
    like = jax.eval_shape(functools.partial(_factor, site, leaves), delta, act)
    if not F.prefers_forming(like):
        return _factor(site, leaves, delta, act)

    def form(example: tuple[Array, Any]) -> Array:
        one_delta, one_act = (x[None] for x in example)
        return _factor(site, leaves, one_delta, one_act).materialize()[0]

    group = -(-delta.shape[0] // _NUM_GROUPS)
    return Dense(jax.lax.map(form, (delta, act), batch_size=group))


_NUM_GROUPS = 8


def _size(site: Site) -> int:
    """The number of entries of a site's value, over all the scans that stack it."""
    return functools.reduce(operator.mul, site.stacked_lengths(), site.value.size)


def _pulled(trace: _Trace, leaves: Sequence[Array], made: Sequence[tuple[int, Factor]]) -> Pulled:
    """Factors of computed values, with the pullback of the computation."""
    numbers = [k for k, _ in made]
    touched = sorted(frozenset().union(*(trace.sites[k].origin.leaves for k in numbers)))

    def values(chosen: list[Array]) -> tuple[Array, ...]:
        replaced = list(leaves)
        for leaf, value in zip(touched, chosen, strict=True):
            replaced[leaf] = value
        return trace.values(replaced, numbers)

    at, pull = jax.vjp(values, [leaves[leaf] for leaf in touched])
    shapes = tuple((value.shape, value.dtype) for value in at)
    return Pulled(tuple(factor for _, factor in made), pull, tuple(touched), shapes)


def _join_dense(factors: Sequence[Factor]) -> tuple[Factor, ...]:
    """Adds up what is written down anyway, so that it is kept once."""
    dense = [f for f in factors if isinstance(f, Dense)]
    if len(dense) < 2:
        return tuple(factors)
    total = Dense(functools.reduce(operator.add, (f.values for f in dense)))
    return (*(f for f in factors if not isinstance(f, Dense)), total)


def _refuse_fallbacks(sites: Sequence[Site], params: Params) -> None:
    names = _names(params)
    for site in sites:
        if not site.has_rule:
            parameters = " ".join(names[leaf] for leaf in sorted(site.origin.leaves))
            raise ValueError(
                f'strategy="factored", but {parameters} meets the example in {site.primitive} at '
                f'{site.source}, which has no rule; strategy="auto" writes down the gradients of '
                "that parameter alone"
            )


def _names(params: Params) -> list[str]:
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    return ["params" + jax.tree_util.keystr(path) for path in paths]


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1 << 30), ("MB", 1 << 20), ("kB", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
