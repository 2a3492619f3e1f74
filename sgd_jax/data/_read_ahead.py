"""Asking the system for scattered rows of a mapped file before they are used.

Where a page of a mapped file is not in memory, a thread that touches it waits for the disk, and the
system reads its neighbours along, for most programs go on there. Rows at random, one after the
other, are thus read slowly and with much that nobody asked for. A system that is told which pages
will be needed reads these alone, many at a time.
"""

import mmap
import os
from collections.abc import Iterator

import numpy as np

from sgd_jax.data._mapped import find_file

_ROWS_AHEAD = 2048
"""How many rows are asked for together: enough for a disk, and few to keep in memory unused."""

_NUM_PROBES = 16
"""Of so many rows none may be missing, or all are asked for: asking takes longer than a copy."""

_GAP = 4
"""Pages not needed between two that are: so few are read along, as one piece."""


def blocks_read_ahead(rows: np.ndarray, indices: np.ndarray) -> Iterator[slice]:
    """Yields blocks of positions in ``indices``, from first to last, soon to be in memory.

    While one is in use, the system reads the rows of the next. Where the rows are in memory as it
    is, in no file, or the system takes no advice, there is one block.

    Args:
      rows: An array, mapped from a file or not, whose rows lie one after the other.
      indices: Of the rows that will be used, ascending.
    """
    whole = slice(0, len(indices))
    is_worth_it = len(indices) >= _NUM_PROBES and hasattr(os, "posix_fadvise")
    opened = _open_file(rows) if is_worth_it else None
    if opened is None:
        yield whole
        return
    file, offset = opened
    try:
        starts = offset + indices * rows.strides[0]
        if not _is_any_missing(file, starts[:: len(starts) // _NUM_PROBES]):
            yield whole
            return
        _ask_for(file, starts[:_ROWS_AHEAD], rows.strides[0])
        for start in range(0, len(indices), _ROWS_AHEAD):
            stop = start + _ROWS_AHEAD
            _ask_for(file, starts[stop : stop + _ROWS_AHEAD], rows.strides[0])
            yield slice(start, stop)
    finally:
        os.close(file)


def _open_file(rows: np.ndarray) -> tuple[int, int] | None:
    """Returns the file that an array is mapped from, opened, and where in it the array begins."""
    mapped = find_file(rows)
    if mapped is None:
        return None
    try:
        file = os.open(str(mapped.filename), os.O_RDONLY)
    except OSError:  # it has been moved since, and is still mapped
        return None
    return file, mapped.offset + rows.ctypes.data - mapped.ctypes.data


def _is_any_missing(file: int, starts: np.ndarray) -> bool:
    """Whether the first byte of one of the rows is not in memory, or the system does not say."""
    byte, flags = [bytearray(1)], getattr(os, "RWF_NOWAIT", None)
    if flags is None:
        return True
    try:
        for start in starts.tolist():
            os.preadv(file, byte, start, flags)
    except OSError:  # that it would have to wait
        return True
    return False


def _ask_for(file: int, starts: np.ndarray, length: int) -> None:
    """Tells the system that rows of so many bytes, if any, will be needed."""
    if not len(starts):
        return
    first = starts // mmap.PAGESIZE
    end = (starts + length - 1) // mmap.PAGESIZE + 1
    is_apart = first[1:] - end[:-1] > _GAP
    begins, stops = first[np.append(True, is_apart)], end[np.append(is_apart, True)]
    for begin, stop in zip(begins.tolist(), stops.tolist(), strict=True):
        size = (stop - begin) * mmap.PAGESIZE
        os.posix_fadvise(file, begin * mmap.PAGESIZE, size, os.POSIX_FADV_WILLNEED)
