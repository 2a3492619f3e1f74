"""Sources of examples, host-side NumPy: digits, MNIST, Fashion-MNIST, `.npz`, IDX and shards."""

from sgd_jax.data.examples import Dataset, Examples
from sgd_jax.data.idx import read_idx
from sgd_jax.data.mapped import ChangedFileError
from sgd_jax.data.rows import Rows, blocks, open_rows, read_examples
from sgd_jax.data.shuffling import index_shuffle
from sgd_jax.data.sources import NAMES, load, open_dataset
from sgd_jax.data.streams import Blocks, Chunk, ShuffledChunks, import_grain, prefetched

__all__ = [
    "NAMES",
    "Blocks",
    "ChangedFileError",
    "Chunk",
    "Dataset",
    "Examples",
    "Rows",
    "ShuffledChunks",
    "blocks",
    "import_grain",
    "index_shuffle",
    "load",
    "open_dataset",
    "open_rows",
    "prefetched",
    "read_examples",
    "read_idx",
]
