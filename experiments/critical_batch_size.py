"""How large a mini-batch is worth its examples?

Trains the textbook network to a target accuracy with mini-batches of many sizes m, each at the best
of many learning rates, and counts steps S and examples E = mS. Where noise and gradient trade as in
McCandlish, Kaplan and Amodei (2018),

  (S/S_min − 1)(E/E_min − 1) = 1,    that is    S = S_min (1 + B_crit/m),  B_crit = E_min/S_min:

below B_crit twice the mini-batch halves the steps, above it the examples are wasted. Fits S_min and
E_min, with 95 % intervals, and puts B_crit beside the simple noise scale B = tr Σ/‖G‖² along one of
the same runs. All seeds and learning rates of a size are one compiled program. Leaves tables,
figure and report in a run folder.

  python -m experiments.critical_batch_size
  python -m experiments.critical_batch_size --dataset=mnist
  python -m experiments.critical_batch_size --dataset=fashion_mnist --target=0.75

Expected, with 95 % intervals of the fit, 3 seeds; the noise scale B of one run from its start to
the target, and its median:

                 S_min              E_min                    B_crit             B
  digits         146 (138 to 155)   749 (672 to 835)         5.1 (4.4 to 5.9)   0.6 to 63, 29
  MNIST          237 (222 to 252)   5,514 (5,133 to 5,923)   23 (21 to 26)      0.9 to 212, 62
  Fashion-MNIST  103 (94 to 112)    2,411 (2,185 to 2,661)   23 (20 to 27)      0.9 to 204, 48

So B is of the order of B_crit, and 2 to 6 times as large. Two minutes for the first command, three
and a half for each of the others, on two shared cores.
"""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
import scipy.stats
from absl import flags
from matplotlib.figure import Figure

import sgd_jax as sj
from experiments import _classifier, _cli, _tabled
from experiments._config import Config as Training
from experiments._tabled import Column
from sgd_jax import data
from sgd_jax._typing import Array, CostFn, Params

RATES = tuple(2.0**k for k in range(-3, 6))
_TRAINING = {"num_seeds": 3}
_SMOKE = {"sizes_swept": (8, 16, 64), "target": 0.3, "most_epochs": 20}
_CHECKS = 25  # how often, about, the accuracy is looked at before the target
_STEPS = 3000  # that every size may take
_CHUNK_SIZE = 1000
_PATH_SIZE = 16  # the runs whose noise scale is measured have about this m
_POINTS = 12  # at so many points at most


@dataclasses.dataclass(frozen=True)
class Config:
    """What is swept; the flags of the same names say what each is."""

    sizes_swept: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
    target: float = 0.9
    most_epochs: int = 30
    num_validated: int = 2000

    def __post_init__(self):
        """Raises ValueError at what is wrong whatever the data are."""
        sizes = self.sizes_swept
        for name, is_good, expected in (
            (
                "sizes_swept",
                len(set(sizes)) >= 3 and min(sizes) >= 1,
                "three sizes or more of at least 1: two numbers are fitted",
            ),
            ("target", 0 < self.target < 1, "an accuracy between 0 and 1"),
            ("most_epochs", self.most_epochs >= 1, "a whole number of at least 1"),
            ("num_validated", self.num_validated >= 1, "a whole number of at least 1"),
        ):
            if not is_good:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected {expected}")


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


