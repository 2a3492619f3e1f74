"""How large a mini-batch is worth its examples?

Trains the textbook network to a target accuracy with mini-batches of many sizes m, each at the best
of many learning rates, and counts steps S and examples E = mS. Where noise and gradient trade as in
McCandlish, Kaplan and Amodei (2018),

  (S/S_min − 1)(E/E_min − 1) = 1,    that is    S = S_min (1 + B_crit/m),  B_crit = E_min/S_min:

below B_crit twice the mini-batch halves the steps, above it the examples are wasted. Fits S_min and
E_min to the best learning rate of each size, interpolated, with 95 % intervals from the misfit and
from leaving out seeds, and puts B_crit beside what should predict it: the noise scales B = tr
Σ/‖∇C‖² and B_noise = tr(HΣ)/(∇CᵀH∇C) along one of the same runs, averaged by progress. All seeds
and learning rates of a size are one compiled program. Sizes, unless given: the powers of two from 1
to 1,024. Leaves tables, figure and report in a run folder.

  python -m experiments.critical_batch_size
  python -m experiments.critical_batch_size --dataset=mnist --num_seeds=3
  python -m experiments.critical_batch_size --dataset=fashion_mnist --target=0.75 --num_seeds=3

Expected of the first command, 8 seeds, in 210 s on two busy cores: S_min 142 (119 to 169), E_min
  888 (800
to 987), B_crit 6.3 (5.1 to 7.7). By progress B is 22 and B_noise 18, the median of B is 30: three
to five times as large. The law predicts the best η too, in proportion to 1/(1 + B_crit/m), and
there it
fails: the best η is 5.7 for every m from 4 to 1,024, where the law asks for 2.2 to 5.7.
"""

import dataclasses
import math
import statistics
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from matplotlib.figure import Figure

import sgd_jax as sj
from experiments import _asked, _classifier, _cli, _flags, _tabled, _target
from experiments._asked import Asked, show_nothing
from experiments._config import check_fields, fill_batch_sizes
from experiments._tabled import Column
from experiments._target import RATES, Problem, count_steps
from experiments._trade import Fit, find_best, fit_trade, progress_weighted
from experiments.runs import style
from sgd_jax import data

_TRAINING = {"num_seeds": 8}
_SMOKE = {"batch_sizes": (8, 16, 64), "target": 0.3, "most_epochs": 20}
_CHECKS = 25  # how often, about, the accuracy is looked at before the target
_STEPS = 3000  # that every size may take
_CHUNK_SIZE = 1000
_PATH_SIZE = 16  # the runs whose noise scale is measured have about this m
_POINTS = 12  # at so many points at most
_NUM_PROBES = 50
_PROBES = 1 << 20  # sets the keys of probes apart from those of draws


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
        Column("learning_rate", "best η", "{:.2g}"),
        Column("steps", "steps S", "{:,.1f}"),
        Column("steps_least", "least", "{:,.1f}"),
        Column("steps_most", "most", "{:,.1f}"),
        Column("examples", "examples E", "{:,.0f}"),
        Column("steps_fitted", "S fitted", "{:,.1f}"),
        Column("rate_predicted", "η by the law", "{:.2g}"),
        Column("seconds", "seconds", "{:.1f}"),
    ),
    legend="Steps and examples to the target at the best learning rate of each size, interpolated: "
    "geometric mean of the seeds, draws with replacement; least and most at the best rate tried. "
    "Fitted is S_min (1 + B_crit/m). The same law asks for η in proportion to 1/(1 + B_crit/m), "
    "here from that of the largest m.",
)


