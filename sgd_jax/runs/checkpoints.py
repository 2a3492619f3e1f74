"""Checkpoints of a run, by orbax: the last two epochs and the best one."""

import contextlib
import hashlib
import inspect
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
import tensorstore
from etils import epath

from sgd_jax import processes
from sgd_jax._typing import PyTree
from sgd_jax.runs.files import read_json, write_json
from sgd_jax.runs.folder import Record

_STATE, _METRICS = "state", "metrics"  # what a checkpoint holds; the second is orbax's own name
_COMMIT_MARKER = "commit_success.txt"  # orbax's last file, written before the folder gets its name
_DIGESTS = "sha256.json"  # of every file of a checkpoint, written when orbax is done


class Snapshot(NamedTuple):
    """What a checkpoint holds."""

    epoch: int
    state: PyTree
    record: Record
    """The line of metrics of that epoch."""


class Checkpoints:
    """The checkpoints in one folder: those of the last two epochs, and the best by a score.

    Each holds the state and its line of metrics, so the two never disagree. `save` returns when the
    checkpoint is complete on the disk, with the SHA-256 of each of its files. One that is not
    complete (half written by a run that was killed) or has a byte that is not as it was saved is
    never restored: it is renamed to `damaged-<epoch>` and the one before is used.

    Of several processes all save and restore together, into one folder that all can see; any number
    may go on from what others saved.

    Args:
      path: The folder; made where it does not exist.
      score: From a line of metrics to the number whose largest value, the earliest among equals,
        marks the best epoch.
      like: A state with the structure, shapes and dtypes of those saved.
    """

    def __init__(self, path: Path, score: Callable[[Record], float], like: PyTree):
        self._path = path.absolute()
        self._like = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), like
        )
        self._path.mkdir(parents=True, exist_ok=True)
        self.damaged: list[str] = []
        """What could not be read and why, one sentence each; then what is used instead."""
        self._latest = self._restore_latest()

        def rank(record: Record) -> Any:
            return score(record), -record["epoch"]

        policies = ocp.checkpoint_managers
        keep = [policies.LatestN(2), policies.BestN(get_metric_fn=rank, n=1)]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(keep),
            best_fn=rank,
            enable_async_checkpointing=False,
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(self._path, options=options)

    @property
    def latest(self) -> Snapshot | None:
        """The last complete checkpoint that was there at the beginning; None where none was."""
        return self._latest

    def save(self, state: PyTree, record: Record) -> None:
        """Saves the state after ``record["epoch"]``; removes what is neither last nor best.

        Raises:
          OSError: the disk is full or fails; the checkpoints before are as they were, or this one
            is whole and only its digests are missing.
        """
        epoch = record["epoch"]
        arguments = ocp.args.Composite(**{_STATE: ocp.args.StandardSave(_named_leaves(state))})
        try:
            with _silent_threads(), _unmetered():
                saved = self._manager.save(epoch, args=arguments, metrics=record, force=True)
        except (OSError, ValueError, RuntimeError) as error:
            reason = _disk_error(error)
            if reason is None:
                raise
            for unfinished in self._path.glob(f"{epoch}.*"):  # it takes room
                shutil.rmtree(unfinished, ignore_errors=True)
            raise OSError(
                f"checkpoint {epoch} could not be saved in {self._path}: {reason}. "
                "Those before it are as they were"
            ) from error
        if not saved:
            raise RuntimeError(f"orbax did not save epoch {epoch} in {self._path}")
        try:
            _write_digests(self._path / str(epoch))
        except OSError as error:
            raise OSError(
                f"checkpoint {epoch} is whole, but the digests of its files could not "
                f"be saved in {self._path}: {error.strerror or error}"
            ) from error

    def close(self) -> None:
        """Waits for what is under way and lets go of the folder."""
        self._manager.close()

    def _restore_latest(self) -> Snapshot | None:
        latest = None
        # The best too, for the manager reads its record.
        for epoch in processes.from_first(lambda: _epochs(self._path)):
            try:
                snapshot = _restore(self._path / str(epoch), self._like)
            except ValueError as error:
                reason = _first_line(error)
                self.damaged.append(
                    processes.from_first(lambda e=epoch, r=reason: self._set_aside(e, r))
                )
            else:
                latest = latest or snapshot
        if self.damaged and latest:
            self.damaged.append(f"the last whole checkpoint is {latest.epoch}")
        return latest

    def _set_aside(self, epoch: int, reason: str) -> str:
        """Renames a damaged checkpoint; returns the sentence that says so."""
        number, target = 1, self._path / f"damaged-{epoch}"
        while target.exists():
            number += 1
            target = self._path / f"damaged-{epoch}-{number}"
        (self._path / str(epoch)).rename(target)
        return f"checkpoint {epoch} is incomplete or damaged ({reason}); it is now {target}"


