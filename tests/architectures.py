"""Costs of one example in every style JAX allows: what the tests of per-example gradients run on.

Each builder takes a `Draw`, a source of numbers in one dtype, and returns ``fun, params,
examples``; the docstring says what is hard about it. `ARCHITECTURES` is the table of them all.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

NUM_EXAMPLES = 5


class Architecture(NamedTuple):
    """A cost of one example, where to evaluate it, and on what."""

    fun: Callable[..., Any]
    params: Any
    examples: Any


@dataclasses.dataclass
class Draw:
    """A seeded source of arrays: ``draw(2, 3)`` is standard normal, in the dtype asked for."""

    dtype: Any = jnp.float64
    num_examples: int = NUM_EXAMPLES
    seed: int = 0

    def __post_init__(self):
        self._numbers = np.random.default_rng(self.seed)

    def __call__(self, *shape):
        return jnp.asarray(self._numbers.standard_normal(shape), self.dtype)

    def batch(self, *shape):
        return self(self.num_examples, *shape)

    def positive(self, *shape):
        return jnp.asarray(self._numbers.uniform(0.5, 1.5, shape), self.dtype)

    def integers(self, low, high, *shape, dtype=np.int32):
        return jnp.asarray(self._numbers.integers(low, high, (self.num_examples, *shape)), dtype)

    def keys(self):
        return jax.random.split(jax.random.key(self.seed), self.num_examples)


ARCHITECTURES: dict[str, Callable[[Draw], Any]] = {}


def architecture(build):
    ARCHITECTURES[build.__name__] = build
    return build


def make(name, dtype=jnp.float64, num_examples=NUM_EXAMPLES):
    """Returns the architecture of that name."""
    return Architecture(*ARCHITECTURES[name](Draw(dtype, num_examples)))


def half_square(x):
    return jnp.sum(jnp.square(x)) / 2


# Dense layers


@architecture
def sigmoid_mlp(draw):
    """The textbook's network: weights and biases, one use each."""
    params = [(draw(4, 3), draw(4)), (draw(2, 4), draw(2))]

    def fun(params, example):
        a, y = example
        for W, b in params:
            a = jax.nn.sigmoid(W @ a + b)
        return half_square(a - y)

    return fun, params, (draw.batch(3), draw.batch(2))


@architecture
def bare_array(draw):
    """Params that are one array, and a scalar example."""
    return lambda w, x: jnp.sin(jnp.dot(w, w * x)), draw(3), draw.batch()


@architecture
def scalars(draw):
    """Parameters of shape (), (1,) and (1, 1), and one that nothing uses."""
    params = {"a": draw(), "b": draw(1), "c": draw(1, 1), "unused": draw(2, 2)}

    def fun(p, x):
        return half_square(jnp.tanh(p["a"] * x) + p["b"]) + (p["c"] @ x[:1])[0] * p["b"][0]

    return fun, params, draw.batch(3)


@architecture
def sequence_gram(draw):
    """Few positions, wide weight: the Gram route to the norms."""
    params = {"W": draw(5, 6), "b": draw(6)}
    return lambda p, x: half_square(jnp.tanh(x @ p["W"] + p["b"][None])), params, draw.batch(2, 5)


@architecture
def sequence_outer(draw):
    """Many positions, narrow weight: the outer-product route."""
    params = {"W": draw(2, 3), "b": draw(2)}
    return lambda p, x: half_square(jnp.tanh(x @ p["W"].T + p["b"][None])), params, draw.batch(7, 3)


@architecture
def dot_general_numbers(draw):
    """Two contracted and two batch dimensions in odd order, the parameter left and right."""
    params = {"left": draw(2, 4, 3, 2, 5), "right": draw(3, 2, 4)}

    def fun(p, x):  # x: (3, 4, 2, 2)
        y = lax.dot_general(p["left"], x, (((1, 3), (1, 2)), ((2, 0), (0, 3))))  # (3, 2, 5)
        z = lax.dot_general(jnp.tanh(y[..., :4]), p["right"], (((2,), (2,)), ((1,), (1,))))
        return half_square(z)

    return fun, params, draw.batch(3, 4, 2, 2)


@architecture
def transposed_use(draw):
    """An autoencoder with tied weights: W and Wᵀ."""
    return lambda W, x: half_square(W.T @ jnp.tanh(W @ x) - x), draw(3, 4), draw.batch(4)


@architecture
def used_twice(draw):
    """One square layer applied three times, once transposed, with a sequence axis."""

    def fun(W, x):
        return half_square(jnp.tanh(jnp.tanh(x @ W) @ W) @ W.T)

    return fun, draw(3, 3), draw.batch(2, 3)


@architecture
def reshaped(draw):
    """Weights stored flat, transposed, squeezed, cut and scaled on their way to the product."""
    params = {"flat": draw(12), "deep": draw(2, 1, 6, 3)}

    def fun(p, x):  # x: (3,)
        h = jnp.tanh(p["flat"].reshape(4, 3) @ x)
        W = jnp.squeeze(p["deep"], 1).transpose(2, 0, 1).reshape(3, 2, 2, 3)
        y = jnp.einsum("abcd,b,c->ad", W, h[:2], h[2:])
        V = p["flat"].reshape(2, 2, 3)[1]
        return (
            half_square(y) + half_square(-V / 3.0 @ x) + jnp.sum(2 * V[:, None, :] * x[None, None])
        )

    return fun, params, draw.batch(3)


