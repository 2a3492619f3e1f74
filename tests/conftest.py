"""What every test runs under: float64, no silent broadcasting, MNIST only where it lies."""

import collections
import os
import tempfile

import hypothesis
import jax
import pytest
import quick

# Read when the first program is compiled. Flags that were set, even to nothing, stay.
os.environ.setdefault("XLA_FLAGS", quick.FLAGS)

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")

# What one test compiled the next one loads, in this process and in those that tests start. The
# folder is this process's own and goes with it: JAX does not write into it in one piece, so two
# workers must not share it, and nothing from before may be found there.
_COMPILED = tempfile.TemporaryDirectory(prefix="sgd_jax-tests-")
for _name, _value in (
    ("jax_compilation_cache_dir", _COMPILED.name),
    ("jax_persistent_cache_min_compile_time_secs", 0.0),
):
    jax.config.update(_name, _value)
    os.environ[_name.upper()] = str(_value)

hypothesis.settings.register_profile("house", derandomize=True, deadline=None, max_examples=8)
hypothesis.settings.load_profile("house")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reasons = {}
    if not os.environ.get("SGD_JAX_MNIST_DIR"):
        reasons["mnist"] = "set SGD_JAX_MNIST_DIR to the folder with MNIST's four IDX files"
    if any(item.get_closest_marker("gpu") for item in items) and jax.default_backend() == "cpu":
        reasons["gpu"] = "JAX finds no accelerator"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
    # Workers take whole files in this order: the long ones first, so that none ends alone.
    num_slow = collections.Counter(i.path for i in items if i.get_closest_marker("slow"))
    items.sort(key=lambda item: -num_slow[item.path])
