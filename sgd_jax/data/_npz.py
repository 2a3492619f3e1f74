"""A data set of one's own, as arrays in an `.npz` file."""

import lzma
import math
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from sgd_jax.data._arrays import (
    check_finite,
    check_headers,
    count_classes,
    default_scale,
    hold_out,
    loaded_dtype,
)
from sgd_jax.data._examples import Dataset, Examples, check_labels
from sgd_jax.data._npy import read_npy_header

_MAX_DEFLATE_RATIO = 1032  # two bits can stand for 258 bytes, not more
_ZIP_ERRORS = (  # what the readers of the standard library make of a damaged file
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    KeyError,
    OSError,
    RuntimeError,
    UnicodeDecodeError,
)


def load_npz(path: Path) -> Dataset:
    """Returns the data set in an `.npz` file; see `load`."""
    arrays = _read_arrays(path)
    for name, array in arrays.items():
        if name.startswith("x_"):
            check_finite(name, array)
    num_classes = count_classes(int(arrays["y_train"].max()))
    sets = {
        part: Examples(
            _as_rows(arrays[f"x_{part}"]),
            check_labels(f"y_{part}", arrays[f"y_{part}"], num_classes),
        )
        for part in ("train", "validation", "test")
        if f"x_{part}" in arrays
    }
    if "validation" not in sets:
        sets["train"], sets["validation"] = hold_out(sets["train"])
    scale = default_scale(sets["train"].inputs.dtype)
    return Dataset(path.stem, **sets, num_classes=num_classes, scale=scale)


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Checks every header, then reads: nothing big is allocated for a file that will not do."""
    with open(path, "rb") as file:
        if not zipfile.is_zipfile(file):
            raise _damaged(path, "is not a zip file")
        try:
            with zipfile.ZipFile(file) as archive:
                names = _choose_names(path, archive)
                headers = {name: _read_header(path, archive, name) for name in names}
                check_headers(headers)
                return {name: _read_array(path, archive, name) for name in names}
        except _ZIP_ERRORS as error:
            raise _damaged(path, f"is a zip file that does not open: {error}") from error


def _choose_names(path: Path, archive: zipfile.ZipFile) -> list[str]:
    present = [member.removesuffix(".npy") for member in archive.namelist()]
    names = ["x_train", "y_train", "x_test", "y_test"]
    if "x_validation" in present or "y_validation" in present:
        names += ["x_validation", "y_validation"]
    missing = [name for name in names if name not in present]
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}: it holds {', '.join(present) or 'nothing'}. "
            f"Expected {', '.join(names)}; write them with np.savez."
        )
    return names


def _read_header(
    path: Path, archive: zipfile.ZipFile, name: str
) -> tuple[tuple[int, ...], np.dtype]:
    """Returns shape and dtype, which the number of bytes in the archive bears out."""
    member: Any  # NumPy types its readers for files opened from disk only
    with archive.open(f"{name}.npy") as member:
        try:
            shape, _, dtype = read_npy_header(member)
        except ValueError as error:
            if isinstance(error.__cause__, _ZIP_ERRORS):
                raise error.__cause__ from error
            raise _damaged(path, f"holds {name} without an array header ({error})") from error
        num_bytes = archive.getinfo(f"{name}.npy").file_size - member.tell()
    if not shape or min(shape) < 1:
        raise ValueError(
            f"{name} has shape {shape}; expected at least one example. Give each set its examples."
        )
    if dtype.hasobject:
        return shape, dtype  # refused by its dtype; its pickle has no length to check
    if num_bytes != math.prod(shape) * dtype.itemsize:
        raise _damaged(path, f"holds {num_bytes} bytes for {name}, {dtype} of shape {shape}")
    if num_bytes > _MAX_DEFLATE_RATIO * path.stat().st_size:
        raise _damaged(path, f"is too small to hold the {num_bytes} bytes {name} is said to have")
    return shape, dtype


def _read_array(path: Path, archive: zipfile.ZipFile, name: str) -> np.ndarray:
    member: Any
    with archive.open(f"{name}.npy") as member:
        try:
            return npy.read_array(member, allow_pickle=False)
        except ValueError as error:
            raise _damaged(path, f"holds a broken {name} ({error})") from error


def _as_rows(inputs: np.ndarray) -> np.ndarray:
    rows = inputs.reshape(len(inputs), -1)
    return np.ascontiguousarray(rows, dtype=loaded_dtype(inputs.dtype))


def _damaged(path: Path, found: str) -> ValueError:
    return ValueError(
        f"{path} {found}; expected what np.savez writes. Write it again with "
        "np.savez(path, x_train=..., y_train=..., x_test=..., y_test=...)."
    )
