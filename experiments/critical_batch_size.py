"""How large a mini-batch is worth its examples?

Trains the textbook network to a target accuracy with mini-batches of many sizes m, each at the best
of many learning rates, and counts steps S and examples E = mS. Where noise and gradient trade as in
McCandlish, Kaplan and Amodei (2018),

  (S/S_min − 1)(E/E_min − 1) = 1,    that is    S = S_min (1 + B_crit/m),  B_crit = E_min/S_min:

below B_crit twice the mini-batch halves the steps, above it the examples are wasted. Fits S_min and
E_min, with 95 % intervals, and puts B_crit beside the simple noise scale B = tr Σ/‖G‖² along one of
the same runs. All seeds and learning rates of a size are one compiled program. Sizes, unless given:
the powers of two from 1 to 1,024. Leaves tables, figure and report in a run folder.

  python -m experiments.critical_batch_size
  python -m experiments.critical_batch_size --dataset=mnist
  python -m experiments.critical_batch_size --dataset=fashion_mnist --target=0.75

Expected, with 95 % intervals of the fit, 3 seeds; the noise scale B of one run from its start to
the target, and its median:

                 S_min              E_min                    B_crit             B
  digits         146 (138 to 155)   749 (672 to 835)         5.1 (4.4 to 5.9)   0.6 to 63, 29
  MNIST          235 (219 to 252)   5,694 (5,264 to 6,158)   24 (21 to 27)      0.9 to 212, 62
  Fashion-MNIST  103 (94 to 112)    2,411 (2,185 to 2,661)   23 (20 to 27)      0.9 to 204, 48

So B is of the order of B_crit, and 2 to 6 times as large. 46 s for the second command on two cores
of its own.
"""

import dataclasses
import math
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
import scipy.stats
from absl import flags
from matplotlib.figure import Figure

import sgd_jax as sj
from experiments import _asked, _classifier, _cli, _flags, _tabled, _target
from experiments._asked import Asked, show_nothing
from experiments._config import check_fields, fill_batch_sizes
from experiments._tabled import Column
from experiments._target import RATES, Problem, count_steps
from sgd_jax import data

_TRAINING = {"num_seeds": 3}
_SMOKE = {"batch_sizes": (8, 16, 64), "target": 0.3, "most_epochs": 20}
_CHECKS = 25  # how often, about, the accuracy is looked at before the target
_STEPS = 3000  # that every size may take
_CHUNK_SIZE = 1000
_PATH_SIZE = 16  # the runs whose noise scale is measured have about this m
_POINTS = 12  # at so many points at most


@dataclasses.dataclass(frozen=True)
class Config:
    """What is swept; the flags of the same names say what each is."""

    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
    target: float = 0.9
    most_epochs: int = 30
    num_validated: int = 2000

    def __post_init__(self):
        """Raises ValueError at what is wrong whatever the data are."""
        sizes_are_good = len(set(self.batch_sizes)) >= 3 and min(self.batch_sizes) >= 0
        check_fields(
            self,
            (
                "batch_sizes",
                sizes_are_good,
                "three sizes or more of at least 1: two numbers are fitted",
            ),
            ("target", 0 < self.target < 1, "an accuracy between 0 and 1"),
            ("most_epochs", self.most_epochs >= 1, "a whole number of at least 1"),
            ("num_validated", self.num_validated >= 1, "a whole number of at least 1"),
        )


TABLE = _tabled.Table(
    (
        Column("batch_size", "m", "{:,}"),
        Column("learning_rate", "best η", "{:g}"),
        Column("steps", "steps S", "{:,.1f}"),
        Column("steps_least", "least", "{:,.1f}"),
        Column("steps_most", "most", "{:,.1f}"),
        Column("examples", "examples E", "{:,.0f}"),
        Column("steps_fitted", "S fitted", "{:,.1f}"),
        Column("seconds", "seconds", "{:.1f}"),
    ),
    legend="Steps and examples to the target at the best learning rate of each size: mean, least "
    "and most of the seeds, draws with replacement. Fitted is S_min (1 + B_crit/m).",
)