def run(
    config: Config,
    training: Training,
    dataset: data.Dataset,
    show: _tabled.Show = lambda table, row: None,
) -> Result:
    """Sweeps the sizes, largest first, and fits the trade of steps and examples.

    Args:
      config: What is swept.
      training: Of the network; its batch size, learning rate and optimizer do not count.
      dataset: Trained on its training examples; the accuracy is that of the first validation
        examples.
      show: Called with each row, before anything is fitted.

    Raises:
      ArithmeticError: a size does not reach the target with any learning rate.
    """
    check(config, training, dataset)
    dtype = np.dtype(training.dtype)
    fun, output = _classifier.example_functions(
        training.cost, dataset.num_classes, dataset.scale, dtype
    )
    examples = _classifier.to_device(dataset.train, dtype)
    held_out = data.Examples(*(leaf[: config.num_validated] for leaf in dataset.validation))
    measure = _make_accuracy(output, _classifier.to_device(held_out, dtype))
    problem = _Problem(fun, training, examples, measure)
    rows, segment = [], 2
    for m in sorted(set(config.sizes_swept), reverse=True):
        began = time.perf_counter()
        most = max(_STEPS, math.ceil(config.most_epochs * len(dataset.train.labels) / m))
        steps = _sweep(problem, m, segment, most, config.target)
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


def check(config: Config, training: Training, dataset: data.Dataset) -> None:
    """Raises ValueError where the settings do not fit the data."""
    del training
    n = len(dataset.train.labels)
    if max(config.sizes_swept) > n:
        raise ValueError(
            f"sizes_swept holds {max(config.sizes_swept)}; expected at most {n}, the training "
            "examples"
        )


class _Problem(NamedTuple):
    fun: CostFn
    training: Training
    examples: Any
    measure: Callable[[Params], Array]


def _make_accuracy(
    output: Callable[[Params, Array], Array], examples: Any
) -> Callable[[Params], Array]:
    """Returns the accuracy of networks (G, R, …) on examples: (G, R)."""

    @jax.jit
    @jax.vmap
    @jax.vmap
    def accuracy(params: Params) -> Array:
        outputs = jax.vmap(output, in_axes=(None, 0))(params, jnp.asarray(examples.inputs))
        return jnp.mean(jnp.argmax(outputs, axis=1) == examples.labels)

    return accuracy


def _first(training: Training, num_rates: int) -> tuple[Params, Array]:
    """Returns the networks before the first step, (G, R, …), and a key for each of G seeds."""
    seeds = jnp.arange(training.seed, training.seed + training.num_seeds, dtype=jnp.uint32)
    keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed)))(seeds)
    sizes, dtype = training.sizes or (), np.dtype(training.dtype)
    networks = jax.vmap(lambda key: sj.init_network(key, sizes, training.init, dtype))(keys[:, 0])
    shared = jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf[:, None], (leaf.shape[0], num_rates, *leaf.shape[1:])),
        networks,
    )
    return shared, keys[:, 1]


def _sweep(problem: _Problem, m: int, segment: int, most_steps: int, target: float) -> np.ndarray:
    """Returns the steps to the target, (num_seeds, num_rates); infinite where it is not reached.

    The accuracy is looked at after every segment, and the step at which it crosses the target is
    interpolated. All run until one learning rate has brought every seed there, and a third longer.
    """
    training, n = problem.training, len(problem.examples.labels)
    sweep = sj.make_sweep(problem.fun, sj.sgd)
    params, keys = _first(training, len(RATES))
    rates = jnp.broadcast_to(
        jnp.asarray(RATES, np.dtype(training.dtype)), (training.num_seeds, len(RATES))
    )
    states = sweep.init(params, rates)

    @jax.jit
    def draw(number: Array) -> Array:
        return jax.vmap(
            lambda key: jax.random.randint(
                jax.random.fold_in(key, number), (segment, m), 0, n, jnp.int32
            )
        )(keys)

    before = np.asarray(problem.measure(states.params), np.float64)
    reached = np.where(before >= target, 0.0, np.inf)
    taken, last = 0, float(most_steps)
    while taken < last:
        states, _ = sweep.epoch(states, rates, problem.examples, draw(jnp.asarray(taken)))
        after = np.asarray(problem.measure(states.params), np.float64)
        crossed = (after >= target) & np.isinf(reached)
        share = (target - before) / np.where(crossed, after - before, 1)
        reached = np.where(crossed, taken + segment * share, reached)
        taken, before = taken + segment, after
        if np.isfinite(reached).all(axis=0).any() and last == most_steps:
            last = min(last, 4 / 3 * taken)
    if not np.isfinite(reached).all(axis=0).any():
        raise ArithmeticError(
            f"no learning rate brings every seed to an accuracy of {target:g} in {taken} steps of "
            f"{m} examples; give a lower --target, or more --most_epochs"
        )
    return reached


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