@architecture
def overlapping_slices(draw):
    """Windows of one matrix that overlap, windows that do not, and the whole."""

    def fun(W, x):  # W: (5, 4)
        a, b, c = W[:3, :3] @ x[:3], W[1:4, 1:] @ x[1:], W[3:, :3] @ x[:3]
        d = W[0] @ x + W[4, 1] * x[0]
        return half_square(a * b) + half_square(c) + jnp.sin(d) + half_square(jnp.tanh(W @ x))

    return fun, draw(5, 4), draw.batch(4)


@architecture
def empty_arrays(draw):
    """A parameter without entries, a scan of no steps, and the empty slices of a parallel scan."""
    params = {"none": draw(0, 3), "stack": draw(0, 3, 3), "a": draw(3), "b": draw(3)}

    def fun(p, xs):  # xs: (4, 3)
        h = lax.scan(lambda h, W: (W @ h, None), xs[0], p["stack"])[0]
        a = jax.nn.sigmoid(p["a"])[None] * jnp.ones_like(xs)
        _, hs = lax.associative_scan(
            lambda one, two: (one[0] * two[0], two[0] * one[1] + two[1]), (a, xs * p["b"][None])
        )
        return half_square(h * p["a"]) + half_square(hs) + half_square(p["none"] @ xs[0])

    return fun, params, draw.batch(4, 3)


@architecture
def mixed_dtypes(draw):
    """Parameters of two precisions in one cost, one of them summed before it is widened."""

    def fun(p, x):
        low = p["low"]
        return half_square(p["high"] @ x + low.astype(x.dtype) @ x) + jnp.sum(low) * x[0]

    return fun, {"high": draw(2, 3), "low": draw(2, 3).astype(jnp.float32)}, draw.batch(3)


@architecture
def strided_and_reversed(draw):
    """Parameter-only moves that are no views: every second row, reversed, rolled, tiled."""

    def fun(W, x):
        return (
            half_square(W[::2] @ x)
            + half_square(W[::-1] @ jnp.sin(x))
            + half_square(jnp.roll(W, 1, 0) @ jnp.cos(x))
            + half_square(jnp.tile(W, (2, 1)) @ x)
        )

    return fun, draw(4, 3), draw.batch(3)


@architecture
def fused_qkv(draw):
    """Weights concatenated before the product, and one weight split before it."""
    params = {"q": draw(3, 2), "k": draw(3, 2), "v": draw(3, 2), "gates": draw(6, 3)}

    def fun(p, x):  # x: (2, 3)
        q, k, v = jnp.split(x @ jnp.concatenate([p["q"], p["k"], p["v"]], axis=1), 3, axis=1)
        a, b = jnp.split(p["gates"], 2)
        gate = jax.nn.sigmoid(x @ a.T) * jnp.tanh(x @ b.T)
        return half_square(jax.nn.softmax(q @ k.T) @ v) + half_square(gate)

    return fun, params, draw.batch(2, 3)


@architecture
def scaled_weights(draw):
    """Literal, traced and array constants times a weight; a weight over a constant."""
    mask = np.tril(np.ones((3, 3)))

    def fun(p, example):
        x, scale = example
        h = jnp.tanh((2.5 * p["W"] / 4) @ x) + (p["V"] * mask.astype(x.dtype)) @ x
        h = h + jnp.asarray(0.3, x.dtype) * -p["W"] @ x
        return half_square((p["V"] * scale) @ h) + half_square((p["V"] / jnp.sqrt(2.0)) @ h)

    return fun, {"W": draw(3, 3), "V": draw(3, 3)}, (draw.batch(3), draw.batch())


@architecture
def weight_normalized(draw):
    """A weight computed from two parameters, pulled back."""

    def fun(p, x):
        W = p["V"] * (p["g"] / jnp.linalg.norm(p["V"], axis=1))[:, None]
        return half_square(jnp.tanh(x @ W.T + p["b"][None]))

    return fun, {"V": draw(3, 4), "g": draw(3), "b": draw(3)}, draw.batch(2, 4)


@architecture
def low_rank(draw):
    """A frozen weight plus a product of two parameters, and the factors used alone."""
    frozen = np.random.default_rng(1).standard_normal((4, 3))

    def fun(p, x):
        W = frozen.astype(x.dtype) + p["B"] @ p["A"]
        return half_square(jnp.tanh(W @ x) + p["B"] @ (p["A"] @ jnp.sin(x)))

    return fun, {"A": draw(2, 3), "B": draw(4, 2)}, draw.batch(3)


@architecture
def cast_weights(draw):
    """Weights cast down and up again on their way, as in mixed precision."""

    def fun(p, x):
        low = p["W"].astype(jnp.float32).astype(x.dtype)
        return half_square(jnp.tanh(low @ x) + p["b"])

    return fun, {"W": draw(3, 4), "b": draw(3)}, draw.batch(4)


