"""Sources of examples, host-side NumPy: digits, MNIST, Fashion-MNIST, `.npz`, IDX and shards."""

from sgd_jax.data.examples import Dataset, Examples
from sgd_jax.data.idx import read_idx
from sgd_jax.data.rows import Rows, open_rows
from sgd_jax.data.shuffling import index_shuffle
from sgd_jax.data.sources import load, open_dataset
from sgd_jax.data.streams import Chunk, ShuffledChunks, prefetched

__all__ = [
    "Chunk",
    "Dataset",
    "Examples",
    "Rows",
    "ShuffledChunks",
    "index_shuffle",
    "load",
    "open_dataset",
    "open_rows",
    "prefetched",
    "read_idx",
]
