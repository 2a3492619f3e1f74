"""Why does SGD work, when its steps hardly point along the gradient?

Trains the textbook network and, at some epochs, takes many steps from where it stands: how far do
mini-batch gradients ĝ turn away from the full gradient ∇C, and what does a step do to the cost of
all examples? To second order in η, exactly on a quadratic,

  E C(w − ηĝ) − C = −η‖∇C‖² + ½η²(∇CᵀH∇C + f tr(HΣ)/m),    f = (n − m)/(n − 1),

so what is lost to noise is of second order: the first term, the descent, is that of the full
gradient however small the cosine. Measured steps stand beside it, for m = 1, 10 and 100 unless
told otherwise. Leaves table, figure and report in a run folder.

  python -m experiments.directions
  python -m experiments.directions --dataset=mnist --init=normal --num_steps=50

Expected of the first command, seed 0: from before training to epoch 30 the mean cosine of a single
example's gradient to ∇C falls from 0.78 to 0.00, that of m = 10 from 0.97 to 0.16 and that of m =
100 from 1.00 to 0.62. From epoch 2 on the change of the cost predicted for m = 100 is within 2 %
of what is measured, and 2.8 standard errors at most; before, steps are too long for an expansion
to second order. At m = 1 and η = 3 a step makes the cost rise, and is expected to. 104 s on two
cores that others shared. Of the second command, five minutes of CPU time: mean cosines from 0.43
to 0.02, 0.84 to 0.09 and 0.98 to 0.23.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import sgd_jax as sj
from experiments import _asked, _cli, _flags, _tabled, runs, train
from experiments._asked import Asked, show_nothing
from experiments._config import check_fields, fill_batch_sizes
from experiments._tabled import Column
from experiments.runs import style
from sgd_jax import sampling
from sgd_jax._tree import tree_axpy, tree_dot, tree_norm
from sgd_jax.estimation.noise import curvature_noise_scale
from sgd_jax.typing import Array, CostFn, Params

_CHUNK_SIZE = 1000
_PROBES = 0x70726F62  # sets the keys of probes apart from those of draws
_SMOKE = {"num_steps": 20, "num_probes": 10}
_COLORS = (style.PURPLE, style.BLUE, style.GREEN, style.ORANGE, style.INK)
_KEPT = (
    *("epoch", "batch_size", "descent", "bend", "noise"),
    *("predicted", "measured", "standard_error", "predicted_error", "z", "in_range"),
)
_TIMES = np.geomspace(0.01, 3, 9)  # learning rates of the last panel, over that of training


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured; the flags of the same names say what each is."""

    batch_sizes: tuple[int, ...] = (1, 10, 100)
    num_steps: int = 1000
    num_probes: int = 400

    def __post_init__(self):
        """Raises ValueError at what is wrong whatever the data are."""
        check_fields(
            self,
            ("batch_sizes", min(self.batch_sizes, default=-1) >= 0, "sizes of at least 1, or full"),
            ("num_steps", self.num_steps >= 2, "a whole number of at least 2"),
            ("num_probes", self.num_probes >= 2, "a whole number of at least 2"),
        )


TABLE = _tabled.Table(
    (
        Column("epoch", "epoch"),
        Column("batch_size", "m", "{:,}"),
        Column("cost", "cost", "{:.4g}"),
        Column("cosine_of_means", "cosine", "{:.3f}"),
        Column("mean_cosine", "mean cos", "{:.3f}"),
        Column("descent", "−η‖∇C‖²", "{:.3g}"),
        Column("bend", "½η²∇CᵀH∇C", "{:.3g}"),
        Column("noise", "½η²f tr(HΣ)/m", "{:.3g}"),
        Column("predicted", "predicted", "{:.3g}"),
        Column("measured", "measured", "{:.3g}"),
        Column("standard_error", "± of measured", "{:.2g}"),
        Column("predicted_error", "± of predicted", "{:.2g}"),
        Column("z", "z", "{:.1f}"),
        Column("in_range", "small step", "{}"),
    ),
    legend="Cosine, 1/√(1 + fB/m) with B = tr Σ/‖∇C‖², is a cosine of expectations, exact; mean "
    "cos and measured, the change of the cost in a step with its standard error, are of the steps "
    "taken. Predicted is the sum of the three terms before; its standard error is that of the "
    "probes of tr(HΣ). z: measured less predicted, over both errors. Small step: no, if a term is "
    "more than half the cost, which is out of reach of an expansion to second order.",
)


