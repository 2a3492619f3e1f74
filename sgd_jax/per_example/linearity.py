"""Whether a derivative is linear in the cotangent.

JAX transposes linear functions, and all its own derivatives are linear. A backward rule that a
user wrote (`jax.custom_vjp`) need not be: it may clip, round or normalize the cotangent, or add
something of its own. The gradient of a sum is then not the sum of gradients, so a value must not be
pulled back through it as a sum.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

OPENS = ("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint")
"""Calls that do nothing but run their jaxpr."""


def open_jaxpr(jaxpr: Any) -> tuple[Jaxpr, Sequence[Any]]:
    """Returns a jaxpr and its constants, closed or not."""
    return (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, ClosedJaxpr) else (jaxpr, ())


def alone(
    jaxpr: Any, eqn: Any, inputs: Sequence[Any], outputs: Sequence[Any]
) -> Callable[..., Sequence[Any]]:
    """Returns one equation of a jaxpr as a function of its input variables."""
    single = jaxpr.replace(
        constvars=[],
        invars=list(inputs),
        outvars=list(outputs),
        eqns=[eqn],
        debug_info=jaxpr.debug_info.with_unknown_names(),
    )
    return jaxpr_as_fun(ClosedJaxpr(single, ()))


def inner_jaxprs(params: Mapping[str, Any]) -> Iterator[Jaxpr]:
    """Yields the jaxprs among the parameters of an equation."""
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, ClosedJaxpr | Jaxpr):
                yield open_jaxpr(part)[0]


def has_backward_rule(eqn: Any) -> bool:
    """Whether an equation is, or holds, a call with a backward rule of its own."""
    if eqn.primitive.name.startswith("custom_vjp_call"):
        return True
    return any(
        has_backward_rule(inner) for jaxpr in inner_jaxprs(eqn.params) for inner in jaxpr.eqns
    )


def pullback_is_linear(function: Callable[..., Any], shapes: Sequence[Any]) -> bool:
    """Whether the pullback of ``function`` at inputs of these shapes is linear in the cotangent.

    True only if that is certain: the pullback can be transposed, and is zero at zero.
    """

    def pullback_at(*inputs: Any) -> Any:
        outputs, pullback = jax.vjp(function, *inputs)
        transposable(pullback, outputs)
        return outputs

    try:
        jax.eval_shape(pullback_at, *shapes)
    except NOT_LINEAR:
        return False
    return True


def transposable(pullback: Callable[..., Any], outputs: Any) -> Callable[..., Any]:
    """Returns the transpose of a pullback: the tangent that its cotangent rule implies.

    Raises:
      ValueError: the pullback is not surely linear: it may add something of its own.
      Exception: what `jax.linear_transpose` raises, see `NOT_LINEAR`.
    """
    backward = jax.make_jaxpr(pullback)(outputs).jaxpr
    if not all(_zeros(backward, [True] * len(backward.invars))):
        raise ValueError("the backward rule may add something of its own")
    transpose = jax.linear_transpose(pullback, outputs)
    gradients = jax.eval_shape(pullback, outputs)
    jax.eval_shape(transpose, gradients)
    return transpose


NOT_LINEAR = (NotImplementedError, AssertionError, TypeError, ValueError, KeyError, RuntimeError)
"""What JAX raises when it is asked to transpose what is not linear."""


def _zeros(jaxpr: Jaxpr, zeros: Sequence[bool]) -> list[bool]:
    """Returns which outputs of a jaxpr are surely zero if the marked inputs are."""
    known = dict(zip(jaxpr.invars, zeros, strict=True))

    def is_zero(atom: Any) -> bool:
        if isinstance(atom, Literal):
            return not np.any(atom.val)
        return known.get(atom, False)

    for eqn in jaxpr.eqns:
        outputs = _zero_outputs(eqn, [is_zero(a) for a in eqn.invars])
        known.update(zip(eqn.outvars, outputs, strict=True))
    return [is_zero(atom) for atom in jaxpr.outvars]


def _zero_outputs(eqn: Any, operands: list[bool]) -> list[bool]:
    """Returns which outputs of an equation are surely zero if the marked operands are."""
    name, params = eqn.primitive.name, eqn.params
    if name in OPENS:
        return _zeros(open_jaxpr(params.get("jaxpr", params.get("call_jaxpr")))[0], operands)
    if name == "scan":
        body = open_jaxpr(params["jaxpr"])[0]
        consts, carry = scan_counts(params)
        return _zeros_of_loop(body, operands[:consts], operands[consts:], carry)
    if name == "while":
        body = open_jaxpr(params["body_jaxpr"])[0]
        first = params["cond_nconsts"]
        consts = operands[first : first + params["body_nconsts"]]
        carry = operands[first + params["body_nconsts"] :]
        return _zeros_of_loop(body, consts, carry, len(carry))
    if name == "cond":
        branches = [_zeros(open_jaxpr(b)[0], operands[1:]) for b in params["branches"]]
        return [all(outputs) for outputs in zip(*branches, strict=True)]
    positions = _ZERO_WITH_ALL.get(name)
    zero = name in _ZERO_WITH_ANY and any(operands)
    zero = zero or (positions is not None and all(operands[positions]))
    return [zero] * len(eqn.outvars)


def _zeros_of_loop(body: Jaxpr, consts: list[bool], rest: list[bool], carry: int) -> list[bool]:
    """Returns which outputs of a loop are zero: a carried value if it starts and stays zero."""
    rest = list(rest)
    while True:
        outputs = _zeros(body, [*consts, *rest])
        kept = [before and after for before, after in zip(rest[:carry], outputs, strict=False)]
        if kept == rest[:carry]:
            return [*kept, *outputs[carry:]]
        rest[:carry] = kept


def scan_counts(params: Mapping[str, Any]) -> tuple[int, int]:
    """Returns the numbers of constants and of carried values of a scan, in any supported JAX."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


_ZERO_WITH_ANY = frozenset(("mul", "dot_general", "conv_general_dilated", "ragged_dot_general"))
"""The primitives whose output is zero if any operand is."""

_ZERO_WITH_ALL: Mapping[str, slice] = {
    **dict.fromkeys(
        (
            *("add", "add_any", "sub", "neg", "concatenate", "pad", "transpose", "reshape"),
            *("squeeze", "broadcast_in_dim", "slice", "rev", "convert_element_type", "copy"),
            *("copy_p", "reduce_sum", "cumsum", "split", "real", "imag", "complex", "conj"),
            *("expand_dims", "reduce_precision", "optimization_barrier", "name", "pvary"),
            *("sharding_constraint", "fft", "psum", "reduce_window_sum", "select_and_scatter_add"),
        ),
        slice(None),
    ),
    **dict.fromkeys(("div", "gather", "dynamic_slice", "stop_gradient"), slice(1)),
    **dict.fromkeys(("scatter-add", "scatter_add", "scatter"), slice(0, 3, 2)),
    **dict.fromkeys(("triangular_solve",), slice(1, 2)),
    "dynamic_update_slice": slice(2),
    "select_n": slice(1, None),
}
"""The primitives whose output is zero if all of these operands are."""
