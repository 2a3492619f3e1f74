"""The folder of one run: never that of another, and every JSON file in it whole at any moment."""

import difflib
import json
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

from experiments.runs.files import parse_object, read_json, write_json, write_text
from experiments.runs.lock import RunLock
from sgd_jax.distributed import processes

Record = dict[str, Any]
"""One line of `metrics.jsonl`: what was measured after one epoch."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+=-]*")


class RunFolder:
    """A folder with `config.json`, `metrics.jsonl` and `summary.json`, and room for more.

    Made by `create` or `open`. JSON files are replaced atomically, so a reader or a crash finds
    the old one or the new one; a line of metrics is on the disk when `append_metrics` returns.
    What reads them raises ValueError, with the path, where a file is damaged. Whoever writes holds
    `lock`.
    """

    def __init__(self, path: str | os.PathLike[str]):
        path = Path(path)
        self.path = path
        self.config_path = path / "config.json"
        self.metrics_path = path / "metrics.jsonl"
        self.summary_path = path / "summary.json"
        self.checkpoints_path = path / "checkpoints"
        self.figure_path = path / "figures" / "learning_curve.png"
        self.report_path = path / "report.html"
        self.lock = RunLock(path)

    @classmethod
    def create(cls, out_dir: str | os.PathLike[str], name: str | None, prefix: str) -> "RunFolder":
        """Makes the folder of a new run.

        Args:
          out_dir: Where runs are kept; made where it does not exist.
          name: Of the folder; None for ``prefix`` with the time, and a number where that is taken.
          prefix: What an automatic name begins with.

        Returns:
          A folder that this call made and nobody else's call did, also under a race.

        Raises:
          ValueError: ``name`` is not a plain folder name.
          FileExistsError: there is a run of that name.
        """
        out_dir = Path(out_dir)
        out_dir.mkdir(parents=True, exist_ok=True)
        if name is not None:
            check_new_name(out_dir, name)
            (out_dir / name).mkdir()
            return cls(out_dir / name)
        prefix = re.sub(r"[^A-Za-z0-9_.+=-]", "_", prefix)
        stem = f"{prefix}-{time.strftime('%Y%m%d-%H%M%S')}"
        number = 1
        while True:
            path = out_dir / (stem if number == 1 else f"{stem}-{number}")
            try:
                path.mkdir()
            except FileExistsError:
                number += 1
            else:
                return cls(path)

    @classmethod
    def open(cls, out_dir: str | os.PathLike[str], name: str) -> "RunFolder":
        """Returns the folder of an existing run; raises FileNotFoundError where there is none."""
        check_name(name)
        out_dir = Path(out_dir)
        folder = cls(out_dir / name)
        if not folder.config_path.is_file():
            raise FileNotFoundError(
                f"run_name is {name!r}, but {folder.config_path} does not exist: no such run. "
                f"{_describe_runs(out_dir, name)}"
            )
        return folder

    def read_config(self) -> dict[str, Any]:
        """Returns `config.json`."""
        return read_json(self.config_path)

    def write_config(self, config: dict[str, Any]) -> None:
        """Replaces `config.json`."""
        write_json(self.config_path, config)

    def read_summary(self) -> dict[str, Any] | None:
        """Returns `summary.json`, or None where there is none."""
        return read_json(self.summary_path) if self.summary_path.is_file() else None

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Replaces `summary.json`."""
        write_json(self.summary_path, summary)

    def append_metrics(self, record: Record) -> None:
        """Adds a line to `metrics.jsonl`; it has reached the disk when this returns."""
        if not processes.is_first():
            return
        with open(self.metrics_path, "a", encoding="utf-8") as file:
            file.write(_line(record))
            file.flush()
            os.fsync(file.fileno())

    def read_metrics(self) -> list[Record]:
        """Returns the lines of `metrics.jsonl`; a torn last line, left by a crash, is left out."""
        if not self.metrics_path.is_file():
            return []
        lines = self.metrics_path.read_bytes().split(b"\n")
        records = []
        for number, line in enumerate(lines[:-1], start=1):  # after the last newline it is torn
            name = f"{self.metrics_path}, line {number},"
            record = parse_object(line, name)
            if type(record.get("epoch")) is not int:
                raise ValueError(f"{name} is damaged: it names no epoch; expected a whole number")
            records.append(record)
        return records

    def rewind_metrics(self, last: Record | None) -> bool:
        """Makes ``last`` the last line of `metrics.jsonl`; None is for a run without a checkpoint.

        Lines of the same and of later epochs are dropped. A checkpoint is saved before its line is
        written, so after a crash the line of the last checkpoint may be the one that is missing.

        Returns:
          Whether ``last`` was missing.

        Raises:
          ValueError: the lines of the epochs before are not all there; there are lines, but no
            checkpoint.
        """
        records = self.read_metrics()
        if last is None:
            if records:
                raise ValueError(
                    f"{self.metrics_path} has a line for epoch {records[-1]['epoch']}, but there "
                    f"is no whole checkpoint in {self.checkpoints_path}; expected one of that "
                    "epoch. Put it back, or start a new run"
                )
            write_text(self.metrics_path, "")
            return False
        earlier = [record for record in records if record["epoch"] < last["epoch"]]
        if [record["epoch"] for record in earlier] != list(range(last["epoch"])):
            raise ValueError(
                f"{self.metrics_path} must hold one line for each epoch before {last['epoch']}, "
                "that of the last checkpoint; it holds those of "
                f"{[record['epoch'] for record in earlier]}. The file was changed by hand: put it "
                "back, or start a new run"
            )
        write_text(self.metrics_path, "".join(map(_line, [*earlier, last])))
        return last not in records


def _describe_runs(out_dir: Path, name: str, most: int = 8) -> str:
    """Returns a sentence about the runs in a folder: one of a similar name, or the latest ones."""
    files = sorted(out_dir.glob("*/config.json"), key=lambda path: -path.stat().st_mtime)
    known = [path.parent.name for path in files]
    if close := difflib.get_close_matches(name, known, n=1):
        return f"Did you mean {close[0]}?"
    more = f" and {len(known) - most} more" if len(known) > most else ""
    return f"Runs in {out_dir}, latest first: {', '.join(known[:most]) or 'none'}{more}"


def check_writable(out_dir: str | os.PathLike[str]) -> None:
    """Raises OSError, with the remedy, unless files can be written in ``out_dir``; makes it."""
    out_dir = Path(out_dir)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out_dir):
            pass
    except OSError as error:
        raise OSError(
            f"out_dir is {str(out_dir)!r}, where no file can be written ({error}); expected a "
            "folder you may write to. Give another one with --out_dir"
        ) from error


def check_name(name: str) -> None:
    """Raises ValueError unless ``name`` is the plain name of a folder."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"run_name is {name!r}; expected letters a to z or A to Z, digits and, after the "
            "first, any of _ . + = -, without spaces. Folders go into --out_dir"
        )


def check_new_name(out_dir: str | os.PathLike[str], name: str) -> None:
    """Raises unless ``name`` is free for a new run."""
    check_name(name)
    out_dir = Path(out_dir)
    if (out_dir / name).exists():
        raise FileExistsError(
            f"run_name is {name!r}, but {out_dir / name} exists and is never overwritten. Give "
            "another --run_name, or continue that run with --resume if it is of train or sweep"
        )


def _line(record: Record) -> str:
    return json.dumps(record, allow_nan=False) + "\n"
