"""Do the networks of the textbook's first chapter learn as it says?

Trains each network that chapter 1 of Nielsen, "Neural Networks and Deep Learning" reports on, from
several seeds at once, and puts their spread beside the number printed. The book shows the best of
three runs; the column "best of 3" is what that is worth on average. Leaves table, figure and report
in a run folder.

  python -m experiments.nielsen
  python -m experiments.nielsen --data_dir=path/of/mnist --num_seeds=16

Expected of the first command, test accuracy in the best epoch of 30, median and range of 8 seeds:

  784-30-10, η = 3        94.98 %  (86.67 to 95.29 %), 1 of 8 stuck; the book 95.42 %
  784-100-10, η = 3       87.04 %  (67.53 to 96.49 %), 7 of 8 stuck; the book 96.59 %
  784-100-10, η = 0.001   21.34 %  (17.53 to 25.89 %); the book 21.42 %
  784-30-10, η = 100      10.10 %  (9.74 to 12.49 %); the book 10.09 %
  784-10, η = 3           75.81 %  (57.81 to 91.83 %), 6 of 8 stuck; an exercise of the book

Stuck is a seed one of whose digits is never learned: with weights drawn from N(0, 1) its output is
0 for every image from the first epochs on, and σ' with it. Of 100 hidden neurons more add up in an
output, so it saturates further. Which seeds get stuck hangs on rounding. 170 s on two CPU cores,
which are two devices that divide the seeds.
"""

import dataclasses
import functools
import itertools
import statistics
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments import _cli, _flags, _recorded, _starting_point, _tabled, sweep
from experiments._config import Config, load
from experiments._recorded import Output
from experiments._tabled import Column
from experiments.runs import style
from sgd_jax import data

_SMOKE = {"dataset": "digits", "num_seeds": 2}
_TRAINING = {"dataset": "mnist", "init": "normal", "num_seeds": 8}
_COLORS = (style.BLUE, style.GREEN, style.ORANGE, style.VERMILION, style.PURPLE)


class Printed(NamedTuple):
    """A network of chapter 1, and what the book prints of it."""

    hidden: tuple[int, ...]
    learning_rate: float
    best: float | None
    """Test accuracy in the best epoch; None where the book leaves it to the reader."""
    right: dict[int, int]
    """Of 10,000 test images, after so many epochs; the book's "Epoch 0" is 1 here."""


CHAPTER = (
    Printed((30,), 3.0, 0.9542, {1: 9129, 2: 9295, 3: 9348, 28: 9528, 29: 9542, 30: 9534}),
    Printed((100,), 3.0, 0.9659, {}),
    Printed((100,), 0.001, 0.2142, {1: 1139, 2: 1136, 3: 1135, 28: 2101, 29: 2123, 30: 2142}),
    Printed((30,), 100.0, 0.1009, {1: 1009, 2: 1009, 3: 1009, 4: 1009, 28: 982, 29: 982, 30: 982}),
    Printed((), 3.0, None, {}),
)

TABLE = _tabled.Table(
    (
        Column("network", "network      ", "{:<13}"),
        Column("learning_rate", "η", "{:g}"),
        Column("printed", "the book", "{:.2%}"),
        Column("median", "median", "{:.2%}"),
        Column("least", "least", "{:.2%}"),
        Column("most", "most", "{:.2%}"),
        Column("best_of_three", "best of 3", "{:.2%}"),
        Column("final", "at the end", "{:.2%}"),
        Column("num_stuck", "stuck"),
        Column("num_seeds", "of"),
        Column("seconds", "seconds", "{:.1f}"),
    ),
    legend="Test accuracy in the best epoch, chosen on the test set as the book does: median, "
    "least and most of the seeds; best of 3, the mean over all choices of three seeds of the best "
    "of them. At the end, the median after the last epoch. Stuck: seeds that end with a class "
    "hardly ever right.",
)


class Result(NamedTuple):
    """What `run` returns."""

    rows: list[_tabled.Row]
    """One for each of `CHAPTER`; see `TABLE`."""
    accuracy: list[np.ndarray]
    """Test accuracy of each, (epochs, num_seeds)."""


def run(
    config: Config,
    dataset: data.Dataset | None = None,
    on_row: Callable[[_tabled.Row], None] = lambda row: None,
) -> Result:
    """Trains the networks of chapter 1 and compares them with what is printed.

    Args:
      config: What they have in common; sizes and learning rate are the chapter's.
      dataset: Of examples; by default what `load` returns. The printed numbers stand beside those
        of MNIST only.
      on_row: Called with each row.
    """
    dataset = load(config) if dataset is None else dataset
    rows, accuracies = [], []
    for printed in CHAPTER:
        sizes = (dataset.train.inputs.shape[1], *printed.hidden, dataset.num_classes)
        grid = sweep.Grid((printed.learning_rate,), (config.batch_size,))
        records = sweep.run(dataclasses.replace(config, sizes=sizes), grid, dataset)
        accuracy = np.array([record["accuracy_test"] for record in records])[:, :, 0]
        dead = np.array(records[-1]["dead_classes_test"])[:, 0]
        best = accuracy.max(axis=0)
        rows.append(
            {
                "network": "-".join(map(str, sizes)),
                "learning_rate": printed.learning_rate,
                "printed": printed.best if dataset.name == "mnist" else None,
                "median": statistics.median(best),
                "least": best.min(),
                "most": best.max(),
                "best_of_three": best_of_three(best),
                "final": statistics.median(accuracy[-1]),
                "num_stuck": int(np.sum(dead > 0)),
                "num_seeds": len(best),
                "seconds": sum(record["seconds"] for record in records),
            }
        )
        accuracies.append(accuracy)
        on_row(rows[-1])
    return Result(rows, accuracies)