class Fit(NamedTuple):
    """S = S_min + E_min/m fitted to log S; each with the ends of its 95 % interval."""

    least_steps: tuple[float, float, float]
    least_examples: tuple[float, float, float]
    critical: tuple[float, float, float]
    """B_crit = E_min/S_min."""


class Result(NamedTuple):
    """What `run` returns."""

    rows: list[_tabled.Row]
    """One for each size; see `TABLE`."""
    fit: Fit
    noise: list[_tabled.Row]
    """Along one of the runs: step, accuracy, tr Σ, ‖G‖² and noise scale."""


def run(asked: Asked[Config], show: _tabled.Show = show_nothing) -> Result:
    """Sweeps the sizes, largest first, and fits the trade of steps and examples.

    Args:
      asked: As `resolve` returns it. Batch size, learning rate and optimizer of training do not
        count; the accuracy is that of the first validation examples.
      show: Called with each row, before anything is fitted.

    Raises:
      ArithmeticError: a size does not reach the target with any learning rate.
    """
    config, dataset = asked.config, asked.dataset
    fun, output = asked.functions()
    held_out = data.Examples(*(leaf[: config.num_validated] for leaf in dataset.validation))
    measure = _target.make_accuracy(output, _classifier.to_device(held_out, asked.dtype))
    problem = Problem(fun, asked.examples(), *asked.first_networks(), measure)
    rows, segment = [], 2
    for m in config.batch_sizes[::-1]:
        began = time.perf_counter()
        most = max(_STEPS, math.ceil(config.most_epochs * asked.num_examples / m))
        steps = count_steps(problem, m, segment, most, config.target)
        means = np.where(np.isfinite(steps).all(axis=0), steps.mean(axis=0), np.inf)
        best = int(np.argmin(means))
        row = {
            "batch_size": m,
            "learning_rate": RATES[best],
            "steps": means[best],
            "steps_least": steps[:, best].min(),
            "steps_most": steps[:, best].max(),
            "examples": m * means[best],
            "steps_fitted": None,
            "seconds": time.perf_counter() - began,
        }
        rows.append(row)
        show(TABLE, row)
        segment = max(1, round(means[best] / _CHECKS))
    rows = rows[::-1]
    fit = fit_trade([row["batch_size"] for row in rows], [row["steps"] for row in rows])
    for row in rows:
        row["steps_fitted"] = fit.least_steps[0] * (1 + fit.critical[0] / row["batch_size"])
    middle = min(rows, key=lambda row: abs(math.log(row["batch_size"] / _PATH_SIZE)))
    return Result(rows, fit, _measure_noise(problem, middle))


def resolve(asked: Asked[Config]) -> Asked[Config]:
    """Returns what is asked with the sizes filled in; raises ValueError where one is above n."""
    sizes = fill_batch_sizes(asked.config.batch_sizes, asked.num_examples)
    return asked._replace(config=dataclasses.replace(asked.config, batch_sizes=sizes))


def fit_trade(sizes: Any, steps: Any) -> Fit:
    """Returns S_min, E_min and B_crit of S = S_min + E_min/m, with 95 % intervals.

    Least squares in log S, so that all sizes count alike; intervals by the t distribution from the
    curvature of the sum of squares in (log S_min, log E_min).

    Args:
      sizes: m, three or more.
      steps: S of each.
    """
    m, log_steps = np.asarray(sizes, np.float64), np.log(np.asarray(steps, np.float64))

    def law(m: np.ndarray, log_least: float, log_examples: float) -> np.ndarray:
        return np.logaddexp(log_least, log_examples - np.log(m))

    first = (log_steps.min(), float(np.min(log_steps + np.log(m))))
    values, covariance = scipy.optimize.curve_fit(law, m, log_steps, p0=first)
    t = scipy.stats.t.ppf(0.975, len(m) - 2)

    def interval(weights: np.ndarray) -> tuple[float, float, float]:
        middle, half = weights @ values, t * math.sqrt(weights @ covariance @ weights)
        return tuple(math.exp(value) for value in (middle, middle - half, middle + half))  # pyright: ignore[reportReturnType]

    return Fit(
        interval(np.array([1.0, 0.0])),
        interval(np.array([0.0, 1.0])),
        interval(np.array([-1.0, 1.0])),
    )


