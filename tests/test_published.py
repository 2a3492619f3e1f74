"""The curves that the book's repository publishes, number by number.

[784, 30, 10], cross-entropy, η = 0.5, m = 10, the first 1,000 training images, fixed seeds of
Python's and NumPy's generators. The figures are facts; nothing of that repository is here.
"""

import itertools
import os
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sgd_jax as sj
from sgd_jax import data
from sgd_jax.networks import Network

SIZES = (784, 30, 10)
SEED = 12345678
BATCH_SIZE = 10
PUBLISHED = {  # epoch: test cost, test images right, training cost, training images right
    0: (2.076277232332908, 5887, 1.8433647860328504, 690),
    9: (1.2353298430277617, 7899, 0.47790622727830795, 949),
    399: (1.7731493757222807, 8223, 0.0042016444290295845, 1000),
}


def initial_network() -> Network:
    generator = np.random.RandomState(SEED)

    def draw(scaled: bool) -> Network:
        pairs = list(itertools.pairwise(SIZES))
        biases = [generator.randn(n_out) for _, n_out in pairs]
        weights = [generator.randn(n_out, n_in) for n_in, n_out in pairs]
        if scaled:
            weights = [w / np.sqrt(w.shape[1]) for w in weights]
        return tuple(map(sj.Layer, map(jnp.asarray, weights), map(jnp.asarray, biases)))

    draw(scaled=True)  # the default initialization, made and thrown away
    return draw(scaled=False)


def shuffle_as_python_2(order: list[int], generator: random.Random) -> None:
    for i in reversed(range(1, len(order))):
        j = int(generator.random() * (i + 1))
        order[i], order[j] = order[j], order[i]


def as_published(examples: data.Examples, n: int) -> data.Examples:
    """Returns the first n with pixels rounded to float32 before they become float64."""
    pixels = examples.inputs[:n].astype(np.float32) / np.float32(256)
    return data.Examples(jnp.asarray(pixels, jnp.float64), jnp.asarray(examples.labels[:n]))


def fun(network: Network, example: data.Examples) -> jax.Array:
    target = jax.nn.one_hot(example.labels, SIZES[-1])
    return sj.logit_cross_entropy_cost(sj.networks.weighted_input(network, example.inputs), target)


@jax.jit
def evaluate(network: Network, examples: data.Examples) -> tuple[jax.Array, jax.Array]:
    outputs = jax.vmap(sj.feedforward, in_axes=(None, 0))(network, examples.inputs)
    num_right = jnp.sum(jnp.argmax(outputs, axis=1) == examples.labels)
    return sj.mean_cost(fun)(network, examples), num_right


@pytest.mark.mnist
def test_training_reproduces_the_published_numbers_to_1e_10():
    mnist = data.load("mnist", os.environ["SGD_JAX_MNIST_DIR"])
    train, test = as_published(mnist.train, 1_000), as_published(mnist.test, 10_000)
    optimizer = sj.sgd(learning_rate=0.5)
    run_epoch = sj.make_epoch(fun, optimizer)
    state = sj.init_state(initial_network(), optimizer)
    order, generator = list(range(1_000)), random.Random(SEED)

    measured = {}
    for epoch in range(max(PUBLISHED) + 1):
        shuffle_as_python_2(order, generator)
        state, _ = run_epoch(state, train, jnp.array(order).reshape(-1, BATCH_SIZE))
        if epoch in PUBLISHED:
            measured[epoch] = (*evaluate(state.params, test), *evaluate(state.params, train))

    for epoch, published in PUBLISHED.items():
        np.testing.assert_allclose(
            [float(number) for number in measured[epoch]],
            published,
            rtol=1e-10,
            err_msg=f"after epoch {epoch}",
        )
