"""Does a run that is killed again and again end as if nothing had happened?

Trains the textbook network once undisturbed and once killed (SIGKILL) at random moments and
resumed each time, then compares parameters, optimizer state and metrics bit for bit.

    python -m scripts.robustness.faults --data_dir=FOLDER --epochs=400 --out_dir=runs/faults

Prints where each kill struck, as Markdown. About four minutes on two cores; without --data_dir, and
with 60 epochs, it trains on scikit-learn's digits, in two.
"""

import collections
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import orbax.checkpoint as ocp
from absl import app, flags, logging

from experiments import runs


class Process(Protocol):
    """A process that trains; `subprocess.Popen` is one."""

    def poll(self) -> int | None:
        """Returns the exit code, or None while it runs."""
        ...

    def kill(self) -> None:
        """Sends SIGKILL."""
        ...

    def wait(self) -> int:
        """Waits for the end; returns the exit code."""
        ...


def kill_again_and_again(
    start: Callable[[bool], Process], path: Path, num_kills: int, seed: int, longest: float
) -> list[str]:
    """Trains into a run folder, killing the process so many times; returns where each kill struck.

    A process is killed a random time after its start, or after an epoch of its own or two; which of
    these three is drawn at random, too. The last process is left alone.

    Args:
      start: Starts a process; its argument says whether to resume.
      path: Of the run folder.
      num_kills: At least so many, each of a process that still ran.
      seed: Decides the moments, as far as a program can.
      longest: Seconds from an epoch to the kill, at most; from the start, ten times as many.

    Raises:
      RuntimeError: a process ended by itself before it was killed, or the last one failed.
    """
    draw = random.Random(seed)
    folder, struck = runs.RunFolder(path), []
    while len(struck) < num_kills:
        before = num_lines(folder)
        process = start(folder.config_path.is_file())
        num_epochs = draw.randrange(3)
        while num_lines(folder) < before + num_epochs and process.poll() is None:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, longest if num_epochs else 10 * longest))
        if process.poll() is not None:
            raise RuntimeError(f"ended with {process.poll()} before kill {len(struck) + 1}")
        process.kill()
        process.wait()
        struck.append(where_it_struck(folder, before))
    code = start(folder.config_path.is_file()).wait()
    if code != 0:
        raise RuntimeError(f"the last process ended with {code}")
    return struck


def num_lines(folder: runs.RunFolder) -> int:
    """Returns how many whole lines `metrics.jsonl` has."""
    path = folder.metrics_path
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def where_it_struck(folder: runs.RunFolder, before: int) -> str:
    """Returns in words what a killed run was at, by what lies in its folder."""
    checkpoints = folder.checkpoints_path
    names = [path.name for path in checkpoints.iterdir()] if checkpoints.is_dir() else []
    done = num_lines(folder)
    if any("tmp" in name for name in names):
        return "in the middle of saving a checkpoint"
    saved = [int(name) for name in names if name.isdecimal()]
    if saved and not (checkpoints / str(max(saved)) / "sha256.json").is_file():
        return "between a checkpoint and its checksums"
    if saved and max(saved) >= done:
        return "between a checkpoint and its line of metrics"
    return "between two checkpoints" if done > before else "before its first epoch"


def last_state(path: Path) -> tuple[int, dict[str, tuple[str, bytes]]]:
    """Returns the last epoch of a run, and dtype and bytes of every array in its checkpoint."""
    epoch = max(int(p.name) for p in (path / "checkpoints").iterdir() if p.name.isdecimal())
    with ocp.StandardCheckpointer() as reader:
        arrays = reader.restore((path / "checkpoints" / str(epoch) / "state").absolute())
    values = {name: np.asarray(array) for name, array in arrays.items()}
    return epoch, {name: (str(value.dtype), value.tobytes()) for name, value in values.items()}


def metrics(path: Path) -> list[runs.Record]:
    """Returns the lines of metrics of a run, without the times."""
    times = ("seconds", "examples_per_second")
    lines = runs.RunFolder(path).read_metrics()
    return [{name: line[name] for name in line if name not in times} for line in lines]


def define_flags() -> None:
    """Defines the flags: called by the program, not on import, as other programs share names."""
    flags.DEFINE_string("data_dir", None, "Folder of MNIST; without it the digits.")
    flags.DEFINE_integer("num_kills", 20, "How often.", lower_bound=1)
    flags.DEFINE_integer("epochs", 60, "Of the run; enough to outlast the kills.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Decides the moments.")
    flags.DEFINE_string("out_dir", None, "Where the runs are kept; without it they are not.")


def main(argv: Sequence[str]) -> None:
    """Trains, kills, compares; ends with exit code 1 where the runs differ."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    given = flags.FLAGS
    logging.set_verbosity(logging.WARNING)
    where = [] if given.data_dir is None else ["--dataset=mnist", f"--data_dir={given.data_dir}"]
    with tempfile.TemporaryDirectory() as temporary:
        out_dir = Path(given.out_dir or temporary)
        for name in ("undisturbed", "killed"):
            runs.check_new_name(out_dir, name)

        def start(name: str, resume: bool) -> Process:
            program = [sys.executable, "-m", "experiments.train", f"--out_dir={out_dir}"]
            how = ["--resume"] if resume else [f"--epochs={given.epochs}", *where]
            command = [*program, f"--run_name={name}", *how]
            return subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ)

        start("undisturbed", False).wait()
        struck = kill_again_and_again(
            lambda resume: start("killed", resume),
            out_dir / "killed",
            given.num_kills,
            given.seed,
            longest=2.0,
        )
        same = [f(out_dir / "undisturbed") == f(out_dir / "killed") for f in (last_state, metrics)]
    print("| where the kill struck | kills |\n| --- | ---: |")
    for place, count in collections.Counter(struck).most_common():
        print(f"| {place} | {count} |")
    print(f"\nfinal state bit-equal: {same[0]}; all metrics equal: {same[1]}")
    if not all(same):
        sys.exit(1)


if __name__ == "__main__":
    define_flags()
    app.run(main)
