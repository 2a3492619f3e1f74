r"""Which learning rate suits which mini-batch size?

Trains the textbook network with every learning rate and mini-batch size given, from several seeds,
as one compiled program for each size: the rates of a seed walk through one order of the examples
together, and each CPU core, or each device, takes its share of the runs. Every run is the one that
`experiments.train` makes of its seed, rate and size, to rounding. Unless told otherwise: m = 1, 10
and 100, eight rates, 4 seeds, 10 epochs. Leaves table, heat map, CSV files and report in a run
folder.

  python -m experiments.sweep
  python -m experiments.sweep --dataset=mnist --init=normal --learning_rates=0.3,1,3,10,30 \
      --batch_sizes=10,100,1000 --num_seeds=4 --epochs=10
  python -m experiments.sweep --run_name=mine --resume

Expected, as median test accuracy of 4 seeds after the last epoch, on 2 CPU cores:
  first command, 96 runs of 10 epochs, in 9 s: 97.1 % with m = 1 and η = 0.3 or 1, 97.0 % with
    m = 10 and η = 3; from η = 30 on all outputs are dead
  second command, 60 runs of 10 epochs of 50,000 images, in 35 s, 0.048 s an epoch and run: 94.4 %
    (94.3 to 94.4) with m = 10 and η = 3, 93.2 % with 100 and 10, 85.7 % with 1000 and 10
"""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Sequence

import numpy as np
from absl import flags
from matplotlib.figure import Figure

import sgd_jax as sj
from experiments import (
    _cli,
    _flags,
    _recorded,
    _signals,
    _starting_point,
    _sweep_programs,
    _tabled,
    runs,
)
from experiments._config import Config, load, read_config, resolve
from experiments._recorded import Output
from experiments._tabled import Column, Row, Table
from experiments.runs import style
from sgd_jax import data

_SMOKE = {"learning_rates": (1.0, 10.0), "batch_sizes": (10, 50)}
_TRAINING = {"num_seeds": 4, "epochs": 10}


@dataclasses.dataclass(frozen=True)
class Grid:
    """What is swept; the flags of the same names say what each is."""

    learning_rates: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
    batch_sizes: tuple[int, ...] = (1, 10, 100)
    """0 is all examples."""

    def __post_init__(self):
        """Raises ValueError at what is wrong whatever the data are."""
        for name, values, expected in (
            ("learning_rates", self.learning_rates, "finite numbers above 0, each once"),
            ("batch_sizes", self.batch_sizes, "whole numbers of at least 1, or full, each once"),
        ):
            least = 0 if name == "batch_sizes" else math.ulp(0.0)  # 0 is full
            good = all(least <= value < math.inf for value in values)
            if not values or not good or len(set(values)) < len(values):
                shown = ",".join(f"{value:g}" for value in values)
                raise ValueError(f"{name} is {shown!r}; expected {expected}")


GROUPS = {
    "Sweep": (
        flags.DEFINE_list(
            "learning_rates",
            [f"{rate:g}" for rate in Grid.learning_rates],
            "η of the runs, times the mean gradient of a mini-batch.",
        ),
        _flags.BATCH_SIZES,
    ),
    **{
        heading: tuple(
            holder
            for holder in _flags.GROUPS[heading]
            if holder.name not in ("batch_size", "learning_rate", "log_to")
        )
        for heading in ("Data", "Network", "Training", "Seeds", "Run folder")
    },
}

TABLE = Table(
    (
        Column("batch_size", "m", "{:,}"),
        Column("learning_rate", "η", "{:g}"),
        Column("median_accuracy", "test accuracy", "{:.2%}"),
        Column("min_accuracy", "least", "{:.2%}"),
        Column("max_accuracy", "largest", "{:.2%}"),
        Column("validation_accuracy", "validation", "{:.2%}"),
        Column("cost", "cost of the last epoch", "{:.4g}", missing="not finite"),
        Column("num_diverged", "diverged"),
    ),
    heading="After the last epoch",
    legend=(
        "Accuracies are those after the last epoch: median over the seeds, least and largest. The "
        "cost is the mean over the mini-batches of the last epoch, median over the seeds; a run "
        "has diverged where it is not finite."
    ),
)


