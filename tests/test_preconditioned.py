"""The noise scale of the optimizer used: its scaling, and gradients as the scaling sees them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import sgd_jax as sj
from sgd_jax.estimation.noise import preconditioned, scaling_of

ROWS = np.random.default_rng(0).normal(size=(40, 3)) * [1.0, 0.1, 3.0] + [0.5, 0.2, 0.0]
W = jnp.array([0.3, -0.2, 0.1])


def fun(w, x):
    """A cost whose gradient at any w is the example itself."""
    return jnp.dot(w, x)


def test_the_noise_scale_is_that_of_the_scaled_gradients_and_blind_to_a_factor():
    p = np.array([2.0, 5.0, 0.5])
    mean, trace, *_ = reference.moments(ROWS * p)
    for factor in (1.0, 7.0):
        cost = preconditioned(fun, W, jnp.array(p * factor))
        moments = sj.gradient_moments(cost, jnp.zeros(3), jnp.array(ROWS))
        scale = sj.noise_scale(moments, of="these_examples")
        np.testing.assert_allclose(scale.value, trace / (mean @ mean), rtol=1e-12)
    plain = sj.noise_scale(sj.gradient_moments(fun, W, jnp.array(ROWS)), of="these_examples")
    assert abs(plain.value / scale.value - 1) > 0.2


def test_of_a_network_it_has_an_interval_and_every_layer():
    network = sj.init_network(jax.random.key(0), (4, 5, 2), dtype=jnp.float64)
    keys = jax.random.split(jax.random.key(1))
    examples = jax.random.normal(keys[0], (60, 4)), jax.nn.one_hot(jnp.arange(60) % 2, 2)
    cost = lambda w, e: sj.quadratic_cost(sj.feedforward(w, e[0]), e[1])  # noqa: E731
    p = jax.tree.map(lambda leaf: 1 + jnp.square(leaf), network)
    moments = sj.gradient_moments(
        preconditioned(cost, network, p),
        jax.tree.map(jnp.zeros_like, network),
        examples,
        keep_norms=True,
        keep_alignments=True,
    )
    g = jax.vmap(jax.grad(cost), (None, 0))(network, examples)
    scaled = jax.tree.map(lambda leaf, s: np.asarray(leaf * s[None]).reshape(60, -1), g, p)
    scale = sj.noise_scale(moments, of="population")
    assert scale.low < scale.high
    for rows, parts in zip(
        jax.tree.leaves(scaled),
        jax.tree.leaves(scale.per_leaf, is_leaf=lambda x: isinstance(x, sj.noise.NoiseParts)),
        strict=True,
    ):
        mean, trace, *_ = reference.moments(rows)
        s2 = trace * 60 / 59
        np.testing.assert_allclose(parts, (s2, mean @ mean - s2 / 60), rtol=1e-9, atol=1e-15)


def state_after(optimizer, steps=3):
    state = optimizer.init(W)
    for row in ROWS[:steps]:
        update, state = optimizer.update(jnp.array(row), state, W)
    return update, state


@pytest.mark.parametrize("wrap", [lambda o: o, lambda o: optax.chain(optax.clip(1e9), o)])
def test_the_scaling_of_adam_is_that_of_its_update(wrap):
    """With β₁ = 0 the update is −η P g, so P = −update/(η g)."""
    update, state = state_after(wrap(optax.adam(0.1, b1=0.0, b2=0.9, eps=1e-3)))
    np.testing.assert_allclose(
        scaling_of(state, W, b2=0.9, eps=1e-3), -update / 0.1 / ROWS[2], rtol=1e-6
    )
    assert not np.allclose(scaling_of(state, W, b2=0.99, eps=1e-3), -update / 0.1 / ROWS[2])


def test_the_scaling_of_rmsprop_is_that_of_its_update():
    update, state = state_after(optax.rmsprop(0.1, eps=1e-3))
    np.testing.assert_allclose(scaling_of(state, W, eps=1e-3), -update / 0.1 / ROWS[2], rtol=1e-6)


def test_the_scaling_of_sgd_is_one_with_momentum_too():
    for optimizer in (optax.sgd(0.1, momentum=0.9), sj.sgd(0.1), optax.sgd(lambda _: 0.1)):
        np.testing.assert_array_equal(scaling_of(state_after(optimizer)[1], W), np.ones(3))


def test_a_scaling_that_is_not_known_is_refused():
    for optimizer in (optax.lion(0.1), optax.adagrad(0.1), optax.adafactor(0.1)):
        with pytest.raises(ValueError, match="is not known"):
            scaling_of(state_after(optimizer)[1], W)
    with pytest.raises(ValueError, match="no step"):
        scaling_of(optax.adam(0.1).init(W), W)
    with pytest.raises(ValueError, match="expected those of params"):
        preconditioned(fun, W, jnp.ones(2))