class Point(NamedTuple):
    """A network in training, and what decides the course of a step from there."""

    epoch: int
    params: Params
    cost: float
    squared_norm: float
    trace: float
    curvature: float
    """∇CᵀH∇C."""
    noise: float
    """tr(HΣ), estimated by probes."""
    noise_error: float
    """The standard error of ``noise``."""


class Steps(NamedTuple):
    """What many steps from one point did; arrays (num_steps,)."""

    change: np.ndarray
    """Of the cost of all examples."""
    cosine: np.ndarray
    """Of the mini-batch gradient to the full one."""


class Result(NamedTuple):
    """What `run` returns."""

    rows: list[_tabled.Row]
    """One for each epoch measured and size; see `TABLE`."""
    rates: list[_tabled.Row]
    """At the last point: change of the cost, predicted and measured, by size and learning rate."""


def epochs_measured(epochs: int) -> list[int]:
    """Returns the epochs to measure at: 0, then ever farther apart, up to the last."""
    kept = {0, epochs}
    spaced = np.geomspace(1, epochs, min(epochs, 9)) if epochs else []
    return sorted(kept | {round(epoch) for epoch in spaced})


def run(asked: Asked[Config], show: _tabled.Show = show_nothing) -> Result:
    """Trains one network, and measures steps from where it stands at some epochs.

    Args:
      asked: As `resolve` returns it.
      show: Called with each row of `TABLE`.
    """
    config, training, n = asked.config, asked.training, asked.num_examples
    rate = training.learning_rate
    (fun, _), examples = asked.functions(), asked.examples()
    wanted = set(epochs_measured(training.epochs))
    key = jax.random.key(training.seed)
    rows, point = [], None

    def on_epoch(state: sj.TrainState, record: runs.Record) -> None:
        nonlocal point
        epoch = record["epoch"]
        if epoch not in wanted:
            return
        params = jax.tree.map(lambda leaf: jnp.copy(leaf[0]), state.params)
        probes = jax.random.fold_in(jax.random.fold_in(key, _PROBES), epoch)
        point = look(fun, params, examples, epoch, probes, config)
        for m in config.batch_sizes:
            draws = jax.random.fold_in(jax.random.fold_in(key, epoch), m)
            steps = take_steps(fun, point.params, examples, draws, rate, m, config.num_steps)
            rows.append(_row(point, steps, n, m, rate))
            show(TABLE, rows[-1])

    train.run(training, asked.dataset, on_epoch=on_epoch, parts=("train",))
    assert point is not None
    rates = []
    for m in dict.fromkeys((*config.batch_sizes, n)):
        for eta in (rate * _TIMES).tolist():
            num_steps = config.num_steps if m < n else 2  # of the full gradient all are alike
            steps = take_steps(fun, point.params, examples, key, eta, m, num_steps)
            row = _row(point, steps, n, m, eta)
            rates.append({"learning_rate": eta} | {name: row[name] for name in _KEPT})
    return Result(rows, rates)


def resolve(asked: Asked[Config]) -> Asked[Config]:
    """Returns what is asked with the sizes filled in; raises ValueError where one is above n."""
    sizes = fill_batch_sizes(asked.config.batch_sizes, asked.num_examples)
    return asked._replace(config=dataclasses.replace(asked.config, batch_sizes=sizes))


def look(
    fun: CostFn, params: Params, examples: Any, epoch: int, key: Array, config: Config
) -> Point:
    """Returns the point with its gradient, noise and curvature, of all examples."""
    moments = sj.gradient_moments(fun, params, examples, chunk_size=_CHUNK_SIZE)
    curved = curvature_noise_scale(
        fun, params, examples, key=key, num_probes=config.num_probes, chunk_size=_CHUNK_SIZE
    )
    return Point(
        epoch,
        params,
        *map(float, (moments.cost, moments.squared_norm, moments.trace)),
        *map(float, (curved.curvature, curved.noise, curved.noise_standard_error)),
    )


@functools.partial(jax.jit, static_argnums=0, static_argnames=("m", "num_steps"))
def _steps(
    fun: CostFn, params: Params, examples: Any, key: Array, rate: Array, *, m: int, num_steps: int
) -> tuple[Array, Array]:
    n = len(examples.labels)
    costs = jax.vmap(fun, in_axes=(None, 0))
    full = sj.per_example_grad(fun, chunk_size=min(n, _CHUNK_SIZE))(params, examples).mean()
    before = costs(params, examples)

    def one(key: Array) -> tuple[Array, Array]:
        sample = sampling.without_replacement(key, n, m)
        _, estimate = sj.estimate(fun, params, examples, sample)
        after = costs(tree_axpy(-rate, estimate, params), examples)
        cosine = tree_dot(estimate, full) / (tree_norm(estimate) * tree_norm(full))
        return jnp.mean(after - before), cosine

    return jax.lax.map(one, jax.random.split(key, num_steps))


