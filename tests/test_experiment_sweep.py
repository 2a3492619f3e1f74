"""The sweep: each of its runs is that of `experiments.train`; it resumes bit for bit."""

import csv
import json

import in_process
import numpy as np
import pytest

from experiments import runs, sweep, train
from experiments._config import Config

GRID = ("--learning_rates=1,10", "--batch_sizes=20,50", "--num_seeds=2", "--epochs=2")


def call(*arguments):
    return in_process.call(sweep, "--dtype=float64", "--sizes=64,5,10", *arguments)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """The folder of a sweep of 2 sizes × 2 rates × 2 seeds, 2 epochs each."""
    out_dir = tmp_path_factory.mktemp("sweep")
    assert call(*GRID, "--seed=3", f"--out_dir={out_dir}", "--run_name=whole") == 0
    return out_dir / "whole"


def rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.parametrize(("batch_size", "rate", "index"), [(20, 1.0, 0), (50, 10.0, 1)])
def test_each_run_is_that_of_train(swept, batch_size, rate, index):
    config = Config(
        sizes=(64, 5, 10), dtype="float64", smoke=True, epochs=2, num_seeds=2, seed=3,
        batch_size=batch_size, learning_rate=rate,
    )  # fmt: skip
    alone = train.run(config).records[1:]
    records = [json.loads(line) for line in (swept / "metrics.jsonl").read_text().splitlines()]
    records = [record for record in records if record["batch_size"] == batch_size]
    assert [record["epoch_of_size"] for record in records] == [1, 2]
    for record, expected in zip(records, alone, strict=True):
        for part in ("validation", "test"):
            found = [of_seed[index] for of_seed in record[f"accuracy_{part}"]]
            assert found == expected[f"accuracy_{part}"]
        assert all(0 < of_seed[index] < 1 for of_seed in record["cost"])


@pytest.mark.slow
def test_tables_sum_up_the_runs(swept):
    table, each = rows(swept / "table.csv"), rows(swept / "runs.csv")
    assert len(table) == 4
    assert len(each) == 2 * 2 * 2 * 2
    for row in table:
        key = row["batch_size"], row["learning_rate"]
        last = [
            float(one["accuracy_test"])
            for one in each
            if (one["batch_size"], one["learning_rate"]) == key and one["epoch"] == "2"
        ]
        assert len(last) == 2
        assert float(row["median_accuracy"]) == np.median(last)
        assert (float(row["min_accuracy"]), float(row["max_accuracy"])) == (min(last), max(last))
    summary = json.loads((swept / "summary.json").read_text())
    best = max(table, key=lambda row: float(row["validation_accuracy"]))
    assert summary["best_learning_rate"] == float(best["learning_rate"])
    assert (summary["status"], summary["num_runs"]) == ("complete", 8)
    page = (swept / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert (swept / "figures" / "sweep.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("stop_after", [2, 3])
def test_an_interrupted_sweep_resumes_bit_for_bit(swept, stop_after, monkeypatch, capsys):
    """Stopped between the two sizes, and within the second."""
    name, out_dir = f"stopped{stop_after}", f"--out_dir={swept.parent}"
    save = runs.Checkpoints.save

    def save_and_stop(checkpoints, state, record):
        save(checkpoints, state, record)
        if record["epoch"] + 1 == stop_after:
            raise KeyboardInterrupt

    monkeypatch.setattr(runs.Checkpoints, "save", save_and_stop)
    assert call(*GRID, "--seed=3", out_dir, f"--run_name={name}") == 130
    assert f"continue with --resume --run_name={name}" in capsys.readouterr().err
    monkeypatch.undo()
    assert call("--resume", out_dir, f"--run_name={name}") == 0
    for file in ("table.csv", "runs.csv"):
        assert (swept.parent / name / file).read_bytes() == (swept / file).read_bytes()


def test_a_run_whose_cost_is_not_finite_has_diverged():
    records = [
        {
            "epoch": 1, "batch_size": 5, "epoch_of_size": 1, "seconds": 2.0,
            "accuracy_test": [[0.5, 0.1], [0.7, 0.1]],
            "accuracy_validation": [[0.5, 0.1], [0.7, 0.1]],
            "cost": [[0.25, None], [0.75, None]],
        }
    ]  # fmt: skip
    config, grid = Config(num_seeds=2, epochs=1), sweep.Grid((1.0, 2.0), (5,))
    table, summary = sweep.summarize(records, config, grid)
    assert [row["num_diverged"] for row in table] == [0, 2]
    assert [row["cost"] for row in table] == [0.5, None]
    assert summary["test_accuracy_there"] == 0.6
    assert summary["seconds_an_epoch_and_run"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--learning_rates=1,fast",), "learning_rates is '1,fast'; expected numbers"),
        (("--learning_rates=0,1",), "learning_rates is '0,1'; expected finite numbers above 0"),
        (("--batch_sizes=10,10",), "batch_sizes is '10,10'; expected whole numbers"),
        (("--batch_sizes=1000",), "batch_size is 1000; expected at most 200"),
        (("--epochs=0",), "epochs is 0; expected at least 1"),
        (("--batch_size=10",), "--batch_size means nothing to this program"),
        (("--optimizer=adam", "--momentum=0.5"), "momentum is set, but optax.adam takes none"),
    ],
)
def test_bad_settings_are_refused_before_any_work(arguments, message, tmp_path, capsys):
    assert call(*arguments, f"--out_dir={tmp_path}") == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_sweep_resumes_with_its_own_settings_only(swept, capsys):
    arguments = (f"--out_dir={swept.parent}", "--run_name=whole", "--resume")
    assert call(*arguments, "--learning_rates=1,30") == 2
    assert "learning_rates is (1.0, 10.0) there and (1.0, 30.0) now" in capsys.readouterr().err
