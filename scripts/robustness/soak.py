"""Do memory and speed stay flat over a long run?

Trains the textbook network on MNIST for 200 epochs by `experiments.train`, checkpoints, metrics
and all, and notes after each epoch the memory that the process holds (resident set) and the CPU
time that it took. Fits a line to each, after the first epochs.

    python -m scripts.robustness.soak --data_dir=FOLDER --figure=docs/figures/soak_mnist.png

Prints a table as Markdown and draws the figure. CPU time, not time: so other work on the machine
counts little. About a minute on two idle cores. Linux only: it reads /proc.
"""

import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags
from matplotlib.figure import Figure

from experiments import _cli, runs, train

_WARM_UP = 20  # epochs left out of the lines: programs and pools of memory are being set up
_MIB = 2**20


class Meter:
    """A `runs.Logger` that notes resident memory in bytes and CPU time in seconds."""

    samples: list[tuple[int, int, float]]  # of the last one made: epoch, memory, CPU time so far

    def __init__(self, folder: runs.RunFolder, config: dict[str, Any]):
        del folder, config
        type(self).samples = []

    def log(self, record: runs.Record) -> None:
        """Takes a sample."""
        self.samples.append((record["epoch"], resident_bytes(), time.process_time()))

    def close(self) -> None:
        """Does nothing."""


def resident_bytes() -> int:
    """Returns how much memory this process holds."""
    found = re.search(r"VmRSS:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def fit_line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Returns the slope of a least-squares line, and its standard error."""
    centered = x - x.mean()
    slope = centered @ y / (centered @ centered)
    residuals = y - y.mean() - slope * centered
    error = np.sqrt(residuals @ residuals / (len(x) - 2) / (centered @ centered))
    return float(slope), float(error)


def draw(path: Path, epochs: np.ndarray, memory: np.ndarray, seconds: np.ndarray) -> None:
    """Draws both over the epochs into a PNG file."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(epochs, memory / _MIB, color="#4477aa")
    left.set_title("resident memory, MiB", fontsize=11)
    right.plot(epochs[1:], seconds, ".", color="#228833", markersize=4)
    right.set_title("CPU seconds an epoch, measuring and saving included", fontsize=11)
    for axis in (left, right):
        axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
    runs.save_figure(path, figure)


def define_flags() -> None:
    """Defines the flag that is not one of `experiments.train`."""
    flags.DEFINE_string("figure", None, "PNG file to draw; without it none is.")


def main(argv: Sequence[str]) -> None:
    """Trains and prints what the lines say; ends with the exit code of the training."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    given = flags.FLAGS
    _cli.keep_compiled_programs()
    runs.LOGGERS["soak"] = Meter
    with tempfile.TemporaryDirectory() as temporary:
        if given.data_dir is not None:
            given["dataset"].parse("mnist")
        if not given["epochs"].present:
            given["epochs"].parse("200")
        given["log_to"].parse(["soak"])
        given["out_dir"].parse(temporary)
        for name in ("dataset", "data_dir", "epochs", "log_to", "out_dir"):
            given[name].present = given[name].value is not None
        code = train.main()
    if code:
        sys.exit(code)
    epochs, memory, cpu = (np.array(column) for column in zip(*Meter.samples, strict=True))
    seconds = np.diff(cpu)
    if given.figure is not None:
        draw(Path(given.figure), epochs, memory, seconds)
    if len(seconds) < _WARM_UP + 3:
        raise app.UsageError(f"epochs is {len(seconds)}; expected at least {_WARM_UP + 3}")
    print("| per epoch | mean | drift over 100 epochs |\n| --- | ---: | ---: |")
    for what, values, unit, scale in (
        ("resident memory", memory[1:].astype(float), "MiB", 1 / _MIB),
        ("CPU time", seconds, "s", 1.0),
    ):
        late, numbers = scale * values[_WARM_UP:], epochs[1 + _WARM_UP :].astype(float)
        slope, error = fit_line(numbers, late)
        drift = f"{100 * slope:+.3g} ± {100 * error:.2g} {unit}"
        share = f"{100 * 100 * slope / late.mean():+.2f} %"
        print(f"| {what} | {late.mean():.4g} {unit} | {drift} ({share}) |")
    print(f"\nmemory after epochs 1, {_WARM_UP} and {epochs[-1]}: ", end="")
    print(", ".join(f"{memory[i] / _MIB:.1f}" for i in (1, _WARM_UP, -1)), "MiB")


if __name__ == "__main__":
    define_flags()
    app.run(main)
