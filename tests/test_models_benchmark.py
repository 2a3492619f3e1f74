"""The claims of scripts/benchmark.py --suite=models: wrong numbers and exceptions become rows."""

import json
from importlib import metadata

import jax
import jax.numpy as jnp
import pytest

import sgd_jax as sj
from benchmarks import models, models_table
from benchmarks.zoo import MODELS, Case, Model, haiku_models


def dense(dtype):
    w = jnp.linspace(-1, 1, 12, dtype=dtype).reshape(4, 3)
    return Case(lambda w, x: jnp.sum(jnp.tanh(x @ w) ** 2), w, jnp.eye(4, dtype=dtype))


DENSE = Model("own.dense", "here", (), dense)


@pytest.mark.slow
def test_every_method_of_a_dense_layer_is_exact():
    errors = models.exactness(dense(jnp.float64))["errors"]
    assert len(errors) == 10
    assert max(errors.values()) < models_table.EXACT


@pytest.mark.parametrize(
    ("method", "name"),
    [("mean", "mean"), ("squared_norms", "squared norms"), ("gram", "gram")],
)
def test_a_method_that_is_wrong_has_a_large_error(monkeypatch, method, name):
    grads = type(sj.per_example_grad(dense(jnp.float64).fun)(*dense(jnp.float64)[1:]))
    right = getattr(grads, method)
    wrong = lambda *args, **kwargs: jax.tree.map(  # noqa: E731
        lambda x: 1.001 * x, right(*args, **kwargs)
    )
    monkeypatch.setattr(grads, method, wrong)
    errors = models.exactness(dense(jnp.float64))["errors"]
    assert errors[name] == pytest.approx(1e-3, rel=1e-6)
    assert name in models_table.as_cells({"model": "m", "errors": {name: errors[name]}})[3]


def test_one_number_that_is_nan_is_an_infinite_error():
    assert models._error({"a": jnp.array([1.0, jnp.nan])}, {"a": jnp.ones(2)}) == float("inf")


@pytest.mark.slow
def test_a_row_holds_times_memory_and_what_fell_back():
    row = models.measure(DENSE, 1, ["time", "exactness"])
    assert "error" not in row
    assert set(row["contenders"]) == {models.PLAIN, models.OURS, models.VMAP}
    assert row["num_parameters"] == 12
    assert row["num_examples"] == 4
    assert row["fell_back"] == []
    assert models_table.ratio(row, models.PLAIN, "median") == 1
    assert json.loads(json.dumps(row)) == row


def test_an_exception_is_a_row_that_says_so():
    def make(dtype):
        raise ValueError("no such layer")

    row = models.measure(Model("own.broken", "here", (), make), 1, ["time"])
    assert models_table.as_cells(row)[-1] == "refused: time: ValueError: no such layer"


@pytest.mark.slow
def test_a_process_that_dies_is_a_row_and_the_next_model_is_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(models.sys, "executable", "/bin/false")
    lines = tmp_path / "models.jsonl"
    rows = models._run_child([DENSE, DENSE], 1, lines, ["time"])
    assert [row["error"] for row in rows] == ["the process ended with code 1"]
    assert json.loads(lines.read_text())["model"] == "own.dense"


@pytest.mark.slow
def test_a_child_measures_a_model_by_name(tmp_path):
    (model,) = models.select(["optax.ctc"])
    (row,) = models._run_child([model], 1, tmp_path / "models.jsonl", ["exactness"])
    assert "error" not in row
    assert row["packages"]["optax"] == metadata.version("optax")
    assert max(row["errors"].values()) < models_table.EXACT


def test_models_are_chosen_by_name_or_by_package():
    assert [model.name for model in models.select(["jraph.gcn"])] == ["jraph.gcn"]
    assert {model.name for model in models.select(["jraph"])} == {
        model.name for model in haiku_models.MODELS if "jraph" in model.needs
    }
    with pytest.raises(ValueError, match=r"--models=nonsense: expected some of transformers\.gpt2"):
        models.select(["nonsense"])


def test_a_large_model_is_timed_alone_and_only_when_named():
    large = [model for model in MODELS if model.large]
    assert [model.name for model in large] == ["transformers.gpt2_small"]
    assert not set(large) & set(models.select([]))
    assert not set(large) & set(models.select(["transformers"]))
    assert models.select(["transformers.gpt2_small"]) == large
    row = models.measure(DENSE._replace(large=True), 1, ["time", "exactness"])
    assert "contenders" in row
    assert "errors" not in row


def test_at_least_forty_models_and_no_name_twice():
    names = [model.name for model in MODELS]
    assert len(set(names)) == len(names) >= 40


def test_a_table_shows_the_last_row_of_each_model(tmp_path):
    lines = tmp_path / "models.jsonl"
    row = models.measure(DENSE, 1, ["time", "exactness"])
    rows = [row | {"model": "optax.ctc", "error": "old"}, row | {"model": "optax.ctc"}]
    lines.write_text("".join(json.dumps(r) + "\n" for r in rows))
    latest = models_table.latest(lines)
    assert [r.get("error") for r in latest] == [None]
    table = models_table.as_markdown(latest)
    assert "1 models; 0 refused." in table
    assert "exact to 1e-09 in float64: 1 of 1." in table


def test_fallbacks_are_read_off_what_explain_prints():
    explained = sj.explain(lambda p, x: jnp.dot(p, x), jnp.ones(3), jnp.ones((2, 3)))
    assert models_table.fell_back(explained) == []
    line = "params  atan2 file.py:3  fallback: written down  1 kB  2 kB"
    assert models_table.fell_back(f"{explained}\n{line}\n{line}") == ["atan2"]
