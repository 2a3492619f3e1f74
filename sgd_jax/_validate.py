"""Checks at the border: each looks at static values only, never at what a tracer holds.

Every message names the argument, its value, what was expected and, where there is one, the remedy.
"""

import math
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from sgd_jax.typing import Examples, Params


def positive_int(name: str, value: Any) -> int:
    """Returns ``value`` as an int; raises unless it is a whole number of at least 1."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or np.ndim(value):
        raise TypeError(
            f"{name} must be a whole number, got {value!r} of type {type(value).__name__}"
        )
    if value.__index__() < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value.__index__()


def finite_float(name: str, value: Any, *, low: float, low_allowed: bool, high: float) -> None:
    """Raises unless a concrete ``value`` is finite and between ``low`` and ``high`` (exclusive).

    A traced value passes: what it will hold is not known at the border.
    """
    if isinstance(value, jax.core.Tracer):
        return
    wrong = TypeError(f"{name} must be one number, got {value!r} of type {type(value).__name__}")
    if isinstance(value, (bool, np.bool_)):
        raise wrong
    try:
        finite = math.isfinite(value)
    except TypeError as error:
        raise wrong from error
    above = value >= low if low_allowed else value > low
    if not (finite and above and value < high):
        opening = "[" if low_allowed else "("
        raise ValueError(f"{name} must be a finite number in {opening}{low}, {high}), got {value}")


def non_negative(name: str, value: Any) -> None:
    """Raises unless a concrete ``value`` is a number of at least 0; infinity is allowed."""
    if isinstance(value, jax.core.Tracer):
        return
    if np.ndim(value) or not np.issubdtype(np.result_type(value), np.number):
        raise TypeError(f"{name} must be one number, got {value!r} of type {type(value).__name__}")
    if not value >= 0:
        raise ValueError(f"{name}={value}: expected a number of at least 0")


def num_examples(examples: Examples) -> int:
    """Returns n, the length of the leading axis that all leaves of ``examples`` share.

    Raises:
      ValueError: there are no leaves, a leaf is a scalar, or leading axes differ.
    """
    leaves = jax.tree_util.tree_leaves_with_path(examples)
    if not leaves:
        raise ValueError(
            "examples holds no arrays; expected a pytree of arrays with leading axis n"
        )
    sizes = {}
    for path, leaf in leaves:
        name = "examples" + jax.tree_util.keystr(path)
        native_byte_order(name, leaf)
        if jnp.ndim(leaf) == 0:
            raise ValueError(
                f"{name} is a scalar; expected a leading axis over examples. "
                "For a single example, add the axis: jax.tree.map(lambda leaf: leaf[None], example)"
            )
        sizes[name] = jnp.shape(leaf)[0]
    if len(set(sizes.values())) > 1:
        listing = ", ".join(f"{name}: {size}" for name, size in sizes.items())
        raise ValueError(
            f"leading axes of examples differ ({listing}); expected one n for all leaves"
        )
    n = next(iter(sizes.values()))
    if n == 0:
        raise ValueError("examples is empty (n = 0); the mean over no examples is undefined")
    return n


def floating_params(params: Params) -> None:
    """Raises unless ``params`` has leaves, all of them real or complex floating-point arrays."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        raise ValueError("params holds no arrays; there is nothing to differentiate")
    for path, leaf in leaves:
        name = f"params{jax.tree_util.keystr(path)}"
        native_byte_order(name, leaf)
        try:
            dtype = jnp.result_type(leaf)
        except TypeError:
            raise TypeError(
                f"{name} is {leaf!r:.40}, not an array; expected floating-point arrays alone. "
                f"{_split_of(params)}"
            ) from None
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(
                f"{name} has dtype {dtype}; expected floating point. {_split_of(params)}"
            )


_SPLITS = {
    "equinox": (
        "Train its arrays alone: params, static = eqx.partition(model, eqx.is_inexact_array), and "
        "in fun: model = eqx.combine(params, static)"
    ),
    "flax": (
        "Train its parameters alone: graphdef, params, rest = nnx.split(model, nnx.Param, ...), "
        "and in fun: model = nnx.merge(graphdef, params, rest)"
    ),
}


def _split_of(params: Params) -> str:
    """Returns how to take what is trained out of ``params``, by the library of a module in it."""

    def library(node: Any) -> str | None:
        names = {base.__module__.partition(".")[0] for base in type(node).__mro__}
        return next((name for name in _SPLITS if name in names), None)

    nodes = jax.tree.leaves(params, is_leaf=lambda node: library(node) is not None)
    found = next((name for node in nodes if (name := library(node))), None)
    plain = "Pass what is not trained inside `examples` or close over it in `fun`"
    return _SPLITS[found] if found else plain


def native_byte_order(name: str, leaf: Any) -> None:
    """Raises TypeError at a NumPy array whose byte order is not that of this machine."""
    if isinstance(leaf, np.ndarray | np.generic) and not leaf.dtype.isnative:
        raise TypeError(
            f"{name} has dtype {leaf.dtype.str}, in a byte order that JAX does not compute in; "
            "convert it with x.astype(x.dtype.newbyteorder('='))"
        )


def optimizer(value: Any) -> None:
    """Raises unless ``value`` has optax's two functions; usually it was not called."""
    if not (callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))):
        raise TypeError(
            f"optimizer is {value!r:.60}; expected one with init and update, such as "
            "sgd(learning_rate=0.1) or optax.adam(1e-3)"
        )


def scalar_cost(cost: Any) -> None:
    """Raises unless ``cost``, abstract output of a cost function, is a floating-point scalar."""
    if getattr(cost, "shape", None) != ():
        raise ValueError(
            f"fun must return a scalar, the cost of ONE example; got {cost}. "
            "Sum over the outputs of one example; never over a batch axis"
        )
    if not jnp.issubdtype(cost.dtype, jnp.floating):
        raise TypeError(f"fun must return a floating-point cost, got dtype {cost.dtype}")