def take_steps(
    fun: CostFn, params: Params, examples: Any, key: Array, rate: float, m: int, num_steps: int
) -> Steps:
    """Takes steps from one point, each on a mini-batch of m drawn without replacement."""
    change, cosine = _steps(
        fun, params, examples, key, jnp.asarray(rate, float), m=m, num_steps=num_steps
    )
    return Steps(np.asarray(change, np.float64), np.asarray(cosine, np.float64))


def expected_change(
    rate: float, squared_norm: float, curvature: float, noise: float
) -> tuple[float, float, float]:
    """Returns −η‖∇C‖², ½η²∇CᵀH∇C and ½η²f tr(HΣ)/m: their sum is the mean change of the cost."""
    return -rate * squared_norm, rate**2 / 2 * curvature, rate**2 / 2 * noise


def _row(point: Point, steps: Steps, n: int, m: int, rate: float) -> _tabled.Row:
    f = (n - m) / (n - 1)
    noise = f * point.noise / m
    terms = expected_change(rate, point.squared_norm, point.curvature, noise)

    predicted_error = rate**2 / 2 * f * point.noise_error / m
    standard_error = steps.change.std(ddof=1) / len(steps.change) ** 0.5
    error = math.hypot(predicted_error, standard_error)
    is_small = max(map(abs, terms)) <= point.cost / 2
    return {
        "epoch": point.epoch,
        "batch_size": m,
        "cost": point.cost,
        "squared_norm": point.squared_norm,
        "trace": point.trace,
        "cosine_of_means": (1 + f * point.trace / m / point.squared_norm) ** -0.5,
        "mean_cosine": steps.cosine.mean(),
        "descent": terms[0],
        "bend": terms[1],
        "noise": terms[2],
        "predicted": sum(terms),
        "measured": steps.change.mean(),
        "standard_error": standard_error,
        "predicted_error": predicted_error,
        "z": (steps.change.mean() - sum(terms)) / error if error else None,
        "in_range": "yes" if is_small else "no",
    }


@style.styled
def draw(result: Result, rate: float, n: int, description: str) -> Figure:
    """Returns cosines and changes of the cost over the epochs, and the changes against η."""
    figure = Figure(figsize=(15, 4.8), layout="constrained")
    cosine, change, rates = figure.subplots(1, 3)
    sizes = list(dict.fromkeys(row["batch_size"] for row in result.rows))
    for m, color in zip(sizes, _COLORS * len(sizes), strict=False):
        rows = [row for row in result.rows if row["batch_size"] == m]
        epochs = [row["epoch"] for row in rows]
        cosine.plot(epochs, [row["cosine_of_means"] for row in rows], color=color, lw=1.3)
        cosine.plot(
            epochs, [row["mean_cosine"] for row in rows], "o", ms=4.5, color=color, mfc="white",
            label=f"m = {m:,}",
        )  # fmt: skip
        change.plot(epochs, [-row["predicted"] / rate for row in rows], color=color, lw=1.3)
        _points(change, epochs, rows, -1 / rate, color, f"m = {m:,}")
    first = [row for row in result.rows if row["batch_size"] == sizes[0]]
    change.plot(
        [row["epoch"] for row in first], [row["squared_norm"] for row in first], "--",
        color=style.GREY, lw=1.2, label="‖∇C‖², first order: any m",
    )  # fmt: skip
    smallest = min(row["squared_norm"] for row in first)
    change.set_yscale("symlog", linthresh=max(smallest, 1e-12))
    change.axhline(0, color=style.INK, lw=0.8)
    cosine.set_ylim(min(0.0, cosine.get_ylim()[0]), 1.02)
    cosine.set_title("lines: ratio of means; points: mean")
    cosine.set_ylabel("cos(ĝ, ∇C)")
    change.set_title(f"descent in a step at η = {rate:g}")
    change.set_ylabel("descent of the cost / η")
    for axis in (cosine, change):
        axis.set_xlabel("epoch (0: before training)")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for m, color in zip((*sizes, n), (*_COLORS[: len(sizes)], style.INK), strict=False):
        rows = [row for row in result.rates if row["batch_size"] == m]
        etas = np.array([row["learning_rate"] for row in rows])
        grid = np.geomspace(etas[0], etas[-1], 100)
        times = grid / etas[0]
        law = -rows[0]["descent"] * times - (rows[0]["bend"] + rows[0]["noise"]) * times**2
        rates.plot(grid, law, color=color, lw=1.3)
        label = f"m = {m:,}" if m < n else "all examples"
        _points(rates, etas, rows, -1.0, color, label)
    top = max(-row["measured"] for row in result.rates)
    rates.set_ylim(-1.5 * abs(top), 1.3 * abs(top))
    rates.axhline(0, color=style.INK, lw=0.8)
    rates.set_xscale("log")
    rates.set_xlabel("learning rate η")
    epoch = result.rates[0]["epoch"]
    rates.set_title(f"descent in a step after epoch {epoch}")
    rates.set_ylabel("descent of the cost")
    for axis in (cosine, change, rates):
        style.legend(axis)
    figure.suptitle(
        f"Steps that hardly point along the gradient: {description}; lines predicted, points taken",
    )
    return figure


