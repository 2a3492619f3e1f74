"""The suite `epoch`: one epoch of the textbook network, in the obvious ways to write it."""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import sgd_jax as sj
from benchmarks import epoch_c, epoch_peers
from benchmarks.harness import Contender, Prepared, Run, Suite, as_array
from sgd_jax import data
from sgd_jax.networks import Network

QUADRATIC, CROSS_ENTROPY = "quadratic cost", "cross-entropy cost"
PRODUCT = "one matrix product, 2048 × k × 2048, of as many operations"
OURS = ("sgd_jax.make_epoch", QUADRATIC)


class EpochProblem(NamedTuple):
    """Where an epoch starts and what it walks over; all contenders see the same."""

    network: Network
    pixels: np.ndarray
    """(n, n_in), uint8."""
    labels: np.ndarray
    """(n,), 0 … 9."""
    batches: np.ndarray
    """(n // m, m) indices."""
    learning_rate: float
    origin: str

    @property
    def sizes(self) -> list[int]:
        """Neurons by layer."""
        return [self.network[0].weights.shape[1], *(len(layer.biases) for layer in self.network)]


def make_epoch_problem(
    data_dir: str | None,
    n: int,
    sizes: tuple[int, ...] = (784, 30, 10),
    batch_size: int = 10,
    learning_rate: float = 0.3,
) -> EpochProblem:
    """Returns a network and the first n training images of MNIST, or random pixels.

    The learning rate is a tenth of the textbook's: at that one rounding errors grow from step to
    step, and after 5,000 of them no two ways agree. It does not change how long a step takes.
    """
    if data_dir is None:
        generator = np.random.default_rng(0)
        pixels = generator.integers(0, 256, (n, sizes[0]), np.uint8)
        labels, origin = generator.integers(0, sizes[-1], n), "random pixels in MNIST's shape"
    else:
        train = data.load("mnist", data_dir, download=False).train
        pixels, labels, origin = train.inputs[:n], train.labels[:n], "MNIST"
    network = sj.init_network(jax.random.key(0), sizes)
    batches = np.asarray(sj.sampling.epoch(jax.random.key(1), len(labels), batch_size))
    return EpochProblem(network, pixels, labels, batches, learning_rate, origin)


def epoch_suites(data_dir: str | None = None, n: int = 50_000) -> list[Suite]:
    """Returns one epoch in many ways, from one start in one order, for three m and a wide network.

    Each returns the params after the epoch, which are compared. Drawing the order is not timed. All
    compute in float32, but for the NumPy of the book, which takes float64.

    Args:
      data_dir: folder of MNIST; None: random pixels of the same shape.
      n: number of examples.
    """
    wide = make_epoch_problem(
        data_dir, min(n, 6_400), (784, 800, 800, 10), min(n, 128), learning_rate=0.5
    )
    return [
        epoch_suite("epoch", make_epoch_problem(data_dir, n)),
        epoch_suite("epoch_m128", make_epoch_problem(data_dir, n, batch_size=min(n, 128))),
        epoch_suite("epoch_m1000", make_epoch_problem(data_dir, n, batch_size=min(n, 1000))),
        wide_suite("epoch_wide", wide),
    ]


def epoch_suite(name: str, problem: EpochProblem) -> Suite:
    """Returns one epoch of any problem in many ways.

    scikit-learn has no quadratic cost behind sigmoid outputs: it takes the cross-entropy, and so
    does a twin of ours that it is compared with, both with a thirtieth of the learning rate, at
    which rounding errors do not grow from step to step.
    """
    ways: list[tuple[str, Callable[[EpochProblem], Prepared | Run], tuple[str, ...], int | None]]
    ways = [
        (OURS[0], our_epoch, (), None),
        ("one scan, optax and grad of the mean", optax_epoch, ("optax",), None),
        ("sgd_jax.make_step in a Python loop", our_steps, (), None),
        ("jitted step of optax in a Python loop", optax_steps, ("optax",), None),
        (
            "jitted step of optax, mini-batches taken by JAX",
            functools.partial(optax_steps, on_device=True),
            ("optax",),
            3,
        ),
        ("C, one core", epoch_c.c_epoch, (), None),
        ("NumPy, a mini-batch at a time", epoch_peers.numpy_by_batch, (), None),
        ("NumPy, an example at a time", epoch_peers.numpy_by_example, (), 3),
    ]
    ways += [
        (way, functools.partial(epoch_peers.in_torch, way), ("torch",), None)
        for way in (epoch_peers.EAGER, epoch_peers.COMPILED)
    ]
    contenders = [
        Contender(name, functools.partial(make, problem), needs, rounds, QUADRATIC, OURS)
        for name, make, needs, rounds in ways
    ]
    slower = problem._replace(learning_rate=problem.learning_rate / 30)
    twin = functools.partial(our_epoch, slower, _cross_entropy)
    theirs = functools.partial(epoch_peers.sklearn_partial_fit, slower)
    baseline = (OURS[0], CROSS_ENTROPY)
    contenders += [
        Contender(OURS[0], twin, question=CROSS_ENTROPY, baseline=baseline),
        Contender("scikit-learn", theirs, ("sklearn",), None, CROSS_ENTROPY, baseline),
    ]
    return Suite(name, _work(problem), contenders, read, tolerance=1e-3)


