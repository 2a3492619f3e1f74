"""The claims of scripts/benchmark.py: contenders agree, take turns, and are skipped by name."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

SCRIPT = pathlib.Path(__file__).parents[1] / "scripts" / "benchmark.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_contenders_agree(suite):
    ours, *others = [contender.make()() for contender in suite.contenders]
    for other in others:
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)


def test_all_contenders_of_the_suite_epoch_compute_the_same(benchmark):
    assert_contenders_agree(benchmark.epoch_suite(n=40))


def test_a_contender_that_takes_the_sum_for_the_mean_is_caught(benchmark, monkeypatch):
    right = benchmark.numpy_batch

    def faulty(*arguments):
        sums = right(*arguments)
        return [[benchmark.BATCH_SIZE * g for g in each] for each in sums]

    monkeypatch.setattr(benchmark, "numpy_batch", faulty)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_contenders_agree(benchmark.epoch_suite(n=40))


@pytest.mark.mnist
def test_the_suite_epoch_runs_on_mnist_and_says_so(benchmark):
    suite = benchmark.epoch_suite(os.environ["SGD_JAX_MNIST_DIR"], n=40)
    assert "n = 40 (MNIST)" in suite.work
    assert_contenders_agree(suite)


def logging_contenders(benchmark, log):
    def contender(name, **options):
        def run():
            log.append(name)
            return jnp.zeros(1)

        return benchmark.Contender(name, lambda: run, **options)

    return [contender("ours"), contender("theirs"), contender("slow", max_rounds=1)]


def test_contenders_warm_up_and_then_take_turns_in_alternating_order(benchmark):
    log = []
    timings = benchmark.time_in_turns(logging_contenders(benchmark, log), num_rounds=3)
    warm_up = ["ours", "theirs"]
    assert log == [*warm_up, "ours", "theirs", "slow", "theirs", "ours", "ours", "theirs"]
    assert [len(timing.seconds) for timing in timings] == [3, 3, 1]


def test_timings_are_seconds_and_ratios_are_to_the_first(benchmark, monkeypatch):
    clock = iter([0.0, 2.0, 10.0, 15.0, 20.0, 20.5])  # start and end of each run
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(clock))
    suite = benchmark.Suite("nothing", logging_contenders(benchmark, []))
    result = benchmark.measure("none", suite, num_rounds=1)
    assert [row["median_seconds"] for row in result["rows"]] == [2.0, 5.0, 0.5]
    assert [row["ratio"] for row in result["rows"]] == [1.0, 2.5, 0.25]
    assert "| 2.50 | theirs | 5 | 5 to 5 | 1 |" in benchmark.as_markdown(result)


def test_a_contender_without_its_library_is_skipped_by_name(benchmark):
    def never():
        raise AssertionError("made without its library")

    absent = benchmark.Contender("a peer", never, needs=("numpy", "no_such_library"))
    suite = benchmark.Suite("nothing", [*logging_contenders(benchmark, []), absent])
    result = benchmark.measure("none", suite, num_rounds=1)
    assert result["skipped"] == {"a peer": ["no_such_library"]}
    assert "Skipped: a peer, for want of no_such_library." in benchmark.as_markdown(result)
    assert "a peer" not in [row["contender"] for row in result["rows"]]


def test_a_result_names_device_versions_and_cores(benchmark):
    suite = benchmark.Suite("nothing", logging_contenders(benchmark, []))
    result = json.loads(json.dumps(benchmark.measure("none", suite, num_rounds=1)))
    assert result["device"].startswith(jax.devices()[0].platform)
    assert result["versions"]["jax"] == jax.__version__
    assert result["num_cores"] >= 1
    table = benchmark.as_markdown(result)
    assert f"jax {jax.__version__}" in table
    assert f"{result['num_cores']} cores" in table


def test_no_rounds_are_refused(benchmark):
    with pytest.raises(ValueError, match="num_rounds must be at least 1, got 0"):
        benchmark.time_in_turns(logging_contenders(benchmark, []), num_rounds=0)


def test_a_result_is_written_as_json_and_as_the_table(benchmark, tmp_path):
    suite = benchmark.Suite("nothing", logging_contenders(benchmark, []))
    result = benchmark.measure("epoch", suite, num_rounds=2)
    benchmark.write(result, tmp_path / "new" / "folder")
    assert json.loads((tmp_path / "new" / "folder" / "epoch.json").read_text()) == result
    table = (tmp_path / "new" / "folder" / "epoch.md").read_text()
    assert table == benchmark.as_markdown(result) + "\n"


def test_the_program_refuses_a_bad_flag_by_name():
    command = [sys.executable, SCRIPT, "--num_rounds=0"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode != 0
    assert "flag --num_rounds=0" in finished.stderr