class Result(NamedTuple):
    """What `run` returns."""

    rows: list[_tabled.Row]
    """One for each size; see `TABLE`."""
    fit: Fit
    noise: list[_tabled.Row]
    """Along one of the runs: step, accuracy, tr Σ, ‖∇C‖² and noise scale."""


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
    rows, runs, segment = [], [], 2
    for m in config.batch_sizes[::-1]:
        began = time.perf_counter()
        most = max(_STEPS, math.ceil(config.most_epochs * asked.num_examples / m))
        steps = count_steps(problem, m, segment, most, config.target)
        found = find_best(np.log(steps).mean(axis=0)[None], np.log(RATES))
        mean, nearest = (
            float(np.exp(found.log_steps[0])),
            int(np.argmin(np.log(steps).mean(axis=0))),
        )
        if nearest in (0, len(RATES) - 1):
            raise ArithmeticError(
                f"the best learning rate of m = {m} is {RATES[nearest]:g}, at the edge of those "
                "tried, which says nothing; give another --target, --cost or --init"
            )
        row = {
            "batch_size": m,
            "learning_rate": float(np.exp(found.log_rate[0])),
            "steps": mean,
            "steps_least": steps[:, nearest].min(),
            "steps_most": steps[:, nearest].max(),
            "examples": m * mean,
            "steps_fitted": None,
            "rate_predicted": None,
            "seconds": time.perf_counter() - began,
        }
        rows.append(row)
        runs.append(steps)
        show(TABLE, row)
        segment = max(1, round(mean / _CHECKS))
    rows, steps = rows[::-1], np.stack(runs[::-1], axis=1)
    sizes = np.array([row["batch_size"] for row in rows], np.float64)
    fit = fit_trade(sizes, steps, np.array(RATES))
    critical, largest = fit.critical[0], rows[-1]
    for row in rows:
        m = row["batch_size"]
        row["steps_fitted"] = fit.least_steps[0] * (1 + critical / m)
        at_largest = 1 + critical / largest["batch_size"]
        row["rate_predicted"] = largest["learning_rate"] * at_largest / (1 + critical / m)
    middle = min(rows, key=lambda row: abs(math.log(row["batch_size"] / _PATH_SIZE)))
    return Result(rows, fit, _measure_noise(problem, middle))


def resolve(asked: Asked[Config]) -> Asked[Config]:
    """Returns what is asked with the sizes filled in; raises ValueError where one is above n."""
    sizes = fill_batch_sizes(asked.config.batch_sizes, asked.num_examples)
    return asked._replace(config=dataclasses.replace(asked.config, batch_sizes=sizes))


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
        curved = sj.noise.curvature_noise_scale(
            problem.fun,
            state.params,
            problem.examples,
            key=jax.random.fold_in(problem.keys[0], _PROBES + number),
            num_probes=_NUM_PROBES,
            chunk_size=_CHUNK_SIZE,
        )
        accuracy = problem.measure(jax.tree.map(lambda leaf: leaf[None, None], state.params))
        rows.append(
            {
                "batch_size": m,
                "learning_rate": row["learning_rate"],
                "step": number * segment,
                "accuracy": float(accuracy[0, 0]),
                "trace": float(scale.parts.trace),
                "squared_norm": float(scale.parts.squared_norm),
                "noise_scale": float(scale.value),
                "curvature_noise_scale": float(curved.value) if curved.value > 0 else None,
            }
        )
        key = jax.random.fold_in(problem.keys[0], number)
        batches = jax.random.randint(key, (segment, m), 0, n, jnp.int32)
        state, _ = epoch(state, problem.examples, batches)
    return rows


def mean_noise_scale(noise: list[_tabled.Row]) -> float:
    """Returns B over a run: the mean of tr Σ over the mean of ‖∇C‖², never the mean of ratios."""
    return sum(row["trace"] for row in noise) / sum(row["squared_norm"] for row in noise)


def median_noise_scale(noise: list[_tabled.Row]) -> float:
    """Returns the median of B over the points of a run."""
    return statistics.median(row["noise_scale"] for row in noise)


def averages(noise: list[_tabled.Row]) -> dict[str, float]:
    """Returns what may predict B_crit from the noise scales along a run, by name.

    By progress, B_noise = tr(HΣ)/(∇CᵀH∇C) is the prediction proper, and B = tr Σ/‖∇C‖² what the
    paper measures; the median over steps and the ratio of means weigh late and first steps.
    """

    def column(name: str) -> np.ndarray:
        return np.array([np.nan if row[name] is None else row[name] for row in noise], np.float64)

    m = noise[0]["batch_size"]
    return {
        "noise_scale_by_progress": progress_weighted(column("noise_scale"), m),
        "curvature_noise_scale_by_progress": progress_weighted(column("curvature_noise_scale"), m),
        "noise_scale_median": median_noise_scale(noise),
        "noise_scale_of_means": mean_noise_scale(noise),
    }


