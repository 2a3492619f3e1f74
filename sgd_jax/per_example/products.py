"""Finds products written as a multiplication and a sum, and makes them `dot_general`.

``(W * x[:, None]).sum(0)`` is ``x @ W``; only as a product does it leave a small factor.
"""

import collections
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, Literal, Var

from sgd_jax.per_example.linearity import alone
from sgd_jax.typing import Array


class _Spread(NamedTuple):
    """A value that is broadcast, and the dimension of the product that each of its own becomes."""

    atom: Any
    places: tuple[int | None, ...]
    """None for a dimension of size 1."""

    @property
    def dims(self) -> tuple[int, ...]:
        """The dimensions of the product that the value has."""
        return tuple(d for d in self.places if d is not None)


class _Product(NamedTuple):
    """The sum over ``axes`` of a multiplication of two spread values."""

    x: _Spread
    y: _Spread
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    multiplied: Var
    """What the multiplication gave, which nothing but the sum reads."""

    def __call__(self, x: Array, y: Array) -> Array:
        """Returns the sum as one dot_general."""
        x, x_dims = self._summed_alone(x, self.x, self.y.dims)
        y, y_dims = self._summed_alone(y, self.y, self.x.dims)
        both = [d for d in x_dims if d in y_dims]
        contract = [d for d in both if d in self.axes]
        batch = [d for d in both if d not in self.axes]
        numbers = (
            ([x_dims.index(d) for d in contract], [y_dims.index(d) for d in contract]),
            ([x_dims.index(d) for d in batch], [y_dims.index(d) for d in batch]),
        )
        exact = jax.lax.Precision.HIGHEST  # as a multiplication and a sum are
        result = jax.lax.dot_general(x, y, numbers, exact, preferred_element_type=x.dtype)
        order = batch + [d for d in x_dims + y_dims if d not in both]
        kept = [d for d in range(len(self.shape)) if d not in self.axes]
        result = result.transpose([order.index(d) for d in kept if d in order])
        shape = [self.shape[d] for d in kept]
        result = jax.lax.broadcast_in_dim(
            result, shape, [k for k, d in enumerate(kept) if d in order]
        )
        times = math.prod(
            self.shape[d] for d in self.axes if d not in self.x.dims and d not in self.y.dims
        )
        return result if times == 1 else result * times

    def _summed_alone(
        self, value: Array, spread: _Spread, others: Sequence[int]
    ) -> tuple[Array, list[int]]:
        """Sums over the dimensions that only this operand has and that are summed."""
        gone = [
            k
            for k, d in enumerate(spread.places)
            if d is None or (d in self.axes and d not in others)
        ]
        dims = [d for k, d in enumerate(spread.places) if k not in gone and d is not None]
        return (jnp.sum(value, axis=gone) if gone else value), dims


def with_products(jaxpr: Jaxpr) -> Jaxpr:
    """Returns the jaxpr with every sum of a product of broadcast values as a dot_general."""
    products = _find(jaxpr)
    if not products:
        return jaxpr
    replaced = {product.multiplied for product in products.values()}

    def evaluate(consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, Literal) else env[atom]

        for eqn in jaxpr.eqns:
            if eqn.outvars and eqn.outvars[0] in replaced:
                continue
            product = products.get(eqn.outvars[0]) if eqn.outvars else None
            if product is not None:
                env[eqn.outvars[0]] = product(read(product.x.atom), read(product.y.atom))
                continue
            inputs = list(dict.fromkeys(a for a in eqn.invars if isinstance(a, Var)))
            values = alone(jaxpr, eqn, inputs, list(eqn.outvars))(*(env[v] for v in inputs))
            env.update(zip(eqn.outvars, values, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    shapes = [
        [shape_of(v.aval) for v in variables] for variables in (jaxpr.constvars, jaxpr.invars)
    ]
    closed = jax.make_jaxpr(evaluate)(*shapes)
    if closed.consts:
        return jaxpr
    inner = closed.jaxpr
    count = len(jaxpr.constvars)
    return inner.replace(
        constvars=inner.invars[:count],
        invars=inner.invars[count:],
        debug_info=jaxpr.debug_info.with_unknown_names(),
    )


def _find(jaxpr: Any) -> dict[Any, _Product]:
    """Returns the products by the variable of their sum."""
    if not any(eqn.primitive.name == "reduce_sum" for eqn in jaxpr.eqns):
        return {}
    made = {variable: eqn for eqn in jaxpr.eqns for variable in eqn.outvars}
    uses = collections.Counter(
        atom
        for atoms in (*(eqn.invars for eqn in jaxpr.eqns), jaxpr.outvars)
        for atom in atoms
        if isinstance(atom, Var)
    )
    products = {}
    for eqn in jaxpr.eqns:
        if eqn.primitive.name != "reduce_sum" or isinstance(eqn.invars[0], Literal):
            continue
        source = made.get(eqn.invars[0])
        if source is None or source.primitive.name != "mul" or uses[eqn.invars[0]] > 1:
            continue
        x, y = (_spread(atom, made) for atom in source.invars)
        shape = tuple(source.outvars[0].aval.shape)
        axes = tuple(eqn.params["axes"])
        if not jnp.issubdtype(source.outvars[0].aval.dtype, jnp.inexact):
            continue
        if isinstance(x.atom, Literal) or isinstance(y.atom, Literal):
            continue
        spreads = len(x.dims) < len(shape) or len(y.dims) < len(shape)
        contracts = any(d in axes for d in x.dims if d in y.dims)
        # Something is broadcast, and the sum is a product: else the sum leaves no small factor.
        if spreads and (contracts or set(axes) - set(x.dims) or set(axes) - set(y.dims)):
            products[eqn.outvars[0]] = _Product(x, y, shape, axes, eqn.invars[0])
    return products


def _spread(atom: Any, made: dict[Any, Any]) -> _Spread:
    """Returns the value that an operand is broadcast from, and where its dimensions went."""
    places: list[int | None] = list(range(len(atom.aval.shape)))
    while not isinstance(atom, Literal) and atom in made:
        eqn = made[atom]
        if eqn.primitive.name not in ("broadcast_in_dim", "reshape") or len(eqn.invars) != 1:
            break
        source, shape = eqn.invars[0], atom.aval.shape
        inner = source.aval.shape
        if eqn.primitive.name == "broadcast_in_dim":
            found = [
                places[d] if inner[k] == shape[d] else None
                for k, d in enumerate(eqn.params["broadcast_dimensions"])
            ]
        elif [s for s in inner if s != 1] == [s for s in shape if s != 1]:
            kept = [d for d, s in zip(places, shape, strict=True) if s != 1]
            found = [None if s == 1 else kept.pop(0) for s in inner]
        else:
            break
        if any(d is None and s != 1 for d, s in zip(found, inner, strict=True)):
            break
        atom, places = source, found
    return _Spread(atom, tuple(places))


def shape_of(aval: Any) -> jax.ShapeDtypeStruct:
    """Returns the shape and dtype of an abstract value, and the mesh axes it varies over."""
    return jax.ShapeDtypeStruct(
        aval.shape, aval.dtype, manual_axis_type=getattr(aval, "manual_axis_type", None)
    )
