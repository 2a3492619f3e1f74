"""Sources of examples, host-side NumPy: digits, MNIST, Fashion-MNIST, `.npz`, IDX and shards."""

from sgd_jax.data._examples import Dataset, Examples
from sgd_jax.data._idx import read_idx
from sgd_jax.data._mapped import ChangedFileError
from sgd_jax.data._rows import Rows, blocks, open_rows, read_examples
from sgd_jax.data._shuffling import index_shuffle
from sgd_jax.data._sources import NAMES, load, open_dataset
from sgd_jax.data._streams import Blocks, Chunk, ShuffledChunks, import_grain, prefetched

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
