"""A network of sigmoid neurons: a' = σ(W a + b), layer after layer, for ONE input."""

import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from sgd_jax import _validate
from sgd_jax.typing import Array

__all__ = [
    "InitScheme",
    "Layer",
    "Network",
    "feedforward",
    "init_network",
    "weighted_input",
]

InitScheme = Literal["normal", "scaled"]


class Layer(NamedTuple):
    """One layer: ``weights`` (n_out, n_in) and ``biases`` (n_out,)."""

    weights: Array
    biases: Array


Network = tuple[Layer, ...]


def init_network(
    key: Array,
    sizes: Sequence[int],
    scheme: InitScheme = "normal",
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> Network:
    """Returns a network with random weights and biases.

    Biases are drawn from N(0, 1). Weights are drawn from N(0, 1) with ``scheme="normal"`` and from
    N(0, 1/n_in) with ``"scaled"``, n_in being the number of inputs of the neuron.

    Args:
      key: a JAX random key, used here and nowhere else.
      sizes: neurons per layer, inputs first: (784, 30, 10) makes two layers of weights.
      scheme: ``"normal"`` (Nielsen, chapter 1) or ``"scaled"`` (chapter 3).
      dtype: of weights and biases.

    Returns:
      A tuple of ``len(sizes) - 1`` layers; layer l has weights (sizes[l+1], sizes[l]).

    Raises:
      ValueError: fewer than two sizes, a size below 1, or an unknown scheme.
      TypeError: a size that is not a whole number.

    >>> import jax
    >>> network = init_network(jax.random.key(0), (784, 30, 10))
    >>> [layer.weights.shape for layer in network]
    [(30, 784), (10, 30)]
    """
    if len(sizes) < 2:
        raise ValueError(f"sizes must name at least inputs and outputs, got {tuple(sizes)}")
    sizes = [_validate.positive_int(f"sizes[{i}]", size) for i, size in enumerate(sizes)]
    if scheme not in get_args(InitScheme):
        raise ValueError(f"scheme must be one of {get_args(InitScheme)}, got {scheme!r}")

    def init_layer(key: Array, n_in: int, n_out: int) -> Layer:
        weights_key, biases_key = jax.random.split(key)
        weights = jax.random.normal(weights_key, (n_out, n_in), dtype)
        if scheme == "scaled":
            weights = weights * n_in**-0.5
        return Layer(weights, jax.random.normal(biases_key, (n_out,), dtype))

    keys = jax.random.split(key, len(sizes) - 1)
    return tuple(
        init_layer(k, *pair) for k, pair in zip(keys, itertools.pairwise(sizes), strict=True)
    )


def weighted_input(params: Network, x: Array) -> Array:
    """Returns the weighted input z = W a + b of the last layer, for ONE input.

    a is x for the first layer and σ(z) of the layer before for all others.

    Args:
      params: the layers, first to last.
      x: one input, shape (n_in,).

    Returns:
      z, shape (n_out,); `feedforward` is σ(z).

    Raises:
      ValueError: x is not one vector of the length that the first layer takes.
    """
    if not params:
        raise ValueError("params holds no layers; expected at least one sgd_jax.Layer")
    expected = (params[0].weights.shape[-1],)
    if jnp.shape(x) != expected:
        raise ValueError(
            f"x has shape {jnp.shape(x)}, expected {expected}: ONE input of the first layer. "
            "For many inputs use jax.vmap(fun, in_axes=(None, 0))"
        )
    *hidden, last = params
    for layer in hidden:
        x = jax.nn.sigmoid(layer.weights @ x + layer.biases)
    return last.weights @ x + last.biases


def feedforward(params: Network, x: Array) -> Array:
    """Returns the output of the network for ONE input.

    a' = σ(W a + b) layer after layer, σ(z) = 1/(1 + e^{−z}).

    Args:
      params: the layers, first to last.
      x: one input, shape (n_in,).

    Returns:
      The output, shape (n_out,), every entry in [0, 1].

    Raises:
      ValueError: x is not one vector of the length that the first layer takes.

    >>> import jax.numpy as jnp
    >>> layer = Layer(weights=jnp.array([[1.0, -1.0]]), biases=jnp.array([0.0]))
    >>> feedforward((layer,), jnp.array([3.0, 3.0])).tolist()
    [0.5]

    Source: Nielsen, equation (22).
    """
    return jax.nn.sigmoid(weighted_input(params, x))