def run(
    config: Config,
    grid: Grid,
    dataset: data.Dataset | None = None,
    *,
    restore: Callable[[sj.TrainState], runs.Snapshot | None] = lambda state: None,
    on_epoch: Callable[[sj.TrainState, runs.Record], None] = lambda state, record: None,
) -> list[runs.Record]:
    """Trains every run of the grid and returns what was measured after each epoch.

    A record holds `epoch`, counted through all batch sizes from 0, `batch_size`, `epoch_of_size`,
    counted from 1 in each, and, as lists over seeds of lists over learning rates,
    `accuracy_validation`, `accuracy_test`, `dead_classes_test`, see `_classifier.make_programs`,
    and `cost`, the mean over the mini-batches of the epoch, None where it is not finite; further
    `seconds`, those of training.

    Args:
      config: What all runs have in common; `batch_size` and `learning_rate` are not used.
      grid: In what they differ.
      dataset: Of examples; by default what `load` returns.
      restore: Called once with the initial state of the first size; returns where to go on from,
        or None. What follows is then bit for bit what would have followed.
      on_epoch: Called with state and record of each epoch; the next epoch uses the state up.

    Raises:
      ValueError: the settings do not fit the data.
    """
    dataset = load(config) if dataset is None else dataset
    config = check(config, grid, dataset)
    programs = _sweep_programs.make_programs(config, grid.learning_rates, dataset)
    state = programs.init()
    snapshot = restore(state)
    done = 0
    if snapshot is not None:
        done, state = snapshot.record["epoch"] + 1, snapshot.state
    records = []
    units = list(itertools.product(grid.batch_sizes, range(1, config.epochs + 1)))
    for number, (batch_size, epoch) in enumerate(units):
        if number < done:
            continue
        if epoch == 1:
            state = programs.init()
        run_epoch = programs.make_epoch(batch_size)
        start = time.perf_counter()
        state, costs = _signals.until_ready(run_epoch(state, epoch))
        seconds = time.perf_counter() - start
        records.append(
            {
                "epoch": number,
                "batch_size": batch_size,
                "epoch_of_size": epoch,
                **programs.evaluate(state.params),
                "cost": [
                    [cost if math.isfinite(cost) else None for cost in of_seed]
                    for of_seed in np.asarray(costs, np.float64).tolist()
                ],
                "seconds": seconds,
            }
        )
        on_epoch(state, records[-1])
    return records


def check(config: Config, grid: Grid, dataset: data.Dataset) -> Config:
    """Returns ``config`` resolved; raises ValueError where a batch size does not fit the data."""
    for batch_size in grid.batch_sizes:
        config = resolve(dataclasses.replace(config, batch_size=batch_size), dataset)
    return config


def summarize(records: list[runs.Record], config: Config, grid: Grid) -> tuple[list[Row], Row]:
    """Returns a row for each size and rate, and the best of them by validation accuracy."""
    rows = []
    for record in records:
        if record["epoch_of_size"] != config.epochs:
            continue
        for index, rate in enumerate(grid.learning_rates):
            test, validation, costs = (
                [of_seed[index] for of_seed in record[name]]
                for name in ("accuracy_test", "accuracy_validation", "cost")
            )
            finite = [cost for cost in costs if cost is not None]
            rows.append(
                {
                    "batch_size": record["batch_size"],
                    "learning_rate": rate,
                    "median_accuracy": float(np.median(test)),
                    "min_accuracy": min(test),
                    "max_accuracy": max(test),
                    "validation_accuracy": float(np.median(validation)),
                    "cost": float(np.median(finite)) if finite else None,
                    "num_diverged": len(costs) - len(finite),
                }
            )
    best = max(rows, key=lambda row: row["validation_accuracy"])
    num_runs = config.num_seeds * len(grid.learning_rates)
    seconds = sum(record["seconds"] for record in records)
    summary = {
        "num_runs": num_runs * len(grid.batch_sizes),
        "epochs": config.epochs,
        "best_batch_size": best["batch_size"],
        "best_learning_rate": best["learning_rate"],
        "best_validation_accuracy": best["validation_accuracy"],
        "test_accuracy_there": best["median_accuracy"],
        "seconds_of_training": seconds,
        "seconds_an_epoch_and_run": seconds / (num_runs * len(records)),
    }
    return rows, summary


