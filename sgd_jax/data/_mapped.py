"""Files mapped into memory, and copies of their rows that survive a file that changes meanwhile.

To touch a mapped page that its file no longer has ends a process by SIGBUS, which Python cannot
catch. Linux copies memory for a process on request, by `process_vm_readv`, and then says how far it
came instead.
"""

import ctypes
import errno
import functools
import mmap
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

_MAX_PIECES = 1024
"""Pieces of memory that Linux copies in one call."""

_MAX_BYTES = 1 << 30
"""Bytes that it is asked for in one call; it copies at most twice as many."""


class ChangedFileError(OSError):
    """A data file has changed since it was opened; what was read from it counts for nothing."""


class MappedFile(np.memmap):
    """An array mapped from a file, which remembers what the file was like."""

    opened: os.stat_result

    def check(self) -> None:
        """Raises ChangedFileError if the file is not as it was when it was opened.

        A file that was deleted, or replaced by another one of its name, is still mapped.
        """
        path = Path(str(self.filename))
        try:
            now = path.stat()
        except FileNotFoundError:
            return
        before = self.opened
        if (now.st_dev, now.st_ino) != (before.st_dev, before.st_ino):
            return
        if (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise ChangedFileError(
                f"{path} has changed while it was in use: expected {_describe(before)}, found "
                f"{_describe(now)}. Data files must stay as they are while they are read"
            )


def _describe(stat: os.stat_result) -> str:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(stat.st_mtime))
    return f"{stat.st_size:,} bytes written at {when}"


def map_file(path: Path, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> MappedFile:
    """Returns the array that begins at an offset in a file, mapped for reading."""
    opened = path.stat()
    array: Any = MappedFile(path, dtype, "r", offset, shape)
    array.opened = opened
    return array


def find_file(rows: np.ndarray) -> MappedFile | None:
    """Returns what an array is a view of, if that is mapped from a file and its rows are whole."""
    array = rows
    while isinstance(array, np.ndarray) and not isinstance(array.base, mmap.mmap):
        array = array.base
    return array if isinstance(array, MappedFile) and rows.flags.c_contiguous else None


def copy_rows(rows: np.ndarray, indices: np.ndarray, out: np.ndarray) -> None:
    """Copies the rows of the indices given into ``out``, whose dtype they are cast to.

    Args:
      rows: (n, ...), mapped from a file or not.
      indices: (k,) integers in [0, n).
      out: (k, ...), C-contiguous.

    Raises:
      ChangedFileError: the file has changed since it was opened.
    """
    if not len(indices):
        return
    file = find_file(rows)
    copied = out if rows.dtype == out.dtype else np.empty(out.shape, rows.dtype)
    if file is None or not _copy_safely(rows, indices, copied, file):
        if file is not None:
            file.check()  # a moment before: all that this system allows
        np.take(rows, indices, axis=0, out=copied, mode="clip")
    if file is not None:
        file.check()
    if copied is not out:
        out[...] = copied


def copy_all(rows: np.ndarray, out: np.ndarray) -> None:
    """Copies all rows into ``out``, as `copy_rows` does."""
    size = max(1, _MAX_BYTES // max(1, rows.nbytes // max(1, len(rows))))
    for first in range(0, len(rows), size):
        piece = rows[first : first + size]
        copy_rows(piece[None], np.zeros(1, np.int64), out[None, first : first + size])


def _copy_safely(rows: np.ndarray, indices: np.ndarray, out: np.ndarray, file: MappedFile) -> bool:
    """Copies rows by `process_vm_readv`; returns False if this system does not do so."""
    read = _find_reader()
    if read is None:
        return False
    length = rows.nbytes // len(rows)
    step = max(1, min(_MAX_PIECES, _MAX_BYTES // max(1, length)))
    for first in range(0, len(indices), step):
        chosen = indices[first : first + step]
        pieces = np.empty((len(chosen), 2), np.uint64)  # (address, length)
        pieces[:, 0] = rows.ctypes.data + chosen * length
        pieces[:, 1] = length
        target = np.array([out.ctypes.data + first * length, len(chosen) * length], np.uint64)
        if (
            read(os.getpid(), target.ctypes.data, 1, pieces.ctypes.data, len(pieces), 0)
            != target[1]
        ):
            if ctypes.get_errno() in (errno.ENOSYS, errno.EPERM):
                return False
            file.check()
            raise ChangedFileError(
                f"{file.filename} could not be read to its end: expected {_describe(file.opened)}. "
                "The disk may have failed; data files must stay as they are while they are read"
            )
    return True


@functools.cache
def _find_reader() -> Callable[..., int] | None:
    """Returns `process_vm_readv`, or None if this system has none."""
    if not sys.platform.startswith("linux"):
        return None
    read = getattr(ctypes.CDLL(None, use_errno=True), "process_vm_readv", None)
    if read is not None:
        address, number = ctypes.c_void_p, ctypes.c_ulong
        read.restype = ctypes.c_ssize_t
        read.argtypes = [ctypes.c_int, address, number, address, number, number]
    return read
