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
  python -m experiments.samplers --problems=network --epochs=60

Expected of the first command, medians of 8 seeds after 60 passes, each at its best η. Convex: SVRG
is 0.00008 above the least cost, stratified draws 0.011, uniform ones 0.018 and importance sampling
0.025. From the third round on SVRG has 10 to 130 times less error than uniform draws at equal
gradients; stratified draws have 2.5 times less at no price at all; importance sampling never earns
back its norms. Network: uniform draws are best, cost 0.0014 (0.0003 to 0.0021), then stratified
0.0019, importance 0.0021 and SVRG 0.0139. Stratified draws have 3 times less error in the first
pass, 5 % less from the tenth on; importance sampling has 2 to 5 times less once few examples are
left that the network gets wrong; SVRG mostly has more, for an anchor grows old within a round; and
all that is less than what twice or three times as many steps bring.
"""

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from matplotlib.figure import Figure

import sgd_jax as sj
from experiments import _classifier, _cli, _tabled
from experiments._config import Config as Training
from experiments._tabled import Column
from sgd_jax import data, sampling
from sgd_jax._tree import tree_axpy, tree_dot
from sgd_jax._typing import Array, CostFn, Params
from sgd_jax.allocation import optimal_probabilities, proportional_allocation
from sgd_jax.control_variate import control_variate, difference, refresh
from sgd_jax.estimates import expected_squared_error

SAMPLERS = ("uniform", "stratified", "importance", "svrg")
PROBLEMS = ("convex", "network")
RATES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
_COLORS = dict(zip(SAMPLERS, ("#4477aa", "#228833", "#aa3377", "#cc3355"), strict=True))
_CHUNK_SIZE = 1000
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
        known = ", ".join(PROBLEMS)
        for name, is_good, expected in (
            (
                "problems",
                self.problems != () and set(self.problems) <= set(PROBLEMS),
                f"any of {known}",
            ),
            ("uniform_share", 0 < self.uniform_share <= 1, "a number above 0 and at most 1"),
            ("l2", 0 <= self.l2 < math.inf, "a finite number of at least 0"),
        ):
            if not is_good:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected {expected}")


TRAINED = _tabled.Table(
    (
        Column("problem", "problem  ", "{:<9}"),
        Column("sampler", "sampler   ", "{:<10}"),
        Column("learning_rate", "best η", "{:g}"),
        Column("num_steps", "steps", "{:,}"),
        Column("num_gradients", "gradients", "{:,}"),
        Column("cost_median", "cost", "{:.6f}"),
        Column("cost_least", "least", "{:.6f}"),
        Column("cost_most", "most", "{:.6f}"),
        Column("excess", "above least", "{:.3g}"),
        Column("squared_norm", "‖∇C‖²", "{:.3g}"),
    ),
    heading="Training",
    stem="training",
    legend="After so many gradients of examples: mean cost of all training examples, median, least "
    "and most of the seeds; the median above the least cost there is, which is known for the "
    "convex problem; the median of ‖∇C‖². The best η is that of the least median cost.",
)
VARIANCE = _tabled.Table(
    (
        Column("problem", "problem  ", "{:<9}"),
        Column("round", "round", "{:d}"),
        *(Column(f"error_{name}", name, "{:.3f}") for name in SAMPLERS),
        *(Column(f"worth_{name}", f"worth: {name}", "{:.3f}") for name in SAMPLERS[1:]),
        Column("noise_scale", "tr Σ/‖G‖²", "{:.3g}"),
    ),
    heading="Variance",
    stem="variance",
    legend="Along the training by uniform draws, after so many rounds of n/m steps: E‖ĝ − G‖² "
    "of each as a multiple of tr Σ/m, exact, at the end of a round, when norms and anchor are a "
    "round old. Worth: the error of uniform draws over that of the sampler at equal gradients, "
    "those that the round began with included; above 1 it pays.",
)


def gradients_of_round(sampler: str, n: int, m: int) -> int:
    """Returns how many gradients of examples a round takes: in its steps, and before them."""
    of_steps = (n // m) * m
    return {
        "uniform": of_steps,
        "stratified": of_steps,
        "importance": n + of_steps,
        "svrg": n + 2 * of_steps,
    }[sampler]


class Problem(NamedTuple):
    """What is trained."""

    name: str
    fun: CostFn
    sizes: tuple[int, ...]


class Result(NamedTuple):
    """What `run` returns."""

    trained: list[_tabled.Row]
    """One for each problem and sampler; see `TRAINED`."""
    variance: list[_tabled.Row]
    """One for each problem and round of uniform draws; see `VARIANCE`."""
    curves: list[_tabled.Row]
    """One for each problem, sampler and round, at the best learning rate: medians of the seeds."""


def run(
    config: Config,
    training: Training,
    dataset: data.Dataset,
    show: _tabled.Show = lambda table, row: None,
) -> Result:
    """Trains with every sampler, and measures their errors along the training by uniform draws.

    Args:
      config: What is compared.
      training: Of the network; its learning rate, optimizer and options do not count.
      dataset: Of examples.
      show: Called with each row of `TRAINED` and `VARIANCE`.
    """
    check(training, dataset)
    examples = _classifier.to_device(dataset.train, np.dtype(training.dtype))
    n, m = len(dataset.train.labels), training.batch_size
    trained, variance, curves = [], [], []
    paths = []
    for name in config.problems:
        problem = make_problem(name, config, training, dataset)
        least = (
            least_cost(problem, examples, np.dtype(training.dtype)) if name == "convex" else None
        )
        first = _first(problem, training)
        for sampler in SAMPLERS:
            price = gradients_of_round(sampler, n, m)
            num_rounds = max(1, training.epochs * n // price)
            make_round = make_sampler(sampler, problem.fun, dataset.train.labels, config, training)
            costs, norms, path = _train(problem, make_round, examples, first, num_rounds)
            final = np.median(np.where(np.isfinite(costs), costs, np.inf)[:, :, -1], axis=1)
            best = int(np.argmin(final))
            row = {
                "problem": name,
                "sampler": sampler,
                "learning_rate": RATES[best],
                "num_steps": num_rounds * (n // m),
                "num_gradients": num_rounds * price,
                "cost_median": final[best],
                "cost_least": costs[best, :, -1].min(),
                "cost_most": costs[best, :, -1].max(),
                "excess": None if least is None else final[best] - least,
                "squared_norm": statistics.median(norms[best, :, -1]),
            }
            trained.append(row)
            show(TRAINED, row)
            curves += [
                {
                    "problem": name,
                    "sampler": sampler,
                    "learning_rate": RATES[best],
                    "passes": number * price / n,
                    "cost": statistics.median(costs[best, :, number]),
                    "excess": statistics.median(costs[best, :, number]) - (least or 0.0),
                    "squared_norm": statistics.median(norms[best, :, number]),
                }
                for number in range(num_rounds + 1)
            ]
            if sampler == "uniform":
                paths.append((problem, jax.tree.map(lambda leaf, k=best: leaf[:, k, 0], path)))
    for problem, path in paths:
        for row in _variances(problem, path, examples, dataset.train.labels, config, training):
            variance.append(row)
            show(VARIANCE, row)
    return Result(trained, variance, curves)


def check(training: Training, dataset: data.Dataset) -> None:
    """Raises ValueError where the settings do not fit the data."""
    if not dataset.num_classes <= training.batch_size <= len(dataset.train.labels):
        raise ValueError(
            f"batch_size is {training.batch_size}; expected at least {dataset.num_classes}, for "
            f"stratified sampling draws from each class, and at most n"
        )


def make_problem(name: str, config: Config, training: Training, dataset: data.Dataset) -> Problem:
    """Returns the cost of one example and the sizes of the network: no hidden layer if convex."""
    kind = "cross_entropy" if name == "convex" else training.cost
    plain, _ = _classifier.example_functions(
        kind, dataset.num_classes, dataset.scale, np.dtype(training.dtype)
    )
    if name == "network":
        return Problem(name, plain, training.sizes or ())

    def fun(params: Params, example: Any) -> Array:
        weights = tuple(layer.weights for layer in params)
        return plain(params, example) + config.l2 / 2 * tree_dot(weights, weights)

    return Problem(name, fun, (dataset.train.inputs.shape[1], dataset.num_classes))


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


Round = Callable[[Params, Any, Array, Array], Params]
"""From params, examples, a key and the learning rate to the params n/m steps later."""


def make_sampler(
    name: str, fun: CostFn, labels: np.ndarray, config: Config, training: Training
) -> Round:
    """Returns a round of SGD with a sampler: what it begins with, then n/m steps."""
    n, m = len(labels), training.batch_size
    strata = jnp.asarray(np.unique(labels, return_inverse=True)[1])
    sizes = proportional_allocation(np.bincount(strata), m) if name == "stratified" else ()
    costs = jax.vmap(fun, in_axes=(None, 0))
    svrg = control_variate(fun)

    def walk(params: Params, examples: Any, key: Array, rate: Array) -> Params:
        anchor, probabilities = None, jnp.zeros(0)
        if name == "svrg":
            anchor = refresh(fun, params, examples, chunk_size=_CHUNK_SIZE)
        if name == "importance":
            norms = _norms(fun, params, examples)
            probabilities = optimal_probabilities(norms, config.uniform_share)

        def step(params: Params, key: Array) -> tuple[Params, None]:
            if name == "stratified":
                sample = sampling.stratified(key, strata, sizes)
            elif name == "importance":
                sample = sampling.importance(key, probabilities, m)
            else:
                sample = sampling.without_replacement(key, n, m)
            chosen = jax.tree.map(lambda leaf: leaf[sample.indices], examples)
            if anchor is None:
                estimate = jax.grad(lambda p: sample.weights @ costs(p, chosen))(params)
            else:
                estimate = svrg(params, anchor, chosen, sample.weights)
            return tree_axpy(-rate, estimate, params), None

        return jax.lax.scan(step, params, jax.random.split(key, n // m))[0]

    return walk


def _norms(fun: CostFn, params: Params, examples: Any) -> Array:
    """‖g_i‖ of all examples."""
    size = min(_CHUNK_SIZE, len(examples.labels))
    return jnp.sqrt(sj.per_example_grad(fun, chunk_size=size)(params, examples).squared_norms())


def _first(problem: Problem, training: Training) -> tuple[Params, Array]:
    """Returns the networks before the first step and a key for the draws, one of each a seed."""

    @jax.jit
    @jax.vmap
    def first(seed: Array) -> tuple[Params, Array]:
        keys = jax.random.split(jax.random.key(seed))
        dtype = np.dtype(training.dtype)
        return sj.init_network(keys[0], problem.sizes, training.init, dtype), keys[1]

    seeds = range(training.seed, training.seed + training.num_seeds)
    return first(jnp.array(seeds, jnp.uint32))


def _train(
    problem: Problem,
    make_round: Round,
    examples: Any,
    first: tuple[Params, Array],
    num_rounds: int,
) -> tuple[np.ndarray, np.ndarray, Params]:
    """Trains with all learning rates and seeds at once; returns what is there after each round.

    The costs and the ‖∇C‖², (num_rates, num_seeds, num_rounds + 1), and the params, whose leaves
    have leading axes (num_rounds + 1, num_rates, num_seeds).
    """
    mean_cost = jax.value_and_grad(sj.mean_cost(problem.fun))

    def measure(params: Params) -> tuple[Array, Array]:
        cost, gradient = mean_cost(params, examples)
        return cost, tree_dot(gradient, gradient)

    def train_one(rate: Array, first: tuple[Params, Array]) -> tuple[Array, Array, Params]:
        params, key = first

        def one(params: Params, number: Array) -> tuple[Params, Params]:
            return make_round(params, examples, jax.random.fold_in(key, number), rate), params

        last, path = jax.lax.scan(one, params, jnp.arange(num_rounds))
        path = jax.tree.map(lambda leaf, end: jnp.concatenate([leaf, end[None]]), path, last)
        return *jax.lax.map(measure, path), path

    over_seeds = jax.vmap(train_one, in_axes=(None, 0), out_axes=(0, 0, 1))
    train_all = jax.jit(jax.vmap(over_seeds, in_axes=(0, None), out_axes=(0, 0, 1)))
    rates = jnp.asarray(RATES, jax.tree.leaves(first[0])[0].dtype)
    costs, norms, path = train_all(rates, first)
    return np.asarray(costs, np.float64), np.asarray(norms, np.float64), path


def _variances(
    problem: Problem,
    path: Params,
    examples: Any,
    labels: np.ndarray,
    config: Config,
    training: Training,
) -> list[_tabled.Row]:
    """Returns the rows of `VARIANCE` along a path, whose leaves have a leading axis of rounds."""
    m, fun = training.batch_size, problem.fun
    strata = jnp.asarray(np.unique(labels, return_inverse=True)[1])
    counts = np.bincount(np.asarray(strata))
    sizes = proportional_allocation(counts, m)
    moments_of = functools.partial(sj.gradient_moments, chunk_size=_CHUNK_SIZE)

    @jax.jit
    def measure(before: Params, params: Params) -> dict[str, Array]:
        moments = moments_of(fun, params, examples, keep_norms=True)
        classes = moments_of(fun, params, examples, strata=strata, num_strata=len(counts))
        p = optimal_probabilities(_norms(fun, before, examples), config.uniform_share)
        offset = jax.tree.map(jnp.zeros_like, params)
        changed = moments_of(difference(fun, params, before), offset, examples)
        return {
            "uniform": expected_squared_error(moments, m),
            "stratified": expected_squared_error(classes, sizes, "stratified"),
            "importance": expected_squared_error(moments, m, "importance", probabilities=p),
            "svrg": expected_squared_error(changed, m),
            "trace": moments.trace,
            "noise_scale": moments.trace / moments.squared_norm,
        }

    rows = []
    for number in range(1, len(jax.tree.leaves(path)[0])):
        before, params = (
            jax.tree.map(lambda leaf, k=k: leaf[k], path) for k in (number - 1, number)
        )
        found = {name: float(value) for name, value in measure(before, params).items()}
        errors = {name: found[name] * m / found["trace"] for name in SAMPLERS}
        paid = {name: errors[name] * gradients_of_round(name, len(labels), m) for name in SAMPLERS}
        rows.append(
            {"problem": problem.name, "round": number}
            | {f"error_{name}": errors[name] for name in SAMPLERS}
            | {f"worth_{name}": paid["uniform"] / paid[name] for name in SAMPLERS[1:]}
            | {"noise_scale": found["noise_scale"]}
        )
    return rows


def draw(result: Result, description: str) -> Figure:
    """Returns worth, cost and gradient norm against the gradients taken, a row for each problem."""
    problems = list(dict.fromkeys(row["problem"] for row in result.trained))
    figure = Figure(figsize=(14, 4.4 * len(problems)), layout="constrained")
    axes = np.atleast_2d(figure.subplots(len(problems), 3))
    for name, (worth, cost, norm) in zip(problems, axes, strict=True):
        rows = [row for row in result.variance if row["problem"] == name]
        rounds = [row["round"] for row in rows]
        worth.axhline(1, color=_COLORS["uniform"], lw=1.5, label="uniform")
        for sampler in SAMPLERS:
            color = _COLORS[sampler]
            if sampler != "uniform":
                values = [row[f"worth_{sampler}"] for row in rows]
                worth.plot(rounds, values, ".-", color=color, lw=1.2, ms=4, label=sampler)
            curve = [r for r in result.curves if (r["problem"], r["sampler"]) == (name, sampler)]
            x = [row["passes"] for row in curve]
            label = f"{sampler}, η = {curve[0]['learning_rate']:g}"
            for axis, column in ((cost, "excess"), (norm, "squared_norm")):
                axis.plot(x, [row[column] for row in curve], ".-", color=color, ms=4, label=label)
        worth.set_title(f"{name}: error of uniform draws over each, equal gradients", fontsize=10)
        above = ", above the least there is" if name == "convex" else ""
        cost.set_title(f"{name}: mean training cost{above}", fontsize=10.5)
        norm.set_title(f"{name}: ‖∇C‖² of all examples", fontsize=10.5)
        worth.set_xlabel("rounds of n/m steps, by uniform draws")
        for axis in (cost, norm):
            axis.set_xlabel("gradients of examples, in units of n")
        for axis in (worth, cost, norm):
            axis.set_yscale("log")
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
    figure.suptitle(f"What a gradient of an example buys: {description}", fontsize=13)
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


def main() -> int:
    """Reads the flags, trains and measures, leaves the run folder; returns the exit code."""
    with _cli.user_errors():
        config, given, output = _tabled.read_settings(Config, GROUPS, _SMOKE)
        opened = _tabled.open_folder("samplers", config, _TRAINING | given, output, __file__, check)
    training, dataset = opened.training, opened.dataset

    def find(show: _tabled.Show) -> _tabled.Answer:
        result = run(config, training, dataset, show)
        description = f"{dataset.name}, {'-'.join(map(str, training.sizes or ()))}"
        least = {
            f"best_sampler_{name}": min(
                (row for row in result.trained if row["problem"] == name),
                key=lambda row: row["cost_median"],
            )["sampler"]
            for name in config.problems
        }
        picture = _tabled.Picture(
            "What a gradient buys",
            "For each problem, against the gradients of examples taken: how much smaller than that "
            "of uniform draws the error of each sampler is at equal gradients, the training cost, "
            "and the squared norm of the gradient.",
            draw(result, description),
            "samplers",
        )
        return _tabled.Answer(
            f"What a gradient of an example buys: {description}",
            least,
            [(TRAINED, result.trained), (VARIANCE, result.variance)],
            [picture],
            {"curves": result.curves},
        )

    total = len(config.problems) * (len(SAMPLERS) + training.epochs)
    return _tabled.record(opened.folder, opened.notes, total, find)


if __name__ == "__main__":
    _cli.start(main, __doc__ or "", GROUPS)
