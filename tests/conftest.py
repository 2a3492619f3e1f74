"""What every test runs under: float64, no silent broadcasting, MNIST only where it lies."""

import os

import hypothesis
import jax
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
hypothesis.settings.register_profile("house", derandomize=True, deadline=None, max_examples=8)
hypothesis.settings.load_profile("house")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("SGD_JAX_MNIST_DIR"):
        return
    reason = "set SGD_JAX_MNIST_DIR to the folder with MNIST's four IDX files"
    for item in items:
        if item.get_closest_marker("mnist"):
            item.add_marker(pytest.mark.skip(reason=reason))
