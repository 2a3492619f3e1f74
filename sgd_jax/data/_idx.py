"""The IDX format: two zero bytes, a type code, the number of axes, the axes, the values."""

import gzip
import math
import os
import struct
import zlib
from typing import BinaryIO

import numpy as np

_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_MAX_AXES = 64  # NumPy's own limit
_MAX_GZIP_RATIO = 1032  # deflate spends at least two bits on 258 bytes
_CHUNK_BYTES = 1 << 20


def read_idx(path: str | os.PathLike[str], *, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """Returns the array in an IDX file, gzipped or not (its content decides, not its name).

    The header is held against the size of the file before anything is allocated, and reading
    stops one byte after the last value, so neither a forged header nor a gzip bomb costs memory
    that the header and the file do not both account for.

    Args:
      path: The file.
      shape: If given, what the header must say; checked before the values are read.

    Returns:
      A writable array in native byte order: uint8, int8, int16, int32, float32 or float64.

    Raises:
      ValueError: The file is not IDX, is truncated, corrupt, empty or too long, or its shape is
        not `shape`.
      OSError: The file cannot be opened.

    Source: Y. LeCun, C. Cortes, C. Burges, "The MNIST database", section "The IDX file format".
    """
    with open(path, "rb") as file:
        num_stored = os.fstat(file.fileno()).st_size
        is_gzip = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if not is_gzip:
            return _read_array(file, path, shape, max_bytes=num_stored)
        try:
            with gzip.GzipFile(fileobj=file) as stream:
                max_bytes = num_stored * _MAX_GZIP_RATIO
                return _read_array(stream, path, shape, max_bytes)  # pyright: ignore[reportArgumentType]
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise _damaged(path, f"is a broken gzip file: {error}", "a whole one") from error


def read_idx_header(
    stream: BinaryIO, path: str | os.PathLike[str]
) -> tuple[tuple[int, ...], np.dtype]:
    """Returns shape and dtype of the IDX array that a stream begins with, and goes past them.

    Args:
      stream: Of the file, at its first byte.
      path: Of the file, for the message.

    Raises:
      ValueError: There is no such header, or it says that there are no values.
    """
    magic = stream.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0":
        raise _damaged(path, f"starts with {magic!r}", "two zero bytes, type code, number of axes")
    code, num_axes = magic[2:]
    if code not in _DTYPES:
        known = ", ".join(f"0x{known:02X}" for known in _DTYPES)
        raise _damaged(path, f"has type code 0x{code:02X}", f"one of {known}")
    if not 1 <= num_axes <= _MAX_AXES:
        raise _damaged(path, f"has {num_axes} axes", f"1 to {_MAX_AXES}")
    header = stream.read(4 * num_axes)
    if len(header) < 4 * num_axes:
        raise _damaged(path, f"ends within the header of {num_axes} axes", "4 bytes an axis")
    shape = struct.unpack(f">{num_axes}I", header)
    if 0 in shape:
        raise _damaged(path, f"is empty, shape {shape}", "at least one value")
    return shape, np.dtype(_DTYPES[code])


def _read_array(
    stream: BinaryIO,
    path: str | os.PathLike[str],
    expected_shape: tuple[int, ...] | None,
    max_bytes: int,
) -> np.ndarray:
    shape, dtype = read_idx_header(stream, path)
    if expected_shape is not None and shape != expected_shape:
        raise _damaged(path, f"has shape {shape}", str(expected_shape))
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes > max_bytes - 4 - 4 * len(shape):
        raise _damaged(path, "is shorter than its header says", f"{num_bytes} bytes of values")
    body = bytearray()
    while chunk := stream.read(min(_CHUNK_BYTES, num_bytes + 1 - len(body))):
        body += chunk
    if len(body) != num_bytes:
        word = "longer" if len(body) > num_bytes else "shorter"
        raise _damaged(path, f"is {word} than its header says", f"{num_bytes} bytes of values")
    values = np.frombuffer(body, dtype).reshape(shape)
    return values.astype(dtype.newbyteorder("="), copy=False)


def _damaged(path: str | os.PathLike[str], found: str, expected: str) -> ValueError:
    return ValueError(
        f"{os.fspath(path)} {found}; expected {expected}. "
        "The file is damaged or is another file: delete it and fetch it again."
    )
