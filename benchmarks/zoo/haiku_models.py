"""Models written with Haiku: its own networks, and graph networks of jraph."""

# Each model imports its own library.
# pyright: reportMissingImports=false

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.zoo.model import Case, Model, cast, cross_entropy, integers, normal, squares

NUM_EXAMPLES = 8


def of_function(forward: Callable[..., Any], examples: Any, dtype: Any, cost: Any) -> Case:
    """Returns ``forward(example, is_training)``; running statistics are constant."""
    import haiku as hk

    transformed = hk.without_apply_rng(hk.transform_with_state(forward))
    examples = cast(examples, dtype)
    first = jax.tree.map(lambda leaf: leaf[0], examples)
    params, state = cast(transformed.init(jax.random.key(0), first, True), dtype)

    def fun(params: Any, example: Any) -> jax.Array:
        return cost(transformed.apply(params, state, example, False)[0], example)

    return Case(fun, params, examples)


def image_network(name: str, **options: Any) -> Callable[[Any], Case]:
    """Returns one of `hk.nets` on 32 × 32 images."""

    def make(dtype: Any) -> Case:
        import haiku as hk

        def forward(example: Any, is_training: bool) -> jax.Array:
            return getattr(hk.nets, name)(10, **options)(example[0][None], is_training)[0]

        examples = normal(0, 4, 32, 32, 3), integers(1, 10, 4)
        return of_function(forward, examples, dtype, lambda y, e: cross_entropy(y, e[1]))

    return make


def mobile_network(dtype: Any) -> Case:
    """Returns a classifier with depthwise convolutions."""
    import haiku as hk

    def forward(example: Any, is_training: bool) -> jax.Array:
        network = hk.nets.MobileNetV1((1, 2, 2), (32, 64, 64), num_classes=10, use_bn=False)
        return network(example[0][None], is_training)[0]

    examples = normal(0, 4, 32, 32, 3), integers(1, 10, 4)
    return of_function(forward, examples, dtype, lambda y, e: cross_entropy(y, e[1]))


def vector_quantizer(dtype: Any) -> Case:
    """Returns an autoencoder with a codebook."""
    import haiku as hk

    def forward(image: Any, is_training: bool) -> Any:
        h = jax.nn.relu(hk.Conv2D(32, 4, 2)(image))
        h = hk.Conv2D(16, 4, 2)(h)
        quantized = hk.nets.VectorQuantizer(16, 64, 0.25)(h, is_training=True)
        h = jax.nn.relu(hk.Conv2DTranspose(32, 4, 2)(quantized["quantize"]))
        return hk.Conv2DTranspose(1, 4, 2)(h), quantized["loss"]

    return of_function(
        forward, normal(0, NUM_EXAMPLES, 16, 16, 1), dtype, lambda y, e: squares(y[0], e) + y[1]
    )


def long_short_term_memory(dtype: Any) -> Case:
    """Returns a classifier of sequences."""
    import haiku as hk

    def forward(example: Any, is_training: bool) -> jax.Array:
        core = hk.LSTM(128)
        outputs, _ = hk.dynamic_unroll(core, example[0], core.initial_state(None))
        return hk.Linear(10)(outputs[-1])

    examples = normal(0, 16, 32, 16), integers(1, 10, 16)
    return of_function(forward, examples, dtype, lambda y, e: cross_entropy(y, e[1]))


def transformer(dtype: Any) -> Case:
    """Returns two causal transformer blocks."""
    import haiku as hk

    def forward(tokens: Any, is_training: bool) -> jax.Array:
        h = hk.Embed(256, 128)(tokens)  # (t, d)
        causal = jnp.tri(tokens.shape[0], dtype=bool)[None]
        for _ in range(2):
            y = hk.LayerNorm(-1, True, True)(h)
            h = h + hk.MultiHeadAttention(4, 32, w_init=hk.initializers.VarianceScaling())(
                y, y, y, mask=causal
            )
            y = hk.LayerNorm(-1, True, True)(h)
            h = h + hk.nets.MLP([512, 128], activation=jax.nn.gelu)(y)
        return hk.Linear(256)(h)

    return of_function(
        forward, integers(0, 256, NUM_EXAMPLES, 32), dtype,
        lambda y, e: cross_entropy(y, jnp.roll(e, -1)),
    )  # fmt: skip