def read_checkpoint(path: Path, like: PyTree) -> Snapshot:
    """Returns the last checkpoint in a folder, which stays as it is.

    Args:
      path: The folder.
      like: A state with the structure, shapes and dtypes of those saved; `jax.ShapeDtypeStruct`
        will do. It comes to lie where ``like`` does, or on one device where that is not said.

    Raises:
      FileNotFoundError: there is no checkpoint.
      ValueError: the last one is damaged, or of another structure, shape or dtype.
    """
    epochs = _epochs(path) if path.is_dir() else []
    if not epochs:
        raise FileNotFoundError(f"{path} holds no checkpoint")
    checkpoint = (path / str(epochs[0])).absolute()
    like = jax.tree.map(_with_sharding, like)
    before = f"that of epoch {epochs[1]}" if len(epochs) > 1 else "the beginning"
    remedy = f"Resume the run: it then goes on from {before}, if that is whole"
    try:
        _check_digests(checkpoint)
        with _silent_threads():
            handler = ocp.StandardCheckpointHandler()
            metadata = handler.metadata(epath.Path(checkpoint / _STATE)).tree
        saved, wanted = (
            {f"{name} {leaf.dtype}{tuple(leaf.shape)}" for name, leaf in leaves.items()}
            for leaves in (metadata, _named_leaves(like))
        )
    except Exception as error:  # of damaged files orbax makes anything
        raise ValueError(f"{checkpoint} is damaged ({_first_line(error)}). {remedy}") from error
    if saved != wanted:
        raise ValueError(
            f"{checkpoint} is of another network: it holds {', '.join(sorted(saved - wanted))}; "
            f"expected {', '.join(sorted(wanted - saved))}"
        )
    try:
        return _restore(checkpoint, like)
    except ValueError as error:
        raise ValueError(f"{checkpoint} is damaged ({_first_line(error)}). {remedy}") from error


def _with_sharding(leaf: Any) -> jax.ShapeDtypeStruct:
    """The shape of a leaf with a place, which orbax asks for where other devices have saved it."""
    place = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def _epochs(path: Path) -> list[int]:
    """Returns the epochs that a folder has checkpoints of, last first."""
    names = (entry.name for entry in path.iterdir())
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def _restore(checkpoint: Path, like: PyTree) -> Snapshot:
    """Returns what a checkpoint holds; raises ValueError unless it is whole."""
    _check_digests(checkpoint)
    try:
        with _silent_threads():
            handler = ocp.JsonCheckpointHandler(filename=_METRICS)
            with ocp.Checkpointer(handler) as reader:
                record = reader.restore(checkpoint / _METRICS)
            if record["epoch"] != int(checkpoint.name):
                raise ValueError(f"it holds epoch {record['epoch']}")
            abstract = _named_leaves(like)
            _read_all(checkpoint / _STATE)
            with ocp.StandardCheckpointer() as reader:
                leaves = reader.restore(checkpoint / _STATE, abstract)
            state = jax.tree.unflatten(
                jax.tree.structure(like), [leaves[name] for name in abstract]
            )
    except Exception as error:  # of damaged files orbax makes anything
        raise ValueError(_first_line(error)) from error
    return Snapshot(record["epoch"], state, record)


