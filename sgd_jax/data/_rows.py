"""Rows of arrays that stay on the disk: mapped into memory, read where they are asked for."""

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from sgd_jax.data._examples import Examples
from sgd_jax.data._idx import read_idx_header
from sgd_jax.data._mapped import copy_all, copy_rows, map_file
from sgd_jax.data._npy import read_npy_header
from sgd_jax.data._read_ahead import blocks_read_ahead

_BLOCK_BYTES = 16 << 20
_ALIGNMENT = 64


class Rows:
    """n rows of one shape and dtype, in one or more files, that stands in for an array.

    Made by `open_rows`. A slice is again `Rows` and reads nothing. The files must not change while
    they are in use: reading from one that has raises `ChangedFileError`.

    Args:
      parts: Arrays, mapped or not, with rows of one shape.
      dtype: What the rows are read as; by default that of the parts in native byte order.
    """

    def __init__(self, parts: Sequence[np.ndarray], dtype: DTypeLike | None = None):
        self.parts = tuple(parts)
        self._starts = np.cumsum([0, *map(len, self.parts)])
        self.shape: tuple[int, ...] = (int(self._starts[-1]), *self.parts[0].shape[1:])
        self.dtype = np.dtype(dtype or self.parts[0].dtype.newbyteorder("="))

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all rows, as they are read."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, rows: slice) -> "Rows":
        start, stop, step = rows.indices(len(self))
        if step != 1:
            raise ValueError(f"rows are sliced in steps of 1, got {step}")
        parts = [
            part[max(start - first, 0) : max(stop - first, 0)]
            for part, first in zip(self.parts, self._starts, strict=False)
        ]
        return Rows([part for part in parts if len(part)] or parts[:1], self.dtype)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        """Returns all rows, read."""
        if copy is False:
            raise ValueError("rows are on the disk: reading them makes a copy")
        array = _empty(self.shape, np.dtype(dtype or self.dtype))
        for part, first in zip(self.parts, self._starts, strict=False):
            copy_all(part, array[first : first + len(part)])
        return array

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Returns the rows of the indices given, (k, ...), read from the disk in that order.

        Args:
          indices: (k,) integers in [0, n), ascending: so the disk is read from front to back.

        Raises:
          ValueError: They do not ascend.
          IndexError: One is outside of [0, n).
          ChangedFileError: A file has changed since it was opened.
        """
        if np.any(indices[1:] < indices[:-1]):
            raise ValueError("indices must ascend; sort them, and put the rows in order after")
        if len(indices) and not 0 <= indices[0] <= indices[-1] < len(self):
            raise IndexError(f"indices must lie in [0, {len(self)}), got {indices[[0, -1]]}")
        rows = _empty((len(indices), *self.shape[1:]), self.dtype)
        cuts = np.searchsorted(indices, self._starts)
        for part, first, a, b in zip(self.parts, self._starts, cuts[:-1], cuts[1:], strict=False):
            of_part, taken = indices[a:b] - first, rows[a:b]
            for block in blocks_read_ahead(part, of_part):
                copy_rows(part, of_part[block], taken[block])
        return rows

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yields all rows from first to last, some megabytes at a time, and where each begins."""
        size = max(1, _BLOCK_BYTES // max(1, math.prod(self.shape[1:]) * self.dtype.itemsize))
        for start in range(0, len(self), size):
            yield start, np.asarray(self[start : start + size])


def read_examples(examples: Examples, indices: np.ndarray) -> Examples:
    """Returns the examples of the indices given, in any order, of examples on the disk."""
    ascending = np.argsort(indices, kind="stable")
    back = np.argsort(ascending)
    inputs: Any = examples.inputs
    labels: Any = examples.labels
    return Examples(*(rows.take(indices[ascending])[back] for rows in (inputs, labels)))


def blocks(array: "np.ndarray | Rows") -> Iterator[np.ndarray]:
    """Yields all rows of an array, some megabytes at a time where they are on the disk."""
    if isinstance(array, Rows):
        yield from (block for _, block in array.blocks())
    else:
        yield array


def open_rows(paths: Sequence[Path]) -> Rows:
    """Returns the rows in the files given, one file after the other, without reading them.

    Every header is held against the size of its file and against the first one's row.

    Args:
      paths: `.npy` files or IDX files without gzip, at least one; the content decides, not the
        name. Pickles are never read.

    Raises:
      ValueError: A file is damaged, gzipped, empty or in Fortran order, or its rows have another
        shape than those of the first file.
      TypeError: Its values are objects, or of another dtype than those of the first file.
    """
    parts = [_map_file(path) for path in paths]
    for path, part in zip(paths, parts, strict=True):
        if part.dtype != parts[0].dtype:
            raise TypeError(
                f"{path} holds {part.dtype}; expected {parts[0].dtype} as {paths[0].name} does. "
                "Write all shards with one dtype"
            )
        if part.shape[1:] != parts[0].shape[1:]:
            raise ValueError(
                f"{path} has rows of shape {part.shape[1:]}; expected {parts[0].shape[1:]} as "
                f"{paths[0].name} has. Write all shards with rows of one shape"
            )
    return Rows(parts)


def as_examples(inputs: Rows, labels: Rows) -> Examples:
    """Returns examples that stay on the disk: `Rows` stand in for the arrays."""
    arrays: Any = (inputs, labels)
    return Examples(*arrays)


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns an array that `jax.device_put` on a CPU takes as it is, without a copy: aligned."""
    num_bytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(num_bytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + num_bytes].view(dtype).reshape(shape)


def _map_file(path: Path) -> np.ndarray:
    with open(path, "rb") as file:
        num_bytes = os.fstat(file.fileno()).st_size
        magic = file.read(2)
        file.seek(0)
        if magic == b"\x1f\x8b":
            raise ValueError(
                f"{path} is gzipped; expected a file that can be mapped. Unpack it, keeping the "
                f"original: gunzip -k {path}"
            )
        if magic == b"\0\0":
            shape, dtype = read_idx_header(file, path)
        else:
            shape, dtype = _read_header(path, file)
        offset = file.tell()
    if num_bytes != offset + math.prod(shape) * dtype.itemsize:
        raise _damaged(
            path, f"has {num_bytes - offset} bytes of values", f"those of {dtype} of shape {shape}"
        )
    return map_file(path, dtype, shape, offset)


def _read_header(path: Path, file: Any) -> tuple[tuple[int, ...], np.dtype]:
    try:
        shape, fortran_order, dtype = read_npy_header(file)
    except ValueError as error:
        raise _damaged(path, f"has no header ({error})", "a .npy or IDX file") from error
    if dtype.hasobject:
        raise TypeError(
            f"{path} holds Python objects, which only a pickle can store; expected numbers. "
            "Pickles are never read: convert with array.astype(np.float32)"
        )
    if not shape or min(shape) < 1:
        raise ValueError(f"{path} has shape {shape}; expected at least one row. Leave it out")
    if fortran_order and len(shape) > 1:
        raise ValueError(
            f"{path} is in Fortran order, in which a row is all over the file; expected C order. "
            "Write it with np.save(path, np.ascontiguousarray(array))"
        )
    return shape, dtype


def _damaged(path: Path, found: str, expected: str) -> ValueError:
    return ValueError(f"{path} {found}; expected {expected}. Write it again with np.save")
