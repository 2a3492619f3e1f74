"""Times contenders that do the same work in turns, and writes what came out as a table."""

import ctypes
import importlib.util
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import jax
import numpy as np

try:
    import resource
except ImportError:  # Windows
    resource = None

Run = Callable[[], object]


class Prepared(NamedTuple):
    """What a contender has made ready."""

    run: Run
    """Does the work once; this is timed."""
    peak_bytes: int | None = None
    """Memory at its peak beyond params and examples, results included; None: not known."""


class Contender(NamedTuple):
    """One way to do the work of a suite."""

    name: str
    make: Callable[[], Prepared | Run]
    """Prepares what is not timed and returns what is. Raises NotImplementedError, with the reason,
    where its library cannot do the work: then it is left out by name."""
    needs: tuple[str, ...] = ()
    """Modules without which this contender is skipped; `make` imports them."""
    max_rounds: int | None = None
    """At most so many timed rounds and no warm-up, for what takes many seconds and compiles
    nothing; None: as many rounds as asked for."""
    question: str = ""
    """What is computed, where the contenders of a suite do not all compute the same."""
    baseline: tuple[str, str] | None = None
    """Name and question of the contender that the ratio is to; None: the first of the suite."""
    units: int = 1
    """How many pieces of work it does at once, such as the runs of a sweep: times are per piece."""


class Suite(NamedTuple):
    """Contenders that do the same work; the first is ours unless they name their baselines."""

    name: str
    work: str
    contenders: list[Contender]
    read: Callable[[object], list[np.ndarray]] | None = None
    """Turns what any contender returns into arrays to compare; None: nothing is compared."""
    tolerance: float = 1e-4
    """How far answers may lie apart, relative to the first contender of the same question: a
    vector entry by entry, other arrays by their Euclidean norm."""
    min_turn_seconds: float = 0.0
    """A turn repeats the work until so much time has passed: what takes milliseconds then finds
    caches and threads as it left them, not as another contender did."""
    max_seconds: float | None = None
    """A contender gets no more turns once its timed runs have taken so long; if its first run takes
    that long, that is the one timed. None: all turns."""


class Timing(NamedTuple):
    """How long one contender took, run by run."""

    contender: Contender
    seconds: list[float]
    cpu_seconds: list[float]
    """What all threads, and processes started, spent on it together: no waiting for others."""
    peak_bytes: int | None = None

    @property
    def median(self) -> float:
        """The median over the runs, in seconds."""
        return statistics.median(self.seconds)

    @property
    def least(self) -> float:
        """The shortest run, in seconds."""
        return min(self.seconds)

    def ratios(self, baseline: "Timing") -> dict[str, float]:
        """The ratios to another: of medians, of the shortest runs, of medians of CPU time."""
        cpu, its_cpu = (statistics.median(t.cpu_seconds) for t in (self, baseline))
        return {
            "ratio": self.median / baseline.median,
            "ratio_of_minima": self.least / baseline.least,
            "ratio_of_cpu": cpu / its_cpu if its_cpu > 0 else float("inf"),
        }


def keep_freed_memory() -> bool:
    """Makes glibc keep what is freed for the next run; returns whether it does.

    By itself glibc hands every block of more than 32 MB back to the system and takes it anew: each
    run then pays for touching fresh pages, and a contender of 33 MB looks twice as slow as one of
    31 MB.
    """
    most = 2**31 - 1
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    trim_threshold, mmap_threshold = -1, -3
    return all([set_option(option, most) == 1 for option in (trim_threshold, mmap_threshold)])


def missing_modules(contender: Contender) -> list[str]:
    """Returns the modules that a contender needs and that are not installed."""
    return [module for module in contender.needs if importlib.util.find_spec(module) is None]