def _measure_noise(problem: _Problem, row: _tabled.Row) -> list[_tabled.Row]:
    """Returns the noise scale of all training examples along a run, from start to target."""
    training, m = dataclasses.replace(problem.training, num_seeds=1), row["batch_size"]
    optimizer = sj.sgd(row["learning_rate"])
    epoch = sj.make_epoch(problem.fun, optimizer)
    params, keys = _first(training, 1)
    state = sj.init_state(jax.tree.map(lambda leaf: leaf[0, 0], params), optimizer)
    segment = max(1, round(row["steps"] / (_POINTS - 1)))
    n, rows = len(problem.examples.labels), []
    for number in range(_POINTS):
        moments = sj.gradient_moments(
            problem.fun, state.params, problem.examples, chunk_size=_CHUNK_SIZE
        )
        scale = sj.noise_scale(moments)
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
        key = jax.random.fold_in(keys[0], number)
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


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


_SIZES_SWEPT = flags.DEFINE_list(
    "sizes_swept", [str(m) for m in Config.sizes_swept], "Mini-batch sizes m, three or more."
)
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
    {"Sweep": (_SIZES_SWEPT, _TARGET, _MOST_EPOCHS, _NUM_VALIDATED)},
    *("batch_size", "learning_rate", "epochs"),
    *("momentum", "nesterov", "weight_decay", "optimizer"),
    shared=("Data", "Network", "Training", "Seeds", "Run folder"),
)


def main() -> int:
    """Reads the flags, sweeps and fits, leaves the run folder; returns the exit code."""
    with _cli.user_errors():
        config, given, output = _tabled.read_settings(
            Config, GROUPS, _SMOKE, {"sizes_swept": _tabled.whole_numbers("sizes_swept")}
        )
        opened = _tabled.open_folder(
            "sweep", config, _TRAINING | given, output, __file__, functools.partial(check, config)
        )
    training, dataset = opened.training, opened.dataset

    def find(show: _tabled.Show) -> _tabled.Answer:
        result = run(config, training, dataset, show)
        net = "-".join(map(str, training.sizes or ()))
        description = f"{dataset.name}, {net}, to {config.target:.0%}"
        summary = {
            f"{name}{end}": value
            for name, values in zip(
                ("least_steps", "least_examples", "critical_batch_size"), result.fit, strict=True
            )
            for end, value in zip(("", "_low", "_high"), values, strict=True)
        }
        summary |= {
            "noise_scale_median": _or_none(median_noise_scale(result.noise)),
            "noise_scale_of_means": mean_noise_scale(result.noise),
            "noise_scale_at_start": result.noise[0]["noise_scale"],
            "noise_scale_at_target": result.noise[-1]["noise_scale"],
        }
        picture = _tabled.Picture(
            "Steps, examples and noise",
            "Steps to the target fall as the mini-batch grows, at first in proportion and then "
            "hardly; examples against steps lie on a hyperbola; and the noise scale of one run "
            "rises from the start to the target, beside the critical batch size.",
            draw(result, config.target, description),
            "critical_batch_size",
        )
        return _tabled.Answer(
            f"How large a mini-batch is worth its examples: {description}",
            summary,
            [(TABLE, result.rows)],
            [picture],
            {"noise": result.noise},
        )

    return _tabled.record(opened.folder, opened.notes, len(config.sizes_swept), find, unit="size")


if __name__ == "__main__":
    _cli.start(main, __doc__ or "", GROUPS)
