"""The readers under test, by kind of file: a whole sample, a damaged one, and what reads it."""

import gzip
import io
import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import sgd_jax as sj
from experiments import _recorded, runs
from experiments._config import Config, read_config
from experiments.runs import checkpoints as checkpoints_module
from scripts.robustness import mutations
from sgd_jax import data


class Reader(NamedTuple):
    """One kind of file."""

    damage: Callable[[random.Random], None]
    """Puts a damaged file where `read` looks."""
    read: Callable[[], Any]
    """Reads it; raises where it is refused. Returns nothing that depends on the file but where
    damage can go unseen; see `expected`."""
    words: tuple[str, ...]
    """Of which a clear message holds one: file or array."""
    expected: Any = None
    """What `read` returns of the whole file, where it must return that or raise."""


def make_readers() -> dict[str, Callable[[Path], Reader]]:
    """Returns makers of readers by kind; each puts its sample into a folder it is given."""
    return {
        "idx": _idx,
        "npz": _npz,
        "shards": _shards,
        "config.json": lambda folder: _run_file(folder, "config.json"),
        "metrics.jsonl": lambda folder: _run_file(folder, "metrics.jsonl"),
        "summary.json": lambda folder: _run_file(folder, "summary.json"),
        "checkpoint": lambda folder: _checkpoint(folder, "whole"),
        "checkpoint, without checksums": lambda folder: _checkpoint(folder, "without"),
        "checkpoint, checksums forged": lambda folder: _checkpoint(folder, "forged"),
    }


def _arrays() -> dict[str, np.ndarray]:
    random_ = np.random.default_rng(0)
    arrays = {}
    for part, n in (("train", 12), ("validation", 5), ("test", 6)):
        arrays[f"x_{part}"] = random_.normal(size=(n, 4)).astype(np.float32)
        arrays[f"y_{part}"] = np.arange(n) % 3
    return arrays


def _idx(folder: Path) -> Reader:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 5), np.uint8)
    whole = struct.pack(">HBB3I", 0, 8, 3, *pixels.shape) + pixels.tobytes()
    samples, path = (whole, gzip.compress(whole, mtime=0)), folder / "images-idx3-ubyte"
    path.write_bytes(whole)

    def damage(draw: random.Random) -> None:
        forged = draw.random() < 0.3
        content = mutations.forge_idx(draw) if forged else mutations.mutate(draw, _pick(draw))
        path.write_bytes(content)

    def _pick(draw: random.Random) -> bytes:
        return draw.choice(samples)

    return Reader(damage, lambda: data.read_idx(path) is None, (path.name,))


def _npz(folder: Path) -> Reader:
    arrays, path, sentinel = _arrays(), folder / "sample.npz", str(folder / "executed")
    samples = []
    for save in (np.savez, np.savez_compressed):
        file = io.BytesIO()
        save(file, **arrays)  # pyright: ignore[reportArgumentType]
        samples.append(file.getvalue())
    path.write_bytes(samples[0])

    def damage(draw: random.Random) -> None:
        if draw.random() < 0.5:
            path.write_bytes(mutations.mutate(draw, draw.choice(samples)))
        else:
            path.write_bytes(mutations.forge_npz(draw, arrays, sentinel))

    def read() -> None:
        _check(data.load(path))

    return Reader(damage, read, (path.name, *arrays))


def _shards(folder: Path) -> Reader:
    arrays, sentinel = _arrays(), str(folder / "executed")
    path = folder / "shards"
    path.mkdir()
    for name, array in arrays.items():
        np.save(path / f"{name}.npy", array)
    whole = {name: (path / f"{name}.npy").read_bytes() for name in arrays}

    def damage(draw: random.Random) -> None:
        for name, content in whole.items():
            (path / f"{name}.npy").write_bytes(content)
        victim = draw.choice(list(whole))
        if draw.random() < 0.5:
            content = mutations.mutate(draw, whole[victim])
        else:
            content = mutations.forge_npy(draw, sentinel)
        (path / f"{victim}.npy").write_bytes(content)

    def read() -> None:
        _check(data.load(path))

    return Reader(damage, read, (path.name, *arrays))


