"""Does it matter in which order the examples are taken?

Runs SGD on a one-dimensional quadratic, where the squared distance to the minimum has a closed form
after every step, and trains the textbook network, with the same learning rate and the examples

  with_replacement   drawn independently, each step
  reshuffling        in a new random order each epoch
  fixed_order        in one random order, drawn once, in all epochs
  cyclic             as they are stored, over and over
  sorted             over and over, sorted: by their targets, the network's by their classes

Leaves tables, a figure with the closed forms through the points, and a report in a run folder.

  python -m experiments.reshuffling
  python -m experiments.reshuffling --dataset=mnist --init=normal --epochs=10

Expected: every mean of 4,000 walks lies within 2.1 of its standard errors of the closed form. At
the end of an epoch reshuffling leaves 0.4416 of the error of draws with replacement at ηλ = 0.05
and 0.0336 at ηλ = 0.01; one fixed order 0.476 and 0.108; sorted examples 26 and 6.6 times as much.
The network of the first command, 16 seeds after 30 epochs: training cost 0.0091 reshuffled (0.0074
to 0.0363), 1.06 times that with replacement and 1.12 in a fixed order (both p = 0.10: no
difference seen), 1.44 as stored (p = 0.02), 25 sorted by class. 96 s on two cores that others
shared.
"""

import dataclasses
import functools
import statistics
from typing import NamedTuple

import jax
import numpy as np
import scipy.stats
from absl import flags
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments import _asked, _classifier, _cli, _tabled, runs
from experiments._asked import Asked, show_nothing
from experiments._config import check_fields, make_optimizer
from experiments._orders import DRAWN, ORDERS, Walks, draw_epoch, predict, walk
from experiments._recorded import DivergenceError
from experiments._tabled import Column
from experiments.runs import style

_COLORS = dict(zip(ORDERS, style.PALETTE, strict=False))
_RATES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
_SHOWN = 0.05  # the rate whose path is drawn
_TRAINING = {"num_seeds": 16}
_SMOKE = {"num_walks": 200}


@dataclasses.dataclass(frozen=True)
class Config:
    """What is walked on the quadratic; the flags of the same names say what each is."""

    num_targets: int = 64
    num_walks: int = 4000
    num_rounds: int = 40

    def __post_init__(self):
        """Raises ValueError at what is wrong."""
        check_fields(
            self,
            ("num_targets", self.num_targets >= 2, "a whole number of at least 2"),
            ("num_walks", self.num_walks >= 2, "a whole number of at least 2"),
            ("num_rounds", self.num_rounds >= 1, "a whole number of at least 1"),
        )


QUADRATIC = _tabled.Table(
    (
        Column("order", "order           ", "{:<16}"),
        Column("rate", "ηλ", "{:g}"),
        Column("predicted", "E(x−x*)²/s²", "{:.4g}"),
        Column("measured", "measured", "{:.4g}"),
        Column("standard_error", "±", "{:.2g}"),
        Column("ratio", "ratio", "{:.4f}"),
        Column("to_replacement", "of replacement", "{:.6f}"),
    ),
    heading="Quadratic",
    stem="quadratic",
    legend="E(x−x*)²/s² is exact, at the end of the last epoch; measured over exact is the ratio; "
    "of replacement, the exact error as a multiple of that of draws with replacement. Cyclic and "
    "sorted have no draws: one walk shows all there is.",
)
NETWORK = _tabled.Table(
    (
        Column("order", "order           ", "{:<16}"),
        Column("cost_median", "cost", "{:.5f}"),
        Column("cost_least", "least", "{:.5f}"),
        Column("cost_most", "most", "{:.5f}"),
        Column("cost_ratio", "of reshuffling", "{:.3f}"),
        Column("num_better", "better in", "{:d}"),
        Column("p_value", "p", "{:.2g}"),
        Column("accuracy_train", "train", "{:.2%}"),
        Column("accuracy_test", "test", "{:.2%}"),
        Column("num_seeds", "seeds"),
    ),
    heading="Network",
    stem="network",
    legend="Of the network after the last epoch: mean cost of the training examples, median, least "
    "and most of the seeds, and the median as a multiple of that of reshuffling; median accuracy. "
    "Better in: seeds in which reshuffling, from the same first weights, has the lower cost; p: of "
    "Wilcoxon's signed-rank test over these pairs, two-sided.",
)


class Result(NamedTuple):
    """What `run` returns."""

    quadratic: list[_tabled.Row]
    walks: dict[str, Walks]
    """By order."""
    targets: np.ndarray
    """The a_i of the quadratic as stored, mean 0 and variance 1."""
    network: list[_tabled.Row]
    costs: dict[str, np.ndarray]
    """By order: mean cost of the training examples, (epochs + 1, num_seeds)."""


def run(asked: Asked[Config], show: _tabled.Show = show_nothing) -> Result:
    """Walks on the quadratic and trains the network, in every order.

    Args:
      asked: The first seed of the network decides the draws on the quadratic too.
      show: Called with each row of `QUADRATIC` and `NETWORK`.
    """
    targets, quadratic, walks = _walk_all(asked.config, asked.training.seed, show)
    return Result(quadratic, walks, targets, *_train_all(asked, show))


