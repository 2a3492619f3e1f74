"""Do damaged and forged files ever do more than raise a clear error?

Makes thousands of damaged files of every kind that is read: IDX, `.npz`, shards, checkpoints, and
what a run folder holds. Each is read in a process whose memory is limited. A file may be read, if
it is still good, or refused by a ValueError, TypeError or OSError that names it. All else is a
fault: another exception, a message without the name, a crash, a hang, too much memory, code run.

    python -m scripts.robustness.fuzz --num_cases=20000 --out_dir=docs/results

Case i of a kind is drawn from (seed, kind, i) alone; --only=KIND:I reads one again, in this
process. Prints a table as Markdown; exit code 1 where there was a fault. About ten minutes on two
cores.
"""

import collections
import multiprocessing
import random
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags

from scripts.robustness.readers import Reader, make_readers

_SHARES = {  # of all cases, by kind
    "idx": 5,
    "npz": 6,
    "shards": 3,
    "config.json": 3,
    "metrics.jsonl": 3,
    "summary.json": 1,
    "checkpoint": 3,
    "checkpoint, without checksums": 1,
    "checkpoint, checksums forged": 1,
}
_HEADROOM = 1 << 30  # bytes of address space that a reader may take beyond what it began with
_LONGEST_WAIT = 600  # seconds without an answer: a hang
_EXECUTION = {"pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen"}


class Case(NamedTuple):
    """What came of a damaged file."""

    outcome: str
    """`read`, `refused`, or `fault: ` and what."""
    seconds: float
    """CPU time of reading it."""
    peak: int
    """Bytes of memory that the process has held at most, so far."""


class Kind(NamedTuple):
    """What came of all files of a kind."""

    name: str
    counts: collections.Counter
    seconds: float
    """The longest."""
    growth: int
    """Bytes of memory beyond what reading the whole sample took, at most."""
    faults: list[tuple[int, str]]


def run_case(reader: Reader, seed: int, kind: str, number: int) -> Case:
    """Makes a damaged file and reads it."""
    reader.damage(random.Random(f"{seed} {kind} {number}"))
    began = time.process_time()
    try:
        found = reader.read()
        outcome = "read" if found == reader.expected or reader.expected is None else "fault: unseen"
    except (ValueError, TypeError, OSError) as error:
        named = any(word in str(error) for word in reader.words)
        outcome = "refused" if named else f"fault: {_describe(error)}"
    except Exception as error:
        outcome = f"fault: {_describe(error)}"
    return Case(outcome, time.process_time() - began, _peak_bytes())


def _describe(error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    message = str(error)[:200]
    return f"{type(error).__name__}: {message!r} at {Path(where.filename).name}:{where.lineno}"


def _peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _work(pipe: Connection, kind: str, seed: int, numbers: range) -> None:
    """Runs cases in a process of its own, and sends what came of each."""
    executed = []
    with tempfile.TemporaryDirectory() as folder:
        reader = make_readers()[kind](Path(folder))
        reader.read()  # so that what is loaded and compiled once is there
        sys.addaudithook(lambda event, _: event in _EXECUTION and executed.append(event))
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limit = in_use + _HEADROOM
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        pipe.send(_peak_bytes())
        for number in numbers:
            case = run_case(reader, seed, kind, number)
            if executed or (Path(folder) / "executed").exists():
                case = case._replace(outcome=f"fault: ran code: {executed}")
                executed.clear()
            pipe.send(case)


def fuzz(kind: str, num_cases: int, seed: int = 0) -> Kind:
    """Reads so many damaged files of a kind, each in a process that may crash or hang."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fuzzing.readers"])
    counts, faults, longest, growth = collections.Counter(), [], 0.0, 0
    number = 0
    while number < num_cases:
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, kind, seed, range(number, num_cases)))
        process.start()
        theirs.close()
        start = None
        try:
            while start is None or number < num_cases:
                if not ours.poll(_LONGEST_WAIT):
                    raise TimeoutError
                answer: Any = ours.recv()
                if start is None:
                    start = answer
                    continue
                growth = max(growth, answer.peak - start)
                longest = max(longest, answer.seconds)
                counts[answer.outcome.partition(":")[0]] += 1
                if answer.outcome.startswith("fault"):
                    faults.append((number, answer.outcome))
                number += 1
        except (EOFError, TimeoutError, ConnectionResetError) as error:
            process.kill()
            process.join()
            if start is None:
                raise RuntimeError(f"the reader of {kind} did not start") from error
            what = "hang" if isinstance(error, TimeoutError) else f"crash {process.exitcode}"
            faults.append((number, f"fault: {what}"))
            counts["fault"] += 1
            number += 1
        process.join()
    return Kind(kind, counts, longest, growth, faults)


def as_table(kinds: Sequence[Kind]) -> str:
    """Returns what came of all kinds as Markdown."""
    lines = [
        "| file | damaged | refused | still good | faults | longest, CPU s | memory beyond, MiB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    total = collections.Counter()
    for kind in kinds:
        lines.append(_row(kind.name, kind.counts, kind.seconds, kind.growth))
        total.update(kind.counts)
    longest, growth = (max(values) for values in zip(*((k[2], k[3]) for k in kinds), strict=True))
    return "\n".join([*lines, _row("all", total, longest, growth)])


def _row(name: str, counts: collections.Counter, seconds: float, growth: int) -> str:
    numbers = (counts.total(), counts["refused"], counts["read"], counts["fault"])
    cells = (*(f"{number:,}" for number in numbers), f"{seconds:.3f}", f"{growth / 2**20:.0f}")
    return f"| {name} | {' | '.join(cells)} |"


def define_flags() -> None:
    """Defines the flags: called by the program, not on import, as other programs share names."""
    flags.DEFINE_integer("num_cases", 20_000, "Damaged files in all.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Decides how they are damaged.")
    flags.DEFINE_string("only", None, "KIND:I reads one case again, and shows its traceback.")


def main(argv: Sequence[str]) -> None:
    """Fuzzes every kind and prints the table."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    given = flags.FLAGS
    if given.only is not None:
        kind, _, number = given.only.rpartition(":")
        with tempfile.TemporaryDirectory() as folder:
            reader = make_readers()[kind](Path(folder))
            reader.damage(random.Random(f"{given.seed} {kind} {number}"))
            print(reader.read())
        return
    kinds = []
    for name, share in _SHARES.items():
        num_cases = -(-given.num_cases * share // sum(_SHARES.values()))
        kinds.append(fuzz(name, num_cases, given.seed))
        for number, what in kinds[-1].faults:
            print(f"{name}:{number}: {what}", file=sys.stderr)
        print(f"{name}: {dict(kinds[-1].counts)}", file=sys.stderr, flush=True)
    print(as_table(kinds))
    if any(kind.faults for kind in kinds):
        sys.exit(1)


if __name__ == "__main__":
    define_flags()
    app.run(main)