def _points(
    axis: Any, x: Any, rows: list[_tabled.Row], scale: float, color: str, label: str
) -> None:
    """Draws changes measured, with 95 % bars of their difference to the prediction."""
    y = scale * np.array([row["measured"] for row in rows])
    errors = np.array([[row["standard_error"], row["predicted_error"]] for row in rows])
    bars = 1.96 * abs(scale) * np.hypot(*errors.T)
    axis.errorbar(x, y, bars, fmt="o", ms=4.5, lw=1, color=color, mfc="white", label=label)


_NUM_STEPS = flags.DEFINE_integer("num_steps", Config.num_steps, "Steps taken from each point.")
_NUM_PROBES = flags.DEFINE_integer(
    "num_probes", Config.num_probes, "Random directions that tr(HΣ) is estimated with."
)
GROUPS = _tabled.groups(
    {"Steps": (_flags.BATCH_SIZES, _NUM_STEPS, _NUM_PROBES)},
    "num_seeds",
    shared=("Data", "Network", "Training", "Seeds", "Run folder"),
)


def describe(result: Result) -> str:
    """Returns in words what `draw` shows, from its numbers."""
    parts = []
    for m in dict.fromkeys(row["batch_size"] for row in result.rows):
        rows = [row for row in result.rows if row["batch_size"] == m]
        ends = (rows[0], rows[-1])
        cosines = " to ".join(f"{row['mean_cosine']:.3f}" for row in ends)
        descents = " to ".join(f"{-row['measured']:.3g}" for row in ends)
        parts.append(f"m = {m:,}: cosine {cosines}, descent in a step {descents}")
    return (
        f"Three panels. From epoch {result.rows[0]['epoch']} to {result.rows[-1]['epoch']}, mean "
        f"cosine to the full gradient and measured descent: {'; '.join(parts)}. Right, the "
        "descent of a step after the last epoch against the learning rate."
    )


def find(asked: Asked[Config], show: _tabled.Show) -> _tabled.Answer:
    """Returns what is left in the run folder."""
    result = run(asked, show)
    first, last = result.rows[0], result.rows[-1]
    summary = {
        "first_cosine": first["mean_cosine"],
        "last_cosine": result.rows[-len(asked.config.batch_sizes)]["mean_cosine"],
        "last_cost": last["cost"],
    }
    picture = _tabled.Picture(
        "Directions and descent",
        describe(result),
        draw(result, asked.training.learning_rate, asked.num_examples, asked.description),
        "directions",
    )
    title = f"Steps that hardly point along the gradient: {asked.description}"
    tables, curves = [(TABLE, result.rows)], {"learning_rates": result.rates}
    return _tabled.Answer(title, summary, tables, [picture], curves)


def num_rows(asked: Asked[Config]) -> int:
    """Returns how many rows the table will have."""
    return len(epochs_measured(asked.training.epochs)) * len(asked.config.batch_sizes)


def main() -> int:
    """Reads the flags, trains and measures, leaves the run folder; returns the exit code."""
    return _asked.answer(
        Config, GROUPS, __file__, find, num_rows=num_rows, resolve=resolve, smoke=_SMOKE
    )


if __name__ == "__main__":
    _cli.start(main, __doc__ or "", GROUPS)
