"""Checkpoints of a run, by orbax: the last two epochs and the best one."""

import contextlib
import hashlib
import inspect
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath

from experiments.runs.files import read_json, write_json
from experiments.runs.folder import Record
from sgd_jax.distributed import processes
from sgd_jax.typing import PyTree

_STATE, _METRICS = "state", "metrics"  # what a checkpoint holds; the second is orbax's own name
_COMMIT_MARKER = "commit_success.txt"  # orbax's last file, written before the folder gets its name
_DIGESTS = "sha256.json"  # of every file of a checkpoint, written when orbax is done


class Snapshot(NamedTuple):
    """What a checkpoint holds."""

    epoch: int
    state: PyTree
    record: Record
    """The line of metrics of that epoch."""


class _DamagedError(ValueError):
    """A checkpoint is incomplete, or has a byte that is not as it was saved."""


class Checkpoints:
    """The checkpoints in one folder: those of the last two epochs, and the best by a score.

    Each holds the state and its line of metrics, so the two never disagree. `save` returns when the
    checkpoint is complete on the disk, with the SHA-256 of each of its files. One that is not
    complete (half written by a run that was killed) or has a byte that is not as it was saved is
    never restored: it is renamed to `damaged-<epoch>` and the one before is used. A whole one that
    does not fit ``like`` is an error, and stays as it is. A context manager: `close` at the end.

    Of several processes all save and restore together, into one folder that all can see; any number
    may go on from what others saved.

    Args:
      path: The folder; made where it does not exist.
      score: From a line of metrics to the number whose largest value, the earliest among equals,
        marks the best epoch.
      like: A state with the structure, shapes and dtypes of those saved, all leaves arrays.

    Raises:
      ValueError: the last whole checkpoint or the best has other shapes, dtypes or names of leaves.
      TypeError: a leaf of ``like`` is not an array.

    Example, of a program of one's own:
      >>> import tempfile, jax.numpy as jnp
      >>> folder, state = tempfile.mkdtemp(), {"w": jnp.ones(3)}
      >>> with Checkpoints(folder, lambda record: record["accuracy"], like=state) as checkpoints:
      ...     checkpoints.save(state, {"epoch": 1, "accuracy": 0.9})
      >>> Checkpoints(folder, lambda record: record["accuracy"], like=state).latest.epoch
      1
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        score: Callable[[Record], float],
        like: PyTree,
    ):
        self._path = Path(path).absolute()
        _check_arrays("like", like)
        self._like = jax.tree.map(_with_sharding, like)
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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    @property
    def latest(self) -> Snapshot | None:
        """The last complete checkpoint that was there at the beginning; None where none was."""
        return self._latest

    def save(self, state: PyTree, record: Record) -> None:
        """Saves the state after ``record["epoch"]``; removes what is neither last nor best.

        If it fails, nothing of this epoch is left, so that it can be tried again.

        Args:
          state: As ``like``.
          record: What was measured, by name: numbers, also of JAX or NumPy, strings, lists and so
            on, as JSON has them; ``epoch`` is a whole number of at least 0.

        Raises:
          ValueError: there is a checkpoint of this epoch, or the state does not fit ``like``.
          TypeError: ``record`` has no such ``epoch``, or holds what is not JSON.
          OSError: the disk is full or fails; the checkpoints before are as they were, or this one
            is whole and only its digests are missing.
        """
        _check_arrays("state", state)
        _check_leaves("state", _described(state), _described(self._like))
        record = _as_json(record)
        epoch = record["epoch"]
        if epoch in self._manager.all_steps():
            raise ValueError(
                f"{self._path} holds a checkpoint of epoch {epoch} already; expected the record of "
                "an epoch that is not saved yet"
            )
        arguments = ocp.args.Composite(**{_STATE: ocp.args.StandardSave(_named_leaves(state))})
        try:
            with _silent_threads(), _unmetered():
                saved = self._manager.save(epoch, args=arguments, metrics=record, force=True)
        except BaseException as error:
            for unfinished in self._path.glob(f"{epoch}.*"):  # it takes room, and its name
                shutil.rmtree(unfinished, ignore_errors=True)
            is_expected = isinstance(error, OSError | ValueError | RuntimeError)
            reason = _disk_error(error) if is_expected else None
            if reason is None:
                raise
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
            except _DamagedError as error:
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


def read_checkpoint(path: str | os.PathLike[str], like: PyTree) -> Snapshot:
    """Returns the last checkpoint in a folder, which stays as it is.

    Args:
      path: The folder.
      like: A state with the structure, shapes and dtypes of those saved; `jax.ShapeDtypeStruct`
        will do. The state is placed where ``like`` is, or on one device if that is not said.

    Raises:
      FileNotFoundError: there is no checkpoint.
      ValueError: the last one is damaged, or of another structure, shape or dtype.
      TypeError: a leaf of ``like`` is not an array.
    """
    path = Path(path)
    _check_arrays("like", like)
    epochs = _epochs(path) if path.is_dir() else []
    if not epochs:
        raise FileNotFoundError(f"{path} holds no checkpoint")
    checkpoint = (path / str(epochs[0])).absolute()
    before = f"that of epoch {epochs[1]}" if len(epochs) > 1 else "the beginning"
    try:
        return _restore(checkpoint, jax.tree.map(_with_sharding, like))
    except _DamagedError as error:
        raise ValueError(
            f"{checkpoint} is damaged ({_first_line(error)}). Resume the run: it then continues "
            f"from {before}, if that is whole"
        ) from error


def _with_sharding(leaf: Any) -> jax.ShapeDtypeStruct:
    """The shape of a leaf with a place, which orbax asks for where other devices have saved it."""
    place = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(
        jax.local_devices()[0]
    )
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def _check_arrays(name: str, tree: PyTree) -> None:
    """Raises TypeError unless all leaves of a tree have a shape and a dtype."""
    for path, leaf in _named_leaves(tree).items():
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise TypeError(
                f"{name}{path} is {leaf!r:.40}; expected arrays alone. Convert it with "
                "jnp.asarray, or keep it in the record"
            )


def _described(tree: PyTree) -> dict[str, Any]:
    """Returns shape and dtype of each leaf of a tree, by its path."""
    return {name: (leaf.shape, leaf.dtype) for name, leaf in _named_leaves(tree).items()}


def _check_leaves(name: str, found: Any, expected: Any) -> None:
    """Raises ValueError unless leaves have the paths, shapes and dtypes that `like` has."""
    found, expected = (
        {path: f"{dtype}{list(shape)}" for path, (shape, dtype) in leaves.items()}
        for leaves in (found, expected)
    )
    differing = [
        f"{path} is {found.get(path, 'missing')} in {name} and {expected.get(path, 'missing')} in "
        "`like`"
        for path in sorted(found.keys() | expected.keys(), key=lambda path: (len(path), path))
        if found.get(path) != expected.get(path)
    ]
    if differing:
        more = f"; so are {len(differing) - 4} more leaves" if len(differing) > 4 else ""
        raise ValueError(
            f"{name} does not fit `like`: {'; '.join(differing[:4])}{more}. Use the model and the "
            "optimizer that it was saved with; nothing on the disk was changed"
        )


def _as_json(record: Record) -> Record:
    """Returns a record with plain numbers; raises TypeError at what JSON cannot hold."""
    plain = {}
    for name, value in record.items():
        if isinstance(value, jax.Array | np.ndarray | np.generic):
            value = value.tolist()
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"record[{name!r}] is {value!r:.40}; expected what JSON can hold, such as a number"
            ) from error
        plain[name] = value
    epoch = plain.get("epoch")
    if type(epoch) is not int or epoch < 0:
        raise TypeError(
            f"record['epoch'] is {epoch!r}; expected a whole number of at least 0, the epochs "
            "trained so far"
        )
    return plain


def _epochs(path: Path) -> list[int]:
    """Returns the epochs that a folder has checkpoints of, last first."""
    names = (entry.name for entry in path.iterdir())
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def _restore(checkpoint: Path, like: PyTree) -> Snapshot:
    """Returns what a checkpoint holds.

    Raises:
      _DamagedError: it is not whole.
      ValueError: it is, and does not fit ``like``.
    """
    try:
        _check_digests(checkpoint)
        with _silent_threads():
            saved = ocp.StandardCheckpointHandler().metadata(epath.Path(checkpoint / _STATE)).tree
            saved = {name: (leaf.shape, leaf.dtype) for name, leaf in saved.items()}
    except Exception as error:  # of damaged files orbax makes anything
        raise _DamagedError(_first_line(error)) from error
    _check_leaves(str(checkpoint), saved, _described(like))
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
        raise _DamagedError(_first_line(error)) from error
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


def _disk_error(error: BaseException) -> str | None:
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