def describe(result: Result) -> str:
    """Returns in words what `draw` shows, from its numbers."""
    first, last = result.rows[0], result.rows[-1]
    critical, low, high = result.fit.critical
    scales = [row["noise_scale"] for row in result.noise]
    return (
        f"From m = {first['batch_size']} to {last['batch_size']} the mean steps to the target go "
        f"from {first['steps']:,.0f} to {last['steps']:,.0f}, and the examples from "
        f"{first['batch_size'] * first['steps']:,.0f} to "
        f"{last['batch_size'] * last['steps']:,.0f}; the fitted critical batch size is "
        f"{critical:.3g} ({low:.3g} to {high:.3g}). The noise scale of one run goes from "
        f"{scales[0]:.3g} at the start to {scales[-1]:.3g} at the target."
    )


@style.styled
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
    steps.plot(grid, law, color=style.BLUE, lw=1.3, label="S_min (1 + B_crit/m), fitted")
    steps.errorbar(
        m, mean, np.abs(ends - mean), fmt="o", ms=5, color=style.INK, mfc="white",
        label="mean, least to most of the seeds",
    )  # fmt: skip
    trade.plot(law, grid * law, color=style.BLUE, lw=1.3, label="(S/S_min − 1)(E/E_min − 1) = 1")
    trade.plot(mean, m * mean, "o", ms=5, color=style.INK, mfc="white")
    for size, x, y in zip(m, mean, m * mean, strict=True):
        trade.annotate(f"{size:.0f}", (x, y), xytext=(5, 4), textcoords="offset points")
    steps.axvspan(low, high, color=style.GREEN, alpha=0.15, lw=0)
    steps.axvline(critical, color=style.GREEN, lw=1.2, label=f"B_crit = {critical:.3g}, 95 %")
    steps.set_xlabel("mini-batch size m")
    steps.set_title(f"to an accuracy of {target:.0%}, best η")
    steps.set_ylabel("steps S")
    trade.set_xlabel("steps S")
    trade.set_title("numbers: mini-batch size m")
    trade.set_ylabel("examples E = mS")
    path, found = result.noise, averages(result.noise)
    noise.plot(
        [row["step"] for row in path], [row["noise_scale"] for row in path], "o-", ms=4,
        color=style.PURPLE, label=f"B = tr Σ/‖∇C‖², m = {result.noise[0]['batch_size']}",
    )  # fmt: skip
    for value, dashes, label in (
        (found["noise_scale_by_progress"], "--", "B by progress"),
        (found["curvature_noise_scale_by_progress"], "-.", "B_noise by progress"),
        (found["noise_scale_median"], ":", "median of B"),
    ):
        noise.axhline(value, color=style.PURPLE, ls=dashes, lw=1.2, label=label)
    noise.axhspan(low, high, color=style.GREEN, alpha=0.15, lw=0)
    noise.axhline(critical, color=style.GREEN, lw=1.2, label="B_crit, 95 %")
    noise.set_xlabel("step, from the start to the target")
    noise.set_title("noise scale of one run")
    noise.set_ylabel("in examples")
    for axis in (steps, trade):
        axis.set_xscale("log")
    for axis in (steps, trade, noise):
        axis.set_yscale("log")
        style.legend(axis)
    figure.suptitle(f"How large a mini-batch is worth its examples: {description}")
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
    summary |= {
        name: value if math.isfinite(value) else None
        for name, value in averages(result.noise).items()
    }
    summary |= {
        "noise_scale_at_start": result.noise[0]["noise_scale"],
        "noise_scale_at_target": result.noise[-1]["noise_scale"],
    }
    picture = _tabled.Picture(
        "Steps, examples and noise",
        describe(result),
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