def _walk_all(
    config: Config, seed: int, show: _tabled.Show
) -> tuple[np.ndarray, list[_tabled.Row], dict[str, Walks]]:
    """Returns the targets of the quadratic, and the rows and the walks of every order."""
    key = jax.random.key(seed)
    targets = np.random.default_rng(seed).normal(size=config.num_targets)
    targets = (targets - targets.mean()) / targets.std()
    quadratic, walks = [], {}
    for number, order in enumerate(ORDERS):
        walks[order] = walk(
            order, targets, _RATES, jax.random.fold_in(key, number),
            num_walks=config.num_walks, num_epochs=config.num_rounds,
        )  # fmt: skip
        for index, rate in enumerate(_RATES):
            law = predict(order, rate, targets, config.num_rounds)
            error = float(walks[order].standard_error[index]) if order in DRAWN else None
            measured = float(walks[order].mean[index, -1])
            replaced = predict("with_replacement", rate, targets, config.num_rounds)
            row = {
                "order": order,
                "rate": rate,
                "predicted": law,
                "measured": measured,
                "standard_error": error,
                "ratio": measured / law,
                "to_replacement": law / replaced,
            }
            quadratic.append(row)
            show(QUADRATIC, row)
    return targets, quadratic, walks


def _train_all(
    asked: Asked[Config], show: _tabled.Show
) -> tuple[list[_tabled.Row], dict[str, np.ndarray]]:
    """Returns the rows and the costs of the network in every order."""
    training, labels = asked.training, asked.dataset.train.labels
    programs = _classifier.make_programs(
        asked.dataset,
        make_optimizer(training, num_examples=len(labels)),
        sizes=asked.sizes,
        cost=training.cost,
        init=training.init,
        seeds=asked.seeds,
        dtype=asked.dtype,
        parts=("train", "test"),
    )
    network, costs = [], {}
    for order in ("reshuffling", *(name for name in ORDERS if name != "reshuffling")):
        draw_order = functools.partial(draw_epoch, order, labels)
        run_epoch = programs.make_epoch(training.batch_size, draw_order)
        state = programs.init()
        records = [programs.evaluate(state.params)]
        for epoch in range(1, training.epochs + 1):
            (part,) = run_epoch(state, epoch)
            state = part.state
            records.append(programs.evaluate(state.params))
        costs[order] = np.array([runs.per_seed(record["cost_train"]) for record in records])
        _check(costs[order], order, training.learning_rate)
        last = costs[order][-1]
        num_better, p_value = compare(costs["reshuffling"][-1], last)
        row = {
            "order": order,
            "cost_median": statistics.median(last),
            "cost_least": last.min(),
            "cost_most": last.max(),
            "cost_ratio": statistics.median(last) / statistics.median(costs["reshuffling"][-1]),
            "num_better": num_better,
            "p_value": p_value,
            **{
                name: statistics.median(runs.per_seed(records[-1][name]))
                for name in ("accuracy_train", "accuracy_test")
            },
            "num_seeds": len(last),
        }
        network.append(row)
        show(NETWORK, row)
    return network, costs


def compare(first: np.ndarray, second: np.ndarray) -> tuple[int | None, float | None]:
    """Returns in how many seeds the first costs less, and the p of Wilcoxon's signed-rank test.

    Both None of one and the same; p is None of less than six seeds, which cannot reach 0.05.
    """
    if np.shares_memory(first, second):
        return None, None
    p = float(np.asarray(scipy.stats.wilcoxon(first, second))[1]) if len(first) >= 6 else None
    return int(np.sum(first < second)), p


def _check(costs: np.ndarray, order: str, rate: float) -> None:
    """Raises DivergenceError unless all costs are finite."""
    if not np.isfinite(costs).all():
        epoch = int(np.argmin(np.isfinite(costs).all(axis=1)))
        raise DivergenceError(
            f"the cost is not finite after epoch {epoch} with order {order}. The likely cause is a "
            f"learning rate that is too large, {rate:g}: try --learning_rate={rate / 10:g}"
        )


