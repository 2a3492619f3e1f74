"""Sources of examples, host-side NumPy: digits, MNIST, Fashion-MNIST, `.npz` and IDX files."""

from sgd_jax.data.examples import Dataset, Examples
from sgd_jax.data.idx import read_idx
from sgd_jax.data.sources import load

__all__ = ["Dataset", "Examples", "load", "read_idx"]