def _check(dataset: data.Dataset) -> None:
    """Stops with AssertionError at a data set that should have been refused."""
    for inputs, labels in (dataset.train, dataset.validation, dataset.test):
        assert len(inputs) == len(labels) > 0
        assert np.isfinite(inputs).all()
        assert ((labels >= 0) & (labels < dataset.num_classes)).all()


def _run_file(folder: Path, name: str) -> Reader:
    """What --resume reads before it trains: settings, metrics, summary."""
    output = _recorded.Output(out_dir=str(folder), run_name="mine", resume=True)
    run = runs.RunFolder.create(folder, "mine", "train")
    lines = [_line(epoch) for epoch in range(3)]
    for line in lines:
        run.append_metrics(line)
    config = {"experiment": "train", **Config(sizes=(4, 5, 3), epochs=9).__dict__}
    told = {"data_sha256": "0", "versions": {"jax": "1"}, "device": {"count": 1}, "git": None}
    run.write_config(config | told)
    run.write_summary({"status": "complete", **runs.summarize(lines)})
    path = run.path / name
    whole, intact = path.read_bytes(), run.metrics_path.read_bytes()

    def damage(draw: random.Random) -> None:
        run.metrics_path.write_bytes(intact)
        if draw.random() < 0.5:
            path.write_bytes(mutations.mutate(draw, whole))
        elif name == "metrics.jsonl":
            changed = whole.splitlines(keepends=True)
            number = draw.randrange(len(changed))
            changed[number] = mutations.forge_json(draw, changed[number]) + b"\n"
            path.write_bytes(b"".join(changed))
        else:
            path.write_bytes(mutations.forge_json(draw, whole))

    def read() -> None:
        stored = _recorded.read_stored(output)
        assert stored is not None
        settings = read_config(stored)
        _recorded.is_complete(output, settings.epochs)
        run.rewind_metrics(lines[-1])
        runs.summarize(run.read_metrics())

    return Reader(damage, read, (name, "_is ", "_size is", *Config.__dataclass_fields__))


def _line(epoch: int) -> runs.Record:
    names = [f"{n}_{s}" for n in ("cost", "accuracy") for s in ("train", "validation", "test")]
    measured = {name: [0.5, 0.25] for name in (*names, "gradient_norm", "dead_classes_test")}
    return {"epoch": epoch, **measured, "seconds": 0.125, "examples_per_second": 8.0}


def _checkpoint(folder: Path, checksums: str) -> Reader:
    params = {"w": jax.random.normal(jax.random.key(0), (40, 30)), "b": np.zeros(3, np.float32)}
    state = sj.init_state(params, sj.sgd(0.1, momentum=0.5))
    saved = runs.Checkpoints(folder / "whole", lambda record: record["accuracy"], like=state)
    for epoch in range(2):
        saved.save(state, {"epoch": epoch, "accuracy": 0.5})
    saved.close()
    path = folder / "checkpoints"
    names = sorted(
        file.relative_to(folder / "whole")
        for file in (folder / "whole" / "1").rglob("*")
        if file.is_file() and (checksums == "whole" or file.name != "sha256.json")
    )
    shutil.copytree(folder / "whole", path)

    def damage(draw: random.Random) -> None:
        shutil.rmtree(path)
        shutil.copytree(folder / "whole", path)
        if checksums == "without":
            (path / "1" / "sha256.json").unlink()
        victim, other = (path / draw.choice(names) for _ in range(2))
        action = draw.random()
        if action < 0.05:
            victim.unlink()
        elif action < 0.1:
            victim.write_bytes(other.read_bytes())
        elif victim.name in ("metrics", "_METADATA", "_sharding") and action < 0.5:
            victim.write_bytes(mutations.forge_json(draw, victim.read_bytes()))
        else:
            victim.write_bytes(mutations.mutate(draw, victim.read_bytes()))
        if checksums == "forged":
            digests = checkpoints_module._digests(path / "1")
            (path / "1" / "sha256.json").write_text(json.dumps(digests))

    def read() -> Any:
        snapshot = runs.read_checkpoint(path, state)
        leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(snapshot.state)]
        return (snapshot.epoch, snapshot.record, leaves) if checksums == "whole" else None

    return Reader(damage, read, (path.name,), read() if checksums == "whole" else None)