def _write_digests(checkpoint: Path) -> None:
    if processes.is_first():
        write_json(checkpoint / _DIGESTS, _digests(checkpoint))


def _check_digests(checkpoint: Path) -> None:
    """Raises ValueError unless a checkpoint is complete and every byte as it was saved.

    A run may have been killed between the checkpoint and its digests; orbax's own checksums, which
    cover less, then have to do.
    """
    if not (checkpoint / _COMMIT_MARKER).is_file():
        raise ValueError(f"{_COMMIT_MARKER} is missing")
    path = checkpoint / _DIGESTS
    if not path.is_file():
        return
    wanted, found = read_json(path), _digests(checkpoint)
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            raise ValueError(f"{name} is missing")
        if wanted.get(name) != found[name]:
            raise ValueError(f"{name} has not the SHA-256 that {_DIGESTS} says")


def _digests(checkpoint: Path) -> dict[str, str]:
    """Returns the SHA-256 of every file of a checkpoint but `_DIGESTS`, by its path within."""
    digests = {}
    for path in sorted(checkpoint.rglob("*")):
        name = path.relative_to(checkpoint).as_posix()
        if path.is_file() and name != _DIGESTS:
            with open(path, "rb") as file:
                digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _read_all(arrays: Path) -> None:
    """Raises ValueError unless every byte of the arrays can be read and has its checksum.

    Orbax reads all arrays at once and leaves its event loop at the first that fails; the threads
    that read the others then find the loop closed, and each prints a traceback of its own.
    """
    spec = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{arrays}/"}}
    store = tensorstore.KvStore.open(spec).result()
    for key in store.list().result():
        store.read(key).result()


def _disk_error(error: Exception) -> str | None:
    """Returns what the operating system said, or None where it said nothing."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    code = re.search(r"\[os_error_code='(\d+)'\]", str(error))  # as tensorstore passes it on
    return code and os.strerror(int(code[1]))


@contextlib.contextmanager
def _silent_threads() -> Iterator[None]:
    """Keeps the threads of orbax from printing tracebacks of what it also raises.

    After a failure some of them go on for a while, and find its event loop closed or their
    coroutine abandoned: then they are kept silent from there on.
    """
    logger, hook = logging.getLogger("absl"), sys.unraisablehook
    logger.addFilter(_is_not_of_orbax)
    if not isinstance(hook, _UnraisableHook):
        sys.unraisablehook = _UnraisableHook(hook)
    yield
    sys.unraisablehook = hook
    logger.removeFilter(_is_not_of_orbax)


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    return f"{os.sep}orbax{os.sep}" not in record.pathname


@contextlib.contextmanager
def _unmetered() -> Iterator[None]:
    """Keeps orbax from asking how many bytes were written, which it does to log a speed.

    tensorstore (0.1.75 to 0.1.86) holds each list of its answer by a reference too many, so none is
    ever freed: 20 kB a checkpoint.
    """
    collect = tensorstore.experimental_collect_matching_metrics
    tensorstore.experimental_collect_matching_metrics = lambda *arguments, **options: []
    try:
        yield
    finally:
        tensorstore.experimental_collect_matching_metrics = collect


class _UnraisableHook:
    """Tells of all but what threads of orbax leave behind."""

    def __init__(self, tell: Callable[[Any], Any]):
        self._tell = tell

    def __call__(self, unraisable: Any) -> None:
        abandoned = inspect.iscoroutine(unraisable.object)
        if not abandoned and str(unraisable.exc_value) != "Event loop is closed":
            self._tell(unraisable)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _named_leaves(tree: PyTree) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
