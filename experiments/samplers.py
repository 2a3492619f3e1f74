"""Which way of sampling is worth its gradients?

Trains by SGD with four estimates of the gradient from the same start, and counts every gradient of
an example that each takes:

  uniform      m drawn without replacement:                                        m a step
  stratified   m drawn from the classes in proportion:                             m a step
  importance   m drawn with p ∝ ‖g_i‖ as they were when the round began:           m a step,
               the n norms of a round                                              and n a round
  svrg         m drawn without replacement, ĝ = mean(g_i − h_i) + H, where h_i     2m a step,
               and their mean H are gradients where the round began                and n a round

A round is n/m steps, so a round of importance sampling costs 2n gradients, one of SVRG 3n. All stop
at the same number of gradients; each uses the best of the same learning rates. On two problems: a
convex one, logistic regression with weight decay, and the textbook network. Leaves tables, figure
and report in a run folder.

  python -m experiments.samplers
  python -m experiments.samplers --dataset=mnist --epochs=12 --num_seeds=3

Expected of the first command, medians of 8 seeds after 60 passes, each at its best η. Convex,
above the least cost, with a constant rate: SVRG 0.00008, stratified draws 0.011, uniform ones
0.018, importance sampling 0.026; with a decaying one 0.000008, 0.0016, 0.0023 and 0.0033; all
differ from uniform draws (p < 0.02). Network, constant rate: uniform draws 0.0014 (0.0003 to
0.0021), stratified 0.0017 (p = 0.46), importance 0.0028 and SVRG 0.0139; a decaying rate is worse
for all. Ten minutes on two cores that others shared.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import scipy.stats
from absl import flags
from matplotlib.figure import Figure

import sgd_jax as sj
from experiments import _asked, _cli, _tabled
from experiments._asked import Asked, show_nothing
from experiments._config import check_fields
from experiments._sampler_rounds import (
    RATES,
    SAMPLERS,
    SCHEDULES,
    Trained,
    gradients_of_round,
    make_round,
    measure_errors,
    train,
)
from experiments._tabled import Column
from experiments.runs import style
from sgd_jax._tree import tree_dot
from sgd_jax.typing import Array, CostFn, Params

PROBLEMS = ("convex", "network")
_COLORS = dict(zip(SAMPLERS, style.PALETTE, strict=False))
_SOLVER_STEPS = 300  # of L-BFGS; at 200 the cost of digits no longer changes in float32
_SMOKE = {"problems": ("network",)}
_TRAINING = {"epochs": 60, "num_seeds": 8}


@dataclasses.dataclass(frozen=True)
class Config:
    """What is compared; the flags of the same names say what each is."""

    problems: tuple[str, ...] = PROBLEMS
    uniform_share: float = 0.1
    l2: float = 1e-2

    def __post_init__(self):
        """Raises ValueError at what is wrong whatever the data are."""
        are_known = self.problems != () and set(self.problems) <= set(PROBLEMS)
        check_fields(
            self,
            ("problems", are_known, f"any of {', '.join(PROBLEMS)}"),
            ("uniform_share", 0 < self.uniform_share <= 1, "a number above 0 and at most 1"),
            ("l2", 0 <= self.l2 < math.inf, "a finite number of at least 0"),
        )


TRAINED = _tabled.Table(
    (
        Column("problem", "problem  ", "{:<9}"),
        Column("sampler", "sampler   ", "{:<10}"),
        Column("schedule", "η       ", "{:<8}"),
        Column("learning_rate", "best η", "{:g}"),
        Column("num_steps", "steps", "{:,}"),
        Column("num_gradients", "gradients", "{:,}"),
        Column("cost_median", "cost", "{:.6f}", missing="edge"),
        Column("cost_least", "least", "{:.6f}"),
        Column("cost_most", "most", "{:.6f}"),
        Column("excess", "above least", "{:.3g}"),
        Column("p_value", "p", "{:.2g}"),
    ),
    heading="Training",
    stem="training",
    legend="After so many gradients of examples: mean cost of all training examples, median, "
    "least and most of the seeds; the median above the least cost there is, known for the convex "
    "problem. The best η is that of the least median cost; at the edge of those tried nothing is "
    "reported. Decaying: linearly to 0. Averaged: constant, at the mean of the params after the "
    "rounds of the second half. p: Wilcoxon's signed-rank test over seeds against uniform draws "
    "with the same schedule.",
)
VARIANCE = _tabled.Table(
    (
        Column("problem", "problem  ", "{:<9}"),
        Column("round", "round", "{:d}"),
        *(Column(f"error_{name}", name, "{:.3f}") for name in SAMPLERS),
        *(Column(f"worth_{name}", f"worth: {name}", "{:.3f}") for name in SAMPLERS[1:]),
        Column("noise_scale", "tr Σ/‖∇C‖²", "{:.3g}"),
    ),
    heading="Variance",
    stem="variance",
    legend="Along the training by uniform draws, after so many rounds of n/m steps: E‖ĝ − ∇C‖² "
    "of each as a multiple of tr Σ/m, exact, at the end of a round, when norms and anchor are a "
    "round old. Worth: the error of uniform draws over that of the sampler at equal gradients, "
    "those that the round began with included; above 1 it pays.",
)


class Result(NamedTuple):
    """What `run` returns."""

    trained: list[_tabled.Row]
    """One for each problem and sampler; see `TRAINED`."""
    variance: list[_tabled.Row]
    """One for each problem and round of uniform draws; see `VARIANCE`."""
    curves: list[_tabled.Row]
    """One for each problem, sampler and round, at the best learning rate: medians of the seeds."""


def run(asked: Asked[Config], show: _tabled.Show = show_nothing) -> Result:
    """Trains with every sampler, and measures their errors along the training by uniform draws.

    Args:
      asked: Learning rate and optimizer of training, and its options, do not count.
      show: Called with each row of `TRAINED` and `VARIANCE`.
    """
    examples, labels = asked.examples(), asked.dataset.train.labels
    n, m, share = len(labels), asked.training.batch_size, asked.config.uniform_share
    trained, variance, curves = [], [], []
    paths = []
    for name in asked.config.problems:
        problem = make_problem(name, asked)
        least = least_cost(problem, examples, asked.dtype) if name == "convex" else None
        first = asked.first_networks(problem.sizes)
        against = {}
        for sampler in SAMPLERS:
            price = gradients_of_round(sampler, n, m)
            num_rounds = max(1, asked.training.epochs * n // price)
            take_round = make_round(sampler, problem.fun, labels, m, share)
            go = functools.partial(train, problem.fun, take_round, examples, first, num_rounds)
            constant, decaying = go(), go(is_decaying=True)
            finals = (constant.costs[..., -1], decaying.costs[..., -1], constant.averaged)
            for schedule, final in zip(SCHEDULES, finals, strict=True):
                row = summarize(final, least, against.setdefault(schedule, final))
                row = {
                    "problem": name,
                    "sampler": sampler,
                    "schedule": schedule,
                    "num_steps": num_rounds * (n // m),
                    "num_gradients": num_rounds * price,
                } | row
                trained.append(row)
                show(TRAINED, row)
            for schedule, found in (("constant", constant), ("decaying", decaying)):
                curves += curve_of(found, name, sampler, schedule, price / n, least or 0.0)
            if sampler == "uniform":
                best = best_rate(finals[0])
                path = jax.tree.map(lambda leaf, k=best: leaf[:, k, 0], constant.path)
                paths.append((problem, path))
    for problem, path in paths:
        found = measure_errors(problem.fun, path, examples, labels, m, share)
        for number, of_round in enumerate(found, start=1):
            errors = {name: of_round[name] * m / of_round["trace"] for name in SAMPLERS}
            paid = {name: errors[name] * gradients_of_round(name, n, m) for name in SAMPLERS}
            row = (
                {"problem": problem.name, "round": number}
                | {f"error_{name}": errors[name] for name in SAMPLERS}
                | {f"worth_{name}": paid["uniform"] / paid[name] for name in SAMPLERS[1:]}
                | {"noise_scale": of_round["noise_scale"]}
            )
            variance.append(row)
            show(VARIANCE, row)
    return Result(trained, variance, curves)


def best_rate(final: np.ndarray) -> int:
    """Returns the place of the learning rate of least median cost, (num_rates, num_seeds)."""
    return int(np.argmin(np.median(np.where(np.isfinite(final), final, np.inf), axis=1)))


def summarize(final: np.ndarray, least: float | None, uniform: np.ndarray) -> _tabled.Row:
    """Returns the cost at the best learning rate, its spread, and a test against uniform draws.

    At the least or the largest rate tried the best one is not known: the costs are None. The test
      is
    Wilcoxon's signed-rank test over seeds, two-sided, each sampler at its own best rate; None with
    less than six seeds, which cannot reach 0.05, and of uniform draws themselves.

    Args:
      final: Costs at the end, (num_rates, num_seeds).
      least: The least cost there is, or None.
      uniform: The same of uniform draws.
    """
    best, reference = best_rate(final), best_rate(uniform)
    if best in (0, len(RATES) - 1):
        names = ("cost_median", "cost_least", "cost_most", "excess", "p_value")
        return {"learning_rate": RATES[best]} | dict.fromkeys(names)
    costs = final[best]
    p = None
    if final is not uniform and len(costs) >= 6 and np.isfinite(costs).all():
        p = float(np.asarray(scipy.stats.wilcoxon(costs, uniform[reference]))[1])
    return {
        "learning_rate": RATES[best],
        "cost_median": float(np.median(costs)),
        "cost_least": float(costs.min()),
        "cost_most": float(costs.max()),
        "excess": None if least is None else float(np.median(costs)) - least,
        "p_value": p,
    }


def curve_of(
    found: Trained, problem: str, sampler: str, schedule: str, passes: float, least: float
) -> list[_tabled.Row]:
    """Returns a row a round at the best learning rate: median, least and most of the seeds."""
    best = best_rate(found.costs[..., -1])
    costs, norms = found.costs[best], found.norms[best]
    return [
        {
            "problem": problem,
            "sampler": sampler,
            "schedule": schedule,
            "learning_rate": RATES[best],
            "passes": number * passes,
            "cost": float(np.median(costs[:, number])),
            "excess": float(np.median(costs[:, number])) - least,
            "excess_least": float(costs[:, number].min()) - least,
            "excess_most": float(costs[:, number].max()) - least,
            "squared_norm": float(np.median(norms[:, number])),
        }
        for number in range(costs.shape[1])
    ]


def check(asked: Asked[Config]) -> Asked[Config]:
    """Returns what is asked; raises ValueError where the settings do not fit the data."""
    asked = _asked.with_one_batch_size(asked)
    least, m = asked.dataset.num_classes, asked.training.batch_size
    if not least <= m <= asked.num_examples:
        raise ValueError(
            f"batch_size is {m}; expected at least {least}, for stratified sampling draws from "
            "each class, and at most n"
        )
    return asked


class Problem(NamedTuple):
    """What is trained."""

    name: str
    fun: CostFn
    sizes: tuple[int, ...]


def make_problem(name: str, asked: Asked[Config]) -> Problem:
    """Returns the cost of one example and the sizes of the network: no hidden layer if convex."""
    plain, _ = asked.functions("cross_entropy" if name == "convex" else None)
    if name == "network":
        return Problem(name, plain, asked.sizes)

    def fun(params: Params, example: Any) -> Array:
        weights = tuple(layer.weights for layer in params)
        return plain(params, example) + asked.config.l2 / 2 * tree_dot(weights, weights)

    return Problem(name, fun, (asked.sizes[0], asked.sizes[-1]))


def least_cost(problem: Problem, examples: Any, dtype: jax.typing.DTypeLike) -> float:
    """Returns the least mean cost of the convex problem, as L-BFGS finds it."""
    network = sj.init_network(jax.random.key(0), problem.sizes, "scaled", dtype)
    optimizer = optax.lbfgs()

    def mean_cost(params: Params) -> Array:
        return sj.mean_cost(problem.fun)(params, examples)

    value_and_grad = optax.value_and_grad_from_state(mean_cost)

    def step(_: int, carry: tuple[Params, Any]) -> tuple[Params, Any]:
        params, state = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = optimizer.update(
            grad, state, params, value=value, grad=grad, value_fn=mean_cost
        )
        return optax.apply_updates(params, updates), state

    start = (network, optimizer.init(network))
    solve = jax.jit(lambda start: jax.lax.fori_loop(0, _SOLVER_STEPS, step, start)[0])
    return float(mean_cost(solve(start)))


@style.styled
def draw(result: Result, description: str) -> Figure:
    """Returns worth, and cost by both schedules against the gradients taken, a row a problem."""
    problems = list(dict.fromkeys(row["problem"] for row in result.trained))
    figure = Figure(figsize=(14, 4.4 * len(problems)), layout="constrained")
    axes = np.atleast_2d(figure.subplots(len(problems), 3))
    for name, (worth, cost, decaying) in zip(problems, axes, strict=True):
        rows = [row for row in result.variance if row["problem"] == name]
        rounds = [row["round"] for row in rows]
        worth.axhline(1, color=_COLORS["uniform"], lw=1.5, label="uniform")
        for sampler in SAMPLERS:
            color = _COLORS[sampler]
            if sampler != "uniform":
                values = [row[f"worth_{sampler}"] for row in rows]
                worth.plot(rounds, values, ".-", color=color, lw=1.2, ms=4, label=sampler)
            for schedule, axis in (("constant", cost), ("decaying", decaying)):
                wanted = (name, sampler, schedule)
                curve = [
                    r
                    for r in result.curves
                    if (r["problem"], r["sampler"], r["schedule"]) == wanted
                ]
                x = [row["passes"] for row in curve]
                label = f"{sampler}, η = {curve[0]['learning_rate']:g}"
                axis.plot(x, [r["excess"] for r in curve], ".-", color=color, ms=4, label=label)
                ends = ([r[f"excess_{end}"] for r in curve] for end in ("least", "most"))
                axis.fill_between(x, *ends, color=color, alpha=0.15, lw=0)
        worth.set_title(f"{name}: worth of a gradient")
        worth.set_ylabel("error of uniform draws / of sampler")
        above = " above the least" if name == "convex" else ""
        cost.set_title(f"{name}: constant η; median, range of seeds")
        decaying.set_title(f"{name}: η falling linearly to 0")
        for axis in (cost, decaying):
            axis.set_ylabel(f"mean training cost{above}")
        worth.set_xlabel("rounds of n/m steps, by uniform draws")
        for axis in (cost, decaying):
            axis.set_xlabel("gradients of examples, in units of n")
        for axis in (worth, cost, decaying):
            axis.set_yscale("log")
            style.legend(axis)
    figure.suptitle(f"What a gradient of an example buys: {description}")
    return figure


_PROBLEMS = flags.DEFINE_list("problems", list(PROBLEMS), f"Any of {', '.join(PROBLEMS)}.")
_UNIFORM_SHARE = flags.DEFINE_float(
    "uniform_share",
    Config.uniform_share,
    "Share of uniform draws in importance sampling, for norms that have grown old.",
)
_L2 = flags.DEFINE_float(
    "l2", Config.l2, "λ of the convex problem, whose cost of an example has ½λ‖w‖² added."
)
GROUPS = _tabled.groups(
    {"Samplers": (_PROBLEMS, _UNIFORM_SHARE, _L2)},
    *("learning_rate", "momentum", "nesterov", "weight_decay", "optimizer"),
    shared=("Data", "Network", "Training", "Seeds", "Run folder"),
)


def find(asked: Asked[Config], show: _tabled.Show) -> _tabled.Answer:
    """Returns what is left in the run folder."""
    result = run(asked, show)
    known = [row for row in result.trained if row["cost_median"] is not None]
    least = {}
    for name in asked.config.problems:
        of_problem = [row for row in known if row["problem"] == name]
        if of_problem:
            best = min(of_problem, key=lambda row: row["cost_median"])
            least[f"best_sampler_{name}"] = best["sampler"]
            least[f"best_schedule_{name}"] = best["schedule"]
    picture = _tabled.Picture(
        "What a gradient buys",
        "For each problem, against the gradients of examples taken: how much smaller than that "
        "of uniform draws the error of each sampler is at equal gradients, and the training cost "
        "with a constant and a decaying learning rate, medians and range of the seeds.",
        draw(result, asked.description),
        "samplers",
    )
    return _tabled.Answer(
        f"What a gradient of an example buys: {asked.description}",
        least,
        [(TRAINED, result.trained), (VARIANCE, result.variance)],
        [picture],
        {"curves": result.curves},
    )


def num_rows(asked: Asked[Config]) -> int:
    """Returns how many rows the tables will have."""
    of_problem = len(SAMPLERS) * len(SCHEDULES) + asked.training.epochs
    return len(asked.config.problems) * of_problem


def main() -> int:
    """Reads the flags, trains and measures, leaves the run folder; returns the exit code."""
    return _asked.answer(
        *(Config, GROUPS, __file__, find),
        num_rows=num_rows, resolve=check, smoke=_SMOKE, training=_TRAINING,
    )  # fmt: skip


if __name__ == "__main__":
    _cli.start(main, __doc__ or "", GROUPS, defaults=_TRAINING)
