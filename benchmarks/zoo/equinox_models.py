"""Models written with Equinox: its own layers, and those of libraries built on it."""

# Each model imports its own library.
# pyright: reportMissingImports=false

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.zoo.model import Case, Model, cast, cross_entropy, integers, normal, squares

WIDTH, LENGTH, NUM_EXAMPLES = 128, 32, 8


def of_module(
    module: Any, examples: Any, dtype: Any, cost: Callable[[Any, Any], jax.Array]
) -> Case:
    """Returns a module with its inexact arrays as parameters; what is frozen stays as it is."""
    import equinox as eqx

    params, static = eqx.partition(module, eqx.is_inexact_array)

    def fun(params: Any, example: Any) -> jax.Array:
        return cost(eqx.combine(params, static), example)

    return Case(fun, cast(params, dtype), cast(examples, dtype))


def mlp(dtype: Any) -> Case:
    """Returns a classifier of vectors."""
    import equinox as eqx

    module = eqx.nn.MLP(64, 10, 256, 3, key=jax.random.key(0))
    examples = normal(0, 64, 64), integers(1, 10, 64)
    return of_module(module, examples, dtype, lambda f, e: cross_entropy(f(e[0]), e[1]))


def convolutional(dtype: Any) -> Case:
    """Returns a classifier of images."""
    import equinox as eqx

    keys = jax.random.split(jax.random.key(0), 4)
    module = eqx.nn.Sequential([
        eqx.nn.Conv2d(3, 32, 3, padding=1, key=keys[0]),
        eqx.nn.GroupNorm(4, 32),
        eqx.nn.Lambda(jax.nn.relu),
        eqx.nn.MaxPool2d(2, 2),
        eqx.nn.Conv2d(32, 64, 3, padding=1, key=keys[1]),
        eqx.nn.Lambda(jax.nn.silu),
        eqx.nn.AvgPool2d(2, 2),
        eqx.nn.Conv2d(64, 64, 3, groups=8, key=keys[2]),
        eqx.nn.Lambda(jnp.ravel),
        eqx.nn.Linear(64 * 36, 10, key=keys[3]),
    ])  # fmt: skip
    examples = normal(0, 16, 3, 32, 32), integers(1, 10, 16)
    return of_module(module, examples, dtype, lambda f, e: cross_entropy(f(e[0]), e[1]))


def autoencoder(dtype: Any) -> Case:
    """Returns an autoencoder with transposed convolutions."""
    import equinox as eqx

    keys = jax.random.split(jax.random.key(0), 4)
    module = eqx.nn.Sequential([
        eqx.nn.Conv2d(1, 16, 4, 2, 1, key=keys[0]),
        eqx.nn.Lambda(jax.nn.gelu),
        eqx.nn.Conv2d(16, 32, 4, 2, 1, key=keys[1]),
        eqx.nn.Lambda(jax.nn.gelu),
        eqx.nn.ConvTranspose2d(32, 16, 4, 2, padding=1, key=keys[2]),
        eqx.nn.Lambda(jax.nn.gelu),
        eqx.nn.ConvTranspose2d(16, 1, 4, 2, padding=1, key=keys[3]),
    ])  # fmt: skip
    return of_module(module, normal(0, 16, 1, 32, 32), dtype, lambda f, e: squares(f(e), e))


def recurrent(cell: str) -> Callable[[Any], Case]:
    """Returns a classifier of sequences by `eqx.nn.GRUCell` or `eqx.nn.LSTMCell`."""

    def make(dtype: Any) -> Case:
        import equinox as eqx

        keys = jax.random.split(jax.random.key(0))
        module = (
            getattr(eqx.nn, cell)(16, WIDTH, key=keys[0]),
            eqx.nn.Linear(WIDTH, 10, key=keys[1]),
        )

        def cost(module: Any, example: Any) -> jax.Array:
            cell, head = module
            zeros = jnp.zeros(WIDTH, example[0].dtype)
            start = zeros if isinstance(cell, eqx.nn.GRUCell) else (zeros, zeros)
            last, _ = jax.lax.scan(lambda h, x: (cell(x, h), None), start, example[0])
            return cross_entropy(head(jax.tree.leaves(last)[0]), example[1])

        examples = normal(0, 16, LENGTH, 16), integers(1, 10, 16)
        return of_module(module, examples, dtype, cost)

    return make