def time_in_turns(
    suite: Suite, num_rounds: int, left_out: dict[str, str] | None = None
) -> list[Timing]:
    """Returns the timing of each contender, in the order given.

    Each is prepared and warmed up by one run that is not counted, whose answer is compared where
    the suite says how; then they take turns for num_rounds, in reversed order every other round.
    The clock stops when the result is ready on its device, not when the call returns.

    Args:
      suite: what to time.
      num_rounds: how many turns each contender gets.
      left_out: filled with the contenders that are not timed and why: their library cannot do the
        work, or their answer is another one.

    Raises:
      ValueError: num_rounds < 1.
    """
    if num_rounds < 1:
        raise ValueError(f"num_rounds must be at least 1, got {num_rounds}")
    left_out = {} if left_out is None else left_out
    lanes, answers = [], {}
    for contender in suite.contenders:
        try:
            made = contender.make()
            prepared = made if isinstance(made, Prepared) else Prepared(made)
            timing = Timing(contender, [], [], prepared.peak_bytes)
            if contender.max_rounds is None:
                result = _run_once(prepared.run, timing)
                if suite.max_seconds is None or timing.least < suite.max_seconds:
                    timing.seconds.clear()
                    timing.cpu_seconds.clear()
                if suite.read is not None:
                    answer = suite.read(result)
                    first = answers.setdefault(contender.question, answer)
                    _refuse_other_answers(answer, first, suite.tolerance)
                del result
        except NotImplementedError as reason:
            left_out[title(contender)] = str(reason)
            continue
        lanes.append((prepared.run, timing))
    for index in range(num_rounds):
        for run, timing in lanes if index % 2 == 0 else reversed(lanes):
            limit = timing.contender.max_rounds
            if limit is not None and index >= limit:
                continue
            if suite.max_seconds is None or sum(timing.seconds) < suite.max_seconds:
                _take_turn(run, timing, suite.min_turn_seconds)
    return [timing for _, timing in lanes]


def _run_once(run: Run, timing: Timing) -> object:
    start, cpu_start = time.perf_counter(), _cpu_seconds()
    result = jax.block_until_ready(run())
    _wait_for_torch()
    units = timing.contender.units
    timing.seconds.append((time.perf_counter() - start) / units)
    timing.cpu_seconds.append((_cpu_seconds() - cpu_start) / units)
    return result


def as_array(leaf: Any) -> np.ndarray:
    """Returns an array of any library, on any device, as one of NumPy's."""
    return np.asarray(leaf.detach().cpu() if hasattr(leaf, "detach") else leaf)


