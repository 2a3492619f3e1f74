"""The suite `startup`: how long until the first step is done, from the start of Python."""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.harness import Contender, Prepared, Suite

ROOT = Path(__file__).parents[1]

BARE = """
import sys
{imports}
import numpy as np

generator = np.random.default_rng(0)
params = tuple(
    (generator.standard_normal((b, a), np.float32) / a**0.5, np.zeros(b, np.float32))
    for a, b in ((64, 30), (30, 10))
)
x, y = generator.random((10, 64), np.float32), np.eye(10, dtype=np.float32)
{step}
"""

BY_JAX = BARE.format(
    imports="import jax, jax.numpy as jnp",
    step="""
def mean_cost(params, x, y):
    for weights, biases in params:
        x = jax.nn.sigmoid(x @ weights.T + biases)
    return jnp.sum((x - y) ** 2) / (2 * len(y))

@jax.jit
def step(params, x, y):
    return jax.tree.map(lambda p, g: p - 3 * g, params, jax.grad(mean_cost)(params, x, y))

jax.block_until_ready(step(params, x, y))
""",
)

BY_SGD_JAX = BARE.format(
    imports="import jax, sgd_jax as sj",
    step="""
def cost(params, example):
    layers = tuple(sj.Layer(*layer) for layer in params)
    return sj.quadratic_cost(sj.feedforward(layers, example[0]), example[1])

optimizer = sj.sgd(3.0)
jax.block_until_ready(sj.make_step(cost, optimizer)(sj.init_state(params, optimizer), (x, y)))
""",
)

TRAIN = """
import os, runpy, sys
from experiments import runs

append_metrics = runs.RunFolder.append_metrics

def stop_after_the_first_epoch(folder, record):
    append_metrics(folder, record)
    if record["epoch"] == 1:
        os._exit(0)

runs.RunFolder.append_metrics = stop_after_the_first_epoch
runpy.run_module("experiments.train", run_name="__main__", alter_sys=True)
sys.exit("experiments.train came to its end without a first epoch")
"""


def start_up_suites(data_dir: str | None = None) -> list[Suite]:
    """Returns the start of one table: Python starts, imports, compiles, and takes its first step.

    The first contender imports JAX and compiles and runs one step of [64, 30, 10], m = 10: nobody
    can do with less. The last two are `experiments.train` on the digits until the line of metrics
    of its first epoch is on the disk: with JAX's compilation cache empty, as on the very first
    start, and filled by a start before. Each run is a process of its own.

    Args:
      data_dir: not used; the digits come with scikit-learn.
    """
    del data_dir
    contenders = [
        Contender("import jax, one step", lambda: _process(BY_JAX, _without_cache)),
        Contender("import sgd_jax, one step", lambda: _process(BY_SGD_JAX, _without_cache)),
        Contender("experiments.train, first start", lambda: _process(TRAIN, _with_a_new_cache)),
        Contender("experiments.train, later start", _later_start),
    ]
    work = "start of Python to the end of the first step (of train: the first epoch) on the digits"
    return [Suite("startup", work, contenders)]


def _without_cache(folder: str) -> dict[str, str]:
    del folder
    return {"JAX_COMPILATION_CACHE_DIR": ""}


def _with_a_new_cache(folder: str) -> dict[str, str]:
    return {"XDG_CACHE_HOME": tempfile.mkdtemp(dir=folder)}


def _with_one_cache(folder: str) -> dict[str, str]:
    return {"XDG_CACHE_HOME": folder}


def _later_start() -> Prepared:
    prepared = _process(TRAIN, _with_one_cache)
    prepared.run()  # fills the cache
    return prepared


def _process(source: str, environment: Callable[[str], dict[str, str]]) -> Prepared:
    """Returns what runs a source in a process; raises CalledProcessError where it fails."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    inherited = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}

    def run() -> None:
        command = [sys.executable, "-c", source]
        if source is TRAIN:
            command.append(f"--out_dir={folder}")
        own = environment(folder)
        subprocess.run(
            command, cwd=ROOT, env=inherited | own, check=True, stdout=subprocess.DEVNULL
        )

    return Prepared(run)