def best_of_three(values: np.ndarray) -> float | None:
    """Returns the mean, over all choices of three of the values, of the largest; None for fewer."""
    if len(values) < 3:
        return None
    return statistics.fmean(map(max, itertools.combinations(values.tolist(), 3)))


@style.styled
def draw(result: Result, name: str) -> Figure:
    """Returns the learning curves of all seeds, printed numbers as crosses."""
    figure = Figure(figsize=(13, 4.8), layout="constrained")
    whole, top = figure.subplots(1, 2)
    for axis in (whole, top):
        for printed, row, accuracy, color in zip(
            CHAPTER, result.rows, result.accuracy, _COLORS, strict=False
        ):
            epochs = np.arange(1, len(accuracy) + 1)
            values = 100 * np.sort(accuracy, axis=1)
            label = f"{row['network']}, η = {row['learning_rate']:g}"
            axis.plot(epochs, np.median(values, axis=1), color=color, lw=1.5, label=label)
            axis.fill_between(epochs, values[:, 0], values[:, -1], color=color, alpha=0.15, lw=0)
            if row["printed"] is not None:
                right = {e: count for e, count in printed.right.items() if e <= len(accuracy)}
                axis.plot(
                    list(right), [count / 100 for count in right.values()], "x", color=color,
                    ms=6, mew=1.6,
                )  # fmt: skip
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    whole.set_ylim(0, 100)
    highest = 100 * max(accuracy.max() for accuracy in result.accuracy)
    top.set_ylim(highest - 12, highest + 1)
    whole.set_title("median, least to most of the seeds")
    has_crosses = any(row["printed"] is not None for row in result.rows)
    top.set_title("the upper end" + ("; crosses: printed in the book" if has_crosses else ""))
    whole.set_ylabel("test accuracy in %")
    top.set_ylabel("test accuracy in %")
    style.legend(whole)
    num_seeds = result.rows[0]["num_seeds"]
    figure.suptitle(f"The networks of chapter 1, {num_seeds} seeds, {name}")
    return figure


def describe(result: Result) -> str:
    """Returns in words what `draw` shows, from its numbers."""
    curves = "; ".join(
        f"{row['network']} at η = {row['learning_rate']:g} from {np.median(accuracy[0]):.1%} to "
        f"{np.median(accuracy[-1]):.1%}"
        for row, accuracy in zip(result.rows, result.accuracy, strict=True)
    )
    crosses = any(row["printed"] is not None for row in result.rows)
    end = " Crosses are at the numbers that the book prints." if crosses else ""
    return (
        f"Median test accuracy of the seeds after epoch 1 and {len(result.accuracy[0])}, with a "
        f"band from the least to the most: {curves}.{end}"
    )


GROUPS = _tabled.groups(
    {},
    *("init", "sizes", "learning_rate", "batch_size"),
    shared=("Data", "Training", "Seeds", "Run folder"),
)


def main() -> int:
    """Reads the flags, trains, leaves the run folder; returns the exit code."""
    with _cli.user_errors():
        given = _flags.given_settings(GROUPS)
        output = Output(**_tabled.take(given, Output))
        _recorded.read_stored(output)
        smoke = _SMOKE if given.get("smoke") else {}
        config, dataset = _starting_point.prepare(_TRAINING | smoke | given)
        if config.epochs < 1:
            raise ValueError("epochs is 0; expected at least 1 to have something to compare")
        settings = _flags.settings_read(config, GROUPS)
        folder, notes = _recorded.open_folder(output, settings, dataset, None, __file__)

    def find(show: _tabled.Show) -> _tabled.Answer:
        result = run(config, dataset, functools.partial(show, TABLE))
        first = result.rows[0]
        summary = {
            "best_test_accuracy": first["median"],
            "num_stuck": [row["num_stuck"] for row in result.rows],
            "num_seeds": first["num_seeds"],
        }
        picture = _tabled.Picture(
            "Learning curves",
            describe(result),
            draw(result, dataset.name),
            "nielsen",
        )
        curves = [
            {"network": row["network"], "learning_rate": row["learning_rate"], "epoch": epoch}
            | {f"seed_{config.seed + k}": value for k, value in enumerate(values)}
            for row, accuracy in zip(result.rows, result.accuracy, strict=True)
            for epoch, values in enumerate(accuracy.tolist(), start=1)
        ]
        title = f"The networks of the textbook's first chapter: {dataset.name}"
        return _tabled.Answer(title, summary, [(TABLE, result.rows)], [picture], {"curves": curves})

    return _tabled.record(folder, notes, len(CHAPTER), find, unit="network")


if __name__ == "__main__":
    _cli.use_all_cores()
    _cli.start(main, __doc__ or "", GROUPS, defaults=_TRAINING)
