"""Models written with Flax: linen and nnx layers, and libraries built on them."""

# Each model imports its own library.
# pyright: reportMissingImports=false

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.zoo.model import Case, Model, cast, cross_entropy, integers, normal, squares


def of_linen(module: Any, examples: Any, dtype: Any, cost: Any, pick: Any) -> Case:
    """Returns a linen module; ``pick`` takes from an example what the module sees."""
    examples = cast(examples, dtype)
    first = jax.tree.map(lambda leaf: leaf[0], examples)
    variables = cast(module.init(jax.random.key(0), pick(first)), dtype)
    rest = {name: leaves for name, leaves in variables.items() if name != "params"}

    def fun(params: Any, example: Any) -> jax.Array:
        return cost(module.apply(rest | {"params": params}, pick(example)), example)

    return Case(fun, variables["params"], examples)


def of_nnx(module: Any, examples: Any, dtype: Any, cost: Any) -> Case:
    """Returns an nnx module; what is no `nnx.Param` is constant."""
    from flax import nnx

    graph, params, rest = nnx.split(module, nnx.Param, ...)
    rest = cast(nnx.to_pure_dict(rest), dtype)
    state = nnx.state(module, nnx.Not(nnx.Param))
    nnx.replace_by_pure_dict(state, rest)

    def fun(values: Any, example: Any) -> jax.Array:
        at = nnx.state(module, nnx.Param)
        nnx.replace_by_pure_dict(at, values)
        return cost(nnx.merge(graph, at, state), example)

    return Case(fun, cast(nnx.to_pure_dict(params), dtype), cast(examples, dtype))


def autoencoder(dtype: Any) -> Case:
    """Returns an autoencoder with transposed convolutions."""
    from flax import linen as nn

    module = nn.Sequential([
        nn.Conv(32, (3, 3), (2, 2)), nn.relu, nn.Conv(32, (3, 3), (2, 2)), nn.relu,
        nn.ConvTranspose(32, (4, 4), (2, 2)), nn.relu, nn.ConvTranspose(1, (4, 4), (2, 2)),
    ])  # fmt: skip
    return of_linen(module, normal(0, 16, 28, 28, 1), dtype, squares, lambda e: e)


def recurrent(cell: str) -> Callable[[Any], Case]:
    """Returns a classifier of sequences by one of linen's cells."""

    def make(dtype: Any) -> Case:
        from flax import linen as nn

        options = {"kernel_size": (3, 3)} if cell == "ConvLSTMCell" else {}
        inner = getattr(nn, cell)(8 if options else 128, **options, param_dtype=dtype)
        module = nn.Sequential([nn.RNN(inner), lambda h: h[-1].ravel(), nn.Dense(10)])
        shape = (8, 6, 8, 8, 1) if options else (16, 32, 16)
        examples = normal(0, *shape), integers(1, 10, shape[0])
        return of_linen(
            module, examples, dtype, lambda y, e: cross_entropy(y, e[1]), lambda e: e[0]
        )

    return make


def normalized(dtype: Any) -> Case:
    """Returns a classifier with normalized weights."""
    from flax import linen as nn

    module = nn.Sequential([
        nn.WeightNorm(nn.Dense(256)), nn.gelu, nn.WeightNorm(nn.Dense(256)), nn.gelu,
        nn.Dense(10),
    ])  # fmt: skip
    examples = normal(0, 64, 64), integers(1, 10, 64)
    return of_linen(module, examples, dtype, lambda y, e: cross_entropy(y, e[1]), lambda e: e[0])


def local_convolution(dtype: Any) -> Case:
    """Returns a classifier with unshared and grouped convolutions."""
    from flax import linen as nn

    module = nn.Sequential([
        nn.ConvLocal(8, (3, 3)), nn.relu, nn.Conv(16, (3, 3), feature_group_count=8), nn.relu,
        nn.GroupNorm(4), lambda h: h.reshape(-1), nn.Dense(10),
    ])  # fmt: skip
    examples = normal(0, 16, 12, 12, 3), integers(1, 10, 16)
    return of_linen(module, examples, dtype, lambda y, e: cross_entropy(y, e[1]), lambda e: e[0])


def scanned_layers(dtype: Any) -> Case:
    """Returns three transformer blocks in a scan, recomputed in the backward pass."""
    from flax import linen as nn

    class Block(nn.Module):
        @nn.compact
        def __call__(self, h: Any, _: Any) -> tuple[Any, None]:
            h = h + nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(h))
            return h + nn.Dense(64)(nn.gelu(nn.Dense(256)(nn.LayerNorm()(h)))), None

    class Network(nn.Module):
        @nn.compact
        def __call__(self, tokens: Any) -> Any:
            embed = nn.Embed(256, 64)
            layers = nn.scan(
                nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )
            h, _ = layers()(embed(tokens), None)
            return embed.attend(nn.LayerNorm()(h))

    return of_linen(
        Network(), integers(0, 256, 8, 32), dtype,
        lambda y, e: cross_entropy(y, jnp.roll(e, -1)), lambda e: e,
    )  # fmt: skip


