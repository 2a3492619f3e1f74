"""The suite `models`: exactness, time, compile time and memory on models that others wrote.

Each model is measured in a process of its own library, one JSON line a model; what raises is a
row that says so, and what ends the process is too.
"""

import gc
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sgd_jax as sj
from benchmarks import harness, models_table
from benchmarks.harness import Contender, Prepared, Suite
from benchmarks.models_table import OURS, PLAIN, VMAP
from benchmarks.zoo import MODELS, Case, Model

_NUM_ENTRIES = 50_000_000
"""At most so many entries of G are written in float64, twice; fewer examples are then taken."""


def run(
    names: Sequence[str], num_rounds: int, path: Path, passes: Sequence[str] = ("time", "exactness")
) -> list[dict]:
    """Measures models in child processes and appends a JSON line for each; returns the rows.

    Args:
      names: names of models, or of their packages; empty: all that are installed.
      num_rounds: timed rounds.
      path: file of JSON lines to append to.
      passes: ``"exactness"``, ``"time"`` or both.

    Raises:
      ValueError: a name that no model has.
    """
    chosen = select(names)
    rows = []
    for model in chosen:
        missing = harness.missing_modules(Contender(model.name, _nothing, model.needs))
        if missing:
            print(f"skipped: {model.name}, for want of {', '.join(missing)}", flush=True)
    waiting = [m for m in chosen if not harness.missing_modules(Contender("", _nothing, m.needs))]
    while waiting:
        package = waiting[0].needs[0]
        batch = [m for m in waiting if m.needs[0] == package]
        waiting = [m for m in waiting if m.needs[0] != package]
        while batch:
            done = _run_child(batch, num_rounds, path, passes)
            rows += done
            batch = batch[len(done) :]
    return rows


def select(names: Sequence[str]) -> list[Model]:
    """Returns the models of some names, or of some packages; without names all but large ones."""
    for name in names:
        if not any(_is_called(model, name) for model in MODELS):
            known = ", ".join(model.name for model in MODELS)
            raise ValueError(f"--models={name}: expected some of {known}")
    chosen = [m for m in MODELS if not names or any(_is_called(m, name) for name in names)]
    return [m for m in chosen if not m.large or m.name in names]


def _is_called(model: Model, name: str) -> bool:
    return model.name == name or model.name.startswith(f"{name}.")


def _nothing() -> Prepared:
    raise NotImplementedError


def _run_child(
    batch: Sequence[Model], num_rounds: int, path: Path, passes: Sequence[str]
) -> list[dict]:
    """Runs a batch until it ends or its process dies; then the model at hand is a row as well."""
    names = [model.name for model in batch]
    request = json.dumps({"names": names, "num_rounds": num_rounds, "passes": list(passes)})
    command = [sys.executable, "-m", "benchmarks.models", request]
    root = Path(__file__).parents[1]
    rows = []

    def keep(row: dict) -> None:
        rows.append(row)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(models_table.as_line(row), flush=True)

    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith("{"):
                keep(json.loads(line))
    code = child.returncode
    if code != 0 and len(rows) < len(names):
        model = batch[len(rows)]
        error = f"the process ended with code {code}"
        keep({"model": model.name, "source": model.source, **circumstances(), "error": error})
    elif len(rows) < len(names):
        raise RuntimeError(f"{len(names) - len(rows)} models were not measured: {names}")
    return rows


def circumstances() -> dict:
    """Returns where a row was measured: commit, machine, versions."""
    where = harness.circumstances()
    asked = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=10"],
        capture_output=True, text=True, cwd=Path(__file__).parent,
    )  # fmt: skip
    commit = asked.stdout.strip() or None
    return {"commit": commit, "date": time.strftime("%Y-%m-%d"), "where": where}


def packages(model: Model) -> dict[str, str]:
    """Returns the versions of the packages that a model needs."""
    installed = metadata.packages_distributions()
    names = {name for module in model.needs for name in installed.get(module, [])}
    return {name: metadata.version(name) for name in sorted(names)}


def measure(model: Model, num_rounds: int, passes: Sequence[str]) -> dict:
    """Returns the row of one model; what a pass raises is in the row."""
    row: dict[str, Any] = {"model": model.name, "source": model.source, **circumstances()}
    row["packages"] = packages(model)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    row["load_before"] = load
    measures: dict[str, Callable[[Model], dict]] = {
        "time": lambda model: times(model.make(jnp.float32), num_rounds),
        "exactness": lambda model: exactness(_in_float64(model)),
    }
    for name in ["time"] if model.large else passes:
        try:
            with jax.enable_x64(name == "exactness"):
                row |= measures[name](model)
        except Exception as error:  # a row of the table, whatever it is
            message = " ".join(str(error).split())[:300]
            row["error"] = f"{name}: {type(error).__name__}: {message}"
        jax.clear_caches()
        gc.collect()
    return row