def _cpu_seconds() -> float:
    """Of this process, all its threads, and of its children that have ended."""
    if resource is None:
        return time.process_time()
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _wait_for_torch() -> None:
    """Waits for what PyTorch has under way on a GPU, where it has one in use."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _take_turn(run: Run, timing: Timing, min_seconds: float) -> None:
    first = len(timing.seconds)
    while not timing.seconds[first:] or sum(timing.seconds[first:]) < min_seconds:
        _run_once(run, timing)


def _refuse_other_answers(
    answer: Sequence[np.ndarray], first: Sequence[np.ndarray], tolerance: float
) -> None:
    """Raises NotImplementedError where an answer is not that of the first contender."""
    error = relative_error(answer, first)
    if not error <= tolerance:
        raise NotImplementedError(f"its answer is another one, by {error:.1g} relative")


def relative_error(answer: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    """Returns the largest relative error: a vector's entry by entry, others' by their norm."""
    if [a.shape for a in answer] != [b.shape for b in expected]:
        return float("inf")
    errors = []
    for a, b in zip(answer, expected, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        if a.ndim == 1:
            errors.append(np.max(np.abs(a - b) / np.maximum(np.abs(b), 1e-30)))
        else:
            errors.append(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))
    return float(np.max(errors, initial=0))  # not a number where one of them is


def title(contender: Contender) -> str:
    """Returns the name of a contender, with the question where there is one."""
    return f"{contender.name}: {contender.question}" if contender.question else contender.name


def measure(suite: Suite, num_rounds: int) -> dict:
    """Returns what was measured, fit for JSON.

    The ratio is that of medians; beside it those of the shortest runs and of CPU time, which other
    work on the machine disturbs less.
    """
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    missing = {title(contender): missing_modules(contender) for contender in suite.contenders}
    present = [c for c in suite.contenders if not missing[title(c)]]
    left_out: dict[str, str] = {}
    timings = time_in_turns(suite._replace(contenders=present), num_rounds, left_out)
    by_title = {(t.contender.name, t.contender.question): t for t in timings}

    def baseline(timing: Timing) -> Timing:
        named = timing.contender.baseline
        return timings[0] if named is None else by_title[named]

    return {
        "suite": suite.name,
        "work": suite.work,
        "load_before": load,
        "rows": [
            {
                "contender": timing.contender.name,
                "question": timing.contender.question,
                "baseline": baseline(timing).contender.name,
                **timing.ratios(baseline(timing)),
                "median_seconds": timing.median,
                "min_seconds": timing.least,
                "max_seconds": max(timing.seconds),
                "median_cpu_seconds": statistics.median(timing.cpu_seconds),
                "num_runs": len(timing.seconds),
                "peak_bytes": timing.peak_bytes,
            }
            for timing in timings
        ],
        "left_out": left_out,
        "skipped": {name: modules for name, modules in missing.items() if modules},
    }


_PACKAGES = (
    *("sgd_jax", "jax", "jaxlib", "numpy", "optax"),
    *("torch", "opacus", "backpack-for-pytorch"),
)


def circumstances() -> dict:
    """Returns where the measuring is done: device, cores, versions."""
    device = jax.devices()[0]
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "device": f"{device.platform} ({device.device_kind})",
        "num_devices": jax.device_count(),
        "num_cores": os.cpu_count(),
        "machine": f"{platform.system()} {platform.machine()}",
        "versions": versions,
    }


def as_markdown(results: Iterable[dict], where: dict) -> str:
    """Returns results of `measure` as tables, ratios first, with `circumstances` below."""
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    last = (
        f"{where['num_devices']} × {where['device']}, {where['num_cores']} cores, "
        f"{where['machine']}; {versions}."
    )
    if where.get("keeps_freed_memory"):
        last += " glibc keeps freed memory."
    return "\n\n".join([*(_table(result) for result in results), last])


def _table(result: dict) -> str:
    """One table; columns that say nothing are left out."""
    rows = result["rows"]
    columns: list[tuple[str, str, Callable[[dict], str]]] = [
        ("ratio", "---:", lambda row: f"{row['ratio']:.2f}"),
        ("of minima", "---:", lambda row: f"{row['ratio_of_minima']:.2f}"),
        ("of CPU time", "---:", lambda row: f"{row['ratio_of_cpu']:.2f}"),
    ]
    if any(row["question"] for row in rows):
        columns.append(("question", "---", lambda row: row["question"]))
    columns += [
        ("contender", "---", lambda row: row["contender"]),
        ("median, s", "---:", lambda row: f"{row['median_seconds']:.3g}"),
        (
            "min to max, s",
            "---:",
            lambda row: f"{row['min_seconds']:.3g} to {row['max_seconds']:.3g}",
        ),
    ]
    if any(row["peak_bytes"] is not None for row in rows):
        columns.append(("peak memory, MB", "---:", lambda row: _megabytes(row["peak_bytes"])))
    columns.append(("runs", "---:", lambda row: str(row["num_runs"])))
    lines = [
        f"**{result['suite']}**: {result['work']}",
        "",
        "| " + " | ".join(name for name, _, _ in columns) + " |",
        "| " + " | ".join(rule for _, rule, _ in columns) + " |",
    ]
    lines += ["| " + " | ".join(cell(row) for _, _, cell in columns) + " |" for row in rows]
    below = []
    others = sorted({row["baseline"] for row in rows} - {rows[0]["baseline"]}) if rows else []
    if rows and any(row["question"] for row in rows):
        below.append(f"Ratios are to {' or '.join([rows[0]['baseline'], *others])}.")
    if result["load_before"] is not None:
        below.append(f"Load of the machine before: {result['load_before']:.1f}.")
    lines += ["", " ".join(below)] if below else []
    lines += [f"\nLeft out: {name}; {reason}." for name, reason in result["left_out"].items()]
    lines += [
        f"\nSkipped: {name}, for want of {', '.join(modules)}."
        for name, modules in result["skipped"].items()
    ]
    return "\n".join(lines)


def _megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.3g}"