def _measure_noise(problem: Problem, row: _tabled.Row) -> list[_tabled.Row]:
    """Returns the noise scale of all training examples along a run, from start to target."""
    m, optimizer = row["batch_size"], sj.sgd(row["learning_rate"])
    epoch = sj.make_epoch(problem.fun, optimizer)
    state = sj.init_state(jax.tree.map(lambda leaf: leaf[0], problem.networks), optimizer)
    segment = max(1, round(row["steps"] / (_POINTS - 1)))
    n, rows = len(problem.examples.labels), []
    for number in range(_POINTS):
        moments = sj.gradient_moments(
            problem.fun, state.params, problem.examples, chunk_size=_CHUNK_SIZE
        )
        scale = sj.noise_scale(moments, of="these_examples")
        accuracy = problem.measure(jax.tree.map(lambda leaf: leaf[None, None], state.params))
        rows.append(
            {
                "batch_size": m,
                "learning_rate": row["learning_rate"],
                "step": number * segment,
                "accuracy": float(accuracy[0, 0]),
                "trace": float(scale.parts.trace),
                "squared_norm": float(scale.parts.squared_norm),
                "noise_scale": None if bool(scale.undetermined) else float(scale.value),
            }
        )
        key = jax.random.fold_in(problem.keys[0], number)
        batches = jax.random.randint(key, (segment, m), 0, n, jnp.int32)
        state, _ = epoch(state, problem.examples, batches)
    return rows


def mean_noise_scale(noise: list[_tabled.Row]) -> float:
    """Returns B over a run: the mean of tr Σ over the mean of ‖G‖², never the mean of ratios."""
    return sum(row["trace"] for row in noise) / sum(row["squared_norm"] for row in noise)


def median_noise_scale(noise: list[_tabled.Row]) -> float:
    """Returns the median of B over the points of a run; undetermined counts as infinite."""
    return statistics.median(
        math.inf if row["noise_scale"] is None else row["noise_scale"] for row in noise
    )


