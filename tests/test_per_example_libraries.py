"""G of models written in Equinox, Flax linen, Flax nnx and Haiku equals vmap(grad)."""

import architectures
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_per_example import TOLERANCES, compare

import sgd_jax as sj

N = architectures.NUM_EXAMPLES
# Flax and Haiku multiply (3,) by (T, 3) freely.
pytestmark = pytest.mark.usefixtures("rank_promotion_allowed")


@pytest.fixture
def rank_promotion_allowed():
    with jax.numpy_rank_promotion("allow"):
        yield


def draw_like(params, dtype=jnp.float64):
    """The same params with every entry drawn anew, so that no bias is zero and no scale one."""
    draw = architectures.Draw(dtype, seed=3)
    return jax.tree.map(lambda leaf: draw(*leaf.shape), params)


def test_equinox_mlp_and_its_layers():
    eqx = pytest.importorskip("equinox")

    class Model(eqx.Module):
        conv: eqx.nn.Conv2d
        norm: eqx.nn.LayerNorm
        mlp: eqx.nn.MLP

        def __call__(self, x):
            h = jax.nn.relu(self.conv(x)).reshape(-1)
            return self.mlp(self.norm(h))

    one, two = jax.random.split(jax.random.key(0))
    model = Model(
        eqx.nn.Conv2d(1, 2, 2, key=one), eqx.nn.LayerNorm(8), eqx.nn.MLP(8, 2, 3, 2, key=two)
    )
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def fun(params, x):
        return architectures.half_square(eqx.combine(params, static)(x))

    examples = architectures.Draw().batch(1, 3, 3)
    assert not compare(fun, draw_like(params), examples, TOLERANCES[jnp.float64])


@pytest.mark.slow
def test_flax_linen():
    nn = pytest.importorskip("flax.linen")

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train_key):
            x = nn.relu(nn.Conv(3, (2, 2), strides=2)(x))
            x = nn.LayerNorm()(x.reshape(-1, 3))
            x = nn.Dropout(0.2)(x, deterministic=False, rng=train_key)
            return nn.Dense(2)(x)

    examples = (architectures.Draw().batch(4, 4, 1), architectures.Draw().keys())
    model = Model()
    params = model.init(jax.random.key(0), *jax.tree.map(lambda leaf: leaf[0], examples))

    def fun(params, example):
        return architectures.half_square(model.apply(params, *example))

    assert not compare(fun, draw_like(params), examples, TOLERANCES[jnp.float64])


@pytest.mark.slow
def test_flax_linen_scan_and_attention():
    nn = pytest.importorskip("flax.linen")

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.RMSNorm()(x))
            return x, None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            embed = nn.Embed(6, 4)
            blocks = nn.scan(
                nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=2
            )
            return embed.attend(blocks()(embed(tokens), None)[0])

    model, tokens = Model(), architectures.Draw().integers(0, 6, 3)
    params = model.init(jax.random.key(0), tokens[0])

    def fun(params, tokens):
        logits = jax.nn.log_softmax(model.apply(params, tokens))
        return -jnp.sum(jnp.take_along_axis(logits, tokens[:, None], 1))

    assert not compare(fun, draw_like(params), tokens, TOLERANCES[jnp.float64])


def test_flax_nnx():
    nnx = pytest.importorskip("flax.nnx")

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.cell = nnx.Linear(3, 3, rngs=rngs)
            self.norm = nnx.BatchNorm(3, use_running_average=True, rngs=rngs)
            self.head = nnx.Linear(3, 2, use_bias=False, rngs=rngs)

        def __call__(self, x):
            return self.head(self.norm(jnp.tanh(self.cell(jnp.tanh(self.cell(x))))))

    graph, params, rest = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)

    def fun(params, x):
        return architectures.half_square(nnx.merge(graph, params, rest)(x))

    examples = architectures.Draw().batch(2, 3)
    assert not compare(fun, draw_like(params), examples, TOLERANCES[jnp.float64])


@pytest.mark.slow
def test_haiku():
    hk = pytest.importorskip("haiku")

    def network(xs):
        core = hk.LSTM(2)
        hidden, _ = hk.dynamic_unroll(core, xs, core.initial_state(None))
        return hk.Linear(2)(hk.LayerNorm(-1, True, True)(hidden))

    model = hk.without_apply_rng(hk.transform(network))
    examples = architectures.Draw(jnp.float32).batch(3, 2)
    params = draw_like(model.init(jax.random.key(0), examples[0]), jnp.float32)

    def fun(params, xs):
        return architectures.half_square(model.apply(params, xs))

    assert not compare(fun, params, examples, TOLERANCES[jnp.float32])


def test_optax_steps_on_the_mean_of_g():
    optax = pytest.importorskip("optax")
    fun, params, examples = architectures.make("sigmoid_mlp")
    optimizer = optax.adam(0.1)
    state = optimizer.init(params)
    mean = jax.jit(lambda *at: sj.per_example_grad(fun)(*at).mean())(params, examples)
    gradient = jax.jit(jax.grad(sj.mean_cost(fun)))(params, examples)
    ours, _ = optimizer.update(mean, state, params)
    plain, _ = optimizer.update(gradient, state, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), ours, plain)
