"""Stochastic gradient descent, written out, in optax's ``GradientTransformation`` protocol."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sgd_jax import _validate
from sgd_jax._tree import tree_axpy
from sgd_jax.typing import Array, Params, PyTree

Schedule = Callable[[Array], Array]


class SGDState(NamedTuple):
    """What SGD carries from step to step."""

    step: Array
    """Number of steps taken, int32 scalar: what a learning-rate schedule is evaluated at."""
    velocity: Params | None
    """The decaying sum of gradients, like params; None without momentum."""


def sgd(
    learning_rate: float | Array | Schedule,
    momentum: float | Array = 0.0,
    nesterov: bool = False,
    weight_decay: float | Array = 0.0,
    mask: PyTree | Callable[[Params], PyTree] | None = None,
) -> optax.GradientTransformation:
    """Returns stochastic gradient descent: w ← w − η (d + λ w).

    With g the gradient of the MEAN cost of the mini-batch, η the learning rate, μ the momentum and
    λ the weight decay, one step is::

        v ← g + μ v                        velocity, starting at 0
        d = v, or g + μ v with Nesterov    direction (v already renewed)
        w ← w − η (d + λ w)                old w on the right

    so plain SGD (μ = λ = 0) is w ← w − η g. Weight decay is decoupled: it never enters the
    velocity. Nielsen's L2 regularization, w ← (1 − ηλ'/n) w − η g, is ``weight_decay=λ'/n`` with
    a mask that is False at the biases. `update` needs ``params`` only where there is weight decay.

    Args:
      learning_rate: η > 0, or a schedule: a function from the number of steps taken to η.
      momentum: μ in [0, 1).
      nesterov: look one step ahead; needs momentum > 0.
      weight_decay: λ ≥ 0, per step and per unit of learning rate.
      mask: which leaves decay: a pytree of bools like params (a prefix is enough), or a function
        from params to one; None decays all.

    Returns:
      An `optax.GradientTransformation`; its updates are to be ADDED to params, as by
      `optax.apply_updates`, in the dtype of the gradient.

    Raises:
      ValueError: a concrete argument is non-finite or outside its range, or Nesterov without
        momentum, or a mask without weight decay. `update` raises it where weight decay finds no
        params.
      TypeError: a concrete argument is not one number.

    >>> import jax.numpy as jnp, optax
    >>> optimizer = sgd(learning_rate=0.5)
    >>> w = jnp.array([1.0, 2.0])
    >>> updates, state = optimizer.update(jnp.array([2.0, 0.0]), optimizer.init(w))
    >>> optax.apply_updates(w, updates).tolist()
    [0.0, 2.0]

    Source: Nielsen, equations (20), (21), (93), (107); Sutskever et al. 2013 for Nesterov's form;
    Loshchilov and Hutter 2019 (arXiv 1711.05101) for decoupled decay.
    """
    infinity = float("inf")
    if not callable(learning_rate):
        _validate.finite_float(
            "learning_rate", learning_rate, low=0, low_allowed=False, high=infinity
        )
    _validate.finite_float("momentum", momentum, low=0, low_allowed=True, high=1)
    _validate.finite_float("weight_decay", weight_decay, low=0, low_allowed=True, high=infinity)
    has_momentum = _is_used(momentum)
    has_decay = _is_used(weight_decay)
    if nesterov and not has_momentum:
        raise ValueError("nesterov=True needs momentum > 0, got momentum = 0")
    if mask is not None and not has_decay:
        raise ValueError("mask chooses what decays, but weight_decay = 0; drop the mask")

    def init(params: Params) -> Any:
        velocity = jax.tree.map(jnp.zeros_like, params) if has_momentum else None
        return SGDState(jnp.zeros([], jnp.int32), velocity)

    def update(updates: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
        direction, velocity = updates, None
        if has_momentum:
            direction = velocity = tree_axpy(momentum, state.velocity, updates)
        if nesterov:
            direction = tree_axpy(momentum, velocity, updates)
        if has_decay:
            direction = _add_decay(weight_decay, mask, direction, params)
        rate = learning_rate(state.step) if callable(learning_rate) else learning_rate
        steps = jax.tree.map(lambda d: -jnp.asarray(rate, d.dtype) * d, direction)
        return steps, SGDState(state.step + 1, velocity)

    return optax.GradientTransformation(init, update)


def _is_used(coefficient: float | Array) -> bool:
    """Whether a coefficient can be other than zero: a JAX array, as in a sweep, always can."""
    return isinstance(coefficient, jax.Array) or bool(coefficient != 0)


def _add_decay(
    weight_decay: float | Array,
    mask: PyTree | Callable[[Params], PyTree] | None,
    direction: Params,
    params: Params | None,
) -> Params:
    """Returns direction + λ params at the leaves where the mask is True, direction elsewhere."""
    if params is None:
        raise ValueError("weight_decay > 0 needs the params: call update(gradients, state, params)")
    decays = mask(params) if callable(mask) else True if mask is None else mask

    def add(decay: bool, d: Params, w: Params) -> Params:
        return tree_axpy(weight_decay, w, d) if decay else d

    return jax.tree.map(add, decays, direction, params)