def draw(result: Result, target: float, description: str) -> Figure:
    """Returns steps against m, the trade of steps and examples, and the noise scale of a run."""
    figure = Figure(figsize=(15, 4.8), layout="constrained")
    steps, trade, noise = figure.subplots(1, 3)
    m = np.array([row["batch_size"] for row in result.rows], np.float64)
    mean = np.array([row["steps"] for row in result.rows])
    ends = np.array([[row["steps_least"], row["steps_most"]] for row in result.rows]).T
    least, _, _ = result.fit.least_steps
    critical, low, high = result.fit.critical
    grid = np.geomspace(m[0] / 1.5, m[-1] * 1.5, 200)
    law = least * (1 + critical / grid)
    steps.plot(grid, law, color="#4477aa", lw=1.3, label="S_min (1 + B_crit/m), fitted")
    steps.errorbar(
        m, mean, np.abs(ends - mean), fmt="o", ms=5, color="#222222", mfc="white",
        label="mean, least to most of the seeds",
    )  # fmt: skip
    trade.plot(law, grid * law, color="#4477aa", lw=1.3, label="(S/S_min − 1)(E/E_min − 1) = 1")
    trade.plot(mean, m * mean, "o", ms=5, color="#222222", mfc="white")
    for size, x, y in zip(m, mean, m * mean, strict=True):
        trade.annotate(f"{size:.0f}", (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8)
    steps.axvspan(low, high, color="#228833", alpha=0.15, lw=0)
    steps.axvline(critical, color="#228833", lw=1.2, label=f"B_crit = {critical:.0f}, 95 %")
    steps.set_xlabel("mini-batch size m")
    steps.set_title(f"steps S to an accuracy of {target:.0%}, best η", fontsize=10.5)
    trade.set_xlabel("steps S")
    trade.set_title("examples E = mS against steps; numbers: m", fontsize=10.5)
    path = [row for row in result.noise if row["noise_scale"] is not None]
    noise.plot(
        [row["step"] for row in path], [row["noise_scale"] for row in path], "o-", ms=4,
        color="#aa3377", label=f"B = tr Σ/‖G‖², m = {result.noise[0]['batch_size']}",
    )  # fmt: skip
    for value, style, label in (
        (median_noise_scale(result.noise), "--", "its median"),
        (mean_noise_scale(result.noise), ":", "mean tr Σ over mean ‖G‖²"),
    ):
        noise.axhline(value, color="#aa3377", ls=style, lw=1.2, label=label)
    noise.axhspan(low, high, color="#228833", alpha=0.15, lw=0)
    noise.axhline(critical, color="#228833", lw=1.2, label="B_crit, 95 %")
    noise.set_xlabel("step, from the start to the target")
    noise.set_title("noise scale of one run, in examples", fontsize=10.5)
    for axis in (steps, trade):
        axis.set_xscale("log")
    for axis in (steps, trade, noise):
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(f"How large a mini-batch is worth its examples: {description}", fontsize=13)
    return figure


_TARGET = flags.DEFINE_float("target", Config.target, "Accuracy on validation examples to reach.")
_MOST_EPOCHS = flags.DEFINE_integer(
    "most_epochs",
    Config.most_epochs,
    f"Passes over the training examples that a size may take, and {_STEPS:,} steps in any case.",
)
_NUM_VALIDATED = flags.DEFINE_integer(
    "num_validated", Config.num_validated, "Validation examples that the accuracy is measured on."
)
GROUPS = _tabled.groups(
    {"Sweep": (_flags.BATCH_SIZES, _TARGET, _MOST_EPOCHS, _NUM_VALIDATED)},
    *("batch_size", "learning_rate", "epochs"),
    *("momentum", "nesterov", "weight_decay", "optimizer"),
    shared=("Data", "Network", "Training", "Seeds", "Run folder"),
)


def find(asked: Asked[Config], show: _tabled.Show) -> _tabled.Answer:
    """Returns what is left in the run folder."""
    result, target = run(asked, show), asked.config.target
    description = f"{asked.description}, to {target:.0%}"
    summary = {
        f"{name}{end}": value
        for name, values in zip(
            ("least_steps", "least_examples", "critical_batch_size"), result.fit, strict=True
        )
        for end, value in zip(("", "_low", "_high"), values, strict=True)
    }
    median = median_noise_scale(result.noise)
    summary |= {
        "noise_scale_median": median if math.isfinite(median) else None,
        "noise_scale_of_means": mean_noise_scale(result.noise),
        "noise_scale_at_start": result.noise[0]["noise_scale"],
        "noise_scale_at_target": result.noise[-1]["noise_scale"],
    }
    picture = _tabled.Picture(
        "Steps, examples and noise",
        "Steps to the target fall as the mini-batch grows, at first in proportion and then "
        "hardly; examples against steps lie on a hyperbola; and the noise scale of one run "
        "rises from the start to the target, beside the critical batch size.",
        draw(result, target, description),
        "critical_batch_size",
    )
    title = f"How large a mini-batch is worth its examples: {description}"
    return _tabled.Answer(
        title, summary, [(TABLE, result.rows)], [picture], {"noise": result.noise}
    )


def main() -> int:
    """Reads the flags, sweeps and fits, leaves the run folder; returns the exit code."""
    return _asked.answer(
        *(Config, GROUPS, __file__, find),
        num_rows=lambda asked: len(asked.config.batch_sizes), resolve=resolve,
        smoke=_SMOKE, training=_TRAINING, unit="size",
    )  # fmt: skip


if __name__ == "__main__":
    _cli.start(main, __doc__ or "", GROUPS, defaults=_TRAINING)
