"""The experiments of the gallery: each smoke run leaves what it says, and the mathematics holds."""

import csv
import functools
import itertools
import json
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from in_process import call
from PIL import Image

import sgd_jax as sj
from experiments import (
    _classifier,
    _orders,
    _recorded,
    _sampler_rounds,
    _starting_point,
    _tabled,
    _target,
    critical_batch_size,
    directions,
    landscape,
    nielsen,
    reshuffling,
    runs,
    samplers,
)
from experiments._asked import Asked
from experiments._trade import find_best, fit_trade, progress_weighted
from sgd_jax import sampling
from sgd_jax.data import Examples

N = 200  # training examples of the digits with --smoke


def smoke(program, folder, *arguments):
    """Returns the run folder of a smoke run, after checks of what every run leaves."""
    assert call(program, f"--out_dir={folder}", "--run_name=one", *arguments) == 0
    run = folder / "one"
    assert json.loads((run / "summary.json").read_text())["status"] == "complete"
    report = (run / "report.html").read_text()
    pictures = sorted((run / "figures").iterdir())
    assert report.count("data:image/") == len(pictures) > 0
    assert "http://" not in report
    assert "https://" not in report
    for picture in pictures:
        with Image.open(picture) as image:
            assert min(image.size) > 300
            assert len(np.unique(np.asarray(image.convert("L")))) > 10  # it is not empty
    return run


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def column(rows, name):
    return np.array([float(row[name]) for row in rows])


# nielsen


@pytest.mark.slow
def test_the_chapter_is_trained_and_its_rows_are_what_the_curves_say(tmp_path, monkeypatch):
    monkeypatch.setattr(nielsen, "CHAPTER", (nielsen.CHAPTER[3], nielsen.CHAPTER[4]))
    run = smoke(nielsen, tmp_path, "--num_seeds=3")
    rows, curves = table(run / "table.csv"), table(run / "curves.csv")
    assert [row["network"] for row in rows] == ["64-30-10", "64-10"]
    assert set(rows[0]) == {column.name for column in nielsen.TABLE.columns}
    for row in rows:
        own = [curve for curve in curves if curve["network"] == row["network"]]
        assert [curve["epoch"] for curve in own] == ["1", "2"]
        best = [column(own, f"seed_{seed}").max() for seed in range(3)]
        assert float(row["median"]) == pytest.approx(statistics.median(best))
        assert float(row["best_of_three"]) == pytest.approx(max(best))
        assert row["printed"] == ""  # these are digits, and the book's are of MNIST
        assert int(row["num_stuck"]) <= int(row["num_seeds"]) == 3
    assert int(rows[0]["num_stuck"]) == 3  # η = 100 learns nothing


def test_the_best_of_three_is_the_mean_over_all_triples():
    assert nielsen.best_of_three(np.array([1.0, 2.0])) is None
    values = np.array([5.0, 1.0, 3.0, 2.0])
    triples = [(5, 1, 3), (5, 1, 2), (5, 3, 2), (1, 3, 2)]
    assert nielsen.best_of_three(values) == pytest.approx(np.mean([max(t) for t in triples]))


def test_the_printed_numbers_agree_with_each_other():
    for printed in nielsen.CHAPTER:
        if printed.right:
            assert printed.best == max(printed.right.values()) / 10_000


# reshuffling


@pytest.mark.slow
def test_walks_follow_the_closed_forms_and_reject_those_of_other_orders(tmp_path):
    few = ("--num_targets=8", "--num_walks=3000", "--num_rounds=6", "--epochs=1", "--num_seeds=2")
    run = smoke(reshuffling, tmp_path, *few)
    rows = table(run / "quadratic.csv")
    drawn = [row for row in rows if row["standard_error"]]
    assert {row["order"] for row in drawn} == {"with_replacement", "reshuffling", "fixed_order"}
    laws = {(row["order"], row["rate"]): float(row["predicted"]) for row in rows}
    for row in drawn:
        measured, error = float(row["measured"]), float(row["standard_error"])
        assert abs(measured - float(row["predicted"])) < 5 * error, row
        if row["order"] == "reshuffling" and 0.05 <= float(row["rate"]) <= 0.2:
            assert abs(measured - laws["with_replacement", row["rate"]]) > 5 * error
    for row in rows:
        if not row["standard_error"]:
            assert float(row["ratio"]) == pytest.approx(1, abs=1e-4)  # walked in float32 or more
    network = table(run / "network.csv")
    assert {row["order"] for row in network} == set(_orders.ORDERS)
    assert float(network[0]["cost_ratio"]) == 1