def attention(dtype: Any) -> Case:
    """Returns one causal transformer block."""
    import equinox as eqx

    keys = jax.random.split(jax.random.key(0), 4)
    module = (
        eqx.nn.Embedding(256, WIDTH, key=keys[0]),
        eqx.nn.LayerNorm(WIDTH),
        eqx.nn.MultiheadAttention(4, WIDTH, key=keys[1], use_query_bias=True),
        eqx.nn.MLP(WIDTH, WIDTH, 4 * WIDTH, 1, jax.nn.gelu, key=keys[2]),
        eqx.nn.Linear(WIDTH, 256, key=keys[3]),
    )

    def cost(module: Any, example: Any) -> jax.Array:
        embed, norm, attend, dense, head = module
        h = jax.vmap(embed)(example)  # (t, d)
        y = jax.vmap(norm)(h)
        h = h + attend(y, y, y, jnp.tri(LENGTH, dtype=bool))
        h = h + jax.vmap(dense)(h)
        return cross_entropy(jax.vmap(head)(h), jnp.roll(example, -1))

    return of_module(module, integers(0, 256, NUM_EXAMPLES, LENGTH), dtype, cost)


def spectral(dtype: Any) -> Case:
    """Returns a classifier with normalized weights."""
    import equinox as eqx

    keys = jax.random.split(jax.random.key(0), 3)
    first, state = eqx.nn.make_with_state(eqx.nn.SpectralNorm)(
        eqx.nn.Linear(WIDTH, WIDTH, key=keys[0]), "weight", key=keys[1]
    )
    module = (first, eqx.nn.WeightNorm(eqx.nn.Linear(WIDTH, 10, key=keys[2])))
    state = cast(state, dtype)

    def cost(module: Any, example: Any) -> jax.Array:
        hidden, _ = module[0](example[0], state, inference=True)
        return cross_entropy(module[1](jax.nn.relu(hidden)), example[1])

    return of_module(module, (normal(0, 64, WIDTH), integers(1, 10, 64)), dtype, cost)


def neural_ode(adjoint: str) -> Callable[[Any], Case]:
    """Returns a neural differential equation, solved with one of diffrax's adjoints."""

    def make(dtype: Any) -> Case:
        import diffrax
        import equinox as eqx

        module = eqx.nn.MLP(4, 4, 64, 2, jnp.tanh, key=jax.random.key(0))
        times = cast(jnp.linspace(0.0, 1.0, 8), dtype)

        def cost(module: Any, example: Any) -> jax.Array:
            solution = diffrax.diffeqsolve(
                diffrax.ODETerm(lambda t, y, args: module(y)),
                diffrax.Tsit5(), 0.0, 1.0, 0.1, example[0],
                saveat=diffrax.SaveAt(ts=times), max_steps=16,
                adjoint=getattr(diffrax, adjoint)(),
            )  # fmt: skip
            return squares(solution.ys, example[1])

        return of_module(module, (normal(0, 16, 4), normal(1, 16, 8, 4)), dtype, cost)

    return make


def fixed_point(dtype: Any) -> Case:
    """Returns an implicit layer, h = tanh(W h + b + x)."""
    import equinox as eqx
    import optimistix as optx

    linear = eqx.nn.Linear(16, 16, key=jax.random.key(0))
    module = eqx.tree_at(lambda m: m.weight, linear, linear.weight / 2)

    def cost(module: Any, example: Any) -> jax.Array:
        solver = optx.FixedPointIteration(rtol=1e-12, atol=1e-12)
        solution = optx.fixed_point(
            lambda y, x: jnp.tanh(module(y) + x), solver, jnp.zeros_like(example), example,
            max_steps=200, throw=False,
        )  # fmt: skip
        return squares(solution.value)

    return of_module(module, normal(0, 16, 16), dtype, cost)


