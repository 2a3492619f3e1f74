"""The optimizer that the flags name: SGD by hand, or any of optax."""

import difflib
import inspect
from typing import Any

import jax
import numpy as np
import optax

import sgd_jax as sj
from sgd_jax.networks import Network

ADAPTIVE_LEARNING_RATE = 0.01
"""Default of optimizers whose steps do not shrink with the gradient, as those of adam."""

_STEPS_LIKE_SGD = ("sgd", "noisy_sgd", "optimistic_gradient_descent")


def default_learning_rate(name: str, of_sgd: float) -> float:
    """Returns the learning rate for an optimizer that is given none; ``of_sgd`` is that of SGD."""
    return of_sgd if name in _STEPS_LIKE_SGD else ADAPTIVE_LEARNING_RATE


def make_optimizer(
    name: str, *, learning_rate: float, momentum: float, nesterov: bool, weight_decay: float
) -> optax.GradientTransformation:
    """Returns an optimizer for a network of `sj.Layer`.

    Weight decay is decoupled and spares the biases: every step also adds −η λ w to the weights,
    η being ``learning_rate`` and λ ``weight_decay``, after whatever the optimizer itself does.
    Options of an optax optimizer that are not named here keep optax's defaults.

    Args:
      name: `sgd`, which is `sj.sgd`, or the name of a factory in optax.
      learning_rate: η > 0.
      momentum: In [0, 1); handed on unless 0.
      nesterov: Handed on where True.
      weight_decay: λ ≥ 0 per step: λ_book / n for the L2 regularization of the book.

    Raises:
      ValueError: there is no such optimizer, or it does not take what it was given.
    """
    options: dict[str, Any] = {"learning_rate": learning_rate}
    if momentum:
        options["momentum"] = momentum
    if nesterov:
        options["nesterov"] = nesterov
    if name == "sgd":
        if weight_decay:
            options |= {"weight_decay": weight_decay, "mask": only_weights}
        return sj.sgd(**options)
    factory = _find(name)
    for option in options:
        if option not in inspect.signature(factory).parameters:
            raise ValueError(
                f"{option} is set, but optax.{name} takes none; leave --{option} out, or use "
                "--optimizer=sgd"
            )
    optimizer = _try(name, factory, options)
    if not weight_decay:
        return optimizer
    decay = optax.add_decayed_weights(-learning_rate * weight_decay, mask=only_weights)
    return optax.chain(optimizer, decay)


def only_weights(params: Network) -> Network:
    """Returns a mask like ``params``: True at weights, False at biases."""
    return tuple(sj.Layer(weights=True, biases=False) for _ in params)  # pyright: ignore[reportArgumentType]


def optimizer_names() -> list[str]:
    """Returns `sgd` and the names of optax's factories that take a learning rate."""
    public = (name for name in dir(optax) if not name.startswith(("_", "scale_by_")))
    return sorted({"sgd", *filter(_takes_learning_rate, public)})


def _takes_learning_rate(name: str) -> bool:
    factory = getattr(optax, name)
    return inspect.isfunction(factory) and "learning_rate" in inspect.signature(factory).parameters


def _find(name: str) -> Any:
    names = optimizer_names()
    if name not in names:
        close = difflib.get_close_matches(name, names, n=3)
        remedy = f"Did you mean {' or '.join(close)}?" if close else f"There are {', '.join(names)}"
        raise ValueError(
            f"optimizer is {name!r}; expected sgd or the name of an optax optimizer that takes a "
            f"learning rate. {remedy}"
        )
    return getattr(optax, name)


def _try(name: str, factory: Any, options: dict[str, Any]) -> optax.GradientTransformation:
    """Makes the optimizer and lets it take a step, abstractly, with gradients and nothing else."""
    w = jax.ShapeDtypeStruct((2,), np.float32)
    try:
        optimizer = factory(**options)
        jax.eval_shape(lambda g, w: optimizer.update(g, optimizer.init(w), w), w, w)
    except (TypeError, AttributeError) as error:
        raise ValueError(
            f"optimizer is {name!r}, which needs more than a learning rate and gradients "
            f"({error}); expected one that does without, such as adam"
        ) from error
    return optimizer
