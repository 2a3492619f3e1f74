"""The claims of scripts/benchmark.py: contenders agree, take turns, and are skipped by name."""

import importlib
import json
import os
import pathlib
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

SCRIPTS = pathlib.Path(__file__).parents[1] / "scripts"


@pytest.fixture(scope="module")
def benchmark():
    return importlib.import_module("benchmarks.__main__")


@pytest.fixture(scope="module")
def harness():
    return importlib.import_module("benchmarks.harness")


@pytest.fixture(scope="module")
def epoch():
    return importlib.import_module("benchmarks.epoch")


@pytest.fixture(scope="module")
def per_example():
    return importlib.import_module("benchmarks.per_example")


@pytest.fixture(scope="module")
def problems():
    return importlib.import_module("benchmarks.problems")


# The suite `epoch`


def assert_all_agree(harness, suite):
    contenders = [c._replace(max_rounds=None) for c in suite.contenders]
    result = harness.measure(suite._replace(contenders=contenders, tolerance=1e-4), num_rounds=1)
    assert set(result["left_out"].values()) <= {"there is no C compiler here"}
    timed = {row["contender"] for row in result["rows"]} | set(result["skipped"])
    timed |= set(result["left_out"])
    assert len(timed) >= len({c.name for c in contenders})


def chosen_from(suite, *words):
    ours = suite.contenders[0].name
    chosen = [c for c in suite.contenders if c.name.startswith((ours, *words))]
    return suite._replace(contenders=chosen)


@pytest.mark.slow
def test_all_contenders_of_the_suite_epoch_compute_the_same(epoch, harness):
    suite = epoch.epoch_suites(n=40)[0]
    without_torch = [c for c in suite.contenders if "torch" not in c.needs]
    assert_all_agree(harness, suite._replace(contenders=without_torch))


@pytest.mark.slow
def test_peers_of_the_suite_epoch_take_other_networks_and_mini_batches(epoch, harness):
    problem = epoch.make_epoch_problem(None, 40, (6, 5, 4, 3), batch_size=8, learning_rate=0.5)
    suite = epoch.epoch_suite("other", problem)
    assert suite.work.startswith("one epoch of [6, 5, 4, 3], m = 8, n = 40")
    assert_all_agree(harness, chosen_from(suite, "NumPy", "scikit-learn"))


@pytest.mark.slow
def test_the_wide_network_stands_beside_a_product_of_as_many_operations(epoch, harness):
    names = [suite.name for suite in epoch.epoch_suites(n=40)]
    assert names == ["epoch", "epoch_m128", "epoch_m1000", "epoch_wide"]
    problem = epoch.make_epoch_problem(None, 40, (6, 5, 4, 3), batch_size=8, learning_rate=0.5)
    # Each product of (a, b) takes 2ab; the inputs need no gradient.
    assert epoch.num_operations(problem) == 40 * 2 * (2 * 6 * 5 + 3 * 5 * 4 + 3 * 4 * 3)
    suite = epoch.wide_suite("wide", problem)
    product = suite.contenders[-1].make()()
    assert product.shape == (2048, 2048)
    result = harness.measure(suite, num_rounds=1)
    assert set(result["left_out"].values()) <= {"there is no C compiler here"}


@pytest.mark.slow
def test_c_is_left_out_where_there_is_no_compiler(epoch, monkeypatch):
    epoch.epoch_c._library.cache_clear()
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(NotImplementedError, match="no C compiler"):
        epoch.epoch_c.c_epoch(epoch.make_epoch_problem(None, 40))


@pytest.mark.slow
def test_c_leaves_subnormal_numbers_as_they_are(epoch):
    try:
        epoch.epoch_c._library()
    except NotImplementedError as reason:
        pytest.skip(str(reason))
    assert np.float64(5e-324) * np.float64(1.0) > 0


@pytest.mark.slow
def test_a_sweep_is_timed_by_the_run(epoch, harness):
    sweep = importlib.import_module("benchmarks.sweep")
    problem = epoch.make_epoch_problem(None, 40, (6, 5, 4))
    suite = sweep.sweep_suite("sweep", problem, num_runs=8)
    assert [c.units for c in suite.contenders] == [1, 1, 8, 8]
    run = suite.contenders[2].make()
    single = suite.contenders[0].make()()
    for leaf, alone in zip(jax.tree.leaves(run()), jax.tree.leaves(single), strict=True):
        np.testing.assert_allclose(leaf[0, -1], alone, rtol=1e-5, atol=1e-6)
    timing = harness.Timing(harness.Contender("one", lambda: None, units=4), [], [])
    harness._run_once(lambda: time.sleep(0.02), timing)
    assert timing.seconds[0] >= 0.005


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_pytorch_computes_the_same_epoch_eagerly_and_compiled(epoch, harness):
    pytest.importorskip("torch")
    suite = epoch.epoch_suites(n=40)[0]
    assert_all_agree(harness, chosen_from(suite, "PyTorch"))


