"""The suite `epoch`: one epoch of the textbook network, in the obvious ways to write it."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import sgd_jax as sj
from sgd_jax import data
from sgd_jax.networks import Network
from suites.harness import Contender, Run, Suite

SIZES = (784, 30, 10)
BATCH_SIZE = 10
LEARNING_RATE = 3.0


class EpochProblem(NamedTuple):
    """Where an epoch starts and what it walks over; all contenders see the same."""

    network: Network
    pixels: np.ndarray
    """(n, 784), uint8."""
    labels: np.ndarray
    """(n,), 0 … 9."""
    batches: np.ndarray
    """(n // m, m) indices."""
    origin: str


def make_epoch_problem(data_dir: str | None, n: int) -> EpochProblem:
    """Returns a network and the first n training images of MNIST, or random pixels."""
    if data_dir is None:
        generator = np.random.default_rng(0)
        pixels = generator.integers(0, 256, (n, SIZES[0]), np.uint8)
        labels, origin = generator.integers(0, SIZES[-1], n), "random pixels in MNIST's shape"
    else:
        train = data.load("mnist", data_dir, download=False).train
        pixels, labels, origin = train.inputs[:n], train.labels[:n], "MNIST"
    network = sj.init_network(jax.random.key(0), SIZES)
    batches = np.asarray(sj.sampling.epoch(jax.random.key(1), len(labels), BATCH_SIZE))
    return EpochProblem(network, pixels, labels, batches, origin)


def epoch_suites(data_dir: str | None = None, n: int = 50_000) -> list[Suite]:
    """Returns one epoch of the textbook network, in five ways, from one start in one order.

    Each returns the params after the epoch. The contenders in NumPy compute in float64, as NumPy
    does unless told otherwise, those in JAX in float32. Drawing the order is not timed.

    Args:
      data_dir: folder of MNIST; None: random pixels of the same shape.
      n: number of examples.
    """
    problem = make_epoch_problem(data_dir, n)
    contenders = [
        Contender("sgd_jax.make_epoch", lambda: our_epoch(problem)),
        Contender("the same scan by optax.sgd and grad", lambda: optax_epoch(problem), ("optax",)),
        Contender("sgd_jax.make_step in a Python loop", lambda: our_steps(problem)),
        Contender("NumPy, a mini-batch at a time", lambda: numpy_epoch(problem, numpy_batch)),
        Contender(
            "NumPy, an example at a time",
            lambda: numpy_epoch(problem, numpy_example_by_example),
            max_rounds=3,
        ),
    ]
    work = (
        f"one epoch of {list(SIZES)}, quadratic cost, m = {BATCH_SIZE}, "
        f"n = {len(problem.labels):,} ({problem.origin})"
    )
    return [Suite("epoch", work, contenders)]


def _cost(network: Network, example: tuple[jax.Array, jax.Array]) -> jax.Array:
    pixels, label = example
    output = sj.feedforward(network, pixels.astype(jnp.float32) / 255)
    return sj.quadratic_cost(output, jax.nn.one_hot(label, SIZES[-1]))


def _on_device(problem: EpochProblem) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    return jax.device_put(((problem.pixels, problem.labels), problem.batches))


def our_epoch(problem: EpochProblem) -> Run:
    """Returns an epoch by `make_epoch`."""
    optimizer = sj.sgd(LEARNING_RATE)
    epoch = sj.make_epoch(_cost, optimizer)
    state = sj.init_state(problem.network, optimizer)
    examples, batches = _on_device(problem)
    return lambda: epoch(state, examples, batches)[0].params


def our_steps(problem: EpochProblem) -> Run:
    """Returns an epoch by `make_step`, the loop and the gathering left to Python and NumPy."""
    optimizer = sj.sgd(LEARNING_RATE)
    step = sj.make_step(_cost, optimizer)
    start = sj.init_state(problem.network, optimizer)

    def run() -> object:
        state = start
        for indices in problem.batches:
            state, _ = step(state, (problem.pixels[indices], problem.labels[indices]))
        return state.params

    return run


def optax_epoch(problem: EpochProblem) -> Run:
    """Returns an epoch as one writes it with optax: a scan over the gradient of the mean cost."""
    import optax

    optimizer = optax.sgd(LEARNING_RATE)
    examples, batches = _on_device(problem)

    def mean_cost(network: Network, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jnp.mean(jax.vmap(_cost, in_axes=(None, 0))(network, batch))

    @jax.jit
    def epoch(network: Network, examples: object, batches: jax.Array) -> object:
        def body(carry: tuple, indices: jax.Array) -> tuple[tuple, None]:
            params, opt_state = carry
            batch = jax.tree.map(lambda leaf: leaf[indices], examples)
            updates, opt_state = optimizer.update(jax.grad(mean_cost)(params, batch), opt_state)
            return (optax.apply_updates(params, updates), opt_state), None

        return jax.lax.scan(body, (network, optimizer.init(network)), batches)[0][0]

    return lambda: epoch(problem.network, examples, batches)


NumpyParams = list[np.ndarray]


def numpy_epoch(
    problem: EpochProblem, sum_gradients: Callable[..., tuple[NumpyParams, NumpyParams]]
) -> Run:
    """Returns an epoch in NumPy, float64; `sum_gradients` sums those of one mini-batch."""
    inputs, targets = problem.pixels / 255.0, np.eye(SIZES[-1])[problem.labels]
    start = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(problem.network)]

    def run() -> object:
        weights, biases = start[::2], start[1::2]
        for indices in problem.batches:
            rate = LEARNING_RATE / len(indices)
            sum_w, sum_b = sum_gradients(weights, biases, inputs[indices], targets[indices])
            weights = [w - rate * g for w, g in zip(weights, sum_w, strict=True)]
            biases = [b - rate * g for b, g in zip(biases, sum_b, strict=True)]
        return tuple(zip(weights, biases, strict=True))

    return run


def numpy_batch(
    weights: NumpyParams, biases: NumpyParams, x: np.ndarray, y: np.ndarray
) -> tuple[NumpyParams, NumpyParams]:
    """Returns the summed gradient of a mini-batch; the matrices have one row an example."""
    activations = [x]
    for W, b in zip(weights, biases, strict=True):
        activations.append(1 / (1 + np.exp(-(activations[-1] @ W.T + b))))
    sum_w, sum_b = [], []
    a = activations.pop()
    delta = (a - y) * a * (1 - a)
    for W in reversed(weights):
        a = activations.pop()
        sum_w.insert(0, delta.T @ a)
        sum_b.insert(0, delta.sum(axis=0))
        delta = delta @ W * a * (1 - a)
    return sum_w, sum_b


def numpy_example_by_example(
    weights: NumpyParams, biases: NumpyParams, x: np.ndarray, y: np.ndarray
) -> tuple[NumpyParams, NumpyParams]:
    """Returns the summed gradient of a mini-batch, backpropagating one example after the other."""
    sum_w, sum_b = [np.zeros_like(W) for W in weights], [np.zeros_like(b) for b in biases]
    for one_x, one_y in zip(x, y, strict=True):
        activations = [one_x]
        for W, b in zip(weights, biases, strict=True):
            activations.append(1 / (1 + np.exp(-(W @ activations[-1] + b))))
        a = activations[-1]
        delta = (a - one_y) * a * (1 - a)
        for layer in reversed(range(len(weights))):
            a = activations[layer]
            sum_w[layer] = sum_w[layer] + np.outer(delta, a)
            sum_b[layer] = sum_b[layer] + delta
            if layer > 0:
                delta = weights[layer].T @ delta * a * (1 - a)
    return sum_w, sum_b
