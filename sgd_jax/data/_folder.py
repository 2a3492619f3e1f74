"""A data set of one's own in a folder of shards, which may be larger than memory."""

import math
import os
import re
from pathlib import Path

import numpy as np

from sgd_jax.data._arrays import (
    check_finite,
    check_headers,
    count_classes,
    default_scale,
    hold_out,
    loaded_dtype,
)
from sgd_jax.data._examples import Dataset, Examples, check_labels
from sgd_jax.data._rows import Rows, as_examples, open_rows


def open_folder(path: Path) -> Dataset:
    """Returns the data set in a folder of shards, its arrays as `Rows`; see `open_dataset`."""
    files = {
        f"{axis}_{part}": shards
        for part in ("train", "validation", "test")
        for axis, shards in zip("xy", _find_shards(path, part), strict=True)
    }
    missing = [name for name in ("x_train", "x_test") if not files[name]]
    if missing:
        raise ValueError(
            f"{path} lacks {' and '.join(missing)}: it holds no file of that name, such as "
            f"{missing[0]}.npy, or {missing[0]}-000.npy, {missing[0]}-001.npy, … in shards. "
            "Write them with np.save, labels into y_… of the same name"
        )
    stored = {name: open_rows(shards) for name, shards in files.items() if shards}
    for name, rows in stored.items():
        if name[0] == "y":
            _check_lengths(files[name], rows, stored["x" + name[1:]])
    check_headers({name: (rows.shape, rows.dtype) for name, rows in stored.items()})

    num_classes = count_classes(max(int(y.max()) for _, y in stored["y_train"].blocks()))
    for name, rows in stored.items():
        if name[0] == "y":
            for first, labels in rows.blocks():
                check_labels(f"{path}: {name}", labels, num_classes, first)
        elif rows.dtype.kind == "f":
            for first, inputs in rows.blocks():
                check_finite(f"{path}: {name}", inputs, first)
    sets = {
        name[2:]: as_examples(
            Rows([part.reshape(len(part), -1) for part in x.parts], loaded_dtype(x.dtype)),
            Rows(stored["y" + name[1:]].parts, np.int32),
        )
        for name, x in stored.items()
        if name[0] == "x"
    }
    if "validation" not in sets:
        sets["train"], sets["validation"] = hold_out(sets["train"])
    scale = default_scale(sets["train"].inputs.dtype)
    return Dataset(path.resolve().name, **sets, num_classes=num_classes, scale=scale)


def _find_shards(path: Path, part: str) -> tuple[list[Path], list[Path]]:
    """Returns the files of inputs and those of labels of a part, in the same order."""
    inputs, labels = (
        sorted(
            child
            for child in path.iterdir()
            if re.fullmatch(rf"{axis}_{part}([-_.].+)?\.(npy|idx)", child.name)
        )
        for axis in "xy"
    )
    names = [{file.name[1:] for file in files} for files in (inputs, labels)]
    for name in sorted(names[0] ^ names[1]):
        there, absent = ("x", "y") if name in names[0] else ("y", "x")
        raise ValueError(
            f"{path} holds {there}{name} but not {absent}{name}; expected a file of inputs x_… and "
            "one of labels y_… for each shard, alike in the rest of the name"
        )
    return inputs, labels


def _check_lengths(files: list[Path], labels: Rows, inputs: Rows) -> None:
    for file, y, x in zip(files, labels.parts, inputs.parts, strict=True):
        if len(y) != len(x):
            raise ValueError(
                f"{file} holds {len(y)} labels, and the file of inputs beside it {len(x)} rows; "
                "expected one label for each row of the same shard"
            )


def read_rows(dataset: Dataset) -> Dataset:
    """Returns a data set of `Rows` with all its arrays in memory, if they fit into it."""
    parts = {name: getattr(dataset, name) for name in ("train", "validation", "test")}
    num_bytes = sum(rows.nbytes for part in parts.values() for rows in part)
    memory = _bytes_of_memory()
    if num_bytes > memory:
        raise ValueError(
            f"{dataset.name} holds {num_bytes / 2**30:.1f} GiB, and this machine has "
            f"{memory / 2**30:.1f} GiB of memory; expected what fits. Leave the examples on the "
            "disk: --stream, or data.open_dataset"
        )
    return dataset._replace(
        **{name: Examples(*map(np.asarray, part)) for name, part in parts.items()}
    )


def _bytes_of_memory() -> float:
    """Returns the physical memory of this machine; infinity where the system does not say."""
    if not hasattr(os, "sysconf"):
        return math.inf
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
