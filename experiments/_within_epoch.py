"""Checkpoints between those of whole epochs, for epochs that take long."""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import sgd_jax as sj
from experiments import runs
from sgd_jax.distributed import processes


class Progress(NamedTuple):
    """How far training has come."""

    state: sj.TrainState
    """After the last step taken."""
    record: runs.Record
    """The line of metrics of the last whole epoch."""
    num_parts: int = 0
    """Parts of the epoch after it that are done."""
    seconds: float = 0.0
    """Spent on them."""


class PartCheckpoints:
    """The checkpoints within the epoch that is under way, the last two, in a folder of their own.

    They are as safe as those of epochs, see `runs.Checkpoints`, and void when their epoch is over.
    Of several processes all must come to each call.

    Args:
      path: The folder; made with the first checkpoint and removed with the last.
      every: Parts from one checkpoint to the next; 0 is none.
    """

    def __init__(self, path: Path, every: int):
        self._path = path
        self._every = every
        self._opened: runs.Checkpoints | None = None

    def restore(self, last: runs.Snapshot) -> tuple[Progress, list[str]]:
        """Returns where to go on from after the last whole epoch, and warnings of damaged files."""
        found, warnings = None, []
        if processes.from_first(self._path.is_dir):
            self._opened = self._open(last.state)
            found, warnings = self._opened.latest, self._opened.damaged
        if found is None or found.record["whole_epochs"] != last.epoch:
            return Progress(last.state, last.record), warnings
        return (
            Progress(found.state, last.record, found.record["num_parts"], found.record["seconds"]),
            warnings,
        )

    def save(self, progress: Progress) -> None:
        """Saves after part number k·every of an epoch, k = 1, 2, …, and removes older ones."""
        if not self._every or progress.num_parts % self._every:
            return
        self._opened = self._opened or self._open(progress.state)
        record = {
            "epoch": int(np.max(progress.state.step)),  # `runs.Checkpoints` counts by this name
            "whole_epochs": progress.record["epoch"],
            "num_parts": progress.num_parts,
            "seconds": progress.seconds,
        }
        self._opened.save(progress.state, record)

    def clear(self) -> None:
        """Removes them all: their epoch is over."""
        processes.in_all(self.close)
        processes.from_first(self._remove)

    def close(self) -> None:
        """Lets go of the folder."""
        if self._opened:
            self._opened.close()
            self._opened = None

    def _remove(self) -> None:
        if self._path.is_dir():
            void = self._path.with_name(f".{self._path.name}.void")
            shutil.rmtree(void, ignore_errors=True)  # of a run that was killed just here
            shutil.rmtree(self._path.rename(void))

    def _open(self, like: Any) -> runs.Checkpoints:
        return runs.Checkpoints(self._path, lambda record: record["epoch"], like=like)