def convolutional_memory(dtype: Any) -> Case:
    """Returns a predictor of the next frame."""
    import haiku as hk

    def forward(frames: Any, is_training: bool) -> jax.Array:
        core = hk.Conv2DLSTM((8, 8), 8, 3)
        outputs, _ = hk.dynamic_unroll(core, frames[:-1], core.initial_state(None))
        return hk.BatchApply(hk.Conv2D(1, 1))(outputs)

    return of_function(
        forward, normal(0, NUM_EXAMPLES, 6, 8, 8, 1), dtype, lambda y, e: squares(y, e[1:])
    )


def graph_network(kind: str) -> Callable[[Any], Case]:
    """Returns a graph network of jraph on random graphs of 12 nodes and 30 edges."""

    def make(dtype: Any) -> Case:
        import haiku as hk
        import jraph

        def dense(*parts: Any) -> jax.Array:
            return hk.nets.MLP([64, 64])(jnp.concatenate(parts, axis=-1))

        def forward(example: Any, is_training: bool) -> jax.Array:
            nodes, edges, senders, receivers, _ = example
            graph = jraph.GraphsTuple(
                nodes, edges, receivers, senders, jnp.zeros((1, 8), nodes.dtype),
                jnp.array([12]), jnp.array([30]),
            )  # fmt: skip
            if kind == "gcn":
                for _ in range(2):
                    graph = jraph.GraphConvolution(hk.Linear(64), add_self_edges=True)(graph)
            elif kind == "gat":
                graph = jraph.GAT(
                    hk.Linear(64),
                    lambda s, r, e: hk.Linear(1)(jax.nn.leaky_relu(s + r + hk.Linear(64)(e))),
                )(graph)
            else:
                graph = jraph.GraphNetwork(dense, dense, dense)(graph)
            return hk.Linear(3)(graph.nodes.mean(0))

        n = NUM_EXAMPLES
        examples = (
            normal(0, n, 12, 8), normal(1, n, 30, 8), integers(2, 12, n, 30),
            integers(3, 12, n, 30), integers(4, 3, n),
        )  # fmt: skip
        return of_function(forward, examples, dtype, lambda y, e: cross_entropy(y, e[4]))

    return make


def physics(dtype: Any) -> Case:
    """Returns the residual of the heat equation of a network (a derivative within the cost)."""
    import haiku as hk

    network = hk.without_apply_rng(
        hk.transform(lambda x: hk.nets.MLP([64, 64, 1], activation=jnp.tanh)(x)[0])
    )
    params = cast(network.init(jax.random.key(0), np.zeros(2)), dtype)

    def fun(params: Any, at: Any) -> jax.Array:
        u = lambda t, x: network.apply(params, jnp.stack([t, x]))  # noqa: E731
        residual = jax.grad(u)(*at) - jax.grad(jax.grad(u, 1), 1)(*at)
        return residual**2 + (u(jnp.zeros_like(at[0]), at[1]) - jnp.sin(at[1])) ** 2

    return Case(fun, params, cast(normal(0, 64, 2), dtype))


def _model(name: str, source: str, make: Callable[[Any], Case], *needs: str) -> Model:
    return Model(name, source, ("haiku", *needs), make)


MODELS = [
    _model("haiku.resnet", "dm-haiku nets.ResNet18", image_network("ResNet18", resnet_v2=True)),
    _model("haiku.mobilenet", "dm-haiku nets.MobileNetV1", mobile_network),
    _model("haiku.vector_quantizer", "dm-haiku nets.VectorQuantizer", vector_quantizer),
    _model("haiku.lstm", "dm-haiku LSTM", long_short_term_memory),
    _model("haiku.transformer", "dm-haiku MultiHeadAttention, Embed, LayerNorm", transformer),
    _model("haiku.conv_lstm", "dm-haiku Conv2DLSTM", convolutional_memory),
    _model("haiku.physics", "dm-haiku nets.MLP in a heat equation", physics),
    _model("jraph.graph_network", "jraph GraphNetwork", graph_network("network"), "jraph"),
    _model("jraph.gcn", "jraph GraphConvolution", graph_network("gcn"), "jraph"),
    _model("jraph.gat", "jraph GAT", graph_network("gat"), "jraph"),
]