def test_a_given_order_is_predicted_at_every_step():
    targets = np.array([1.0, -2.0, 0.5, 0.5])
    for order, given in (("cyclic", targets), ("sorted", np.sort(targets))):
        x = _orders.START
        for epoch, (step, target) in itertools.product(range(3), enumerate(given)):
            law = _orders.predict(order, 0.3, targets, epoch, step)
            assert law == pytest.approx(x**2), (order, epoch, step)
            x -= 0.3 * (x - target)


def test_orders_of_an_epoch_are_what_they_are_called():
    labels = np.array([2, 0, 1, 0, 2, 1, 0])
    draw = functools.partial(_orders.draw_epoch, labels=labels, n=7, batch_size=2)

    def epochs(order):
        return [np.asarray(draw(order, key=jax.random.key(0), number=e)).ravel() for e in (0, 1)]

    for order in ("reshuffling", "fixed_order", "cyclic", "sorted"):
        for batches in epochs(order):
            assert sorted(batches.tolist()) == [-1, *range(7)]
    for order, is_same in (("reshuffling", False), ("fixed_order", True), ("cyclic", True)):
        first, second = epochs(order)
        assert (first.tolist() == second.tolist()) == is_same
    assert epochs("cyclic")[0].tolist() == [*range(7), -1]
    assert labels[epochs("sorted")[0][:-1]].tolist() == sorted(labels)
    replaced = epochs("with_replacement")
    assert replaced[0].tolist() != replaced[1].tolist()
    assert min(replaced[0]) >= 0


def test_orders_are_compared_seed_by_seed():
    first = np.arange(7.0)
    assert reshuffling.compare(first[:], first[:]) == (None, None)
    better, p = reshuffling.compare(first, first + 0.1 * np.arange(1, 8))
    assert (better, p) == (7, pytest.approx(2 / 2**7))
    assert reshuffling.compare(first[:3], first[:3] + 1) == (3, None)


# directions


@pytest.fixture(scope="module")
def regression():
    """A linear regression, where the change of the cost is of second order exactly."""
    random = np.random.default_rng(0)
    examples = Examples(jnp.asarray(random.normal(size=(6, 3))), jnp.asarray(random.normal(size=6)))

    def fun(w, example):
        return sj.quadratic_cost(w @ example.inputs, example.labels)

    return fun, jnp.asarray([1.0, -2.0, 0.5]), examples


def test_the_change_of_a_quadratic_is_as_expected_over_every_mini_batch(regression):
    fun, w, examples = regression
    config = directions.Config(num_probes=4000)
    point = directions.look(fun, w, examples, 0, jax.random.key(1), config)
    x, y = map(np.asarray, examples)
    g = (x @ np.asarray(w) - y)[:, None] * x
    mean, hessian = g.mean(axis=0), x.T @ x / 6
    sigma = (g - mean).T @ (g - mean) / 6
    assert point.squared_norm == pytest.approx(mean @ mean)
    assert point.curvature == pytest.approx(mean @ hessian @ mean)
    assert point.noise == pytest.approx(np.trace(hessian @ sigma), rel=0.05)
    assert abs(point.noise - np.trace(hessian @ sigma)) < 4 * point.noise_error
    assert 0 < point.noise_error < 0.05 * point.noise

    def cost(w):
        return np.mean((x @ w - y) ** 2) / 2

    changes = [
        cost(np.asarray(w) - 0.2 * g[list(pair)].mean(axis=0)) - cost(np.asarray(w))
        for pair in itertools.combinations(range(6), 2)
    ]
    noise = (6 - 2) / (6 - 1) * np.trace(hessian @ sigma) / 2
    terms = directions.expected_change(0.2, mean @ mean, mean @ hessian @ mean, noise)
    assert sum(terms) == pytest.approx(np.mean(changes))
    assert sum(terms[:2]) != pytest.approx(np.mean(changes), rel=0.05)

    steps = directions.take_steps(fun, w, examples, jax.random.key(2), 0.2, 2, 3000)
    error = steps.change.std(ddof=1) / np.sqrt(3000)
    assert abs(steps.change.mean() - np.mean(changes)) < 5 * error
    cosines = [
        g[list(pair)].mean(axis=0) @ mean for pair in itertools.combinations(range(6), 2)
    ] / np.array(
        [
            np.linalg.norm(g[list(pair)].mean(axis=0)) * np.linalg.norm(mean)
            for pair in itertools.combinations(range(6), 2)
        ]
    )
    assert sorted(set(steps.cosine.round(9))) == sorted(set(cosines.round(9)))