@pytest.mark.slow
def test_a_compiled_step_of_pytorch_is_left_out_where_there_is_no_compiler(epoch, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setattr("shutil.which", lambda name: None)
    problem = epoch.make_epoch_problem(None, 40)
    with pytest.raises(NotImplementedError, match="needs a C\\+\\+ compiler: g\\+\\+ or clang"):
        epoch.epoch_peers.in_torch("PyTorch, whole step compiled", problem)


@pytest.mark.slow
def test_a_contender_that_takes_the_sum_for_the_mean_is_left_out(epoch, harness, monkeypatch):
    right = epoch.epoch_peers.batch_gradients

    def faulty(*arguments):
        sums = right(*arguments)
        return [[len(arguments[2]) * g for g in each] for each in sums]

    monkeypatch.setattr(epoch.epoch_peers, "batch_gradients", faulty)
    suite = epoch.epoch_suite("epoch", epoch.make_epoch_problem(None, 40, (6, 5, 4)))
    result = harness.measure(chosen_from(suite, "NumPy, a mini-batch"), num_rounds=1)
    assert list(result["left_out"]) == ["NumPy, a mini-batch at a time: quadratic cost"]


@pytest.mark.slow
@pytest.mark.mnist
def test_the_suite_epoch_runs_on_mnist_and_says_so(epoch, harness):
    suite = epoch.epoch_suites(os.environ["SGD_JAX_MNIST_DIR"], n=40)[0]
    assert "n = 40 (MNIST)" in suite.work
    assert_all_agree(harness, suite._replace(contenders=suite.contenders[:2]))


# The suite `per_example`


NETWORKS = {
    "mlp": lambda problems: problems.mlp((6, 5, 4), 4),
    "conv": lambda problems: problems.conv(8, (2, 3), 4),
    "transformer": lambda problems: problems.transformer(4, 8, 2, 7, 4),
    "transformer_untied": lambda problems: problems.transformer(4, 8, 2, 7, 4, tied=False),
}


def assert_ways_agree(per_example, harness, problem, ways):
    @jax.jit
    def ask_all(params, examples):
        return [{q: f(params, examples) for q, f in way.items()} for way in ways]

    ours, *others = ask_all(*problem.at)
    for other in others:
        for question, answer in other.items():
            found, expected = per_example.read(answer), per_example.read(ours[question])
            assert harness.relative_error(found, expected) < 1e-4, question
    return ours


@pytest.mark.slow
def test_the_contenders_in_jax_answer_every_question_alike(per_example, problems, harness):
    problem = NETWORKS["mlp"](problems)
    ways = [
        per_example.by_sgd_jax(problem, "auto"),
        {per_example.MEAN: per_example.by_plain_gradient(problem)},
        per_example.by_vmap(problem),
        per_example.by_optax(problem),
    ]
    assert set(ways[0]) == set(ways[1]) | set(ways[2])
    ours = assert_ways_agree(per_example, harness, problem, ways)
    squared_norms = ours[per_example.NORMS][0]
    assert 0 < np.sum(squared_norms > problem.max_norm**2) < len(squared_norms)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["conv", "transformer"])
def test_norms_of_the_other_networks_are_those_of_vmap(per_example, problems, harness, name):
    problem = NETWORKS[name](problems)
    ways = (per_example.by_sgd_jax(problem, "auto"), per_example.by_vmap(problem))
    norms = [{per_example.NORMS: way[per_example.NORMS]} for way in ways]
    assert_ways_agree(per_example, harness, problem, norms)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(NETWORKS))
def test_contenders_in_pytorch_agree_or_are_left_out_with_their_reason(
    per_example, problems, harness, name
):
    pytest.importorskip("torch")
    suite = per_example.network_suite(NETWORKS[name](problems))
    chosen = [c for c in suite.contenders if "torch" in c.needs or c.name == "sgd_jax"]
    chosen = [c._replace(baseline=None) for c in chosen]
    result = harness.measure(suite._replace(contenders=chosen, tolerance=2e-3), num_rounds=1)
    reasons = ("Parameter tying is not supported", "BackPACK has no rule for LayerNorm")
    assert all(r.startswith(reasons) for r in result["left_out"].values()), result["left_out"]
    assert all(row["peak_bytes"] > 0 for row in result["rows"])