@architecture
def fourier_weights(draw):
    """A circular convolution by the Fourier transform: parameter-only complex values."""

    def fun(w, x):
        return half_square(jnp.fft.ifft(jnp.fft.fft(w) * jnp.fft.fft(x)).real)

    return fun, draw(4), draw.batch(4)


@architecture
def solved(draw):
    """A linear system whose matrix is a parameter: no rule, so written down."""
    eye = 3 * np.eye(3)

    def fun(p, x):
        return half_square(jnp.linalg.solve(p["A"] + eye.astype(x.dtype), x)) + p["b"] @ x

    return fun, {"A": draw(3, 3), "b": draw(3)}, draw.batch(3)


@architecture
def shifted_weights(draw):
    """Constants added to parameters and parameters taken from constants, as control variates do."""
    A, B = draw(3, 3), draw(3, 3)

    def fun(p, x):
        return half_square(jnp.tanh((A + p["W"]) @ x)) - half_square((B - 2 * p["W"]).T @ x)

    return fun, {"W": draw(3, 3)}, draw.batch(3)


# Costs that do not meet the example, or only partly


@architecture
def penalty_alone(draw):
    """A cost of the parameters alone."""
    params = {"W": draw(2, 3), "b": draw(2)}
    return lambda p, x: 0.1 * half_square(p["W"]) + jnp.sum(p["b"]), params, draw.batch(3)


@architecture
def penalty_and_fit(draw):
    """½λ‖w‖² beside a factored use: cross terms between the two."""

    def fun(p, x):
        fit = half_square(jnp.tanh(x @ p["W"].T) * p["g"][None])
        return fit + 0.5 * 0.3 * jnp.sum(p["W"] ** 2) + 0.1 * jnp.sum(jnp.abs(p["g"]))

    return fun, {"W": draw(3, 2), "g": draw(3)}, draw.batch(4, 2)


@architecture
def penalty_times_example(draw):
    """A penalty whose strength is data."""

    def fun(p, example):
        x, strength = example
        return half_square(p["W"] @ x) + strength * half_square(p["W"]) * jnp.sum(p["b"])

    return fun, {"W": draw(3, 2), "b": draw(2)}, (draw.batch(2), draw.batch())


@architecture
def stopped_gradients(draw):
    """stop_gradient on a parameter, on an activation, in a jit; a straight-through sign."""

    def fun(p, x):
        h = jnp.tanh(p["W"] @ x) * lax.stop_gradient(p["W"] @ x)
        h = h + jax.jit(lambda w: lax.stop_gradient(w) * w)(p["W"]) @ x
        hard = p["b"] + lax.stop_gradient(jnp.sign(p["b"]) - p["b"])
        return half_square(h + hard) + jnp.sum(lax.stop_gradient(p["frozen"]) * x)

    return fun, {"W": draw(3, 4), "b": draw(3), "frozen": draw(4)}, draw.batch(4)


@architecture
def cost_without_params(draw):
    """The cost does not depend on the parameters."""
    return lambda w, x: jnp.sum(x), draw(2), draw.batch(3)


@architecture
def rounded_to_integers(draw):
    """Integers and booleans made of a parameter carry no gradient."""

    def fun(w, x):
        steps = jnp.round(w).astype(jnp.int32)
        return half_square(jnp.where(w > 0, w * x, x)) + jnp.sum(steps * x) + jnp.argmax(w) * x[0]

    return fun, draw(3), draw.batch(3)


# Convolutions


def convolution(x, kernel, numbers, strides, padding, lhs=None, rhs=None, groups=1):
    ones = (1,) * (kernel.ndim - 2)
    y = lax.conv_general_dilated(
        x[None], kernel, strides, padding, lhs or ones, rhs or ones, numbers, groups
    )
    return y[0]


@architecture
def conv_strided(draw):
    """Channels last, a stride, then channels' order swapped in the kernel; a dense readout."""
    params = {"K": draw(3, 2, 2, 3), "b": draw(3), "L": draw(2, 3, 2, 2), "W": draw(2, 12)}

    def fun(p, x):  # x: (7, 6, 2)
        h = convolution(x, p["K"], ("NHWC", "HWIO", "NHWC"), (2, 1), "VALID")
        h = jax.nn.relu(h + p["b"][None, None])  # (3, 5, 3)
        h = convolution(h, p["L"], ("NHWC", "OIHW", "NHWC"), (1, 2), ((1, 0), (0, 1)))
        return half_square(p["W"] @ jnp.tanh(h).reshape(-1)[:12])

    return fun, params, draw.batch(7, 6, 2)


@architecture
def conv_channels_first_dilated(draw):
    """Channels first; input and kernel dilation; unequal and negative padding."""

    def fun(K, x):  # x: (2, 4, 4)
        y = convolution(
            x, K, ("NCHW", "OIHW", "NCHW"), (1, 2), ((2, 1), (-1, 3)), lhs=(2, 1), rhs=(1, 2)
        )
        return half_square(jnp.tanh(y))

    return fun, draw(3, 2, 2, 2), draw.batch(2, 4, 4)