@pytest.mark.slow
def test_steps_are_measured_along_the_training(tmp_path):
    run = smoke(directions, tmp_path, "--batch_sizes=10", "--epochs=1")
    rows, rates = table(run / "table.csv"), table(run / "learning_rates.csv")
    assert [(row["epoch"], row["batch_size"]) for row in rows] == [("0", "10"), ("1", "10")]
    for row in rows + rates:
        terms = [float(row[name]) for name in ("descent", "bend", "noise")]
        assert float(row["predicted"]) == pytest.approx(sum(terms))
        error = np.hypot(float(row["standard_error"]), float(row["predicted_error"]))
        if error:
            gap = float(row["measured"]) - float(row["predicted"])
            assert float(row["z"]) == pytest.approx(gap / error, rel=1e-6)
    for row in rows:
        largest = max(abs(float(row[name])) for name in ("descent", "bend", "noise"))
        assert (row["in_range"] == "yes") == (largest <= float(row["cost"]) / 2)
        if row["batch_size"] == str(N):
            assert terms[2] == 0
            assert float(row["standard_error"]) == pytest.approx(0, abs=1e-7)
    for m in ("10", str(N)):  # steps so small that the first order decides
        small = next(row for row in rates if row["batch_size"] == m)
        assert float(small["measured"]) == pytest.approx(float(small["descent"]), rel=0.4)


def test_epochs_measured_begin_with_0_and_end_with_the_last():
    assert directions.epochs_measured(0) == [0]
    assert directions.epochs_measured(2) == [0, 1, 2]
    many = directions.epochs_measured(30)
    assert (many[0], many[1], many[-1]) == (0, 1, 30)
    assert len(many) <= 10


# landscape


def test_the_plane_holds_what_the_two_largest_directions_hold():
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 3)))[0].T
    first = np.array([[0, 0, 0], [3, 0, 0], [3, 2, 0.1]]) @ basis
    second = np.array([[0, 0, 0], [3, -2, 0.1]]) @ basis
    plane, share = landscape.principal_plane([first, second])
    np.testing.assert_allclose(plane @ plane.T, np.eye(2), atol=1e-12)
    on_plane = sum(np.sum((part @ plane.T) ** 2) for part in (first, second))
    assert share == pytest.approx(on_plane / sum(np.sum(part**2) for part in (first, second)))
    assert 0.999 < share < 1
    assert (first[-1] @ plane.T > 0).all()


def test_a_plane_holds_most_of_two_paths_that_know_of_no_landscape():
    steps = landscape.spaced_steps(2400, 60)
    ends = list(np.random.default_rng(0).normal(size=(2, 2260)))
    walks, lines = landscape.null_shares(steps, ends, np.random.default_rng(1))
    assert lines == pytest.approx(1)
    assert 0.6 < walks < 0.9


