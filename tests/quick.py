"""How `make test` is fast: programs are compiled fast, for most run once, and slow tests left out.

With JAX 0.10 that takes a fifth of the time. In `make test-all`, the programs of slow tests are
compiled as for users.
"""

import jax
import pytest

OPTIONS = {"xla_backend_optimization_level": 0}
"""For `jax.jit(fun, compiler_options=OPTIONS)`."""

# Later versions do not know the second of these, and a flag that XLA does not know ends a process.
if jax.__version_info__[:2] == (0, 10):
    OPTIONS |= {
        "xla_cpu_parallel_codegen_split_count": 1,
        "xla_cpu_use_fusion_emitters": False,
        "xla_llvm_disable_expensive_passes": True,
    }

FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in OPTIONS.items())
"""The same for the environment variable XLA_FLAGS."""


def slow(*values):
    """Returns values of a parameter with which a test runs in `make test-all` only."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]