@pytest.mark.slow
def test_all_strategies_and_both_routes_of_the_small_tables_agree(per_example, harness):
    tiny = per_example.tiny_suite(4, (6, 5, 4))
    routes = per_example.routes_suite(4, 6, n=3, lengths=(2, 5))
    for suite in (tiny, routes):
        result = harness.measure(suite._replace(min_turn_seconds=0), num_rounds=1)
        assert not result["left_out"]
    chosen = [row["contender"] for row in result["rows"] if "chosen" in row["contender"]]
    assert chosen == ["Gram route, chosen", "outer-product route, chosen"]


@pytest.mark.slow
def test_the_contenders_of_the_suite_moments_agree(harness):
    (suite,) = importlib.import_module("benchmarks.moments").moments_suites(n=20)
    result = harness.measure(suite, num_rounds=1)
    assert not result["left_out"]
    assert len(result["rows"]) == len(suite.contenders) == 5


@pytest.mark.slow
def test_memory_is_what_is_in_between_and_what_comes_out(per_example):
    x = jnp.ones(1000, jnp.float32)
    prepared = per_example.compiled(lambda x: jnp.sort(x) + x, x)
    assert prepared.peak_bytes >= x.nbytes
    np.testing.assert_array_equal(prepared.run(), np.full(1000, 2.0))


# The suite `startup`


@pytest.fixture(scope="module")
def start_up():
    return importlib.import_module("benchmarks.start_up")


@pytest.mark.slow
@pytest.mark.parametrize("index", [1, 2])
def test_a_start_comes_to_its_first_step(start_up, index):
    (suite,) = start_up.start_up_suites()
    suite.contenders[index].make().run()


@pytest.mark.slow
def test_a_start_that_fails_is_not_timed(start_up, monkeypatch, capfd):
    with pytest.raises(subprocess.CalledProcessError):
        start_up._process("raise SystemExit('no step')", start_up._without_cache).run()
    assert "no step" in capfd.readouterr().err


def test_cpu_time_is_that_of_processes_too(harness):
    def run():
        subprocess.run([sys.executable, "-c", "for _ in range(10**6): pass"], check=True)

    suite = harness.Suite("none", "nothing", [harness.Contender("a process", lambda: run)])
    (timing,) = harness.time_in_turns(suite, num_rounds=1)
    assert timing.cpu_seconds[0] > 0.01


# The suite `gpu`


@pytest.fixture
def gpu():
    before = jax.config.jax_default_matmul_precision
    yield importlib.import_module("benchmarks.gpu")
    jax.config.update("jax_default_matmul_precision", before)


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="there is an accelerator")
def test_without_an_accelerator_the_suite_gpu_refuses_and_says_how_to_try_it(gpu):
    with pytest.raises(RuntimeError, match=r"computes on the CPU; expected a GPU or TPU.*--tiny"):
        gpu.gpu_suites()


@pytest.mark.slow
def test_an_epoch_and_a_sweep_of_the_suite_gpu_agree_at_tiny_sizes(gpu, harness):
    suites = gpu.epochs_suite(None, 40, (10, 40)), gpu.sweeps_suite(None, 40, (1, 3))
    for suite in suites:
        without_torch = [c for c in suite.contenders if "torch" not in c.needs]
        suite = suite._replace(contenders=without_torch, min_turn_seconds=0.0)
        result = harness.measure(suite, num_rounds=1)
        assert not result["left_out"]
    assert [row["question"] for row in result["rows"]] == ["1 run", "3 runs"]
    assert [c.units for c in without_torch] == [1, 3]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_many_networks_in_pytorch_are_those_of_our_sweep(gpu, harness):
    pytest.importorskip("torch")
    suite = gpu.sweeps_suite(None, 40, (3,))
    result = harness.measure(suite, num_rounds=1)
    found = {row["contender"] for row in result["rows"]}
    assert found >= {"sgd_jax.make_sweep", "PyTorch, eager", "PyTorch, whole step compiled"}
    assert all("CUDA graphs need a GPU" in reason for reason in result["left_out"].values())


# The harness