@pytest.mark.slow
def test_sgd_walks_as_an_epoch_does_and_gradient_descent_takes_all_examples():
    _, dataset = _starting_point.prepare({"smoke": True, "dtype": "float64"})
    fun, _ = _classifier.example_functions("quadratic", 10, dataset.scale, np.float64)
    examples = _classifier.to_device(dataset.train, np.float64)
    start = sj.init_network(jax.random.key(0), (64, 4, 10), "scaled", jnp.float64)
    batches = np.asarray(sampling.epoch(jax.random.key(1), N, 20))
    steps = np.array([0, 3, 10])
    for order, rows in ((batches, batches), (None, np.tile(np.arange(N), (10, 1)))):
        walk = landscape._walk(fun, 0.5, start, examples, order, steps)
        state = sj.init_state(start, sj.sgd(0.5))
        state, _ = sj.make_epoch(fun, sj.sgd(0.5))(state, examples, jnp.asarray(rows))
        end = jax.flatten_util.ravel_pytree(state.params)[0]
        np.testing.assert_allclose(walk[-1], end, rtol=1e-9, atol=1e-12)
        np.testing.assert_array_equal(walk[0], jax.flatten_util.ravel_pytree(start)[0])


@pytest.mark.slow
def test_both_paths_are_shown_and_animated_on_one_plane(tmp_path):
    run = smoke(landscape, tmp_path, "--epochs=1")
    rows = table(run / "table.csv")
    assert [row["step"] for row in rows] == ["0", "5", "20"]
    assert column(rows, "gradients_sgd").tolist() == [0, 50, 200]
    assert column(rows, "gradients_full").tolist() == [0, 1000, 4000]
    assert (column(rows, "x_sgd")[0], column(rows, "y_full")[0]) == (0, 0)
    assert rows[0]["cost_sgd"] == rows[0]["cost_full"]
    length = np.hypot(column(rows, "x_sgd"), column(rows, "y_sgd"))
    assert (length <= column(rows, "travelled") + 1e-4).all()
    with Image.open(run / "figures" / "landscape.gif") as animation:
        assert animation.n_frames == 3
    assert "data:image/gif;base64," in (run / "report.html").read_text()
    assert len(table(run / "plane.csv")) == 7 * 7


# samplers


@pytest.mark.slow
def test_every_sampler_is_trained_and_pays_for_all_its_gradients(tmp_path):
    run = smoke(samplers, tmp_path, "--epochs=6", "--num_seeds=2", "--sizes=64,5,10")
    every = table(run / "training.csv")
    assert [row["schedule"] for row in every] == 4 * list(_sampler_rounds.SCHEDULES)
    rows = {row["sampler"]: row for row in every}
    assert list(rows) == list(_sampler_rounds.SAMPLERS)
    for name, steps in (("uniform", 120), ("stratified", 120), ("importance", 60), ("svrg", 40)):
        assert int(rows[name]["num_steps"]) == steps
        assert int(rows[name]["num_gradients"]) == 6 * N
    variance = table(run / "variance.csv")
    assert len(variance) == 6
    np.testing.assert_allclose(column(variance, "error_uniform"), (N - 10) / (N - 1), rtol=1e-4)
    for name, passes in (("stratified", 1), ("importance", 2), ("svrg", 3)):
        worth = column(variance, "error_uniform") / column(variance, f"error_{name}") / passes
        np.testing.assert_allclose(column(variance, f"worth_{name}"), worth, rtol=1e-6)


def test_a_learning_rate_at_the_edge_of_those_tried_is_not_reported():
    costs = np.tile(np.arange(10.0)[:, None], (1, 7)) + 1
    costs[3] = 0.5 + np.arange(7) / 100
    worse = costs + 0.1
    row = samplers.summarize(costs, 0.25, worse)
    assert (row["learning_rate"], row["cost_median"], row["excess"]) == (0.1, 0.53, 0.28)
    assert (row["cost_least"], row["cost_most"]) == (0.5, pytest.approx(0.56))
    assert row["p_value"] == pytest.approx(2 / 2**7)  # all seven seeds are better
    assert samplers.summarize(worse, None, worse)["p_value"] is None
    assert samplers.summarize(costs[:, :5], None, worse[:, :5])["p_value"] is None
    costs[0] = 0.1
    edge = samplers.summarize(costs, 0.25, worse)
    assert edge["learning_rate"] == 0.003
    assert edge["cost_median"] is None
    costs[0] = np.nan
    assert samplers.best_rate(costs) == 3


