"""The comparison: laws hold and wrong ones fail, files say the same, bad input is told clearly."""

import csv
import json
import re

import in_process
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import _comparison, _starting_point, compare_gradients, train
from experiments._config import Config
from experiments._recorded import Output

N, CLASSES = 200, 10  # training examples and classes of the digits with --smoke
SIZES = (50, N)


def call(program, *arguments):
    return in_process.call(program, "--dtype=float64", *arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns the folder of one comparison of all schemes."""
    out_dir = tmp_path_factory.mktemp("runs")
    sizes = "--batch_sizes=full,50,50"
    assert call(compare_gradients, f"--out_dir={out_dir}", "--run_name=all", sizes) == 0
    return out_dir / "all"


@pytest.fixture(scope="module")
def table(folder):
    return json.loads((folder / "table.json").read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Returns the folder of a training of two seeds."""
    out_dir = tmp_path_factory.mktemp("trained")
    more = ("--num_seeds=2", "--epochs=1", "--sizes=64,5,10", "--init=normal")
    assert call(train, f"--out_dir={out_dir}", "--run_name=two", *more) == 0
    return out_dir / "two"


def rejects(row, factor):
    """Says whether the draws of a row are 5 standard errors from a law that is so much larger."""
    return abs(row["measured"] - factor * row["predicted"]) > 5 * row["standard_error"]


@pytest.mark.slow
def test_there_is_a_row_for_each_scheme_and_size_each_once_and_in_order(table):
    assert [(row["scheme"], row["batch_size"]) for row in table["rows"]] == [
        (scheme, m) for scheme in _comparison.SCHEMES for m in SIZES
    ]


@pytest.mark.slow
def test_measured_errors_follow_the_laws_and_reject_others(table):
    rows = [row for row in table["rows"] if row["ratio"] is not None]
    assert len(rows) == len(_comparison.SCHEMES) + 2
    for row in rows:
        assert not rejects(row, 1), row
        assert rejects(row, 3 / 2), row
        assert rejects(row, 2 / 3), row
        assert row["ratio"] == pytest.approx(row["measured"] / row["predicted"])


@pytest.mark.slow
def test_the_finite_population_factor_is_needed_at_a_quarter_of_the_examples(table):
    (row,) = (
        row
        for row in table["rows"]
        if (row["scheme"], row["batch_size"]) == ("without_replacement", 50)
    )
    assert rejects(row, (N - 1) / (N - 50))


@pytest.mark.slow
def test_the_error_is_zero_at_m_equal_to_n_unless_drawn_with_replacement(table):
    scale = table["point"]["squared_norm"]
    for row in table["rows"]:
        if row["batch_size"] == N:
            is_zero = row["scheme"] not in ("with_replacement", "importance")
            assert (row["measured"] < 1e-24 * scale) == is_zero, row
            assert (row["ratio"] is None) == is_zero
            assert row["cosine_95"] <= 1 + 1e-12


@pytest.mark.slow
def test_the_cosine_of_means_is_the_law_and_the_mean_cosine_close_to_it(table):
    for row in table["rows"]:
        law = 1 / np.sqrt(1 + row["predicted"] / table["point"]["squared_norm"])
        assert row["cosine_of_means"] == pytest.approx(law)
        assert row["cosine_5"] <= row["mean_cosine"] <= row["cosine_95"]
        assert row["mean_cosine"] == pytest.approx(law, abs=0.12)


@pytest.mark.slow
def test_csv_json_and_report_hold_the_same_table(folder, table):
    with open(folder / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [list(row) for row in rows] == [list(row) for row in table["rows"]]
    assert [float(row["measured"]) for row in rows] == [row["measured"] for row in table["rows"]]
    report = (folder / "report.html").read_text()
    assert report.count("data:image/png;base64,") == 2 == len(list((folder / "figures").iterdir()))
    for label in compare_gradients.TABLE.labels():
        assert f">{label}</th>" in report
    for row in table["rows"]:
        cells = "".join(f"<td>{cell}</td>" for cell in compare_gradients.TABLE.cells(row))
        assert cells in report
    assert json.loads((folder / "summary.json").read_text())["status"] == "complete"


@pytest.mark.slow
def test_every_cell_of_a_row_stands_under_its_label(table):
    row = table["rows"][0]
    shown = dict(
        zip(compare_gradients.TABLE.labels(), compare_gradients.TABLE.cells(row), strict=True)
    )
    assert shown["m"] == "50"
    assert float(shown["E‖ĝ−G‖²"]) == pytest.approx(row["predicted"], rel=1e-3)
    assert float(shown["gradient, µs"]) == pytest.approx(1e6 * row["gradient_seconds"], abs=0.06)


@pytest.mark.slow
def test_a_run_is_compared_at_its_last_checkpoint_and_stays_as_it_is(trained, capsys):
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    out_dir = trained.parent
    choice = ("--schemes=without_replacement", "--batch_sizes=50", "--seed=1", "--num_draws=50")
    name = ("--run=two", "--run_name=at_two", f"--out_dir={out_dir}")
    assert call(compare_gradients, *name, *choice) == 0
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before
    table = json.loads((out_dir / "at_two" / "table.json").read_text())

    given = {"seed": 1}
    config, dataset, params = _starting_point.read_run(str(trained), given, Output())
    assert config.epochs == 1
    assert [layer.weights.shape for layer in params] == [(5, 64), (10, 5)]
    again = train.run(Config(**{**vars(config), "seed": 1}), dataset)
    for here, there in zip(
        jax.tree.leaves(params), jax.tree.leaves(again.state.params), strict=True
    ):
        np.testing.assert_allclose(here, there[0], rtol=1e-9, atol=1e-12)

    point = _starting_point.find_point(config, dataset, params)
    grads = jax.vmap(jax.grad(point.fun), in_axes=(None, 0))(params, point.examples)
    matrix = np.concatenate([np.reshape(leaf, (N, -1)) for leaf in jax.tree.leaves(grads)], axis=1)
    trace = np.mean(np.sum((matrix - matrix.mean(axis=0)) ** 2, axis=1))
    (row,) = table["rows"]
    assert table["point"]["trace"] == pytest.approx(trace)
    assert row["predicted"] == pytest.approx((N - 50) / (N - 1) * trace / 50)


@pytest.mark.slow
def test_large_and_small_samples_are_measured_alike():
    config, dataset = _starting_point.prepare({"smoke": True, "epochs": 0, "dtype": "float64"})
    point = _starting_point.find_point(config, dataset)
    scheme = _comparison.make_schemes(point, 0.1)["without_replacement"]()
    full = scheme.target.moments.mean
    rng = np.random.default_rng(0)
    few, weights = rng.integers(0, N, size=(3, 8)), rng.random((3, 8))
    arguments = (point.fun, point.params, full, full, point.examples)
    small = _comparison.Sample(jnp.asarray(few, jnp.int32), jnp.asarray(weights))
    pad = ((0, 0), (0, N))
    large = _comparison.Sample(
        jnp.asarray(np.pad(few, pad, constant_values=-1), jnp.int32),
        jnp.asarray(np.pad(weights, pad)),
    )
    measured = (_comparison._errors(*arguments, s, mesh=None) for s in (small, large))
    for a, b in zip(*measured, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10)


def test_the_cosine_of_a_zero_estimate_counts_as_zero():
    # Of two estimates one is G itself and one is zero: its squared length 1 − 2 + 1 is rounding.
    errors = _comparison.Errors(np.array([0.0, 1.0 - 1e-7]), np.array([0.0, -1.0]), 0.0)
    summary = _comparison.summarize(errors, predicted=0.5, squared_norm=1.0)
    assert (summary["mean_cosine"], summary["measured"]) == (0.5, pytest.approx(0.5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--schemes=sobol"], "schemes is ('sobol',); expected any of without_replacement"),
        (["--schemes="], "schemes is (); expected any of"),
        (["--batch_sizes="], "batch_sizes is (); expected one size or more"),
        (["--batch_sizes=1,201"], "batch_sizes holds 201; expected at most 200"),
        (["--batch_sizes=0"], "batch_sizes holds 0; expected sizes of at least 1"),
        (["--batch_sizes=-3"], "expected whole numbers of at least 1"),
        (["--batch_sizes=ten"], "batch_sizes is 'ten'; expected whole numbers"),
        (["--num_draws=1"], "num_draws is 1; expected a whole number of at least 2"),
        (["--floor=2"], "floor is 2.0; expected a number from 0 to 1"),
        (["--schemes=stratified", "--batch_sizes=9"], "expected a batch size of at least 10"),
        (["--schemes=control_variate", "--epochs=0"], "--epochs of at least 1 and no --run"),
        (["--resume", "--run_name=x"], "--resume means nothing to this program"),
        (["--run=nowhere"], "no such run"),
    ],
)
def test_bad_input_is_told_before_any_work(arguments, message, tmp_path, capsys):
    if message == "no such run":
        message = "nowhere/config.json does not exist; expected the folder of a run"
    assert call(compare_gradients, f"--out_dir={tmp_path}", *arguments) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_what_is_no_training_of_this_network_is_refused(folder, trained, tmp_path, capsys):
    def message(*arguments):
        assert call(compare_gradients, f"--out_dir={tmp_path}", *arguments) == 2
        return capsys.readouterr().err

    assert "holds no checkpoint of a training" in message(f"--run={folder}")
    assert "run is set, but settings differ" in message(f"--run={trained}", "--sizes=64,6,10")
    assert "seed is 7; expected one that" in message(f"--run={trained}", "--seed=7")
    config = json.loads((trained / "config.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    (other / "checkpoints").symlink_to(trained / "checkpoints")
    (other / "config.json").write_text(json.dumps(config | {"sizes": [64, 6, 10]}))
    assert re.search(r"does not fit `like`: .*\[2, 5, 64\] in", message(f"--run={other}"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]


@pytest.mark.slow
def test_no_run_is_overwritten(folder, capsys):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert call(compare_gradients, f"--out_dir={folder.parent}", "--run_name=all") == 2
    assert "never overwritten" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