def runs_of(records: list[runs.Record], config: Config, grid: Grid) -> list[Row]:
    """Returns what was measured of each run after each epoch, a row each."""
    return [
        {
            "batch_size": record["batch_size"],
            "learning_rate": rate,
            "seed": config.seed + g,
            "epoch": record["epoch_of_size"],
            "accuracy_validation": record["accuracy_validation"][g][r],
            "accuracy_test": record["accuracy_test"][g][r],
            "dead_classes_test": record["dead_classes_test"][g][r],
            "cost": record["cost"][g][r],
        }
        for record in records
        for g in range(config.num_seeds)
        for r, rate in enumerate(grid.learning_rates)
    ]


@style.styled
def draw(rows: list[Row], title: str) -> Figure:
    """Returns the median accuracy as a heat map, and against the learning rate with its spread."""
    sizes = list(dict.fromkeys(row["batch_size"] for row in rows))
    rates = list(dict.fromkeys(row["learning_rate"] for row in rows))
    percent = {
        name: 100 * np.array([row[name] for row in rows]).reshape(len(sizes), len(rates))
        for name in ("median_accuracy", "min_accuracy", "max_accuracy")
    }
    median = percent["median_accuracy"]
    figure = Figure(figsize=(13, max(4.2, 1.2 + 0.7 * len(sizes))), layout="constrained")
    heat, lines = figure.subplots(1, 2)
    image = heat.imshow(median, cmap="viridis", aspect="auto", vmin=0, vmax=100)
    heat.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    heat.set_yticks(range(len(sizes)), [f"{size:,}" for size in sizes])
    for (i, j), value in np.ndenumerate(median):
        shade = "black" if value > 60 else "white"
        heat.text(j, i, f"{value:.1f}", ha="center", va="center", color=shade, fontsize=style.SMALL)
    heat.set_ylabel("mini-batch size m")
    heat.set_title("median of the seeds")
    heat.grid(visible=False)
    figure.colorbar(image, ax=heat, label="test accuracy in %")
    for i, (size, color) in enumerate(zip(sizes, itertools.cycle(style.PALETTE), strict=False)):
        lines.plot(rates, median[i], "o-", ms=4, color=color, label=f"m = {size:,}")
        low, high = percent["min_accuracy"][i], percent["max_accuracy"][i]
        lines.fill_between(rates, low, high, color=color, alpha=0.15, lw=0)
    lines.set_xscale("log")
    lines.set_ylim(0, 100)
    lines.set_title("median, least and largest of the seeds")
    lines.set_ylabel("test accuracy in %")
    style.legend(lines)
    for axis in (heat, lines):
        axis.set_xlabel("learning rate η")
    figure.suptitle(title, parse_math=False)
    return figure