def lora(dtype: Any) -> Case:
    """Returns two dense layers with low-rank adapters."""
    from flax import nnx

    rngs = nnx.Rngs(0)
    module = nnx.Sequential(
        nnx.LoRALinear(128, 256, lora_rank=8, rngs=rngs), nnx.gelu,
        nnx.LoRALinear(256, 128, lora_rank=8, rngs=rngs), nnx.RMSNorm(128, rngs=rngs),
    )  # fmt: skip

    def cost(module: Any, example: Any) -> jax.Array:
        return squares(module(example[0]), example[1])

    return of_nnx(module, (normal(0, 16, 16, 128), normal(1, 16, 16, 128)), dtype, cost)


def nnx_attention(dtype: Any) -> Case:
    """Returns one causal transformer block with tied embeddings."""
    from flax import nnx

    class Network(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.embed = nnx.Embed(256, 64, rngs=rngs)
            self.attend = nnx.MultiHeadAttention(4, 64, decode=False, rngs=rngs)
            self.norm = nnx.LayerNorm(64, rngs=rngs)
            self.dense = nnx.LinearGeneral(64, (4, 64), rngs=rngs)

        def __call__(self, tokens: Any) -> Any:
            h = self.embed(tokens)
            h = h + self.attend(self.norm(h), mask=nnx.make_causal_mask(tokens))
            return self.embed.attend(self.dense(h).sum(-2))

    return of_nnx(
        Network(nnx.Rngs(0)), integers(0, 256, 8, 32), dtype,
        lambda module, e: cross_entropy(module(e), jnp.roll(e, -1)),
    )  # fmt: skip


def mamba(dtype: Any) -> Case:
    """Returns a state-space language model."""
    from flax import nnx
    from mamba2_jax import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(
        vocab_size=256, hidden_size=64, state_size=16, head_dim=16, chunk_size=16,
        num_hidden_layers=2, residual_in_fp32=False,
    )  # fmt: skip
    module = Mamba2ForCausalLM(config, rngs=nnx.Rngs(0))

    def cost(module: Any, tokens: Any) -> jax.Array:
        return cross_entropy(module(tokens[None])["logits"][0], jnp.roll(tokens, -1))

    return of_nnx(module, integers(0, 256, 8, 32), dtype, cost)


def spline_network(kind: str) -> Callable[[Any], Case]:
    """Returns a Kolmogorov-Arnold network of jaxkan with one kind of layer."""

    def make(dtype: Any) -> Case:
        from jaxkan.models.KAN import KAN

        options: dict[str, Any] = {"k": 3, "G": 5} if kind in ("base", "spline") else {"D": 5}
        module = KAN([8, 32, 4], kind, options, seed=0)

        def cost(module: Any, example: Any) -> jax.Array:
            return squares(module(example[0][None])[0], example[1])

        examples = 0.3 * normal(0, 32, 8), normal(1, 32, 4)
        return of_nnx(module, examples, dtype, cost)

    return make


def equivariant(dtype: Any) -> Case:
    """Returns an equivariant network on 6 points."""
    import e3nn_jax as e3nn
    import flax.linen as nn

    class Network(nn.Module):
        @nn.compact
        def __call__(self, positions: Any) -> Any:
            vectors = (positions[:, None] - positions[None]).reshape(-1, 3)
            edges = e3nn.spherical_harmonics("0e + 1o + 2e", vectors, normalize=False)
            h = e3nn.flax.Linear("16x0e + 8x1o + 4x2e")(edges)
            h = e3nn.tensor_product(h, edges, filter_ir_out=["0e", "1o", "2e"])
            h = e3nn.gate(e3nn.flax.Linear("24x0e + 8x1o")(h))
            return e3nn.flax.Linear("1x0e")(h).array.mean()

    examples = normal(0, 8, 6, 3), normal(1, 8)
    return of_linen(
        Network(), examples, dtype, lambda y, e: squares(y, e[1]), lambda e: e[0]
    )  # fmt: skip


def _model(name: str, source: str, make: Callable[[Any], Case], *needs: str) -> Model:
    return Model(name, source, ("flax", *needs), make)


MODELS = [
    _model("linen.autoencoder", "flax.linen Conv, ConvTranspose", autoencoder),
    _model("linen.lstm", "flax.linen OptimizedLSTMCell", recurrent("OptimizedLSTMCell")),
    _model("linen.gru", "flax.linen GRUCell", recurrent("GRUCell")),
    _model("linen.conv_lstm", "flax.linen ConvLSTMCell", recurrent("ConvLSTMCell")),
    _model("linen.weight_norm", "flax.linen WeightNorm", normalized),
    _model("linen.conv_local", "flax.linen ConvLocal, grouped Conv", local_convolution),
    _model("linen.scanned", "flax.linen scan of remat of a transformer block", scanned_layers),
    _model("nnx.lora", "flax.nnx LoRALinear, RMSNorm", lora),
    _model("nnx.attention", "flax.nnx MultiHeadAttention, LinearGeneral", nnx_attention),
    _model("mamba2", "mamba2-jax Mamba2ForCausalLM", mamba, "mamba2_jax"),
    _model("jaxkan.spline", "jaxkan KAN, spline layers", spline_network("spline"), "jaxkan"),
    _model(
        "jaxkan.chebyshev", "jaxkan KAN, Chebyshev layers", spline_network("chebyshev"), "jaxkan"
    ),
    _model("e3nn", "e3nn-jax flax.Linear, tensor_product, gate", equivariant, "e3nn_jax"),
]
