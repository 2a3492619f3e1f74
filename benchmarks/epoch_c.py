"""The epoch of the suite `epoch` in C: `benchmarks/epoch.c`, compiled when it is asked for."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

from benchmarks.harness import Run

if TYPE_CHECKING:
    from benchmarks.epoch import EpochProblem

_SOURCE = Path(__file__).parent / "epoch.c"
_FLAGS = ("-O3", "-march=native", "-ffast-math", "-fPIC")
_FLOATS = ctypes.POINTER(ctypes.c_float)


def c_epoch(problem: EpochProblem) -> Run:
    """Returns an epoch in C, float32, on one core.

    Raises:
      NotImplementedError: there is no C compiler, or it cannot compile for this machine.
    """
    function = _library().epoch
    pixels = np.ascontiguousarray(problem.pixels)
    labels, batches = (
        np.ascontiguousarray(indices, np.int32) for indices in (problem.labels, problem.batches)
    )
    sizes = np.array(problem.sizes, np.int32)
    start = [np.array(leaf, np.float32) for leaf in jax.tree.leaves(problem.network)]

    def run() -> object:
        params = [leaf.copy() for leaf in start]
        failed = function(
            len(sizes) - 1,
            _address(sizes),
            _addresses(params[::2]),
            _addresses(params[1::2]),
            _address(pixels),
            _address(labels),
            _address(batches),
            *batches.shape,
            ctypes.c_float(problem.learning_rate),
        )
        if failed:
            raise MemoryError("benchmarks/epoch.c ran out of memory or of layers")
        return params

    return run


@functools.cache
def _library() -> ctypes.CDLL:
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise NotImplementedError("there is no C compiler here")
    with tempfile.TemporaryDirectory() as folder:
        program, library = Path(folder) / "epoch.o", Path(folder) / "epoch.so"
        # Linked with -ffast-math too, a library rounds subnormal numbers of the whole process to 0.
        for command in (
            [compiler, *_FLAGS, "-c", str(_SOURCE), "-o", str(program)],
            [compiler, "-shared", str(program), "-o", str(library), "-lm"],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                reason = (done.stderr.splitlines() or ["no reason given"])[0]
                raise NotImplementedError(f"{compiler} does not compile {_SOURCE.name}: {reason}")
        return ctypes.CDLL(str(library))  # stays loaded when the file is gone


def _address(array: np.ndarray) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)


def _addresses(arrays: Sequence[np.ndarray]) -> ctypes.Array:
    return (_FLOATS * len(arrays))(*(array.ctypes.data_as(_FLOATS) for array in arrays))