def _find(
    folder: runs.RunFolder, config: Config, grid: Grid, dataset: data.Dataset, show: _tabled.Show
) -> _tabled.Answer:
    """Trains what is not trained yet, saving each epoch, and sums up."""
    saved: list[runs.Checkpoints] = []

    def restore(state: sj.TrainState) -> runs.Snapshot | None:
        saved.append(runs.Checkpoints(folder.checkpoints_path, lambda record: 0.0, like=state))
        latest = saved[0].latest
        folder.rewind_metrics(latest.record if latest else None)
        for row in _rows_of_size(folder.read_metrics()):
            show(TABLE, row)
        return latest

    def _rows_of_size(records: list[runs.Record]) -> list[Row]:
        ended = any(record["epoch_of_size"] == config.epochs for record in records)
        return summarize(records, config, grid)[0] if ended else []

    def on_epoch(state: sj.TrainState, record: runs.Record) -> None:
        with _signals.shielded():
            saved[0].save(state, record)
            folder.append_metrics(record)
        for row in _rows_of_size([record]):
            show(TABLE, row)

    try:
        run(config, grid, dataset, restore=restore, on_epoch=on_epoch)
    finally:
        for checkpoints in saved:
            checkpoints.close()
    records = folder.read_metrics()
    rows, summary = summarize(records, config, grid)
    title = (
        f"{folder.path.name}: {summary['test_accuracy_there']:.2%} at m = "
        f"{summary['best_batch_size']}, η = {summary['best_learning_rate']:g}"
    )
    picture = _tabled.Picture(
        "Accuracy by mini-batch size and learning rate",
        f"Median test accuracy by mini-batch size and learning rate: from "
        f"{min(row['median_accuracy'] for row in rows):.1%} to "
        f"{summary['test_accuracy_there']:.1%}, the best, at m = {summary['best_batch_size']} and "
        f"η = {summary['best_learning_rate']:g}. Left as a heat map, right a line for each size.",
        draw(rows, title),
        "sweep",
    )
    return _tabled.Answer(
        title, summary, [(TABLE, rows)], [picture], {"runs": runs_of(records, config, grid)}
    )


def main() -> int:
    """Reads the flags, trains, leaves the run folder; returns the exit code."""
    with _cli.user_errors():
        given = _flags.given_settings(GROUPS)
        own, output = _tabled.take(given, Grid), Output(**_tabled.take(given, Output))
        for name, parse in (
            ("learning_rates", _parse_rates),
            ("batch_sizes", _flags.parse_batch_sizes),
        ):
            if name in own:
                own[name] = parse(own[name])
        stored = _recorded.read_stored(output, experiment="sweep")
        if stored is None:
            config, dataset = _starting_point.prepare(_TRAINING | given)
            grid = Grid(**((_SMOKE if config.smoke else {}) | own))
        else:
            before = {name: tuple(values) for name, values in stored["sweep"].items()}
            grid = Grid(**_recorded.merge_settings(before, own, frozenset()))
            settings = dataclasses.asdict(read_config(stored))
            free = frozenset({"data_dir"})
            config, dataset = _starting_point.prepare(
                _recorded.merge_settings(settings, given, free)
            )
        n = len(dataset.train.labels)
        grid = dataclasses.replace(grid, batch_sizes=tuple(m or n for m in grid.batch_sizes))
        if config.epochs < 1:
            raise ValueError("epochs is 0; expected at least 1 to compare anything")
        config = check(config, grid, dataset)
        settings = {**_flags.settings_read(config, GROUPS), "sweep": dataclasses.asdict(grid)}
        folder, notes = _recorded.open_folder(output, settings, dataset, stored, __file__)
    find = functools.partial(_find, folder, config, grid, dataset)
    num_rows = len(grid.batch_sizes) * len(grid.learning_rates)
    return _tabled.record(folder, notes, num_rows, find, can_resume=True)


def _parse_rates(words: Sequence[str]) -> tuple[float, ...]:
    try:
        return tuple(map(float, words))
    except ValueError as error:
        raise ValueError(
            f"learning_rates is {','.join(words)!r}; expected numbers with commas between, as in "
            "0.1,0.3,1"
        ) from error


if __name__ == "__main__":
    _cli.use_all_cores()
    _cli.start(main, __doc__ or "", GROUPS, defaults=_TRAINING)