@architecture
def conv_grouped(draw):
    """Two groups, then a depthwise convolution with two outputs for each channel."""
    params = {"K": draw(2, 2, 2, 4), "D": draw(2, 2, 1, 8)}

    def fun(p, x):  # x: (4, 4, 4)
        numbers = ("NHWC", "HWIO", "NHWC")
        h = jnp.tanh(convolution(x, p["K"], numbers, (1, 1), "SAME", groups=2))
        return half_square(convolution(h, p["D"], numbers, (2, 2), "SAME", groups=4))

    return fun, params, draw.batch(4, 4, 4)


@architecture
def conv_1d(draw):
    """One spatial dimension; the kernel used twice, the second time on its own output."""

    def fun(K, x):  # x: (6, 2)
        numbers = ("NWC", "WIO", "NWC")
        h = jnp.tanh(convolution(x, K, numbers, (1,), "SAME"))
        return half_square(convolution(h, K, numbers, (2,), ((2, 0),), rhs=(2,)))

    return fun, draw(3, 2, 2), draw.batch(6, 2)


@architecture
def conv_3d(draw):
    """Three spatial dimensions; the kernel is cut from a larger parameter and scaled."""

    def fun(K, x):  # x: (3, 3, 2, 1)
        y = convolution(x, 0.5 * K[:, :, 1:], ("NDHWC", "DHWIO", "NDHWC"), (1, 2, 1), "SAME")
        return half_square(jnp.sin(y))

    return fun, draw(2, 2, 3, 1, 2), draw.batch(3, 3, 2, 1)


@architecture
def conv_transposed_and_input(draw):
    """Transposed convolution with a flipped kernel; a parameter as the input of a convolution."""

    def fun(p, x):  # x: (3, 3, 2)
        numbers = ("NHWC", "HWIO", "NHWC")
        y = lax.conv_transpose(
            x[None], p["K"], (2, 2), "SAME", dimension_numbers=numbers, transpose_kernel=True
        )
        z = convolution(p["image"], x[:2, :2, :, None], numbers, (1, 1), "VALID")
        return half_square(jnp.tanh(y)) + half_square(z)

    return fun, {"K": draw(2, 2, 3, 2), "image": draw(3, 3, 2)}, draw.batch(3, 3, 2)


@architecture
def conv_in_scan(draw):
    """Stacked convolution layers in a scan, each grouped."""

    def fun(K, x):  # x: (4, 4)
        def layer(h, kernel):
            return jnp.tanh(
                convolution(h, kernel, ("NWC", "WIO", "NWC"), (1,), "SAME", groups=2)
            ), None

        return half_square(lax.scan(layer, x, K)[0])

    return fun, draw(2, 3, 2, 4), draw.batch(4, 4)


def normalize(x, axes):
    centred = x - jnp.mean(x, axes, keepdims=True)
    return centred * lax.rsqrt(jnp.mean(jnp.square(centred), axes, keepdims=True) + 1e-3)


@architecture
def conv_group_norm(draw):
    """Convolution, GroupNorm with scale and shift, pooling."""
    params = {"K": draw(2, 2, 2, 4), "scale": draw.positive(4), "shift": draw(4), "W": draw(2, 4)}

    def fun(p, example):  # x: (4, 4, 2)
        x, y = example
        h = convolution(x, p["K"], ("NHWC", "HWIO", "NHWC"), (1, 1), "SAME")
        h = normalize(h.reshape(4, 4, 2, 2), (0, 1, 3)).reshape(4, 4, 4)
        h = jax.nn.relu(h * p["scale"][None, None] + p["shift"][None, None])
        h = lax.reduce_window(h, -jnp.inf, lax.max, (2, 2, 1), (2, 2, 1), "VALID")
        return half_square(p["W"] @ jnp.mean(h, (0, 1)) - y)

    return fun, params, (draw.batch(4, 4, 2), draw.batch(2))


@architecture
def batch_norm_in_eval(draw):
    """Scale and shift on stored statistics, which are constants."""
    mean, variance = np.array([0.1, -0.2, 0.3]), np.array([1.0, 2.0, 0.5])

    def fun(p, x):  # x: (4, 2)
        h = x @ p["W"]
        h = (h - mean.astype(x.dtype)[None]) / np.sqrt(variance).astype(x.dtype)[None]
        return half_square(jnp.tanh(h * p["scale"][None] + p["shift"][None]))

    return fun, {"W": draw(2, 3), "scale": draw(3), "shift": draw(3)}, draw.batch(4, 2)


# Attention


def attention(p, x):
    q, k, v = (jnp.einsum("td,dhk->htk", x, p[name]) for name in "qkv")
    scores = jnp.einsum("htk,hsk->hts", q, k) / np.sqrt(k.shape[-1]).astype(x.dtype)
    scores = jnp.where(jnp.tril(jnp.ones(scores.shape, bool)), scores, -1e9)
    return jnp.einsum("hts,hsk,hkd->td", jax.nn.softmax(scores), v, p["o"])