@pytest.mark.slow
def test_the_rate_falls_and_the_second_half_is_averaged():
    def fun(params, example):
        return params[0] + 0 * example.inputs[0]  # a step subtracts η

    def take_round(params, examples, key, rate):
        return (params[0] - rate,)

    examples = Examples(jnp.zeros((4, 1)), jnp.zeros(4, jnp.int32))
    first = ((jnp.zeros(2),), jax.random.split(jax.random.key(0), 2))
    rates = np.array(_sampler_rounds.RATES)
    steady = _sampler_rounds.train(fun, take_round, examples, first, 4)
    np.testing.assert_allclose(steady.costs[:, 0], -rates[:, None] * np.arange(5))
    np.testing.assert_allclose(steady.averaged[:, 1], -3 * rates)  # rounds 2, 3 and 4
    falling = _sampler_rounds.train(fun, take_round, examples, first, 4, is_decaying=True)
    sums = np.array([0, 1, 1.75, 2.25, 2.5])
    np.testing.assert_allclose(falling.costs[:, 1], -rates[:, None] * sums)


def test_gradients_of_a_round_are_counted_one_by_one():
    for name, before, each in (
        ("uniform", 0, 10),
        ("stratified", 0, 10),
        ("importance", 203, 10),
        ("svrg", 203, 20),
    ):
        assert _sampler_rounds.gradients_of_round(name, 203, 10) == before + 20 * each


@pytest.mark.slow
def test_the_least_cost_of_the_convex_problem_is_that_of_another_solver():
    asked = Asked(
        samplers.Config(l2=0.1), *_starting_point.prepare({"smoke": True, "dtype": "float64"})
    )
    problem, examples = samplers.make_problem("convex", asked), asked.examples()
    zeros, unravel = jax.flatten_util.ravel_pytree(
        sj.init_network(jax.random.key(0), problem.sizes, "scaled", jnp.float64)
    )
    value_and_grad = jax.jit(
        jax.value_and_grad(lambda v: sj.mean_cost(problem.fun)(unravel(v), examples))
    )
    found = scipy.optimize.minimize(value_and_grad, zeros, jac=True, method="L-BFGS-B")
    assert samplers.least_cost(problem, examples, np.float64) == pytest.approx(found.fun, rel=1e-5)


# critical_batch_size


SIZES = 2.0 ** np.arange(11)


def swept(law, critical, random, *, spacing=0.5, num_seeds=3, noise=0.0, seed_spread=0.05):
    """Returns steps (seeds, sizes, rates) of a known trade, and the rates.

    ``law``: "quadratic" is McCandlish's own, steps as 1/(2x − x²) with x = η/η_best and
    η_best ∝ 1/(1 + B_crit/m); "flat" the same with one best η for all sizes; "parabola" is one in
    log η. The place of the best η between the rates is random.
    """
    rates = 2.0 ** np.arange(-8, 8, spacing)
    best = 2 ** random.uniform(-1, 1) / (1 if law == "flat" else 1 + critical / SIZES)
    x = rates / np.broadcast_to(best, 11)[:, None]
    if law == "parabola":
        excess = np.exp(0.35 * np.log(x) ** 2)
    else:
        excess = np.where(x < 1.95, 1 / np.where(x < 1.95, 2 * x - x**2, 1), np.inf)
    steps = 100 * (1 + critical / SIZES)[:, None] * excess
    seeds = np.exp(seed_spread * random.normal(size=(num_seeds, 1, 1)))
    return steps * seeds * np.exp(noise * random.normal(size=(num_seeds, *steps.shape))), rates


def test_the_fit_finds_the_trade_that_steps_were_made_from():
    steps, rates = swept("parabola", 30, np.random.default_rng(0), seed_spread=0.0)
    fit = fit_trade(SIZES, steps, rates)
    for value, truth in zip(fit, (100, 3000, 30), strict=True):
        np.testing.assert_allclose(value, truth, rtol=1e-6)


def test_the_best_rate_lies_between_those_tried():
    log_rates = np.log(2.0 ** np.arange(-2, 3, 0.5))
    log_steps = 1.5 + 0.4 * (log_rates - 0.3) ** 2
    best = find_best(np.stack([log_steps, log_rates]), log_rates)
    np.testing.assert_allclose([best.log_steps[0], best.log_rate[0]], [1.5, 0.3])
    assert best.is_edge.tolist() == [False, True]
    log_steps[log_rates > 0.4] = np.inf  # what lies beyond the best one never arrives
    missing = find_best(log_steps[None], log_rates)
    assert missing.is_edge[0]
    assert missing.log_steps[0] == log_steps.min()


