"""The noise scale of the optimizer that is used: gradients as its diagonal scaling sees them."""

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import optax

from sgd_jax import _validate
from sgd_jax.typing import Array, CostFn, Example, Params


def preconditioned(fun: CostFn, params: Params, scaling: Params) -> CostFn:
    """Returns the cost whose per-example gradients at zero are P g_i, P a diagonal scaling.

    fun'(v, x) = fun(w + P v, x), w = params: at v = 0 its gradients are P g_i, g_i those of ``fun``
    at w. So everything that takes a cost takes preconditioned gradients: with ``m =
    gradient_moments(preconditioned(fun, w, P), zeros_like(w), examples)``, ``noise_scale(m, of=…)``
    is tr(PΣPᵀ)/‖P∇C‖², with its interval, and its ``per_leaf`` has that of each layer. It does not
    change if P is multiplied by a number.

    Args:
      fun: the cost of ONE example.
      params: w, a pytree of floating-point arrays.
      scaling: the diagonal of P, like params; that of an optimizer is `scaling_of`.

    Raises:
      ValueError: params and scaling differ in structure or shapes.

    >>> import jax.numpy as jnp
    >>> f = preconditioned(lambda w, x: w**2 * x, jnp.array(3.0), jnp.array(0.5))
    >>> float(jax.grad(f)(jnp.array(0.0), 1.0))  # 0.5 · 2·3
    3.0

    Source: McCandlish, Kaplan and Amodei 2018 (arXiv 1812.06162), section 2.2, on preconditioners.
    """
    wanted, given = (jax.tree.map(jnp.shape, tree) for tree in (params, scaling))
    if wanted != given:
        raise ValueError(f"scaling has shapes {given}: expected those of params, {wanted}")

    def cost(offset: Params, example: Example) -> Array:
        return fun(jax.tree.map(lambda w, p, v: w + p * v, params, scaling, offset), example)

    return cost


def scaling_of(state: Any, params: Params, *, b2: float = 0.999, eps: float = 1e-8) -> Params:
    """Returns the diagonal scaling that an optax optimizer applies to a gradient, from its state.

    From the running second moment ν of the gradients that the state holds::

        Adam      1/(√(ν/(1 − β₂^t)) + ε)     t steps so far
        RMSProp   1/√(ν + ε)
        SGD       1, with momentum too

    Momentum averages gradients and scales none, so the noise scale of a single gradient is that of
    SGD; with coefficient μ the noise of the average is (1 − μ)/(1 + μ) times that of one gradient
    while params stand still. Learning rates and weight decay do not matter.

    Args:
      state: of an optax optimizer, chains included.
      params: like the gradients.
      b2: β₂ of Adam, as the optimizer was made with.
      eps: ε, likewise.

    Returns:
      P, like params.

    Raises:
      ValueError: b2 or eps out of range; a state that holds several second moments; Adam's before
        its first step, when it has none.

    >>> import jax.numpy as jnp, optax
    >>> w = jnp.array([1.0, 2.0])
    >>> optimizer = optax.adam(0.1)
    >>> _, state = optimizer.update(jnp.array([2.0, 4.0]), optimizer.init(w), w)
    >>> scaling_of(state, w).round(3).tolist()  # one step: 1/|g|
    [0.5, 0.25]

    Source: Kingma and Ba 2015 (arXiv 1412.6980); Hinton 2012 for RMSProp.
    """
    _validate.finite_float("b2", b2, low=0, low_allowed=True, high=1)
    _validate.finite_float("eps", eps, low=0, low_allowed=True, high=jnp.inf)
    states = [leaf for leaf in jax.tree.leaves(state, is_leaf=_is_state) if _is_state(leaf)]
    unknown = [type(s).__name__ for s in states if type(s).__name__ not in (*_PLAIN, *_SCALING)]
    scaling = [s for s in states if type(s).__name__ in _SCALING]
    if unknown or len(scaling) > 1:
        names = ", ".join(unknown or [type(s).__name__ for s in scaling])
        raise ValueError(
            f"the scaling of {names} is not known: expected the state of one of SGD, Adam and "
            "RMSProp; for another optimizer give its scaling to preconditioned() yourself"
        )
    if not scaling:
        return jax.tree.map(jnp.ones_like, params)
    (found,) = scaling
    if isinstance(found, optax.ScaleByRmsState):
        return jax.tree.map(lambda second: jax.lax.rsqrt(second + eps), found.nu)
    count = found.count
    if not isinstance(count, jax.core.Tracer) and int(count) == 0:
        raise ValueError("Adam has taken no step, so its second moment is 0: take one first")
    correction = 1 - b2 ** count.astype(float)
    return jax.tree.map(
        lambda second: 1 / (jnp.sqrt(second / correction.astype(second.dtype)) + eps), found.nu
    )


_SCALING = ("ScaleByAdamState", "ScaleByRmsState")
_PLAIN = (
    *("EmptyState", "TraceState", "ScaleByScheduleState", "ScaleState", "SGDState"),
    "NoiseTrackingState",
)


def _is_state(node: Any) -> bool:
    """Whether it is the state of one transformation: a NamedTuple, as all of optax's are."""
    return isinstance(node, tuple) and hasattr(node, "_fields")
