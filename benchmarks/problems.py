"""The networks that the suite `per_example` takes per-example gradients of."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import sgd_jax as sj


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A network, and examples to take gradients on."""

    name: str
    work: str
    fun: Callable[[Any, Any], jax.Array]
    """The cost of ONE example."""
    params: Any
    examples: Any
    microbatch_size: int
    """How many examples optax's microbatching takes at a time."""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What PyTorch's twin of the network has to know."""

    @functools.cached_property
    def max_norm(self) -> float:
        """The median of ‖g_i‖: a clipping norm that half of the examples exceed."""
        grad = sj.per_example_grad(self.fun, chunk_size=16)
        with jax.ensure_compile_time_eval():  # also while a contender is being traced
            squared_norms = jax.jit(lambda *at: grad(*at).squared_norms())(*self.at)
            return float(jnp.sqrt(jnp.median(squared_norms)))

    @property
    def at(self) -> tuple[Any, Any]:
        """Params and examples."""
        return self.params, self.examples


def mlp(sizes: tuple[int, ...] = (784, 1024, 1024, 10), m: int = 256) -> Problem:
    """Returns sigmoid layers with the quadratic cost."""
    keys = jax.random.split(jax.random.key(0), 3)
    examples = (
        jax.random.uniform(keys[1], (m, sizes[0]), jnp.float32),
        jax.nn.one_hot(jax.random.randint(keys[2], (m,), 0, sizes[-1]), sizes[-1]).astype(
            "float32"
        ),
    )

    def fun(params: Any, example: Any) -> jax.Array:
        x, y = example
        return sj.quadratic_cost(sj.feedforward(params, x), y)

    work = f"sigmoid layers {list(sizes)}, quadratic cost, m = {m}"
    params = sj.init_network(keys[0], sizes, "scaled")
    return Problem("mlp", work, fun, params, examples, min(16, m), {"sizes": sizes})


def conv(side: int = 28, channels: tuple[int, int] = (16, 32), m: int = 128) -> Problem:
    """Returns two 3 × 3 convolutions, each with ReLU and mean pooling, and a dense layer."""
    keys = iter(jax.random.split(jax.random.key(0), 8))
    sizes, flat = (1, *channels), (side // 4) ** 2 * channels[-1]
    params = [
        (_normal(next(keys), (3, 3, a, b), 9 * a), _normal(next(keys), (b,), 9 * a))
        for a, b in itertools.pairwise(sizes)
    ]
    params.append((_normal(next(keys), (10, flat), flat), _normal(next(keys), (10,), flat)))
    examples = (
        jax.random.uniform(next(keys), (m, side, side, 1), jnp.float32),
        jax.random.randint(next(keys), (m,), 0, 10),
    )

    def fun(params: Any, example: Any) -> jax.Array:
        x, label = example
        for kernel, bias in params[:-1]:
            x = jax.lax.conv_general_dilated(
                x[None], kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )[0]
            x = jax.nn.relu(x + bias[None, None])
            height, width, features = x.shape
            x = x.reshape(height // 2, 2, width // 2, 2, features).mean((1, 3))
        weights, biases = params[-1]
        return -jax.nn.log_softmax(weights @ x.reshape(-1) + biases)[label]

    work = (
        f"{side} × {side} pixels, 3 × 3 × {channels[0]}, pool, 3 × 3 × {channels[1]}, pool, "
        f"dense 10, cross-entropy, m = {m}"
    )
    options = {"side": side, "channels": channels}
    return Problem("conv", work, fun, params, examples, min(16, m), options)


def transformer(
    length: int = 128,
    width: int = 256,
    heads: int = 8,
    vocabulary: int = 1024,
    m: int = 16,
    tied: bool = True,
) -> Problem:
    """Returns a causal transformer block between an embedding and the prediction of tokens."""
    keys = iter(jax.random.split(jax.random.key(0), 12))

    def dense(n_in: int, n_out: int) -> tuple[jax.Array, jax.Array]:
        return _normal(next(keys), (n_in, n_out), n_in), jnp.zeros(n_out, jnp.float32)

    norm = (jnp.ones(width, jnp.float32), jnp.zeros(width, jnp.float32))
    params = [
        _normal(next(keys), (vocabulary, width), width),
        _normal(next(keys), (length, width), width),
        norm,
        dense(width, 3 * width),
        dense(width, width),
        norm,
        dense(width, 4 * width),
        dense(4 * width, width),
        norm,
    ]
    if not tied:
        params.append(_normal(next(keys), (vocabulary, width), width))
    tokens = jax.random.randint(next(keys), (m, length + 1), 0, vocabulary)

    def fun(params: Any, tokens: jax.Array) -> jax.Array:
        embedding, positions, norm_1, qkv, out, norm_2, up, down, norm_3, *head = params
        x = embedding[tokens[:-1]] + positions
        x = x + _affine(out, _attention(_affine(qkv, _layer_norm(norm_1, x)), heads))
        hidden = jax.nn.gelu(_affine(up, _layer_norm(norm_2, x)), approximate=True)
        x = _layer_norm(norm_3, x + _affine(down, hidden))
        scores = jax.nn.log_softmax(x @ (head[0] if head else embedding).T, axis=-1)
        return -jnp.mean(jnp.take_along_axis(scores, tokens[1:, None], axis=-1))

    name = "transformer" if tied else "transformer_untied"
    work = (
        f"transformer block, {'tied' if tied else 'untied'} embedding, T = {length}, d = {width}, "
        f"{heads} heads, LayerNorm, {vocabulary} tokens, m = {m}"
    )
    options = {"length": length, "width": width, "heads": heads, "vocabulary": vocabulary}
    return Problem(name, work, fun, params, tokens, min(4, m), options | {"tied": tied})


def _normal(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    return jax.random.normal(key, shape, jnp.float32) / jnp.float32(fan_in) ** 0.5


def _affine(layer: tuple[jax.Array, jax.Array], x: jax.Array) -> jax.Array:
    weights, biases = layer
    return x @ weights + biases[None]


def _layer_norm(layer: tuple[jax.Array, jax.Array], x: jax.Array) -> jax.Array:
    scale, shift = layer
    mean = jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True)
    return (x - mean) / jnp.sqrt(variance + 1e-5) * scale[None] + shift[None]


def _attention(qkv: jax.Array, heads: int) -> jax.Array:
    """Causal self-attention; (T, 3 d) to (T, d)."""
    length, width = qkv.shape[0], qkv.shape[1] // 3
    q, k, v = jnp.moveaxis(qkv.reshape(length, 3, heads, width // heads), 1, 0)
    scores = jnp.einsum("thd,shd->hts", q, k) / jnp.float32(width // heads) ** 0.5
    mask = jnp.tril(jnp.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(mask[None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("hts,shd->thd", weights, v).reshape(length, width)
