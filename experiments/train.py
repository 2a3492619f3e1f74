"""How well does the textbook network learn to tell handwritten digits apart?

Trains a network of sigmoid neurons by stochastic gradient descent on shuffled mini-batches, as in
Nielsen, "Neural Networks and Deep Learning", and leaves a run folder behind.

  python -m experiments.train
  python -m experiments.train --dataset=mnist --init=normal --num_seeds=8
  python -m experiments.train --run_name=mine --epochs=10
  python -m experiments.train --run_name=mine --epochs=20 --resume

Expected, as best test accuracy of 30 epochs, on 2 shared CPU cores with compiling:
  first command: 97.97 % in 10 s, when started again 3 s; of 32 seeds median 97.97 %,
    97.30 to 98.65 %, none stuck
  second command, the book's settings: median 95.06 %, 86.65 to 95.30 %, 1 of 8 stuck, in 46 s
"""

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

import sgd_jax as sj
from experiments import (
    _classifier,
    _cli,
    _flags,
    _noise,
    _processes,
    _recorded,
    _signals,
    _streamed,
    runs,
)
from experiments._config import Config, load, make_optimizer, read_config, resolve
from experiments._recorded import DivergenceError, Output
from experiments._within_epoch import Progress
from sgd_jax import data
from sgd_jax.distributed import processes

_FREE_TO_CHANGE = frozenset({"epochs", "data_dir"})
"""What may differ when a run is resumed: when it ends, and where the same data now lie."""


class Result(NamedTuple):
    """What a run returns."""

    state: sj.TrainState
    """After the last epoch; every leaf has a leading axis over seeds."""
    records: list[runs.Record]
    """The lines of metrics of the epochs of this call; see `run`."""


def run(
    config: Config,
    dataset: data.Dataset | None = None,
    *,
    mesh: Mesh | None = None,
    restore: Callable[[sj.TrainState], Progress | None] = lambda state: None,
    on_epoch: Callable[[sj.TrainState, runs.Record], None] = lambda state, record: None,
    on_part: Callable[[Progress], None] = lambda progress: None,
    parts: Sequence[str] = _classifier.PARTS,
) -> Result:
    """Trains, measuring before the first epoch and after each.

    A record holds `epoch` (0: before training; the book's "Epoch 0" is 1 here), what
    `_classifier.make_programs` measures of the network at that moment and, with ``track_noise``,
    `_noise.make_measurement`, `seconds` of training in the epoch, without compiling, measuring and
    saving, and `examples_per_second`, of all seeds together (None at epoch 0). With ``adaptive`` it
    also holds `batch_size`, that of the epoch; `_noise.next_batch_size` makes the next from the
    record. For several seeds what is measured is a list in their order.

    Args:
      config: What to train.
      dataset: Of examples; by default what `load` returns.
      mesh: Devices that share each mini-batch; None is one device. The numbers are the same but for
        rounding.
      restore: Called once with the initial state; returns where to go on from, or None. What
        follows is then bit for bit what would have followed.
      on_epoch: Called with state and record of each epoch, the first included unless restored. The
        next epoch uses the state up: copy what is to be kept.
      on_part: Called after each part of an epoch but the last; only a streamed one has several.
      parts: Of the data set, on which it is measured.

    Raises:
      ValueError: the settings do not fit the data, or float64 is wanted and not enabled.
      DivergenceError: a cost is not finite; names the epoch, the step and the likely cause.
    """
    if config.dtype == "float64" and not jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        raise ValueError(
            "dtype is float64, but JAX computes in float32; expected 64 bits to be enabled before "
            "the first array is made: jax.config.update('jax_enable_x64', True)"
        )
    dataset = load(config) if dataset is None else dataset
    config = resolve(config, dataset)
    n = len(dataset.train.labels)
    seeds = range(config.seed, config.seed + config.num_seeds)
    if config.stream:
        make_programs = functools.partial(_streamed.make_programs, chunk_bytes=config.chunk_bytes)
    else:
        make_programs = _classifier.make_programs
    programs = make_programs(
        dataset,
        make_optimizer(config, num_examples=n),
        sizes=config.sizes or (),
        cost=config.cost,
        init=config.init,
        seeds=seeds,
        dtype=np.dtype(config.dtype),
        parts=parts,
        first_batch_size=(config.batch_size or n) if config.epochs else None,
        mesh=mesh,
    )
    records = []

    measure_noise = None
    if config.track_noise or config.adaptive:
        measure_noise = _noise.make_measurement(
            dataset,
            cost=config.cost,
            seeds=seeds,
            dtype=np.dtype(config.dtype),
            num_examples=config.noise_examples,
            split="train" if config.adaptive else config.noise_split,
            mesh=mesh,
        )

    def report(state: sj.TrainState, epoch: int, seconds: float) -> None:
        measured = programs.evaluate(state.params)
        _check_measured(measured, epoch, config, n)
        if measure_noise:
            measured |= measure_noise(state.params, epoch)
        if config.adaptive:
            measured["batch_size"] = batch_size
            measured["wanted_batch_size"] = _noise.wanted_batch_size(
                config, measured, done.record if done else None, n
            )
        speed = len(seeds) * n / seconds if epoch else None
        records.append(
            {"epoch": epoch, **measured, "seconds": seconds, "examples_per_second": speed}
        )
        on_epoch(state, records[-1])

    batch_size = config.batch_size or n
    state = programs.init()
    done = restore(state)
    if done is None:
        report(state, 0, 0.0)
        done = Progress(state, records[-1])
    for epoch in range(done.record["epoch"] + 1, config.epochs + 1):
        if config.adaptive:
            batch_size = _noise.next_batch_size(config, done.record, n)
        run_epoch = programs.make_epoch(batch_size)
        for part, seconds in _clocked(run_epoch(done.state, epoch, done.num_parts), done.seconds):
            done = Progress(part.state, done.record, done.num_parts + 1, seconds)
            _check_costs(np.asarray(part.costs), epoch, config, n, part)
            if part.steps.stop < part.num_steps:
                on_part(done)
        report(done.state, epoch, done.seconds)
        done = Progress(done.state, records[-1])
    return Result(done.state, records)