def _in_float64(model: Model) -> Case:
    case = model.make(jnp.float64)
    size = sum(leaf.size for leaf in jax.tree.leaves(case.params))
    n = max(2, min(4, _NUM_ENTRIES // size))
    return case._replace(examples=jax.tree.map(lambda leaf: jnp.asarray(leaf)[:n], case.examples))


# --- exactness ---

_FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""For what is compiled to run once; what it computes is the same."""


def exactness(case: Case) -> dict:
    """Returns the relative error of every method against ``vmap(grad)``, in one program."""
    fun, params, examples = case
    n = jax.tree.leaves(examples)[0].shape[0]
    direction = jax.tree.map(lambda leaf: jnp.cos(leaf + jnp.arange(leaf.size).reshape(leaf.shape)),
                             params)  # fmt: skip
    weights = jnp.linspace(-1.0, 2.0, n)

    def both(params: Any, examples: Any) -> tuple[dict, dict]:
        written = jax.vmap(jax.grad(fun), (None, 0))(params, examples)
        expected = _by_rows(written, direction, weights)
        grads = sj.per_example_grad(fun)(params, examples)
        return _by_methods(grads, direction, weights, expected["max_norm"]), expected

    found, expected = jax.jit(both, compiler_options=_FAST)(params, examples)
    errors = {name: _error(found[name], expected[name]) for name in found}
    return {"errors": errors, "num_parameters": sum(x.size for x in jax.tree.leaves(params))}


def _by_methods(grads: Any, direction: Any, weights: jax.Array, max_norm: jax.Array) -> dict:
    return {
        "mean": grads.mean(),
        "sum": grads.sum(),
        "weighted sum": grads.sum(weights),
        "squared norms": grads.squared_norms(),
        "norms per leaf": grads.squared_norms(per_leaf=True),
        "second moment": grads.second_moment(),
        "inner products": grads.inner_products(direction),
        "gram": grads.gram(),
        "clipped mean": grads.clipped_mean(max_norm),
        "materialize": grads.materialize(),
    }


def _by_rows(written: Any, direction: Any, weights: jax.Array) -> dict:
    """The same from the written rows; the inner product is the real part of ⟨g, v⟩ = Σ ḡ v."""
    n = weights.shape[0]
    joined = jnp.concatenate([x.reshape(n, -1) for x in jax.tree.leaves(written)], 1)  # (n, p)
    along = jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(direction)])
    norms = jnp.sum(jnp.abs(joined) ** 2, 1)
    max_norm = jnp.median(jnp.sqrt(norms))
    clips = jnp.minimum(1.0, max_norm / jnp.sqrt(norms)) / n

    def weighted(c: jax.Array) -> Any:
        return jax.tree.map(lambda x: jnp.tensordot(c, x, 1), written)

    return {
        "mean": weighted(jnp.full(n, 1 / n)),
        "sum": weighted(jnp.ones(n)),
        "weighted sum": weighted(weights),
        "squared norms": norms,
        "norms per leaf": jax.tree.map(
            lambda x: jnp.sum(jnp.abs(x.reshape(n, -1)) ** 2, 1), written
        ),
        "second moment": jax.tree.map(lambda x: jnp.mean(jnp.abs(x) ** 2, 0), written),
        "inner products": (joined.conj() @ along).real,
        "gram": (joined.conj() @ joined.T).real,
        "clipped mean": weighted(clips),
        "materialize": written,
        "max_norm": max_norm,
    }


def _error(found: Any, expected: Any) -> float:
    """‖found − expected‖ / ‖expected‖ over all leaves; infinite if one alone is not a number."""
    a, b = (
        np.concatenate([np.ravel(np.asarray(leaf)) for leaf in jax.tree.leaves(tree)])
        for tree in (found, expected)
    )
    if a.shape != b.shape or not np.all(np.isfinite(a)) or not np.all(np.isfinite(b)):
        return float("inf")
    return float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-300))


# --- time ---


def times(case: Case, num_rounds: int) -> dict:
    """Returns times, compile times and temporary memory, side by side in one process."""
    fun, params, examples = case
    mean_gradient = jax.grad(sj.mean_cost(fun))

    def ours(params: Any, examples: Any) -> Any:
        grads = sj.per_example_grad(fun)(params, examples)
        return grads.squared_norms(), grads.mean()

    def by_vmap(params: Any, examples: Any) -> Any:
        written = jax.vmap(jax.grad(fun), (None, 0))(params, examples)
        norms = sum(
            jnp.sum(jnp.abs(x.reshape(x.shape[0], -1)) ** 2, 1) for x in jax.tree.leaves(written)
        )
        return norms, jax.tree.map(lambda x: x.mean(0), written)

    compiled: dict[str, dict] = {}

    def contender(name: str, function: Callable[..., Any]) -> Contender:
        def make() -> Prepared:
            start = time.perf_counter()
            program = jax.jit(function).lower(params, examples).compile()
            seconds = time.perf_counter() - start
            memory = program.memory_analysis()
            temporary = memory.temp_size_in_bytes if memory is not None else float("nan")
            compiled[name] = {"compile_seconds": seconds, "temporary_bytes": temporary}
            return Prepared(lambda: program(params, examples))

        return Contender(name, make)

    functions = {PLAIN: mean_gradient, OURS: ours, VMAP: by_vmap}
    contenders = [contender(name, function) for name, function in functions.items()]
    timings = harness.time_in_turns(
        Suite("", "", contenders, min_turn_seconds=0.05, max_seconds=20.0), num_rounds
    )
    for timing in timings:
        compiled[timing.contender.name] |= {
            "median": timing.median,
            "least": timing.least,
            "cpu": statistics.median(timing.cpu_seconds),
        }
    explained = sj.explain(fun, params, examples)
    return {
        "num_parameters": sum(x.size for x in jax.tree.leaves(params)),
        "num_examples": jax.tree.leaves(examples)[0].shape[0],
        "contenders": compiled,
        "fell_back": models_table.fell_back(explained),
    }


# --- the child process ---


def main(request: str) -> None:
    """Measures the models of a request, as a child process: prints one JSON line for each."""
    warnings.simplefilter("ignore")
    asked = json.loads(request)
    harness.keep_freed_memory()
    by_name = {model.name: model for model in MODELS}
    for name in asked["names"]:
        row = measure(by_name[name], asked["num_rounds"], asked["passes"])
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
