"""G, the n × p matrix of per-example gradients, as one lazy, factored object."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp

from sgd_jax import _validate
from sgd_jax._tree import tree_dot
from sgd_jax._typing import Array, Example, Examples, Params, PyTree, Strategy
from sgd_jax.per_example import factors as F  # noqa: N812
from sgd_jax.per_example.factors import Dense, Factor, Shared
from sgd_jax.per_example.program import EXAMPLE, Program, Values, plan
from sgd_jax.per_example.sites import Kind, Lift, Origin, Site
from sgd_jax.per_example.views import View


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pulled:
    """Factors of values that parameters were computed into, such as a normalized weight.

    Gradients with respect to the parameters are their pullback by the VJP of that computation.
    """

    factors: tuple[Factor, ...]
    pull: Callable[[tuple[Array, ...]], tuple[list[Array]]]
    """From cotangents of the values to cotangents of the leaves."""
    leaves: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    shapes: tuple[tuple[tuple[int, ...], Any], ...] = dataclasses.field(metadata={"static": True})
    """Shape and dtype of each value."""

    def pull_back(self, cotangents: Sequence[Array]) -> dict[int, Array]:
        """Cotangents of the leaves, by leaf."""
        (leaves,) = self.pull(tuple(cotangents))
        return dict(zip(self.leaves, leaves, strict=True))

    def push_forward(self, direction: Sequence[Array]) -> tuple[Array, ...]:
        """The directional derivative of the values: the transpose of `pull_back`."""
        zeros = tuple(jnp.zeros(shape, dtype) for shape, dtype in self.shapes)

        def product(cotangents: tuple[Array, ...]) -> Array:
            pulled = self.pull_back(cotangents)
            return tree_dot(list(pulled.values()), [direction[leaf] for leaf in pulled])

        return jax.grad(product)(zeros)

    def factors_of_leaves(self) -> dict[int, list[Factor]]:
        """The same gradients as factors of the parameters themselves."""
        result: dict[int, list[Factor]] = {leaf: [] for leaf in self.leaves}
        zeros = [jnp.zeros(shape, dtype) for shape, dtype in self.shapes]
        full = [k for k, z in enumerate(zeros) if z.size > 1]
        for k, zero in enumerate(zeros):
            if k in full:
                continue
            ones = [jnp.ones_like(zero) if j == k else z for j, z in enumerate(zeros)]
            coefficients = self.factors[k].materialize().reshape(-1)
            for leaf, basis in self.pull_back(ones).items():
                result[leaf].append(Shared(coefficients, basis))
        if full:

            def pull_one(values: list[Array]) -> dict[int, Array]:
                cotangents = list(zeros)
                for k, value in zip(full, values, strict=True):
                    cotangents[k] = value
                return self.pull_back(cotangents)

            pulled = jax.vmap(pull_one)([self.factors[k].materialize() for k in full])
            for leaf, values in pulled.items():
                result[leaf].append(Dense(values))
        return result


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PerExampleGrads:
    """The gradients g_1 … g_n of n examples: the rows of G, kept in factors.

    Made by `per_example_grad`. A pytree, so it passes through `jax.jit`, `jax.vmap`,
    `jax.lax.scan` and `jax.shard_map`. Products with G cost about one plain gradient; only
    `materialize`, and what is said to form g_i below, writes gradients down. Every method equals
    what the same formula gives on ``jax.vmap(jax.grad(fun))``, to rounding.
    """

    factors: tuple[tuple[Factor, ...], ...]
    pulled: Pulled | None
    treedef: Any = dataclasses.field(metadata={"static": True})
    shapes: tuple[tuple[tuple[int, ...], Any], ...] = dataclasses.field(metadata={"static": True})
    num_examples: int = dataclasses.field(metadata={"static": True})
    """n."""

    def sum(self, weights: Array | None = None) -> Params:
        """Returns Σ_i c_i g_i, a sum without 1/n; like params.

        Args:
          weights: c, shape (n,); None is all ones. A padded example takes weight 0.

        Raises:
          ValueError: weights is not (n,).
        """
        self._check_weights(weights)
        leaves = [
            functools.reduce(
                operator.add, (f.weighted_sum(weights) for f in factors), jnp.zeros(shape, dtype)
            )
            for factors, (shape, dtype) in zip(self.factors, self.shapes, strict=True)
        ]
        if self.pulled is not None:
            sums = [f.weighted_sum(weights) for f in self.pulled.factors]
            for leaf, value in self.pulled.pull_back(sums).items():
                leaves[leaf] = leaves[leaf] + value
        return self._like_params(leaves)

    def mean(self) -> Params:
        """Returns the gradient of the mean cost, 1/n Σ_i g_i; like params."""
        return jax.tree.map(lambda leaf: leaf / self.num_examples, self.sum())

    def clipped_mean(self, max_norm: float | Array) -> Params:
        """Returns 1/n Σ_i min(1, c/‖g_i‖) g_i with c = max_norm; like params.

        The norm is over all parameters together. A gradient of norm zero stays zero.
        """
        norms = jnp.sqrt(self.squared_norms())
        clip = jnp.minimum(1, max_norm / jnp.where(norms > 0, norms, 1))
        return self.sum(clip / self.num_examples)

    def squared_norms(self, per_leaf: bool = False) -> PyTree:
        """Returns ‖g_i‖², shape (n,), over all parameters; exact also for shared parameters.

        Args:
          per_leaf: return a pytree like params instead, with the (n,) of each leaf.
        """
        leaves = [
            F.squared_norms(factors) if factors else jnp.zeros(self.num_examples, dtype)
            for factors, (_, dtype) in zip(self._leaf_factors(), self.shapes, strict=True)
        ]
        return self._like_params(leaves) if per_leaf else functools.reduce(operator.add, leaves)

    def second_moment(self, weights: Array | None = None) -> Params:
        """Returns 1/n Σ_i g_i², entry by entry, or Σ_i c_i g_i² with weights; like params.

        One product where an example uses a parameter once; otherwise g_i is formed, some examples
        at a time. The variance of each coordinate is this less the square of `mean`.
        """
        self._check_weights(weights)
        if weights is None:
            weights = jnp.full((self.num_examples,), 1 / self.num_examples)
        leaves = [
            F.second_moment(factors, weights.astype(dtype)) if factors else jnp.zeros(shape, dtype)
            for factors, (shape, dtype) in zip(self._leaf_factors(), self.shapes, strict=True)
        ]
        return self._like_params(leaves)

    def inner_products(self, direction: Params) -> Array:
        """Returns ⟨g_i, v⟩, shape (n,): the derivative of each example's cost along v.

        Args:
          direction: v, like params.

        Raises:
          ValueError: direction has another structure or other shapes than params.
        """
        leaves, treedef = jax.tree.flatten(direction)
        found = tuple(jnp.shape(leaf) for leaf in leaves)
        expected = tuple(shape for shape, _ in self.shapes)
        if treedef != self.treedef or found != expected:
            raise ValueError(
                f"direction must be like params: expected {self.treedef} with shapes {expected}, "
                f"got {treedef} with shapes {found}"
            )
        leaves = [
            jnp.asarray(leaf, dtype) for leaf, (_, dtype) in zip(leaves, self.shapes, strict=True)
        ]
        products = [
            f.inner_products(leaf)
            for factors, leaf in zip(self.factors, leaves, strict=True)
            for f in factors
        ]
        if self.pulled is not None:
            pushed = self.pulled.push_forward(leaves)
            pairs = zip(self.pulled.factors, pushed, strict=True)
            products += [f.inner_products(v) for f, v in pairs]
        zeros = jnp.zeros(self.num_examples, self.shapes[0][1])
        return functools.reduce(operator.add, products, zeros)

    def gram(self, other: "PerExampleGrads | None" = None) -> Array:
        """Returns ⟨g_i, h_j⟩ for all pairs, (n, n'): the Gram matrix G Hᵀ.

        Args:
          other: H, the gradients of n' examples in the same parameters; None is G itself.

        Raises:
          ValueError: other has parameters of another structure or other shapes.
        """
        other = self if other is None else other
        if (self.treedef, self.shapes) != (other.treedef, other.shapes):
            raise ValueError(
                "other must have the same parameters: expected "
                f"{self.treedef} with {self.shapes}, got {other.treedef} with {other.shapes}"
            )
        products = [
            F.gram(mine, theirs)
            for mine, theirs in zip(self._leaf_factors(), other._leaf_factors(), strict=True)
            if mine and theirs
        ]
        zeros = jnp.zeros((self.num_examples, other.num_examples), self.shapes[0][1])
        return functools.reduce(operator.add, products, zeros)

    def materialize(self) -> Params:
        """Returns the g_i themselves, leaves (n, *shape): n·p numbers, as ``vmap(grad)`` does."""
        leaves = [
            functools.reduce(
                operator.add,
                (f.materialize() for f in factors),
                jnp.zeros((self.num_examples, *shape), dtype),
            )
            for factors, (shape, dtype) in zip(self._leaf_factors(), self.shapes, strict=True)
        ]
        return self._like_params(leaves)

    def _leaf_factors(self) -> list[list[Factor]]:
        """The factors of each leaf, with those that are pulled back among them."""
        factors = [list(f) for f in self.factors]
        if self.pulled is not None:
            for leaf, more in self.pulled.factors_of_leaves().items():
                factors[leaf].extend(more)
        return factors

    def _like_params(self, leaves: Sequence[Array]) -> Params:
        return jax.tree.unflatten(self.treedef, leaves)

    def _check_weights(self, weights: Array | None) -> None:
        if weights is not None and jnp.shape(weights) != (self.num_examples,):
            raise ValueError(
                f"weights must have shape ({self.num_examples},), one number for each example, "
                f"got {jnp.shape(weights)}"
            )


def per_example_grad(
    fun: Callable[..., Any], *, strategy: Strategy = "auto"
) -> Callable[[Params, Examples], PerExampleGrads]:
    """Returns a function that takes the gradient of every example's cost.

    Row i of G is g_i = ∇_params fun(params, example_i), so ``grads.mean()`` is the gradient of the
    mean cost. See `per_example_value_and_grad` for arguments, errors and guarantees.

    >>> import jax.numpy as jnp
    >>> fun = lambda w, x: jnp.dot(w, x) ** 2 / 2  # g_i = (w·x_i) x_i
    >>> grads = per_example_grad(fun)(jnp.array([1.0, 0.0]), jnp.array([[1.0, 2.0], [3.0, 0.0]]))
    >>> grads.mean().tolist(), grads.squared_norms().tolist()
    ([5.0, 1.0], [5.0, 81.0])
    """
    value_and_grad = per_example_value_and_grad(fun, strategy=strategy)
    return lambda params, examples: value_and_grad(params, examples)[1]


def per_example_value_and_grad(
    fun: Callable[..., Any], *, strategy: Strategy = "auto", has_aux: bool = False
) -> Callable[[Params, Examples], tuple[Any, PerExampleGrads]]:
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
      strategy: ``"auto"`` factors what it can and writes down the rest, parameter by parameter;
        ``"factored"`` raises where a use of a parameter has no rule; ``"materialized"`` is
        ``jax.vmap(jax.grad(fun))`` behind the same interface.
      has_aux: whether fun returns more than the cost.

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

    def value_and_grad(params: Params, examples: Examples) -> tuple[Any, PerExampleGrads]:
        _validate.floating_params(params)
        n = _validate.num_examples(examples)
        leaves, treedef = jax.tree.flatten(params)
        leaves = _vary_like(examples, leaves)
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
    n = _validate.num_examples(examples)
    leaves, treedef = jax.tree.flatten(params)
    function = _flat(fun, treedef, has_aux=False)
    traces: list[_Trace] = []

    def kept(leaves: list[Array], examples: Examples) -> list[Factor]:
        trace, _, _, deltas, acts = _collect(function, leaves, examples)
        traces.append(trace)
        return [
            _factor(site, _view(site), _leaf_shape(site, leaves), deltas[k], acts[k])
            for k, site in enumerate(trace.sites)
        ]

    factors = jax.eval_shape(kept, leaves, examples)
    names = _names(params)
    rows = [("parameter", "meets the example in", "rule", "factor", "written down")]
    used: set[int] = set()
    for site, factor in zip(traces[0].sites, factors, strict=True):
        touched = sorted(site.origin.leaves)
        used.update(touched)
        rule = site.rule.name if site.has_rule else "fallback: written down"
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
            k: _vary_like(example, jnp.zeros(site.probe_shape(), site.probe.dtype))
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
        made = _factor(site, _view(site), _leaf_shape(site, leaves), deltas[k], acts[k])
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


def _factor(site: Site, view: View, shape: tuple[int, ...], delta: Array, act: Any) -> Factor:
    """The factor that a site leaves, as arrays of the dtype of its value."""
    if view.scale != 1:
        delta = delta * view.scale
    factor = site.rule.factor(site, view, shape, delta, act)

    def cast(x: Array) -> Array:
        return x.astype(site.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(cast, factor)


def _view(site: Site) -> View:
    """How a site's value lies in its parameter, or in itself where it is no view of one."""
    lengths = site.stacked_lengths()
    return site.origin.view or View.whole(0, lengths + site.value.shape, len(lengths))


def _leaf_shape(site: Site, leaves: Sequence[Any]) -> tuple[int, ...]:
    if site.origin.view is None:
        return site.stacked_lengths() + site.value.shape
    return leaves[site.origin.view.leaf].shape


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


def _vary_like(examples: Examples, values: Any) -> Any:
    """Marks values as varying over the mesh axes that examples vary over, inside shard_map.

    Otherwise their gradients would be summed over devices, and no longer be one example's.
    """
    axes = frozenset().union(
        *(getattr(jax.typeof(leaf), "vma", ()) for leaf in jax.tree.leaves(examples))
    )

    def vary(value: Array) -> Array:
        missing = tuple(sorted(axes - frozenset(getattr(jax.typeof(value), "vma", ()))))
        return jax.lax.pcast(value, missing, to="varying") if missing else jnp.asarray(value)

    return jax.tree.map(vary, values)


def _names(params: Params) -> list[str]:
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    return ["params" + jax.tree_util.keystr(path) for path in paths]


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1 << 30), ("MB", 1 << 20), ("kB", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