def _clocked(
    parts: Iterator[_classifier.Part], seconds: float
) -> Iterator[tuple[_classifier.Part, float]]:
    """Yields each part when it is ready, and the seconds spent on it and those before."""
    while True:
        start = time.perf_counter()
        part = _signals.until_ready(next(parts, None))
        seconds += time.perf_counter() - start
        if part is None:
            return
        yield part, seconds


def _check_costs(
    costs: np.ndarray, epoch: int, config: Config, n: int, part: _classifier.Part
) -> None:
    """Raises DivergenceError at the first of the costs (num_seeds, steps) that is not finite.

    They are those of a part of an epoch; n is the number of training examples.
    """
    bad = ~np.isfinite(costs)
    if bad.any():
        step = int(np.argmax(bad.any(axis=0)))
        index = int(np.argmax(bad[:, step]))
        where = f"at epoch {epoch}, step {part.steps.start + step + 1} of {part.num_steps}"
        raise _divergence(f"the cost became {costs[index, step]} {where}", index, config, n)


def _check_measured(measured: dict[str, Any], epoch: int, config: Config, n: int) -> None:
    for name, values in measured.items():
        for index, value in enumerate(runs.per_seed(values)):
            if not math.isfinite(value):
                raise _divergence(
                    f"{name} is {value} at the end of epoch {epoch}", index, config, n
                )


def _divergence(what: str, index: int, config: Config, n: int) -> DivergenceError:
    return DivergenceError(f"{what} (seed {config.seed + index}). {likely_cause(config, n)}")


def likely_cause(config: Config, n: int) -> str:
    """Returns what probably made a cost infinite, judged by the settings, and what to try."""
    rate, decay = config.learning_rate, config.learning_rate * config.weight_decay / n
    if decay > 2:  # |1 − ηλ/n| > 1: the weights grow
        return (
            f"The likely cause is a weight decay that is too large: each step multiplies the "
            f"weights by 1 − ηλ/n = {1 - decay:.4g}. Try --weight_decay={0.1 * n / rate:.2g}, for "
            "which it is 0.9, or less"
        )
    if config.momentum >= 0.9:
        effective = rate / (1 - config.momentum)
        return (
            f"The likely cause is that the learning rate {rate:g} with momentum "
            f"{config.momentum:g} moves as far as {effective:g} without: try "
            f"--learning_rate={rate * (1 - config.momentum):.2g}"
        )
    return (
        f"The likely cause is a learning rate that is too large, {rate:g}: try "
        f"--learning_rate={rate / 10:g}"
    )


def main() -> int:
    """Reads the flags, trains, leaves the run folder; returns the exit code."""
    with _cli.user_errors():
        given = _flags.given_settings()
        output = Output(**{f.name: given.pop(f.name) for f in fields(Output) if f.name in given})
        mesh = _processes.make_mesh(given)
        stored = processes.from_first(lambda: _recorded.read_stored(output))
        if stored is None:
            config = Config(**given)
        else:
            before = asdict(read_config(stored))
            config = Config(**_recorded.merge_settings(before, given, _FREE_TO_CHANGE))
            if processes.from_first(lambda: _recorded.is_complete(output, config.epochs)):
                print(f"complete: {output.run_name} has trained its {config.epochs} epochs already")
                return 0
        if config.dtype == "float64":
            jax.config.update("jax_enable_x64", True)
        dataset = processes.in_all(lambda: load(config))
        config = processes.in_all(lambda: resolve(config, dataset))
        folder, notes = _recorded.open_folder(output, asdict(config), dataset, stored, __file__)
    train = functools.partial(run, config, dataset, mesh=mesh)
    return _recorded.record(folder, output, config.epochs, config.seed, notes, train)


if __name__ == "__main__":
    _cli.start(main, __doc__ or "", _flags.GROUPS)
