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
    reasons = {}
    if not os.environ.get("SGD_JAX_MNIST_DIR"):
        reasons["mnist"] = "set SGD_JAX_MNIST_DIR to the folder with MNIST's four IDX files"
    if any(item.get_closest_marker("gpu") for item in items) and jax.default_backend() == "cpu":
        reasons["gpu"] = "JAX finds no accelerator"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
