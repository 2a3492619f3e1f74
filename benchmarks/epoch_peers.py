"""The epoch of the suite `epoch` in NumPy and scikit-learn; `epoch_torch` has it in PyTorch.

Each takes the data in the form that serves it best, made before the clock starts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from benchmarks.harness import Run

if TYPE_CHECKING:
    from benchmarks.epoch import EpochProblem


def _leaves(problem: EpochProblem, dtype: type = np.float32) -> list[np.ndarray]:
    """Returns weights and biases by turns."""
    return [np.array(leaf, dtype) for leaf in jax.tree.leaves(problem.network)]


def _floats(problem: EpochProblem, dtype: type = np.float32) -> tuple[np.ndarray, np.ndarray]:
    """Returns inputs in [0, 1] and targets, one row an example."""
    return problem.pixels / dtype(255), np.eye(problem.sizes[-1], dtype=dtype)[problem.labels]


# --- NumPy ---

Params = list[np.ndarray]


def numpy_by_batch(problem: EpochProblem) -> Run:
    """Returns an epoch in NumPy, float32, that backpropagates a mini-batch at a time."""
    return _numpy_epoch(problem, batch_gradients, np.float32)


def numpy_by_example(problem: EpochProblem) -> Run:
    """Returns an epoch in NumPy, float64, an example at a time, as Nielsen's book writes it."""
    return _numpy_epoch(problem, example_gradients, np.float64)


def _numpy_epoch(
    problem: EpochProblem, sum_gradients: Callable[..., tuple[Params, Params]], dtype: type
) -> Run:
    inputs, targets = _floats(problem, dtype)
    start = _leaves(problem, dtype)

    def run() -> object:
        weights, biases = start[::2], start[1::2]
        for indices in problem.batches:
            rate = problem.learning_rate / len(indices)
            sum_w, sum_b = sum_gradients(weights, biases, inputs[indices], targets[indices])
            weights = [w - rate * g for w, g in zip(weights, sum_w, strict=True)]
            biases = [b - rate * g for b, g in zip(biases, sum_b, strict=True)]
        return tuple(zip(weights, biases, strict=True))

    return run


def batch_gradients(
    weights: Params, biases: Params, x: np.ndarray, y: np.ndarray
) -> tuple[Params, Params]:
    """Returns the summed gradient of a mini-batch; the matrices have one row an example."""
    activations = [x]
    for W, b in zip(weights, biases, strict=True):
        activations.append(1 / (1 + np.exp(-(activations[-1] @ W.T + b))))
    sum_w, sum_b = [], []
    a = activations.pop()
    delta = (a - y) * a * (1 - a)
    for W in reversed(weights):
        below = activations.pop()
        sum_w.insert(0, delta.T @ below)
        sum_b.insert(0, delta.sum(axis=0))
        if activations:
            delta = delta @ W * below * (1 - below)
    return sum_w, sum_b


def example_gradients(
    weights: Params, biases: Params, x: np.ndarray, y: np.ndarray
) -> tuple[Params, Params]:
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


# --- scikit-learn ---


def sklearn_partial_fit(problem: EpochProblem) -> Run:
    """Returns an epoch by `MLPClassifier.partial_fit`, float32.

    With several labels allowed its outputs are sigmoid neurons and its cost is the cross-entropy,
    −Σ[y ln a + (1−y) ln(1−a)]: per step almost the work of the quadratic cost. It cannot be told an
    order, so the examples lie in order before the clock starts and it takes slices of them, which
    spares it the gathering.
    """
    from sklearn.neural_network import MLPClassifier

    m, order = problem.batches.shape[1], problem.batches.reshape(-1)
    inputs, targets = (leaf[order] for leaf in _floats(problem))
    targets = targets.astype(int)
    classifier = MLPClassifier(
        tuple(problem.sizes[1:-1]),
        activation="logistic",
        solver="sgd",
        alpha=0.0,
        batch_size=m,
        learning_rate_init=problem.learning_rate,
        momentum=0.0,
        nesterovs_momentum=False,
        shuffle=False,
        n_iter_no_change=2**31,
    )
    classifier.partial_fit(inputs[:m], targets[:m], classes=np.arange(targets.shape[1]))
    start = _leaves(problem)

    def run() -> object:
        for leaf, first in zip(classifier.coefs_, start[::2], strict=True):
            leaf[:] = first.T
        for leaf, first in zip(classifier.intercepts_, start[1::2], strict=True):
            leaf[:] = first
        classifier.partial_fit(inputs, targets)
        pairs = zip(classifier.coefs_, classifier.intercepts_, strict=True)
        return tuple((weights.T, biases) for weights, biases in pairs)

    return run


# --- PyTorch ---

EAGER, COMPILED = "PyTorch, eager", "PyTorch, whole step compiled"
GRAPHS = "PyTorch, CUDA graphs"
GRAPHS_OF_COMPILED = "PyTorch, CUDA graphs of the compiled step"


def in_torch(way: str, problem: EpochProblem) -> Run:
    """Returns an epoch by PyTorch in one of these ways; see `epoch_torch`, which needs it."""
    from benchmarks import epoch_torch

    return epoch_torch.prepare(way, problem)


def many_in_torch(way: str, problem: EpochProblem, networks: Any) -> Run:
    """Returns an epoch of many networks, whose leaves have a leading axis, by PyTorch."""
    from benchmarks import epoch_torch

    return epoch_torch.prepare_many(way, problem, networks)