def flow(name: str) -> Callable[[Any], Case]:
    """Returns minus the log density of one of flowjax's flows."""

    def make(dtype: Any) -> Case:
        from flowjax import bijections, distributions, flows

        base = distributions.Normal(jnp.zeros(6))
        options: dict[str, Any] = {"base_dist": base, "flow_layers": 2}
        if name in ("coupling_flow", "masked_autoregressive_flow"):
            options |= {"nn_width": 64, "nn_depth": 1}
            options["transformer"] = bijections.RationalQuadraticSpline(knots=8, interval=4)
        module = getattr(flows, name)(jax.random.key(0), **options)
        return of_module(module, normal(0, 32, 6), dtype, lambda f, x: -f.log_prob(x))

    return make


def state_space(layer: str) -> Callable[[Any], Case]:
    """Returns a classifier of sequences by two state-space layers of rnn-jax."""

    def make(dtype: Any) -> Case:
        import equinox as eqx
        from rnn_jax.ssm import lru, s5

        kind = getattr(lru if layer == "LinearRecurrentUnit" else s5, layer)
        keys = jax.random.split(jax.random.key(0), 3)
        module = (
            kind(16, 32, 16, key=keys[0]),
            kind(16, 32, 16, key=keys[1]),
            eqx.nn.Linear(16, 10, key=keys[2]),
        )

        def cost(module: Any, example: Any) -> jax.Array:
            first, second, head = module
            h = first(example[0])
            h = jnp.real(second(jnp.real(h)))
            return cross_entropy(head(h.mean(0)), example[1])

        examples = normal(0, 8, LENGTH, 16), integers(1, 10, 8)
        return of_module(module, examples, dtype, cost)

    return make


def _model(name: str, source: str, make: Callable[[Any], Case], *needs: str) -> Model:
    return Model(name, source, ("equinox", *needs), make)


MODELS = [
    _model("equinox.mlp", "equinox nn.MLP", mlp),
    _model("equinox.conv", "equinox nn.Conv2d, GroupNorm", convolutional),
    _model("equinox.autoencoder", "equinox nn.Conv2d, ConvTranspose2d", autoencoder),
    _model("equinox.gru", "equinox nn.GRUCell", recurrent("GRUCell")),
    _model("equinox.lstm", "equinox nn.LSTMCell", recurrent("LSTMCell")),
    _model("equinox.attention", "equinox nn.MultiheadAttention", attention),
    _model("equinox.spectral", "equinox nn.SpectralNorm, WeightNorm", spectral),
    _model(
        "diffrax.checkpoint",
        "diffrax diffeqsolve, RecursiveCheckpointAdjoint",
        neural_ode("RecursiveCheckpointAdjoint"),
        "diffrax",
    ),
    _model(
        "diffrax.direct",
        "diffrax diffeqsolve, DirectAdjoint",
        neural_ode("DirectAdjoint"),
        "diffrax",
    ),
    _model("optimistix.fixed_point", "optimistix fixed_point", fixed_point, "optimistix"),
    _model("flowjax.coupling", "flowjax coupling_flow", flow("coupling_flow"), "flowjax"),
    _model(
        "flowjax.masked",
        "flowjax masked_autoregressive_flow",
        flow("masked_autoregressive_flow"),
        "flowjax",
    ),
    _model(
        "flowjax.block",
        "flowjax block_neural_autoregressive_flow",
        flow("block_neural_autoregressive_flow"),
        "flowjax",
    ),
    _model("flowjax.planar", "flowjax planar_flow", flow("planar_flow"), "flowjax"),
    _model(
        "rnn_jax.lru", "rnn-jax LinearRecurrentUnit", state_space("LinearRecurrentUnit"), "rnn_jax"
    ),
    _model(
        "rnn_jax.s5",
        "rnn-jax SimplifiedStateSpaceLayer",
        state_space("SimplifiedStateSpaceLayer"),
        "rnn_jax",
    ),
]
