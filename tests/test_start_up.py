"""A start is quick: nothing slow is imported early, nothing is compiled twice."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import quick

import sgd_jax as sj
from experiments import _classifier
from sgd_jax import data

ROOT = pathlib.Path(_classifier.__file__).parents[1]
SLOW = ["matplotlib", "scipy", "sklearn"]

PROGRAM = f"""
import json, runpy, sys
import jax

counts = dict.fromkeys(["cache_hits", "cache_misses"], 0)

def count(name, **more):
    name = name.rpartition("/")[2]
    if name in counts:
        counts[name] += 1

def note_imports(self, record, append=None):
    counts.setdefault("imported", sorted(set({SLOW}) & set(sys.modules)))
    return append(self, record)

jax.monitoring.register_event_listener(count)
from experiments import runs
import functools
runs.RunFolder.append_metrics = functools.partialmethod(
    note_imports, append=runs.RunFolder.append_metrics
)
try:
    runpy.run_module("experiments.train", run_name="__main__", alter_sys=True)
except SystemExit as leaving:
    print(json.dumps(counts | {{"exit_code": leaving.code}}))
"""


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    """Two starts of a tiny training run that share a cache: what each counted."""
    folder = tmp_path_factory.mktemp("start")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    command = [sys.executable, "-c", PROGRAM, "--smoke", "--epochs=1", f"--out_dir={folder}"]
    found = []
    for _ in range(2):
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True,
            env=environment | {"XDG_CACHE_HOME": str(folder), "JAX_PLATFORMS": "cpu"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return found


@pytest.mark.slow
def test_the_second_start_takes_every_program_small_ones_too_from_the_cache(starts):
    first, second = starts
    assert (first["exit_code"], second["exit_code"]) == (0, 0)
    assert first["cache_hits"] == 0
    assert first["cache_misses"] >= 3  # first weights, measuring, an epoch
    assert second["cache_hits"] == first["cache_misses"]
    assert second["cache_misses"] == 0


@pytest.mark.slow
def test_no_step_waits_for_plotting_or_scikit_learn(starts):
    assert starts[0]["imported"] == []


@pytest.mark.slow
@pytest.mark.skipif(
    os.environ["XLA_FLAGS"] == quick.FLAGS, reason="of users' programs: scripts/check tests --all"
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
def test_first_weights_compiled_with_less_effort_are_the_same_to_the_last_bit(dtype):
    dataset, sizes = data.load("digits"), (64, 30, 10)
    programs = _classifier.make_programs(
        dataset, sj.sgd(1.0), sizes=sizes, cost="quadratic", init="scaled", seeds=range(2, 5),
        dtype=dtype, parts=(),
    )  # fmt: skip
    state = programs.init()
    for row, seed in enumerate(range(2, 5)):
        key, _ = jax.random.split(jax.random.key(seed))
        network = jax.jit(sj.init_network, static_argnums=(1, 2, 3))(key, sizes, "scaled", dtype)
        for ours, expected in zip(
            jax.tree.leaves(state.params), jax.tree.leaves(network), strict=True
        ):
            np.testing.assert_array_equal(ours[row], expected, strict=True)