def logging_contenders(harness, log):
    def contender(name, **options):
        def run():
            log.append(name)
            return jnp.zeros(1)

        return harness.Contender(name, lambda: run, **options)

    return [contender("ours"), contender("theirs"), contender("slow", max_rounds=1)]


def quiet_suite(harness, log=None, **options):
    contenders = logging_contenders(harness, [] if log is None else log)
    return harness.Suite("none", "nothing", contenders, **options)


def markdown(harness, result):
    return harness.as_markdown([result], harness.circumstances())


def test_contenders_warm_up_and_then_take_turns_in_alternating_order(harness):
    log = []
    timings = harness.time_in_turns(quiet_suite(harness, log), num_rounds=3)
    warm_up = ["ours", "theirs"]
    assert log == [*warm_up, "ours", "theirs", "slow", "theirs", "ours", "ours", "theirs"]
    assert [len(timing.seconds) for timing in timings] == [3, 3, 1]


WARM_UP = [0.0, 1.0] * 2  # of two contenders


def test_timings_are_seconds_and_ratios_are_to_the_first(harness, monkeypatch):
    clock = iter([*WARM_UP, 0.0, 2.0, 10.0, 15.0, 20.0, 20.5])  # start and end of each run
    monkeypatch.setattr(harness.time, "perf_counter", lambda: next(clock))
    cpu = iter([*WARM_UP, 0.0, 1.0, 1.0, 4.0, 4.0, 4.5])
    monkeypatch.setattr(harness.time, "process_time", lambda: next(cpu))
    result = harness.measure(quiet_suite(harness), num_rounds=1)
    assert [row["median_seconds"] for row in result["rows"]] == [2.0, 5.0, 0.5]
    assert [row["ratio"] for row in result["rows"]] == [1.0, 2.5, 0.25]
    assert "| 2.50 | 2.50 | 3.00 | theirs | 5 | 5 to 5 | 1 |" in markdown(harness, result)


def test_a_ratio_is_to_the_baseline_that_a_contender_names(harness, monkeypatch):
    clock = iter([*WARM_UP, 0.0, 2.0, 10.0, 15.0, 20.0, 20.5])
    monkeypatch.setattr(harness.time, "perf_counter", lambda: next(clock))
    suite = quiet_suite(harness)
    contenders = [c._replace(question="speed", baseline=("theirs", "speed")) for c in suite[2]]
    result = harness.measure(suite._replace(contenders=contenders), num_rounds=1)
    assert [row["ratio"] for row in result["rows"]] == [0.4, 1.0, 0.1]
    assert "Ratios are to theirs." in markdown(harness, result)


def test_a_turn_repeats_short_work_and_long_work_stops_early(harness, monkeypatch):
    clock = iter([*WARM_UP, 0.0, 2.0, 2.0, 5.0, 10.0, 20.0])
    monkeypatch.setattr(harness.time, "perf_counter", lambda: next(clock))
    suite = quiet_suite(harness, min_turn_seconds=4.0, max_seconds=5.0)
    suite = suite._replace(contenders=suite.contenders[:2])
    timings = harness.time_in_turns(suite, num_rounds=3)
    assert [timing.seconds for timing in timings] == [[2.0, 3.0], [10.0]]


def test_a_first_run_that_uses_up_the_time_is_the_one_timed(harness, monkeypatch):
    clock = iter([0.0, 7.0, 0.0, 1.0, 20.0, 23.0, 30.0, 33.0])
    monkeypatch.setattr(harness.time, "perf_counter", lambda: next(clock))
    suite = quiet_suite(harness, max_seconds=5.0)
    suite = suite._replace(contenders=suite.contenders[:2])
    timings = harness.time_in_turns(suite, num_rounds=3)
    assert [timing.seconds for timing in timings] == [[7.0], [3.0, 3.0]]


def test_a_contender_with_another_answer_is_left_out_by_name(harness):
    def contender(name, value, question):
        return harness.Contender(name, lambda: lambda: np.array([1.0, value]), question=question)

    contenders = [contender("ours", 2.0, "a"), contender("wrong", 2.001, "a")]
    contenders += [contender("near", 2.0001, "a"), contender("other question", 3.0, "b")]
    suite = harness.Suite("none", "nothing", contenders, read=lambda answer: [answer])
    result = harness.measure(suite, num_rounds=1)
    assert [row["contender"] for row in result["rows"]] == ["ours", "near", "other question"]
    reason = "its answer is another one, by 0.0005 relative"
    assert result["left_out"] == {"wrong: a": reason}
    assert f"Left out: wrong: a; {reason}." in markdown(harness, result)


