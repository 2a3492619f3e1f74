"""Does training on data larger than memory work, and how fast is it beside the same in memory?

    python scripts/larger_than_memory.py --folder=FOLDER

writes images at random, in shards, three times as many bytes as the cap; then, one after the other,

1. trains on them in memory under the cap, which must fail;
2. trains on them with --stream under the cap, which must not: a whole epoch, all of it measured;
3. takes turns at the epoch program in memory, without a cap, and on streamed chunks, under it, with
   the same network on the same mini-batches, and prints examples per second and their ratio.

The cap is RLIMIT_DATA, as `ulimit -d` sets it: Linux then refuses a process private writable memory
beyond it, be it heap, stacks or anonymous maps. It does not count shared pages of files, so the
system may keep what it has read of the shards as long as memory is free. --cold takes that away: no
page of a shard is left in memory when a chunk is read, which is then read from the disk anew, as on
a machine where nothing but the program fits. The folder stays, and is used again.

A comparison takes a few seconds a turn; run nothing else meanwhile. Linux only.
"""

import json
import mmap
import os
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
from absl import app, flags, logging

_FOLDER = flags.DEFINE_string("folder", None, "Of the shards; made where it does not exist.")
_CAP_MIB = flags.DEFINE_integer(
    "cap_mib", 1024, "The cap, in MiB; stacks of threads and compiled programs take most of 600."
)
_RATIO = flags.DEFINE_float("ratio", 3.0, "Bytes of all shards over the cap.")
_SIZES = flags.DEFINE_string("sizes", "784,30,10", "Neurons per layer.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 10, "Examples per step.")
_CHUNK_MIB = flags.DEFINE_float("chunk_mib", 64.0, "Size of a chunk.")
_SECONDS = flags.DEFINE_float("seconds", 2.0, "How long a turn takes, about.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Turns of each.")
_COLD = flags.DEFINE_boolean("cold", False, "Read every chunk from the disk anew.")
_ONLY = flags.DEFINE_enum("only", None, ("train", "compare"), "Do 1 and 2, or 3, alone.")
_TURNS_OF = flags.DEFINE_enum("turns_of", None, ("memory", "stream"), "For its own use.")

_NUM_FEATURES, _NUM_CLASSES, _SHARD_EXAMPLES = 784, 10, 100_000


def write_shards(folder: Path, num_bytes: int) -> None:
    """Writes images of random pixels, lighter where their class says so, unless they are there."""
    num_shards = -(-num_bytes // (_SHARD_EXAMPLES * _NUM_FEATURES))
    if (folder / "x_test.npy").exists() and len(list(folder.glob("x_train-*"))) == num_shards:
        return
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    means = random.integers(0, 128, (_NUM_CLASSES, _NUM_FEATURES), np.uint8)
    names = [f"train-{number:04}" for number in range(num_shards)] + ["validation", "test"]
    for name in names:
        n = _SHARD_EXAMPLES if name.startswith("train") else 10_000
        labels = random.integers(0, _NUM_CLASSES, n, np.uint8)
        noise = random.integers(0, 128, (n, _NUM_FEATURES), np.uint8)
        np.save(folder / f"y_{name}.npy", labels)
        np.save(folder / f"x_{name}.npy", means[labels] + noise)


def start_capped(command: list[str], cap_mib: int | None, **options: object) -> subprocess.Popen:
    """Starts a program of this interpreter, under the cap unless it is None."""

    def limit() -> None:
        if cap_mib:
            resource.setrlimit(resource.RLIMIT_DATA, (cap_mib << 20, cap_mib << 20))

    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen(
        [sys.executable, *command],
        text=True,
        preexec_fn=limit,
        env=environment,
        **options,  # pyright: ignore[reportArgumentType, reportCallIssue]
    )


def train(folder: Path) -> None:
    """Trains as a user does, under the cap: in memory, then from the disk."""
    with tempfile.TemporaryDirectory() as out_dir:
        for stream in ([], ["--stream", f"--chunk_mib={_CHUNK_MIB.value}"]):
            command = [
                "-m",
                "experiments.train",
                f"--dataset={folder}",
                f"--sizes={_SIZES.value}",
                f"--batch_size={_BATCH_SIZE.value}",
                "--epochs=1",
                "--learning_rate=0.5",
                f"--out_dir={out_dir}",
                *stream,
            ]
            print(f"\n$ ulimit -d {_CAP_MIB.value << 10}; python {' '.join(command)}", flush=True)
            began = time.perf_counter()
            process = start_capped(
                command, _CAP_MIB.value, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            output, errors = process.communicate()
            print(output + "\n".join(errors.splitlines()[-2:]))
            print(f"exit code {process.returncode} after {time.perf_counter() - began:.1f} s")
            if (process.returncode == 0) != bool(stream):
                sys.exit("error: expected the first to fail and the second not to")


def compare(folder: Path) -> None:
    """Prints examples per second in memory and streamed, turn by turn."""
    own = [f"--{f.name}={f.value}" for f in (_SIZES, _BATCH_SIZE, _CHUNK_MIB, _SECONDS)]
    own += [f"--folder={folder}", f"--cold={str(_COLD.value).lower()}"]
    workers = {
        kind: start_capped(
            [__file__, *own, f"--turns_of={kind}"],
            _CAP_MIB.value if kind == "stream" else None,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for kind in ("memory", "stream")
    }
    speeds: dict[str, list[float]] = {kind: [] for kind in workers}
    bytes_read: dict[str, list[float]] = {kind: [] for kind in workers}
    ready, number_of_chunks = {}, 0
    for kind, worker in workers.items():
        ready[kind] = _ask(worker, {"num_chunks": number_of_chunks})
        number_of_chunks = ready[kind]["num_chunks"]
    for _ in range(_ROUNDS.value):
        for kind, worker in workers.items():
            answer = _ask(worker, {"num_chunks": number_of_chunks})
            speeds[kind].append(answer["speed"])
            bytes_read[kind].append(answer["bytes_read"])
    last = {kind: _ask(worker, {"num_chunks": 0}) for kind, worker in workers.items()}
    for worker in workers.values():
        worker.communicate()
    ratios = [s / m for m, s in zip(speeds["memory"], speeds["stream"], strict=True)]
    where = "from the disk each time" if _COLD.value else "from what the system keeps"
    print(f"\n[{_SIZES.value}], m = {_BATCH_SIZE.value}; {number_of_chunks} chunks a turn, {where}")
    for kind in workers:
        memory = last[kind]["status"]
        print(
            f"{kind:>7}: {statistics.median(speeds[kind]):>9,.0f} examples/s "
            f"({min(speeds[kind]):,.0f} to {max(speeds[kind]):,.0f}); private memory "
            f"{memory['VmData'] >> 10} MiB, of it in use {memory['RssAnon'] >> 10} MiB; "
            f"{statistics.median(bytes_read[kind]):,.0f} bytes from the disk for each example"
        )
    print(
        f"  ratio: {statistics.median(ratios):.3f} "
        f"({min(ratios):.3f} to {max(ratios):.3f} in {len(ratios)} rounds)",
        flush=True,
    )


def _ask(worker: subprocess.Popen, question: dict[str, int]) -> dict:
    assert worker.stdin
    assert worker.stdout
    worker.stdin.write(json.dumps(question) + "\n")
    worker.stdin.flush()
    line = worker.stdout.readline()
    if not line:
        command = shlex.join(map(str, cast(list, worker.args)))
        sys.exit(
            f"error: {command} ended with exit code {worker.wait()}; its "
            f"own output says why. If memory is short, raise --cap_mib={_CAP_MIB.value}, or lower "
            f"--chunk_mib={_CHUNK_MIB.value:g}: two chunks are in memory at a time"
        )
    return json.loads(line)


def take_turns(folder: Path, kind: str) -> None:
    """Trains as many chunks as each line of stdin says, and answers with examples per second."""
    import jax
    import jax.numpy as jnp

    import sgd_jax as sj
    from sgd_jax import data

    class ColdChunks(data.ShuffledChunks):
        """Chunks of which no page is in memory when they are read."""

        def __getitem__(self, chunk: int) -> data.Chunk:
            _drop_pages(rows)
            return super().__getitem__(chunk)

    dataset = data.open_dataset(folder)
    rows = dataset.train
    kind_of_chunks = ColdChunks if _COLD.value and kind == "stream" else data.ShuffledChunks
    chunk_bytes = int(_CHUNK_MIB.value * 2**20)
    chunks = kind_of_chunks(rows, _BATCH_SIZE.value, [(0, 1)], chunk_bytes=chunk_bytes)

    def fun(params: tuple[sj.Layer, ...], example: data.Examples) -> jax.Array:
        x = jnp.asarray(example.inputs).astype(jnp.float32) / 255
        y = jax.nn.one_hot(example.labels, _NUM_CLASSES)
        return sj.quadratic_cost(sj.feedforward(params, x), y)

    optimizer = sj.sgd(learning_rate=0.1)
    sizes = tuple(map(int, _SIZES.value.split(",")))
    state = sj.init_state(sj.init_network(jax.random.key(0), sizes, "scaled"), optimizer)
    epoch = sj.make_epoch(fun, optimizer, donate=True)
    whole = len(chunks) - 1  # without the last, shorter one
    all_examples = None
    if kind == "memory":
        all_examples = jax.device_put(data.Examples(*map(np.asarray, rows)))
        _drop_pages(rows)  # or the other process could not

    def parts(first: int, number: int) -> Iterator[tuple[data.Examples, jax.Array]]:
        if all_examples is None:
            loaded = data.prefetched(chunks, jax.device_put, first)
            for chunk, _ in zip(loaded, range(number), strict=False):
                yield chunk.examples, chunk.batches[0]
        else:
            for batches in drawn:
                yield all_examples, batches

    position, drawn = 0, []
    for line in sys.stdin:
        number = json.loads(line)["num_chunks"]
        timing = number == 0 and position == 0
        if number == 0 and position:
            print(json.dumps({"status": _memory()}), flush=True)
            continue
        wanted = 2 if position == 0 else number  # the first time compiles
        if position + wanted > whole:
            position = 0
        if kind == "memory":
            drawn = [
                jnp.asarray(chunks.indices(k)[0], jnp.int32)
                for k in range(position, position + wanted)
            ]
        durations, read_before = [], _bytes_read()
        start = time.perf_counter()
        for examples, batches in parts(position, wanted):
            state, info = epoch(state, examples, batches)
            jax.block_until_ready(info)
            durations.append(time.perf_counter() - start - sum(durations))
        seconds = sum(durations)
        num_examples = sum(chunks.num_rows(k) for k in range(position, position + wanted))
        position += wanted
        if timing:
            number = max(1, min(round(_SECONDS.value / durations[-1]), whole // 2))
        answer = {
            "speed": num_examples / seconds,
            "num_chunks": number,
            "bytes_read": (_bytes_read() - read_before) / num_examples,
        }
        print(json.dumps(answer), flush=True)


def _drop_pages(examples: Any) -> None:
    """Lets go of all pages of the shards, and has the system do so too."""
    for rows in examples:
        for part in rows.parts:
            mapped = part
            while not isinstance(mapped.base, mmap.mmap):
                mapped = mapped.base
            mapped.base.madvise(mmap.MADV_DONTNEED)
            file = os.open(mapped.filename, os.O_RDONLY)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


def _bytes_read() -> int:
    """Returns the bytes that the disk has read for this process."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def _memory() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return {
        name: int(value.split()[0])
        for name, value in (line.split(":", 1) for line in lines)
        if name in ("VmData", "RssAnon")
    }


def main(argv: list[str]) -> None:
    """Reads the flags and does what they say."""
    logging.set_verbosity(logging.WARNING)
    folder = Path(_FOLDER.value or "")
    if _TURNS_OF.value:
        take_turns(folder, _TURNS_OF.value)
        return
    num_bytes = int(_RATIO.value * (_CAP_MIB.value << 20))
    write_shards(folder, num_bytes)
    stored = sum(path.stat().st_size for path in folder.glob("?_train-*"))
    print(
        f"cap {_CAP_MIB.value} MiB of private memory; training examples {stored / 2**20:,.0f} MiB, "
        f"{stored / 2**20 / _CAP_MIB.value:.2f} times as much"
    )
    if _ONLY.value != "compare":
        train(folder)
    if _ONLY.value != "train":
        compare(folder)


if __name__ == "__main__":
    flags.mark_flag_as_required("folder")
    app.run(main)