def dropout(key, x, rate=0.25):
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def transformer_params(draw, vocabulary=7, width=4, heads=2, length=3):
    return {
        "embedding": draw(vocabulary, width),
        "position": draw(length + 1, width),
        **{name: draw(width, heads, width // heads) for name in "qkv"},
        "o": draw(heads, width // heads, width),
        "norm": {"scale": draw.positive(width), "shift": draw(width)},
        "rms": draw.positive(width),
        "up": draw(width, 5),
        "down": draw(5, width),
        "bias": draw(5),
    }


@architecture
def transformer(draw):
    """Tied embedding, positions, LayerNorm, causal attention in heads, RMSNorm, dropout by keys."""

    def fun(p, example):
        tokens, key = example
        inputs, targets = tokens[:-1], tokens[1:]
        x = p["embedding"][inputs] + p["position"][: inputs.shape[0]]
        norm = p["norm"]
        h = normalize(x, -1) * norm["scale"][None] + norm["shift"][None]
        x = x + dropout(key, attention(p, h))
        h = x * lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-3) * p["rms"][None]
        x = x + jax.nn.gelu(h @ p["up"] + p["bias"][None]) @ p["down"]
        log_probabilities = jax.nn.log_softmax(x @ p["embedding"].T)
        return -jnp.sum(jnp.take_along_axis(log_probabilities, targets[:, None], 1))

    return fun, transformer_params(draw), (draw.integers(0, 7, 4), draw.keys())


# Recurrent networks and stacks


@architecture
def rnn(draw):
    """A scan over time with a trained initial state; the state and every output enter the cost."""
    params = {"W": draw(3, 3), "U": draw(3, 2), "b": draw(3), "h0": draw(3)}

    def fun(p, xs):
        def cell(h, x):
            h = jnp.tanh(p["W"] @ h + p["U"] @ x + p["b"])
            return h, h

        h, hs = lax.scan(cell, p["h0"], xs)
        return half_square(h) + jnp.sum(jnp.sin(hs))

    return fun, params, draw.batch(4, 2)


@architecture
def lstm(draw):
    """Gates from one fused weight, split; a masked sequence; run backwards."""
    params = {"W": draw(8, 5), "b": draw(8)}

    def fun(p, example):
        xs, mask = example

        def cell(carry, step):
            (x, keep), (h, c) = step, carry
            i, f, g, o = jnp.split(p["W"] @ jnp.concatenate([x, h]) + p["b"], 4)
            new_c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            new = (jax.nn.sigmoid(o) * jnp.tanh(new_c), new_c)
            return jax.tree.map(lambda a, b: jnp.where(keep, a, b), new, carry), None

        start = (jnp.zeros(2, xs.dtype), jnp.zeros(2, xs.dtype))
        (h, c), _ = lax.scan(cell, start, (xs, mask), reverse=True, unroll=2)
        return half_square(h) + jnp.sum(c)

    return fun, params, (draw.batch(3, 3), draw.integers(0, 2, 3).astype(bool))


@architecture
def gru_unrolled(draw):
    """Three time steps written out in Python: one parameter at many sites."""
    params = {name: draw(2, 5) for name in "zrh"}

    def fun(p, xs):
        h = jnp.zeros(2, xs.dtype)
        for x in xs:
            joined = jnp.concatenate([x, h])
            z, r = jax.nn.sigmoid(p["z"] @ joined), jax.nn.sigmoid(p["r"] @ joined)
            h = (1 - z) * h + z * jnp.tanh(p["h"] @ jnp.concatenate([x, r * h]))
        return half_square(h)

    return fun, params, draw.batch(3, 3)


def stack_of_layers(draw, depth=3):
    return {"W": draw(depth, 3, 3), "b": draw(depth, 3)}


@architecture
def stacked_remat(draw):
    """Layers stacked in a scan, each rematerialized under a policy."""
    policy = jax.checkpoint_policies.dots_saveable

    def fun(p, x):
        @functools.partial(jax.checkpoint, policy=policy)
        def layer(h, layer_params):
            return jnp.tanh(layer_params["W"] @ h + layer_params["b"]), None

        return half_square(lax.scan(layer, x, p)[0])

    return fun, stack_of_layers(draw), draw.batch(3)


@architecture
def stacked_reverse(draw):
    """The stack from the last layer to the first, unrolled, on a sequence, with a shared scale."""

    def fun(p, x):
        def layer(h, layer_params):
            h = (h @ layer_params["W"].T / 2) * p["scale"][None] + layer_params["b"][None]
            return jnp.tanh(h), jnp.sum(h)

        h, sums = lax.scan(layer, x, p["stack"], reverse=True, unroll=True)
        return half_square(h) + jnp.sum(jnp.sin(sums))

    return fun, {"stack": stack_of_layers(draw), "scale": draw(3)}, draw.batch(2, 3)


@architecture
def stack_of_one(draw):
    """Scans of length 1 over a stack of one layer, and over a window of one layer of two."""

    def fun(p, x):
        def layer(h, W):
            return jnp.tanh(W @ h), None

        h = lax.scan(layer, x, p["one"])[0]
        return half_square(lax.scan(layer, h, p["two"][1:])[0])

    return fun, {"one": draw(1, 3, 3), "two": draw(2, 3, 3)}, draw.batch(3)


@architecture
def nested_scans(draw):
    """A recurrent cell scanned over time inside a scan over layers, inside a shared scan."""
    params = {"W": draw(2, 3, 3), "shared": draw(3, 3)}

    def fun(p, xs):
        def layer(inputs, W):
            def cell(h, x):
                h = jnp.tanh(W @ h + p["shared"] @ x)
                return h, h

            return lax.scan(cell, jnp.zeros(3, xs.dtype), inputs)[1], None

        def twice(inputs, _):
            return lax.scan(layer, inputs, p["W"])[0], None

        return half_square(lax.scan(twice, xs, None, length=2)[0])

    return fun, params, draw.batch(2, 3)


@architecture
def grid_of_layers(draw):
    """A stack of stacks, (outer, inner, 3, 3), scanned twice, read through odd reshapes."""

    def fun(p, x):
        def inner(h, W):
            return jnp.tanh(W.reshape(3, 3).T @ h), None

        def outer(h, stack):
            return lax.scan(inner, h, stack.transpose(1, 0, 2))[0], None

        return half_square(lax.scan(outer, x, p.reshape(2, 3, 2, 3))[0])

    return fun, draw(2, 18), draw.batch(3)


@architecture
def stack_by_python(draw):
    """A stack indexed in Python, with one layer used again and one counted from the end."""

    def fun(p, x):
        for k in (0, 1, 2, 1, -1):
            x = jnp.tanh(p[k] @ x)
        return half_square(x)

    return fun, draw(3, 3, 3), draw.batch(3)


@architecture
def stack_by_fori(draw):
    """A stack indexed by the counter of a loop, and by a scanned constant."""

    def fun(p, x):
        x = lax.fori_loop(0, 3, lambda k, h: jnp.tanh(p["W"][k] @ h), x)
        order = jnp.array([2, 0])
        x = lax.scan(lambda h, k: (jnp.tanh(p["W"][k] @ h + p["b"][k]), None), x, order)[0]
        return half_square(x)

    return fun, stack_of_layers(draw), draw.batch(3)


@architecture
def carried_params(draw):
    """Parameters carried through a scan unchanged, or changed by parameters alone."""

    def fun(p, xs):
        def step(carry, x):
            W, decayed, h = carry
            h = jnp.tanh(W @ h + decayed * x)
            return (W, 0.5 * decayed, h), decayed

        carry, history = lax.scan(step, (p["W"], p["v"], jnp.ones(3, xs.dtype)), xs)
        return half_square(carry[2]) + half_square(carry[0] @ xs[0]) + jnp.sum(history * xs)

    return fun, {"W": draw(3, 3), "v": draw(3)}, draw.batch(2, 3)


@architecture
def scan_outputs_of_params(draw):
    """Scans that emit parameters, constants and sums of stacked parameters."""

    def fun(p, x):
        def step(total, W):
            return total + W @ x, (W, 1.0, jnp.sum(W))

        total, (stack, ones, sums) = lax.scan(step, jnp.zeros(2, x.dtype), p)
        return half_square(total) + jnp.sum(stack * x[0]) + jnp.sum(ones) + sums @ sums * x[1]

    return fun, draw(3, 2, 2), draw.batch(2)


# Choices


@architecture
def mixture_by_cond(draw):
    """A predicate that depends on the example; branches with constants, outputs of parameters."""

    def fun(p, x):
        y = lax.cond(x[0] > 0, lambda: p["W"] @ x, lambda: p["v"] * jnp.sin(x))
        z = lax.cond(x[1] > 0, lambda: p["v"], lambda: jnp.zeros_like(p["v"]))
        w = lax.cond(x[2] > 0, lambda: y[0], lambda: jnp.zeros((), x.dtype))
        return half_square(y) + jnp.sum(z * x) + w

    return fun, {"W": draw(3, 3), "v": draw(3)}, draw.batch(3)


@architecture
def mixture_by_switch(draw):
    """Three branches of unlike sites, one index out of range, a scan in one branch."""

    def fun(p, example):
        x, k = example

        def recur(x):
            return lax.fori_loop(0, 2, lambda _, h: jnp.tanh(p["W"] @ h), x)

        return half_square(
            lax.switch(k, [recur, lambda x: p["W"].T @ (x + p["b"]), lambda x: x * p["b"][0]], x)
        )

    return (
        fun,
        {"W": draw(3, 3), "b": draw(3)},
        (draw.batch(3), jnp.array([0, 1, 2, 9, 0][: draw.num_examples])),
    )


@architecture
def cond_in_scan(draw):
    """A choice at every step of a scan over layers, and a choice by a constant of the scan."""

    def fun(p, x):
        def layer(h, step):
            W, even = step
            h = lax.cond(h[0] > 0, lambda h: jnp.tanh(W @ h), lambda h: h * p["b"], h)
            return lax.cond(even, lambda h: W.T @ h, lambda h: h, h), None

        return half_square(lax.scan(layer, x, (p["W"], jnp.array([True, False, True])))[0])

    return fun, {"W": draw(3, 2, 2), "b": draw(2)}, draw.batch(2)


@architecture
def choice_by_parameter(draw):
    """A predicate made of a parameter: no gradient flows through it."""

    def fun(p, x):
        W = lax.cond(p["b"][0] > 0, lambda: p["W"], lambda: p["W"].T)
        return half_square(W @ x) + lax.cond(p["b"][1] > 0, lambda: p["b"] @ x, lambda: x[0])

    return fun, {"W": draw(3, 3), "b": draw(3)}, draw.batch(3)


@architecture
def experts_by_index(draw):
    """A mixture of experts: one expert by gather, one by dynamic_slice, top two with weights."""

    def fun(p, example):
        x, k = example
        h = jnp.tanh(p["W"][k] @ x) + lax.dynamic_index_in_dim(p["W"], k, 0, keepdims=False) @ x
        weights, chosen = lax.top_k(p["router"] @ x, 2)
        mixed = jnp.einsum("e,eij,j->i", jax.nn.softmax(weights), p["W"][chosen], x)
        return half_square(h + mixed)

    return fun, {"W": draw(3, 2, 2), "router": draw(3, 2)}, (draw.batch(2), draw.integers(0, 3))


# Embeddings and indices


@architecture
def embedding_modes(draw):
    """Repeated, negative and out-of-bounds indices in every mode of a gather."""

    def fun(E, k):  # k: (4,)
        rows = [
            E[k],
            E.at[k].get(mode="clip"),
            E.at[k].get(mode="fill", fill_value=0),
            E.at[jnp.clip(k, 0, 4)].get(mode="promise_in_bounds"),
            jnp.take(E, k, axis=0, mode="wrap"),
        ]
        return half_square(sum(w * jnp.sum(jnp.tanh(r), 0) for w, r in enumerate(rows, 1)))

    tokens = np.random.default_rng(2).integers(-7, 8, (draw.num_examples, 4))
    tokens[:, 1] = tokens[:, 0]
    return fun, draw(5, 3), jnp.asarray(tokens)


@architecture
def embedding_columns(draw):
    """Indices along the second axis, two indices at once, and one-hot rows."""

    def fun(E, example):
        i, j = example  # (3,) each
        one_hot = jax.nn.one_hot(i, E.shape[0], dtype=E.dtype)
        picked = jnp.take(E, j, axis=1) @ jnp.ones(3, E.dtype)
        pairs = E[i, j] * E[i[:, None], j[None, :]].sum(1)
        return half_square(picked) + half_square(jnp.sin(pairs)) + half_square(one_hot @ E)

    return fun, draw(4, 5), (draw.integers(0, 4, 3), draw.integers(0, 5, 3))


@architecture
def narrow_indices(draw):
    """Indices of 8 bits into tables of more than 8 bits' worth of entries."""

    def fun(p, example):
        i, j = example
        table = p["table"]  # (20, 20, 2)
        return half_square(jnp.sum(table[i, j], 0)) + half_square(p["long"][i] + p["wide"][j] ** 2)

    indices = [draw.integers(8, 20, 3, dtype=np.uint8), draw.integers(0, 20, 3, dtype=np.int8)]
    return fun, {"table": draw(20, 20, 2), "long": draw(256), "wide": draw(100)}, tuple(indices)


@architecture
def embedding_three_ways(draw):
    """One table read by index, multiplied as a matrix, transposed, and penalized."""

    def fun(E, k):
        h = jnp.tanh(E[k])  # (3, 4)
        return half_square(h @ E.T) + half_square(E @ h[0]) + 0.1 * half_square(E)

    return fun, draw(5, 4), draw.integers(0, 5, 3)


@architecture
def batched_gather(draw):
    """take_along_axis of a parameter, updates of a parameter at data's index, windows of it."""

    def fun(p, example):
        x, k = example  # (3,), (3,)
        a = jnp.take_along_axis(p["W"], k[:, None], axis=1)[:, 0] * x
        b = p["W"].at[k[0]].set(x) @ x
        c = (
            lax.dynamic_slice_in_dim(p["W"], k[1], 2) @ x
            + lax.dynamic_slice(p["W"], (k[1], k[0]), (2, 2)) @ x[:2]
        )
        d = lax.dynamic_update_slice(p["b"], x[:1], (k[2],))
        return half_square(a + b) + half_square(c) + half_square(d)

    return fun, {"W": draw(3, 3), "b": draw(4)}, (draw.batch(3), draw.integers(0, 3, 3))


# Functions with derivative rules of their own, and other calls


@jax.custom_jvp
def scaled_sine(w, x):
    return jnp.sin(w @ x)


@scaled_sine.defjvp
def _(primals, tangents):
    (w, x), (dw, dx) = primals, tangents
    return scaled_sine(w, x), 2 * jnp.cos(w @ x) * (dw @ x + w @ dx)


@jax.custom_vjp
def odd_product(w, x):
    return w @ x


odd_product.defvjp(
    lambda w, x: (w @ x, (w, x)),
    lambda kept, c: (2 * jnp.outer(c, kept[1]), kept[0].T @ c),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def with_power(power, w, x):
    return (w * x) ** power, x


def _with_power_fwd(power, w, x):
    return with_power(power, w, x), (w, x)


def _with_power_bwd(power, kept, cotangents):
    (w, x), (c, _) = kept, cotangents
    return 3 * power * c * x, c * w


with_power.defvjp(_with_power_fwd, _with_power_bwd)


@architecture
def custom_jvp(draw):
    """A derivative rule that is not the derivative; and jax.numpy's own, mixed operands."""

    def fun(p, x):
        h = jnp.logaddexp(p["b"], scaled_sine(p["W"], x)) + scaled_sine(jnp.tanh(p["W"]), x)
        return half_square(h) + jnp.sum(jax.nn.relu(p["b"]) * jax.nn.silu(x[:3]))

    return fun, {"W": draw(3, 4), "b": draw(3)}, draw.batch(4)


@architecture
def custom_vjp(draw):
    """A backward rule that is not the transpose: it must be used, factored or not."""

    def fun(p, x):
        h = jnp.tanh(odd_product(p["W"], x))
        y, unused = with_power(2, p["b"], h)
        return half_square(y) + jnp.sum(odd_product(p["W"], unused))

    return fun, {"W": draw(3, 3), "b": draw(3)}, draw.batch(3)


@jax.custom_vjp
def clipped_backward(w, x):
    return w @ x


clipped_backward.defvjp(
    lambda w, x: (w @ x, (w, x)),
    lambda kept, c: (jnp.outer(jnp.clip(c, -0.5, 0.5), kept[1]), kept[0].T @ c),
)


@jax.custom_vjp
def shifted_backward(w, x):
    return w @ x


shifted_backward.defvjp(
    lambda w, x: (w @ x, (w, x)),
    lambda kept, c: (jnp.outer(c, kept[1]) + 0.1 * kept[0], kept[0].T @ c),
)


@architecture
def custom_vjp_not_linear(draw):
    """Backward rules that clip the cotangent, or add something: not linear in it."""

    def fun(p, x):
        h = clipped_backward(p["clipped"], x)
        return half_square(shifted_backward(p["shifted"], jnp.tanh(h)))

    return fun, {"clipped": draw(3, 3), "shifted": draw(3, 3)}, draw.batch(3)


@architecture
def custom_rules_in_scan(draw):
    """Both kinds of custom rule on stacked parameters, under remat, in a scan."""

    def fun(p, x):
        @jax.checkpoint
        def layer(h, step):
            W, b = step
            return jnp.logaddexp(b, scaled_sine(W, odd_product(p["shared"], h))), None

        return half_square(lax.scan(layer, x, (p["W"], p["b"]))[0])

    return fun, {"W": draw(2, 3, 3), "b": draw(2, 3), "shared": draw(3, 3)}, draw.batch(3)


@architecture
def while_without_gradient(draw):
    """A while loop that a parameter enters; nothing is differentiated through it."""

    def fun(p, x):
        def halve(carry):
            norm, count = carry
            return norm / 2 * jnp.abs(p["s"]), count + 1

        norm = lax.stop_gradient(half_square(p["W"] @ x))
        _, count = lax.while_loop(lambda c: (c[0] > 0.1) & (c[1] < 9), halve, (norm, 0))
        return half_square(p["W"] @ x) * count + p["s"]

    return fun, {"W": draw(2, 3), "s": jnp.asarray(0.7, draw.dtype)}, draw.batch(3)


@architecture
def vmap_inside(draw):
    """Heads by vmap over parameters, positions by vmap over data, indices by vmap over both."""

    def fun(p, example):
        x, k = example  # (2, 3), (2,)
        heads = jax.vmap(lambda W: jax.vmap(lambda row: jnp.tanh(W @ row))(x))(p["W"])
        picked = jax.vmap(lambda W, i: W[i])(p["W"], k)
        shared = jax.vmap(lambda i: p["b"][i])(k)
        return half_square(heads) + half_square(picked) + half_square(shared[:, None] * x)

    return fun, {"W": draw(2, 4, 3), "b": draw(4)}, (draw.batch(2, 3), draw.integers(0, 4, 2))


@architecture
def nested_jit(draw):
    """jit in jit: views made inside, an unused output, a parameter returned, donated arguments."""

    @jax.jit
    def views(W, b):
        return W.T, 2 * b, b

    @jax.jit
    def layer(p, x):
        transposed, doubled, _ = views(p["W"], p["b"])
        h = jax.jit(lambda h: h + doubled)(transposed @ x)
        return jnp.tanh(h), p["b"]

    def fun(p, x):
        h, b = layer(p, x)
        return half_square(h) + jnp.sum(b * h)

    return fun, {"W": draw(4, 3), "b": draw(3)}, draw.batch(4)


@architecture
def grad_inside(draw):
    """A cost that takes a gradient step of its own, on the example."""

    def fun(p, x):
        inner = jax.grad(lambda x: half_square(jnp.tanh(p["W"] @ x + p["b"])))
        return half_square(jnp.tanh(p["W"] @ (x - 0.1 * inner(x))))

    return fun, {"W": draw(3, 4), "b": draw(3)}, draw.batch(4)


@architecture
def examples_of_many_kinds(draw):
    """Keys, integers, booleans and floats in one example; unused leaves."""

    def fun(p, example):
        noise = jax.random.normal(example["key"], (3,), p["W"].dtype)
        x = jnp.where(example["flag"], example["x"], noise)
        return half_square(p["W"] @ x + p["b"][example["label"]])

    examples = {
        "key": draw.keys(),
        "flag": draw.integers(0, 2).astype(bool),
        "label": draw.integers(0, 4),
        "x": draw.batch(3),
        "unused": draw.batch(2),
    }
    return fun, {"W": draw(2, 3), "b": draw(4)}, examples