def wide_suite(name: str, problem: EpochProblem) -> Suite:
    """Returns one epoch of a network whose time goes into matrix products.

    Beside it one large product of as many operations: what the machine gives at best.
    """
    ways = {
        OURS[0]: (our_epoch, ()),
        "one scan, optax and grad of the mean": (optax_epoch, ("optax",)),
        "C, one core": (epoch_c.c_epoch, ()),
        "NumPy, a mini-batch at a time": (epoch_peers.numpy_by_batch, ()),
        epoch_peers.EAGER: (functools.partial(epoch_peers.in_torch, epoch_peers.EAGER), ("torch",)),
    }
    contenders = [
        Contender(way, functools.partial(make, problem), needs, None, QUADRATIC, OURS)
        for way, (make, needs) in ways.items()
    ]
    product = functools.partial(_product_of, num_operations(problem))
    contenders.append(Contender("jnp.matmul", product, (), None, PRODUCT, OURS))
    return Suite(name, _work(problem), contenders, read, tolerance=1e-3)


def num_operations(problem: EpochProblem) -> int:
    """Returns the additions and multiplications in the matrix products of an epoch.

    For each example and each layer (n_in, n_out): 2·n_in·n_out forward, for the gradient and, but
    for the first layer, backward.
    """
    pairs = list(itertools.pairwise(problem.sizes))
    per_example = sum(6 * a * b for a, b in pairs) - 2 * pairs[0][0] * pairs[0][1]
    return per_example * problem.batches.size


def _product_of(operations: int, size: int = 2048) -> Run:
    terms = max(1, round(operations / (2 * size * size)))
    left, right = jnp.ones((size, terms)), jnp.ones((terms, size))
    product = jax.jit(jnp.matmul)
    return lambda: product(left, right)


def _work(problem: EpochProblem) -> str:
    return (
        f"one epoch of {problem.sizes}, m = {problem.batches.shape[1]}, "
        f"n = {len(problem.labels):,} ({problem.origin}), "
        f"{num_operations(problem) / 1e9:.3g}·10⁹ operations in products"
    )


def read(params: object) -> list[np.ndarray]:
    """Returns weights and biases, layer by layer, each as one row to compare by its norm."""
    return [as_array(leaf).reshape(1, -1) for leaf in jax.tree.leaves(params)]


def _quadratic(network: Network, x: jax.Array, y: jax.Array) -> jax.Array:
    return sj.quadratic_cost(sj.feedforward(network, x), y)


def _cross_entropy(network: Network, x: jax.Array, y: jax.Array) -> jax.Array:
    return sj.logit_cross_entropy_cost(sj.networks.weighted_input(network, x), y)


def cost_of_one(problem: EpochProblem, cost: Callable = _quadratic) -> Callable:
    """Returns the cost of one example as it is stored: pixels of a byte, and a label."""

    def fun(network: Network, example: tuple[jax.Array, jax.Array]) -> jax.Array:
        pixels, label = example
        return cost(
            network, pixels.astype(jnp.float32) / 255, jax.nn.one_hot(label, problem.sizes[-1])
        )

    return fun


def on_device(problem: EpochProblem) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """Returns examples and mini-batches as arrays of JAX."""
    return jax.device_put(((problem.pixels, problem.labels), problem.batches))


def our_epoch(problem: EpochProblem, cost: Callable = _quadratic) -> Run:
    """Returns an epoch by `make_epoch`."""
    optimizer = sj.sgd(problem.learning_rate)
    epoch = sj.make_epoch(cost_of_one(problem, cost), optimizer)
    state = sj.init_state(problem.network, optimizer)
    examples, batches = on_device(problem)
    return lambda: epoch(state, examples, batches)[0].params


def our_steps(problem: EpochProblem) -> Run:
    """Returns an epoch by `make_step`, the loop and the gathering left to Python and NumPy."""
    optimizer = sj.sgd(problem.learning_rate)
    step = sj.make_step(cost_of_one(problem), optimizer)
    start = sj.init_state(problem.network, optimizer)

    def run() -> object:
        state = start
        for indices in problem.batches:
            state, _ = step(state, (problem.pixels[indices], problem.labels[indices]))
        return state.params

    return run


def _optax_step(problem: EpochProblem) -> tuple[Any, Callable]:
    """Returns where a step of optax starts, and the step: gradient of the mean cost, update."""
    import optax

    optimizer = optax.sgd(problem.learning_rate)
    cost = cost_of_one(problem)

    def mean_cost(network: Network, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jnp.mean(jax.vmap(cost, in_axes=(None, 0))(network, batch))

    def step(state: tuple, batch: tuple[jax.Array, jax.Array]) -> tuple:
        params, opt_state = state
        updates, opt_state = optimizer.update(jax.grad(mean_cost)(params, batch), opt_state)
        return optax.apply_updates(params, updates), opt_state

    return (problem.network, optimizer.init(problem.network)), step


def optax_epoch(problem: EpochProblem) -> Run:
    """Returns an epoch as one writes it with optax: a scan over the gradient of the mean cost."""
    start, step = _optax_step(problem)
    examples, batches = on_device(problem)

    @jax.jit
    def epoch(state: Any, examples: Any, batches: jax.Array) -> Any:
        def body(state: tuple, indices: jax.Array) -> tuple[tuple, None]:
            return step(state, jax.tree.map(lambda leaf: leaf[indices], examples)), None

        return jax.lax.scan(body, state, batches)[0][0]

    return lambda: epoch(start, examples, batches)


def optax_steps(problem: EpochProblem, on_device: bool = False) -> Run:
    """Returns an epoch as a loop over a jitted step of optax.

    Args:
      problem: what to walk over.
      on_device: whether the mini-batches are taken from arrays of JAX; otherwise of NumPy.
    """
    start, step = _optax_step(problem)
    step = jax.jit(step)
    pixels, labels = problem.pixels, problem.labels
    if on_device:
        pixels, labels = jax.device_put((pixels, labels))

    def run() -> object:
        state = start
        for indices in problem.batches:
            state = step(state, (pixels[indices], labels[indices]))
        return state[0]

    return run
