"""How fast is it, against the obvious ways to write the same thing?

Every suite does the same work in several ways, its contenders. They take turns, round by round, in
one process, so that whatever else the machine does hits all of them alike. The table gives the
ratio to our own way first, then the median and the spread. A contender whose library is not
installed is skipped by name.

    python scripts/benchmark.py --suite=epoch --data_dir=FOLDER_OF_MNIST --out_dir=runs/benchmark

Without --data_dir the suite `epoch` draws pixels at random in MNIST's shape, and says so: how long
an epoch takes does not depend on what the pixels show. It runs about two minutes on two cores.

A suite is one function that returns a `Suite`, named in `SUITES`.
"""

import importlib.util
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import sgd_jax as sj
from sgd_jax import data
from sgd_jax.networks import Network

Run = Callable[[], object]


class Contender(NamedTuple):
    """One way to do the work of a suite."""

    name: str
    make: Callable[[], Run]
    """Prepares what is not timed and returns what is: a function that does the work once."""
    needs: tuple[str, ...] = ()
    """Modules without which this contender is skipped; `make` imports them."""
    max_rounds: int | None = None
    """At most so many timed rounds and no warm-up, for what takes many seconds and compiles
    nothing; None: as many rounds as asked for."""


class Suite(NamedTuple):
    """Contenders that do the same work; the first is ours."""

    work: str
    contenders: list[Contender]


class Timing(NamedTuple):
    """How long one contender took, round by round."""

    name: str
    seconds: list[float]

    @property
    def median(self) -> float:
        """The median over the rounds, in seconds."""
        return statistics.median(self.seconds)


# --- the harness ---


def missing_modules(contender: Contender) -> list[str]:
    """Returns the modules that a contender needs and that are not installed."""
    return [module for module in contender.needs if importlib.util.find_spec(module) is None]


def time_in_turns(contenders: Sequence[Contender], num_rounds: int) -> list[Timing]:
    """Returns the timing of each contender, in the order given.

    Each is prepared and warmed up by one run that is not counted; then they take turns for
    num_rounds, in reversed order every other round. The clock stops when the result is ready on its
    device, not when the call returns.

    Raises:
      ValueError: num_rounds < 1.
    """
    if num_rounds < 1:
        raise ValueError(f"num_rounds must be at least 1, got {num_rounds}")
    lanes = [(contender, contender.make(), Timing(contender.name, [])) for contender in contenders]
    for contender, run, _ in lanes:
        if contender.max_rounds is None:
            jax.block_until_ready(run())
    for index in range(num_rounds):
        for contender, run, timing in lanes if index % 2 == 0 else reversed(lanes):
            if contender.max_rounds is None or index < contender.max_rounds:
                start = time.perf_counter()
                jax.block_until_ready(run())
                timing.seconds.append(time.perf_counter() - start)
    return [timing for _, _, timing in lanes]


def measure(name: str, suite: Suite, num_rounds: int) -> dict:
    """Returns what was measured, and where, fit for JSON; ratios are to the first contender."""
    missing = {contender.name: missing_modules(contender) for contender in suite.contenders}
    timings = time_in_turns([c for c in suite.contenders if not missing[c.name]], num_rounds)
    ours = timings[0].median
    device = jax.devices()[0]
    return {
        "suite": name,
        "work": suite.work,
        "rows": [
            {
                "contender": timing.name,
                "ratio": timing.median / ours,
                "median_seconds": timing.median,
                "min_seconds": min(timing.seconds),
                "max_seconds": max(timing.seconds),
                "num_rounds": len(timing.seconds),
            }
            for timing in timings
        ],
        "skipped": {name: modules for name, modules in missing.items() if modules},
        "device": f"{device.platform} ({device.device_kind})",
        "num_devices": jax.device_count(),
        "num_cores": os.cpu_count(),
        "machine": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in ("sgd_jax", "jax", "jaxlib", "numpy", "optax")},
    }


def as_markdown(result: dict) -> str:
    """Returns a result of `measure` as a table, ratios first, with its circumstances below."""
    lines = [
        f"**{result['suite']}**: {result['work']}",
        "",
        "| ratio | contender | median, s | min to max, s | rounds |",
        "| ---: | --- | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row['ratio']:.2f} | {row['contender']} | {row['median_seconds']:.3g} "
        f"| {row['min_seconds']:.3g} to {row['max_seconds']:.3g} | {row['num_rounds']} |"
        for row in result["rows"]
    ]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines += [
        "",
        f"{result['num_devices']} × {result['device']}, {result['num_cores']} cores, "
        f"{result['machine']}; {versions}.",
    ]
    lines += [
        f"Skipped: {name}, for want of {', '.join(modules)}."
        for name, modules in result["skipped"].items()
    ]
    return "\n".join(lines)


# --- suite `epoch`: one epoch of the textbook network ---

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


def epoch_suite(data_dir: str | None = None, n: int = 50_000) -> Suite:
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
    return Suite(work, contenders)


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


SUITES = {"epoch": epoch_suite}


def write(result: dict, folder: Path) -> None:
    """Writes a result of `measure` into a folder, made if need be: <suite>.json and <suite>.md."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / result["suite"]
    stem.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    stem.with_suffix(".md").write_text(as_markdown(result) + "\n")


def define_flags() -> None:
    """Defines the flags: called by the program, not on import, as other programs share names."""
    flags.DEFINE_enum("suite", "epoch", list(SUITES), "What to time.")
    flags.DEFINE_string("data_dir", None, "Folder of MNIST; without it random pixels.")
    flags.DEFINE_integer("num_rounds", 7, "Timed rounds.", lower_bound=1)
    flags.DEFINE_string("out_dir", None, "Where to write <suite>.json and <suite>.md.")


def main(argv: Sequence[str]) -> None:
    """Times the suite asked for, prints its table and writes it where asked."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    values = flags.FLAGS
    result = measure(values.suite, SUITES[values.suite](values.data_dir), values.num_rounds)
    print(as_markdown(result))
    if values.out_dir is not None:
        write(result, Path(values.out_dir))


if __name__ == "__main__":
    define_flags()
    app.run(main)