@pytest.mark.slow
@pytest.mark.parametrize("law", ["quadratic", "flat", "parabola"])
@pytest.mark.parametrize("num_seeds", [3, 8])
@pytest.mark.parametrize("noise", [0.0, 0.05, 0.15])
def test_the_interval_of_the_critical_batch_size_holds_it(law, num_seeds, noise):
    """At least 0.9 of 60 sweeps; rates a factor of 2 apart fail where there is no noise."""

    def coverage(spacing):
        random = np.random.default_rng(1)
        inside = 0
        for _ in range(60):
            steps, rates = swept(law, 10, random, spacing=spacing, num_seeds=num_seeds, noise=noise)
            _, low, high = fit_trade(SIZES, steps, rates).critical
            inside += low <= 10 <= high
        return inside / 60

    assert coverage(0.5) >= 0.9
    if law == "quadratic" and noise == 0:
        assert coverage(1.0) < 0.8


def test_progress_weighs_a_noise_scale_by_the_steps_it_leaves_undone():
    scales = np.array([1.0, 3.0, np.nan, np.inf])
    weights = 1 / (1 + scales[:2] / 2)
    assert progress_weighted(scales, 2) == pytest.approx(np.average(scales[:2], weights=weights))
    assert np.isnan(progress_weighted(scales[2:], 2))


@pytest.mark.slow
def test_steps_to_the_target_are_counted_for_every_learning_rate_and_interpolated():
    def fun(params, example):
        return -params[0].biases[0] + 0 * example.inputs[0]  # a step adds η to the bias

    examples = Examples(jnp.zeros((4, 1)), jnp.zeros(4, jnp.int32))
    first, keys = _classifier.first_networks((1, 1), "scaled", range(2), jnp.float64)

    def measure(params):
        return params[0].biases[..., 0] - first[0].biases

    problem = _target.Problem(fun, examples, first, keys, measure)
    steps = _target.count_steps(problem, 3, 1, 60, target=100.0)
    arrived = np.isfinite(steps).all(axis=0)
    exact = 100 / np.array(_target.RATES)
    np.testing.assert_allclose(steps[:, arrived], np.broadcast_to(exact, steps.shape)[:, arrived])
    assert arrived[-2:].all()  # the best, and the one next to it
    assert not arrived[0]  # 800 steps
    with pytest.raises(ArithmeticError, match="no learning rate brings every seed"):
        _target.count_steps(problem, 3, 4, 30, target=1e6)


def test_counting_ends_when_nothing_that_may_come_can_be_better():
    inf = np.inf
    reached = np.array([[5.0, 2.0, 9.0], [7.0, 3.0, inf], [inf, inf, inf]])
    assert not _target.is_decided(reached, 100)  # no rate has brought all seeds there
    reached[2, 0] = 12.0  # the first, in a mean of 8
    assert not _target.is_decided(reached, 10.9)  # the second may still have (2 + 3 + 11)/3
    assert _target.is_decided(reached, 19)
    reached[2, 1] = 15.0
    assert not _target.is_decided(reached, 9)  # the second, in 20/3; the third may have 9
    assert _target.is_decided(reached, 10.1)  # the third takes over 1.5 times as long


def test_the_noise_scale_of_a_run_is_the_ratio_of_means():
    rows = [{"trace": 1.0, "squared_norm": 1.0}, {"trace": 3.0, "squared_norm": -0.5}]
    assert critical_batch_size.mean_noise_scale(rows) == 8.0
    scales = [{"noise_scale": value} for value in (2.0, 4.0, 1.0, 9.0, 5.0)]
    assert critical_batch_size.median_noise_scale(scales) == 4.0


