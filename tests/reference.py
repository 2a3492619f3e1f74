"""The oracle: SGD as the textbook writes it, in NumPy float64, in loops, one equation a line.

It imports nothing from the package. A network is a flat list of arrays, [W_1, b_1, W_2, b_2, …]; an
example is a pair (x, y) of vectors. Equation numbers are those of Nielsen's "Neural Networks and
Deep Learning".
"""

import numpy as np


def sigmoid(z):
    return 1 / (1 + np.exp(-z))  # (3)


def feedforward(network, x):
    a = np.asarray(x, np.float64)
    for W, b in zip(network[::2], network[1::2], strict=True):
        a = sigmoid(W @ a + b)  # (22)
    return a


def quadratic_cost(a, y):
    cost = 0.0
    for a_j, y_j in zip(np.ravel(a), np.ravel(y), strict=True):
        cost += (y_j - a_j) ** 2 / 2  # (6)
    return cost


def cross_entropy_cost(a, y):
    cost = 0.0
    for a_j, y_j in zip(np.ravel(a), np.ravel(y), strict=True):
        cost -= y_j * np.log(a_j) + (1 - y_j) * np.log(1 - a_j)  # (63)
    return cost


def quadratic_delta(a, y):
    return (a - y) * a * (1 - a)  # (30)


def cross_entropy_delta(a, y):
    return a - y  # (66)


def backprop(network, x, y, delta_of_output):
    """Returns the gradient of the cost of one example, a list like the network."""
    weights, biases = network[::2], network[1::2]
    activations = [np.asarray(x, np.float64)]
    for W, b in zip(weights, biases, strict=True):
        activations.append(sigmoid(W @ activations[-1] + b))
    gradient = [None] * len(network)
    delta = delta_of_output(activations[-1], y)  # (BP1)
    for layer in reversed(range(len(weights))):
        a = activations[layer]
        gradient[2 * layer] = np.outer(delta, a)  # (BP4)
        gradient[2 * layer + 1] = delta  # (BP3)
        delta = (weights[layer].T @ delta) * a * (1 - a)  # (BP2)
    return gradient


def mean_cost(network, examples, cost):
    total = 0.0
    for x, y in examples:
        total += cost(feedforward(network, x), y)
    return total / len(examples)


def mean_gradient(network, examples, delta_of_output):
    total = [np.zeros_like(w) for w in network]
    for x, y in examples:
        for k, g in enumerate(backprop(network, x, y, delta_of_output)):
            total[k] += g
    return [t / len(examples) for t in total]


def sgd_step(
    params,
    velocities,
    gradient,
    learning_rate,
    momentum=0.0,
    nesterov=False,
    weight_decay=0.0,
    decays=None,
):
    """Returns params and velocities after one step; `decays` says which arrays decay, None: all."""
    new_params, new_velocities = [], []
    for k, (w, v, g) in enumerate(zip(params, velocities, gradient, strict=True)):
        v = momentum * v + g
        direction = momentum * v + g if nesterov else v
        decay = weight_decay if decays is None or decays[k] else 0.0
        new_params.append(w - learning_rate * direction - learning_rate * decay * w)
        new_velocities.append(v)
    return new_params, new_velocities


def epoch(network, velocities, examples, batches, delta_of_output, **hyperparameters):
    """Returns network and velocities after one step for each list of indices in `batches`."""
    for batch in batches:
        gradient = mean_gradient(network, [examples[i] for i in batch], delta_of_output)
        network, velocities = sgd_step(network, velocities, gradient, **hyperparameters)
    return network, velocities


def accuracy(network, inputs, labels):
    right = 0
    for x, label in zip(inputs, labels, strict=True):
        right += int(np.argmax(feedforward(network, x)) == label)
    return right / len(labels)


def moments(gradients):
    """Returns mean, trace of the population covariance, mean norm, and variances, of rows."""
    n, p = gradients.shape
    mean = sum(gradients[i] for i in range(n)) / n
    trace = sum(float((g - mean) @ (g - mean)) for g in gradients) / n
    mean_norm = sum(float(g @ g) ** 0.5 for g in gradients) / n
    variance = np.array([sum((g[j] - mean[j]) ** 2 for g in gradients) / n for j in range(p)])
    return mean, trace, mean_norm, variance


def estimate(gradients, indices, weights):
    """Returns Σ_k weights[k] g_(indices[k]); an index of −1 is no example."""
    total = np.zeros(gradients.shape[1])
    for i, weight in zip(indices, weights, strict=True):
        if i >= 0:
            total += weight * gradients[i]
    return total


def squared_error(gradients, indices, weights):
    error = estimate(gradients, indices, weights) - gradients.mean(axis=0)
    return float(error @ error)


def linear_gradients(w, xs, ys):
    """Returns the gradients of ½(w·x − y)² at w, one row an example."""
    return np.array([(w @ x - y) * x for x, y in zip(xs, ys, strict=True)])


def clipped_estimate(gradients, indices, weights, max_norm):
    """Returns Σ_k weights[k] min(1, max_norm/‖g‖) g, g = g_(indices[k]); −1 is no example."""
    norms = np.array([float(g @ g) ** 0.5 for g in gradients])
    shares = [min(1.0, max_norm / norm) if norm > 0 else 1.0 for norm in norms]
    clipped = np.array([s * g for s, g in zip(shares, gradients, strict=True)])
    return estimate(clipped, indices, weights)


def private_estimate(gradients, indices, max_norm, noise, expected_size):
    """Returns (Σ_k min(1, max_norm/‖g_k‖) g_k + noise)/expected_size."""
    total = clipped_estimate(gradients, indices, np.ones(len(indices)), max_norm)
    return (total + noise) / expected_size


def svrg_estimate(gradients, anchor_gradients, indices, weights):
    """Returns Σ_k weights[k] (g_k − h_k) + 1/n Σ_i h_i, h the gradients at the anchor."""
    mean = sum(anchor_gradients) / len(anchor_gradients)
    return estimate(gradients - anchor_gradients, indices, weights) + mean