@style.styled
def draw(result: Result, config: Config, description: str) -> Figure:
    """Returns the errors on the quadratic, laws through points, and the costs of the network."""
    figure = Figure(figsize=(13, 8.6), layout="constrained")
    (path, rates), (inside, network) = figure.subplots(2, 2)
    n, rounds, index = config.num_targets, config.num_rounds, _RATES.index(_SHOWN)
    for order in ORDERS:
        color, mean = _COLORS[order], result.walks[order].mean
        epochs = np.arange(rounds + 1)
        law = [predict(order, _SHOWN, result.targets, int(epoch)) for epoch in epochs]
        path.plot(epochs, law, color=color, lw=1.2)
        path.plot(
            epochs, mean[index, ::n], "o", ms=4, color=color, mfc="white", label=_words(order)
        )
        grid = np.geomspace(_RATES[0] / 1.3, _RATES[-1] * 1.3, 80)
        laws = [predict(order, rate, result.targets, rounds) for rate in grid]
        rates.plot(grid, laws, color=color, lw=1.2)
        rates.plot(_RATES, mean[:, -1], "o", ms=4, color=color, mfc="white", label=_words(order))
        if order in DRAWN:
            steps = np.arange(n)
            law = [predict(order, _SHOWN, result.targets, rounds - 1, int(k)) for k in steps]
            inside.plot(steps, law, color=color, lw=1.2)
            last = mean[index, (rounds - 1) * n : rounds * n]
            inside.plot(steps[::4], last[::4], "o", ms=4, color=color, mfc="white")
        costs = np.sort(result.costs[order], axis=1)
        middle = np.median(costs, axis=1)
        network.plot(np.arange(len(costs)), middle, color=color, lw=1.5, label=_words(order))
        network.fill_between(
            np.arange(len(costs)), costs[:, 0], costs[:, -1], color=color, alpha=0.13, lw=0
        )
    path.set_title(f"quadratic, ηλ = {_SHOWN}: lines exact, points walked")
    path.set_xlabel("epoch")
    for axis in (path, network):
        style.legend(axis, ncols=3)
    rates.set_title(f"quadratic after {rounds} epochs")
    rates.set_xlabel("ηλ")
    rates.set_xscale("log")
    left_out = ", ".join(_words(order) for order in ORDERS if order not in DRAWN)
    inside.set_title(f"within epoch {rounds}, ηλ = {_SHOWN}; not shown: {left_out}")
    for axis in (path, rates, inside):
        axis.set_ylabel("E(x − x*)²/s²")
    network.set_ylabel("mean training cost")
    inside.set_xlabel(f"step of {n}")
    inside.set_ylim(bottom=0)
    network.set_title(f"{description}: median and range of the seeds")
    network.set_xlabel("epoch (0: before training)")
    network.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in (path, rates, network):
        axis.set_yscale("log")
    figure.suptitle("The order of the examples, and what remains of the error")
    return figure


def _words(order: str) -> str:
    return order.replace("_", " ")


_NUM_TARGETS = flags.DEFINE_integer("num_targets", Config.num_targets, "n of the quadratic.")
_NUM_WALKS = flags.DEFINE_integer(
    "num_walks", Config.num_walks, "Walks on the quadratic whose mean is taken."
)
_NUM_ROUNDS = flags.DEFINE_integer(
    "num_rounds", Config.num_rounds, "Epochs of each walk; the network's are --epochs."
)


def describe(result: Result) -> str:
    """Returns in words what `draw` shows, from its numbers."""
    index = _RATES.index(_SHOWN)
    levels = "; ".join(
        f"{_words(order)} {result.walks[order].mean[index, -1]:.3g}" for order in ORDERS
    )
    costs = "; ".join(
        f"{_words(order)} {np.median(result.costs[order][-1]):.3g}" for order in ORDERS
    )
    return (
        "Four panels. On the quadratic, points walked and lines exact, the mean squared distance "
        f"to the minimum after the last epoch at ηλ = {_SHOWN}: {levels}. The median training "
        f"cost of the network at the end: {costs}."
    )


GROUPS = _tabled.groups(
    {"Quadratic": (_NUM_TARGETS, _NUM_WALKS, _NUM_ROUNDS)},
    shared=("Data", "Network", "Training", "Seeds", "Run folder"),
)


def find(asked: Asked[Config], show: _tabled.Show) -> _tabled.Answer:
    """Returns what is left in the run folder."""
    result = run(asked, show)
    ratios = [abs(row["ratio"] - 1) for row in result.quadratic if row["order"] in DRAWN]
    picture = _tabled.Picture(
        "Errors and costs",
        describe(result),
        draw(result, asked.config, asked.description),
        "reshuffling",
    )
    paths = [
        {"order": order, "rate": rate, "step": step, "mean_squared_distance": value}
        for order, walks in result.walks.items()
        for rate, values in zip(_RATES, walks.mean, strict=True)
        for step, value in enumerate(values.tolist())
        if step % asked.config.num_targets == 0
    ]
    costs = [
        {"order": order, "epoch": epoch}
        | {f"seed_{seed}": value for seed, value in zip(asked.seeds, values, strict=True)}
        for order, table in result.costs.items()
        for epoch, values in enumerate(table.tolist())
    ]
    return _tabled.Answer(
        f"The order of the examples: a quadratic, and {asked.description}",
        {
            "farthest_ratio_from_1": max(ratios),
            "network_cost_of_reshuffling": result.network[0]["cost_median"],
        },
        [(QUADRATIC, result.quadratic), (NETWORK, result.network)],
        [picture],
        {"paths": paths, "costs": costs},
    )


def main() -> int:
    """Reads the flags, walks and trains, leaves the run folder; returns the exit code."""
    total = len(ORDERS) * (len(_RATES) + 1)
    return _asked.answer(
        *(Config, GROUPS, __file__, find),
        num_rows=lambda _: total, resolve=_asked.with_one_batch_size,
        smoke=_SMOKE, training=_TRAINING,
    )  # fmt: skip


if __name__ == "__main__":
    _cli.start(main, __doc__ or "", GROUPS, defaults=_TRAINING)
