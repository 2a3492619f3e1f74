"""An epoch of shuffled mini-batches of examples on the disk, a chunk at a time, through grain."""

import math
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from sgd_jax.data._examples import Examples
from sgd_jax.data._rows import Rows
from sgd_jax.data._shuffling import index_shuffle

T = TypeVar("T")
U = TypeVar("U")
T_co = TypeVar("T_co", covariant=True)


class Chunk(NamedTuple):
    """Some mini-batches in a row, and the examples they name: what an epoch program is called on.

    Attributes:
      examples: Of this chunk alone, in the order they have on the disk, not in that of the epoch.
      batches: (num_orders, steps, m), int32: rows of ``examples``; −1 is no example.
    """

    examples: Examples
    batches: Any


class ShuffledChunks:
    """The chunks of an epoch over all examples, in random order: a data source of grain.

    Mini-batch s of the epoch consists of the examples at positions s·m … s·m + m − 1 of a random
    order of all n, drawn by `index_shuffle` from the seed given: every example once, and the
    last mini-batch filled up with −1. Nothing of the order is stored, so any chunk can be had at
    once, and again. The examples of a chunk are read in the order they have on the disk, which is
    then read from front to back, and `Chunk.batches` says which belongs where.

    With several orders, one for each of several networks, a chunk holds the examples of all of
    them. With P processes, each has its columns of every mini-batch and reads no others, ⌈m/P⌉ of
    them: the mini-batches of all put side by side are those of one, filled up with −1. Which
    mini-batches a chunk holds does not depend on P, nor does the shape of a chunk on the process:
    where one has fewer examples, copies that no index names follow them. A process of several
    devices takes a source for each, as if each were a process.

    Args:
      examples: Of `Rows`, as in what `open_dataset` returns.
      batch_size: m, at least 1 and at most n.
      seeds: One for each order: whole numbers, or sequences of them such as (seed, epoch).
      chunk_bytes: How large the examples of a chunk may be, of all processes together; at least one
        mini-batch of each order.
      process_index: Which columns, from 0.
      num_processes: P.

    Raises:
      ValueError: A size is out of range, or a mini-batch is larger than a chunk.
    """

    def __init__(
        self,
        examples: Examples,
        batch_size: int,
        seeds: Sequence[int | Sequence[int]],
        *,
        chunk_bytes: int = 64 << 20,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        self._rows = _as_rows(examples)
        self._num_examples = len(self._rows[0])
        self._batch_size = batch_size
        self._seeds = tuple(seeds)
        if not 1 <= batch_size <= self._num_examples:
            raise ValueError(
                f"batch_size is {batch_size}; expected 1 to {self._num_examples}, the examples"
            )
        _check_process(process_index, num_processes)
        self._width = math.ceil(batch_size / num_processes)
        self._columns = process_index * self._width + np.arange(self._width)
        bytes_per_step = batch_size * len(self._seeds) * sum(map(_bytes_per_row, self._rows))
        self._steps_per_chunk = chunk_bytes // bytes_per_step
        if not self._steps_per_chunk:
            raise ValueError(
                f"a mini-batch of {batch_size} examples for each of {len(self._seeds)} networks "
                f"takes {bytes_per_step:,} bytes and a chunk at most {chunk_bytes:,}; expected a "
                "chunk to hold one. Make the chunks larger or the mini-batches smaller"
            )
        self.num_steps = math.ceil(self._num_examples / batch_size)

    def __len__(self) -> int:
        """Returns the number of chunks."""
        return math.ceil(self.num_steps / self._steps_per_chunk)

    def steps(self, chunk: int) -> range:
        """Returns which mini-batches of the epoch, counted from 0, a chunk holds."""
        first = chunk * self._steps_per_chunk
        return range(first, min(first + self._steps_per_chunk, self.num_steps))

    def num_rows(self, chunk: int) -> int:
        """Returns the number of examples that a chunk holds, in every process that of the first."""
        steps = self.steps(chunk)
        left = self._num_examples - steps[-1] * self._batch_size
        return len(self._seeds) * ((len(steps) - 1) * self._width + min(left, self._width))

    def indices(self, chunk: int) -> np.ndarray:
        """Returns the examples of each mini-batch of a chunk, (num_orders, steps, m), or −1."""
        steps = np.asarray(self.steps(chunk))
        positions = steps[:, None] * self._batch_size + self._columns
        present = (positions < self._num_examples) & (self._columns < self._batch_size)
        indices = np.full((len(self._seeds), *positions.shape), -1, np.int64)
        for order, seed in enumerate(self._seeds):
            indices[order, present] = index_shuffle(positions[present], self._num_examples, seed)
        return indices

    def __getitem__(self, chunk: int) -> Chunk:
        """Returns a chunk, read from the disk."""
        indices = self.indices(chunk)
        wanted = indices.ravel()
        from_front = np.argsort(wanted)
        from_front = from_front[np.searchsorted(wanted, 0, sorter=from_front) :]  # without the −1
        batches = np.full(wanted.shape, -1, np.int32)
        batches[from_front] = np.arange(len(from_front))
        ascending = _filled_up(wanted[from_front], self.num_rows(chunk))
        examples = Examples(*(rows.take(ascending) for rows in self._rows))
        return Chunk(examples, batches.reshape(indices.shape))


class Blocks:
    """All examples in the order they have on the disk, a block at a time: a data source of grain.

    With P processes, each has ⌈k/P⌉ examples in a row of every block of k, the first process the
    first ones; where fewer are left, copies of the last follow, or of any.

    Args:
      examples: Of `Rows`.
      block_bytes: How large a block may be, of all processes together, unless ``multiple`` examples
        take more.
      multiple: The number of examples in a block, the last one apart, is a multiple of it.
      process_index: Which part of each block, from 0.
      num_processes: P.

    Raises:
      ValueError: There is no such process.
    """

    def __init__(
        self,
        examples: Examples,
        block_bytes: int = 64 << 20,
        multiple: int = 1,
        *,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        _check_process(process_index, num_processes)
        self._process, self._num_processes = process_index, num_processes
        self._rows = _as_rows(examples)
        fitting = block_bytes // sum(map(_bytes_per_row, self._rows))
        self._size = max(1, fitting // multiple) * multiple

    def __len__(self) -> int:
        """Returns the number of blocks."""
        return math.ceil(len(self._rows[0]) / self._size)

    def num_rows(self, block: int) -> int:
        """Returns the number of examples in a block, those of all processes together."""
        return min(self._size, len(self._rows[0]) - block * self._size)

    def __getitem__(self, block: int) -> Examples:
        """Returns a block, or the part of it that this process has, read from the disk."""
        first, num_rows = block * self._size, self.num_rows(block)
        share = math.ceil(num_rows / self._num_processes)
        start, stop = (first + min(k * share, num_rows) for k in (self._process, self._process + 1))
        if stop - start == share:
            return Examples(*(np.asarray(rows[start:stop]) for rows in self._rows))
        indices = _filled_up(np.arange(start, stop), share)
        return Examples(*(rows.take(indices) for rows in self._rows))


class Source(Protocol[T_co]):
    """What grain reads from: anything with a length and elements by number."""

    def __len__(self) -> int: ...
    def __getitem__(self, number: int, /) -> T_co: ...


def prefetched(source: Source[T], put: Callable[[T], U], first: int = 0) -> Iterator[U]:
    """Yields the elements from ``first`` on, each loaded while the one before is in use.

    A thread of grain reads the next element and puts it on the device as soon as one is handed out,
    so there are two at a time, and no more.

    Args:
      source: `ShuffledChunks` or `Blocks`.
      put: What becomes of each element in that thread: `jax.device_put`, or a cast before it.
      first: Of the elements, counted from 0: where an epoch goes on.

    Raises:
      ImportError: grain is not installed.
    """
    grain = import_grain()
    elements = grain.MapDataset.source(source).map(put)[first:]
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    return iter(elements.to_iter_dataset(options))


def import_grain() -> ModuleType:
    """Returns grain; raises ImportError, with the remedy, where it is not installed."""
    try:
        import grain
    except ImportError as error:
        raise ImportError(
            "Streaming needs grain, which is not installed. Run: pip install 'sgd_jax[experiments]'"
        ) from error
    return grain


def _check_process(process_index: int, num_processes: int) -> None:
    if not 0 <= process_index < num_processes:
        raise ValueError(
            f"process_index is {process_index}; expected 0 to num_processes − 1 = "
            f"{num_processes - 1}"
        )


def _filled_up(ascending: np.ndarray, length: int) -> np.ndarray:
    """Returns indices with copies of the last behind them, or of 0 where there are none."""
    missing = length - len(ascending)
    return np.append(ascending, np.full(missing, ascending[-1] if len(ascending) else 0))


def _bytes_per_row(rows: Rows) -> int:
    return rows.nbytes // len(rows)


def _as_rows(examples: Examples) -> tuple[Rows, Rows]:
    inputs: Any = examples.inputs
    labels: Any = examples.labels
    return inputs, labels