@pytest.mark.slow
def test_sizes_are_swept_and_set_beside_the_noise_scale(tmp_path):
    run = smoke(critical_batch_size, tmp_path, "--num_seeds=2", "--sizes=64,5,10")
    rows, noise = table(run / "table.csv"), table(run / "noise.csv")
    assert column(rows, "batch_size").tolist() == [8, 16, 64]
    np.testing.assert_allclose(
        column(rows, "examples"), column(rows, "batch_size") * column(rows, "steps")
    )
    assert (column(rows, "steps_least") <= column(rows, "steps_most")).all()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["critical_batch_size_low"] < summary["critical_batch_size"]
    law = summary["least_steps"] + summary["least_examples"] / column(rows, "batch_size")
    np.testing.assert_allclose(column(rows, "steps_fitted"), law, rtol=1e-6)
    assert float(noise[0]["accuracy"]) < 0.3
    scale = column(noise, "trace").sum() / column(noise, "squared_norm").sum()
    assert summary["noise_scale_of_means"] == pytest.approx(scale)


# all


def test_a_batch_size_of_full_is_that_of_all_examples():
    prepared = _starting_point.prepare({"batch_size": 0, "epochs": 1, "smoke": True})
    for program in (landscape, samplers):
        assert program.check(Asked(program.Config(), *prepared)).training.batch_size == N


@pytest.mark.parametrize("can_resume", [False, True])
def test_an_interrupted_run_leaves_the_rows_it_has_found_and_says_where(
    tmp_path, capsys, can_resume
):
    folder = runs.RunFolder.create(tmp_path, "mine", "train")
    folder.write_config({"experiment": "samplers"})
    rows = [{"m": 1, "cost": 0.5}, {"m": 10, "cost": None}]

    def find(show):
        for row in rows:
            show(_tabled.Table((_tabled.Column("m", "m"),)), row)
        raise KeyboardInterrupt

    assert _tabled.record(folder, [], 3, find, can_resume=can_resume) == 130
    printed = capsys.readouterr()
    how = ": continue with --resume --run_name=mine" if can_resume else ""
    assert printed.err == f"error: interrupted; the rows found so far are kept{how}\n"
    assert printed.out.endswith(f"run folder: {folder.path}\n")
    assert table(folder.path / "table.csv") == [
        {"m": "1", "cost": "0.5"}, {"m": "10", "cost": ""},
    ]  # fmt: skip
    assert not folder.summary_path.exists()
    _recorded.renew_report(folder)  # of what was kept
    assert "mine: interrupted" in folder.report_path.read_text()


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        (nielsen, ["--sizes=64,10"], "--sizes means nothing to this program"),
        (reshuffling, ["--num_walks=1"], "num_walks is 1; expected a whole number of at least 2"),
        (directions, ["--batch_sizes=ten"], "batch_sizes is 'ten'; expected whole numbers"),
        (directions, ["--batch_sizes=201"], "batch_sizes holds 201; expected at most 200"),
        (directions, ["--num_seeds=2"], "--num_seeds means nothing to this program"),
        (directions, ["--num_steps=1"], "num_steps is 1; expected a whole number of at least 2"),
        (landscape, ["--epochs=0"], "epochs is 0; expected at least 1"),
        (landscape, ["--grid=1"], "grid is 1; expected a whole number of at least 2"),
        (critical_batch_size, ["--batch_sizes=1,2"], "batch_sizes is (1, 2); expected three sizes"),
        (critical_batch_size, ["--batch_sizes=1,200,full"], "is (1, 200); expected three sizes"),
        (critical_batch_size, ["--batch_sizes=1,2,201"], "batch_sizes holds 201; expected at most"),
        (critical_batch_size, ["--target=1"], "target is 1.0; expected an accuracy between 0 and"),
        (samplers, ["--problems=hard"], "problems is ('hard',); expected any of convex, network"),
        (samplers, ["--batch_size=9"], "batch_size is 9; expected at least 10"),
        (samplers, ["--uniform_share=0"], "uniform_share is 0.0; expected a number above 0"),
        *(
            (
                program,
                ["--batch_size=adaptive:cabs", "--num_seeds=1"][:arguments],
                "batch_size is adaptive:cabs; expected one size for all of training",
            )
            for program, arguments in ((reshuffling, 2), (samplers, 2), (landscape, 1))
        ),
    ],
)
def test_bad_input_is_told_before_any_work(program, arguments, message, tmp_path, capsys):
    assert call(program, f"--out_dir={tmp_path}", *arguments) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
