"""A data set of one's own, as arrays in an `.npz` file."""

import math
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from sgd_jax.data.examples import Dataset, Examples, check_labels

_INPUT_DTYPES = ("uint8", "float32", "float64")
_MAX_CLASSES = 2**31
_MAX_DEFLATE_RATIO = 1032  # two bits can stand for 258 bytes, not more


def load_npz(path: Path) -> Dataset:
    """Returns the data set in an `.npz` file; see `load`."""
    arrays = _read_arrays(path)
    for name, array in arrays.items():
        if name.startswith("x_"):
            _check_finite(name, array)
    largest = int(arrays["y_train"].max())
    if largest >= _MAX_CLASSES:
        raise ValueError(
            f"y_train holds label {largest}; expected less than {_MAX_CLASSES}. "
            "Number the classes from 0."
        )
    num_classes = 1 + max(largest, 0)
    sets = {
        part: Examples(
            _as_rows(arrays[f"x_{part}"]),
            check_labels(f"y_{part}", arrays[f"y_{part}"], num_classes),
        )
        for part in ("train", "validation", "test")
        if f"x_{part}" in arrays
    }
    if "validation" not in sets:
        sets["train"], sets["validation"] = _hold_out(sets["train"])
    scale = 255.0 if sets["train"].inputs.dtype == np.uint8 else 1.0
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
                _check_headers(headers)
                return {name: _read_array(path, archive, name) for name in names}
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError) as error:
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
            version = npy.read_magic(member)
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, _, dtype = read(member)
        except ValueError as error:
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


def _check_headers(headers: dict[str, tuple[tuple[int, ...], np.dtype]]) -> None:
    """Raises TypeError or ValueError where shapes and dtypes do not make a data set."""
    train_shape, train_dtype = headers["x_train"]
    for name, (shape, dtype) in headers.items():
        if name.startswith("y_"):
            if dtype.kind not in "iu":
                raise TypeError(
                    f"{name} has dtype {dtype}; expected integers, one class number an example. "
                    f"Convert with {name}.astype(np.int32)."
                )
            num_examples = headers["x" + name[1:]][0][0]
            if shape != (num_examples,):
                raise ValueError(
                    f"{name} has shape {shape}; expected ({num_examples},), one label for each "
                    f"row of x{name[1:]}. Use argmax(axis=1) on one-hot rows, ravel() on a column."
                )
            continue
        if _loaded_dtype(dtype).name not in _INPUT_DTYPES:
            raise TypeError(
                f"{name} has dtype {dtype}; expected {', '.join(_INPUT_DTYPES)} or float16. "
                f"Convert with {name}.astype(np.float32), or np.uint8 for pixels 0 to 255."
            )
        if _loaded_dtype(dtype) != _loaded_dtype(train_dtype):
            raise TypeError(
                f"{name} has dtype {dtype}; expected {train_dtype} as x_train has. "
                "Give all inputs the same dtype and scale."
            )
        if math.prod(shape[1:]) != math.prod(train_shape[1:]):
            raise ValueError(
                f"{name} has rows of shape {shape[1:]}; expected {train_shape[1:]} as x_train has. "
                "Give all inputs the same features."
            )


def _loaded_dtype(dtype: np.dtype) -> np.dtype:
    return np.dtype(np.float32) if dtype.name == "float16" else dtype.newbyteorder("=")


def _read_array(path: Path, archive: zipfile.ZipFile, name: str) -> np.ndarray:
    member: Any
    with archive.open(f"{name}.npy") as member:
        try:
            return npy.read_array(member, allow_pickle=False)
        except ValueError as error:
            raise _damaged(path, f"holds a broken {name} ({error})") from error


def _check_finite(name: str, inputs: np.ndarray) -> None:
    finite = np.isfinite(inputs)
    if not finite.all():
        index = tuple(int(i) for i in np.unravel_index(np.argmin(finite), inputs.shape))
        raise ValueError(
            f"{name}{list(index)} is {inputs[index]}; expected finite inputs. "
            "Remove or fill in such examples."
        )


def _as_rows(inputs: np.ndarray) -> np.ndarray:
    rows = inputs.reshape(len(inputs), -1)
    return np.ascontiguousarray(rows, dtype=_loaded_dtype(inputs.dtype))


def _hold_out(examples: Examples) -> tuple[Examples, Examples]:
    """Returns all but the last tenth (rounded down, at least one example), and that tenth."""
    num_examples = len(examples.labels)
    if num_examples < 2:
        raise ValueError(
            "x_train has 1 example; expected at least 2, one of them held out for validation. "
            "Add examples, or give x_validation and y_validation."
        )
    cut = num_examples - max(1, num_examples // 10)
    return (
        Examples(examples.inputs[:cut], examples.labels[:cut]),
        Examples(examples.inputs[cut:], examples.labels[cut:]),
    )


def _damaged(path: Path, found: str) -> ValueError:
    return ValueError(
        f"{path} {found}; expected what np.savez writes. Write it again with "
        "np.savez(path, x_train=..., y_train=..., x_test=..., y_test=...)."
    )