def test_a_contender_whose_library_cannot_do_the_work_is_left_out_with_its_reason(harness):
    def make():
        raise NotImplementedError("no rule for LayerNorm")

    suite = quiet_suite(harness)
    contenders = [*suite.contenders, harness.Contender("a peer", make)]
    result = harness.measure(suite._replace(contenders=contenders), num_rounds=1)
    assert result["left_out"] == {"a peer": "no rule for LayerNorm"}


def test_vectors_are_compared_entry_by_entry_and_other_arrays_by_norm(harness):
    a, b = np.array([1.0, 100.0]), np.array([1.1, 100.0])
    assert harness.relative_error([b], [a]) == pytest.approx(0.1)
    assert harness.relative_error([b[None]], [a[None]]) == pytest.approx(0.1 / np.hypot(1, 100))
    assert harness.relative_error([a], [a[None]]) == float("inf")
    assert not harness.relative_error([a * np.nan], [a]) <= 1


def test_a_contender_without_its_library_is_skipped_by_name(harness):
    def never():
        raise AssertionError("made without its library")

    absent = harness.Contender("a peer", never, needs=("numpy", "no_such_library"))
    suite = quiet_suite(harness)
    result = harness.measure(suite._replace(contenders=[*suite.contenders, absent]), num_rounds=1)
    assert result["skipped"] == {"a peer": ["no_such_library"]}
    assert "Skipped: a peer, for want of no_such_library." in markdown(harness, result)
    assert "a peer" not in [row["contender"] for row in result["rows"]]


def test_the_circumstances_name_device_versions_and_cores(harness):
    where = json.loads(json.dumps(harness.circumstances()))
    assert where["device"].startswith(jax.devices()[0].platform)
    assert where["versions"]["jax"] == jax.__version__
    assert where["num_cores"] >= 1
    table = harness.as_markdown([], where)
    assert f"jax {jax.__version__}" in table
    assert f"{where['num_cores']} cores" in table


def test_no_rounds_are_refused(harness):
    with pytest.raises(ValueError, match="num_rounds must be at least 1, got 0"):
        harness.time_in_turns(quiet_suite(harness), num_rounds=0)


def test_results_are_written_as_json_and_as_tables(benchmark, harness, tmp_path):
    results = [harness.measure(quiet_suite(harness), num_rounds=2) for _ in range(2)]
    where, folder = harness.circumstances(), tmp_path / "new" / "folder"
    benchmark.write("epoch", results, where, folder)
    assert json.loads((folder / "epoch.json").read_text()) == where | {"tables": results}
    assert (folder / "epoch.md").read_text() == harness.as_markdown(results, where) + "\n"


# The figure


def rows(*names, question=""):
    return [{"contender": n, "question": question, "ratio": 0.5 + k} for k, n in enumerate(names)]


@pytest.mark.slow
def test_the_figure_shows_the_main_tables_of_the_suites_that_are_there(tmp_path):
    figure = importlib.import_module("benchmarks.figure")
    tables = {
        "epoch": [
            {"suite": "epoch", "work": "one epoch", "rows": rows("sgd_jax", "C", "NumPy")},
            {"suite": "epoch_wide", "work": "of a wide network", "rows": rows("sgd_jax")},
        ],
        "per_example": [
            {"suite": "mlp", "work": "layers", "rows": rows("BackPACK", question="norms + mean")},
            {"suite": "conv", "work": "convolutions", "rows": rows("sgd_jax", question="mean")},
        ],
    }
    for suite, content in tables.items():
        (tmp_path / f"{suite}.json").write_text(json.dumps({"tables": content}))
    path = tmp_path / "figures" / "benchmark.png"
    headings = figure.draw_figure(tmp_path, path)
    assert [heading.rpartition(" ")[2] for heading in headings] == ["epoch", "layers"]
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_figure_of_nothing_is_refused(benchmark, tmp_path):
    with pytest.raises(SystemExit, match="holds no main table of epoch"):
        benchmark.draw(str(tmp_path), tmp_path / "benchmark.png")
    assert not (tmp_path / "benchmark.png").exists()


@pytest.mark.slow
def test_the_program_refuses_a_bad_flag_by_name():
    command = [sys.executable, SCRIPTS / "benchmark.py", "--num_rounds=0"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode != 0
    assert "flag --num_rounds=0" in finished.stderr
