"""Checkpoints of a run, by orbax: the last epoch and the best one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
import tensorstore
from etils import epath

from sgd_jax._typing import PyTree
from sgd_jax.runs.folder import Record

_STATE, _METRICS = "state", "metrics"  # what a checkpoint holds; the second is orbax's own name
_COMMIT_MARKER = "commit_success.txt"  # orbax's last file, written before the folder gets its name


class Snapshot(NamedTuple):
    """What a checkpoint holds."""

    epoch: int
    state: PyTree
    record: Record
    """The line of metrics of that epoch."""


class Checkpoints:
    """The checkpoints in one folder: that of the last epoch, and the best by a score.

    Each holds the state and its line of metrics, so the two never disagree. `save` returns when the
    checkpoint is complete on the disk. One that is not (half written by a run that was killed, or
    damaged since) is never restored: it is renamed to `damaged-<epoch>` and the one before is
    used.

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
        """What could not be read and why, one sentence each."""
        self._latest = self._restore_latest()

        def rank(record: Record) -> Any:
            return score(record), -record["epoch"]

        policies = ocp.checkpoint_managers
        keep = [policies.LatestN(1), policies.BestN(get_metric_fn=rank, n=1)]
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
        """Saves the state after ``record["epoch"]``; removes what is neither last nor best."""
        arguments = ocp.args.Composite(**{_STATE: ocp.args.StandardSave(_named_leaves(state))})
        if not self._manager.save(record["epoch"], args=arguments, metrics=record, force=True):
            raise RuntimeError(f"orbax did not save epoch {record['epoch']} in {self._path}")

    def close(self) -> None:
        """Waits for what is under way and lets go of the folder."""
        self._manager.close()

    def _restore_latest(self) -> Snapshot | None:
        latest = None
        for epoch in _epochs(self._path):  # the best too: the manager reads its record
            try:
                snapshot = _restore(self._path / str(epoch), self._like)
            except (ValueError, OSError) as error:
                self._set_aside(epoch, error)
            else:
                latest = latest or snapshot
        return latest

    def _set_aside(self, epoch: int, error: Exception) -> None:
        number, target = 1, self._path / f"damaged-{epoch}"
        while target.exists():
            number += 1
            target = self._path / f"damaged-{epoch}-{number}"
        (self._path / str(epoch)).rename(target)
        self.damaged.append(
            f"checkpoint {epoch} is incomplete or damaged ({str(error).splitlines()[0]}); "
            f"it is now {target}"
        )


def read_checkpoint(path: Path, like: PyTree) -> Snapshot:
    """Returns the last checkpoint in a folder, which stays as it is.

    Args:
      path: The folder.
      like: A state with the structure, shapes and dtypes of those saved; `jax.ShapeDtypeStruct`
        will do.

    Raises:
      FileNotFoundError: there is no checkpoint.
      ValueError: the last one is damaged, or of another structure, shape or dtype.
    """
    epochs = _epochs(path) if path.is_dir() else []
    if not epochs:
        raise FileNotFoundError(f"{path} holds no checkpoint")
    checkpoint = (path / str(epochs[0])).absolute()
    metadata = ocp.StandardCheckpointHandler().metadata(epath.Path(checkpoint / _STATE)).tree
    saved, wanted = (
        {f"{name} {leaf.dtype}{tuple(leaf.shape)}" for name, leaf in leaves.items()}
        for leaves in (metadata, _named_leaves(like))
    )
    if saved != wanted:
        raise ValueError(
            f"{checkpoint} is of another network: it holds {', '.join(sorted(saved - wanted))}; "
            f"expected {', '.join(sorted(wanted - saved))}"
        )
    return _restore(checkpoint, like)


def _epochs(path: Path) -> list[int]:
    """Returns the epochs that a folder has checkpoints of, last first."""
    names = (entry.name for entry in path.iterdir())
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def _restore(checkpoint: Path, like: PyTree) -> Snapshot:
    if not (checkpoint / _COMMIT_MARKER).is_file():
        raise ValueError(f"{_COMMIT_MARKER} is missing")
    handler = ocp.JsonCheckpointHandler(filename=_METRICS)
    with ocp.Checkpointer(handler) as reader:
        record = reader.restore(checkpoint / _METRICS)
    if record["epoch"] != int(checkpoint.name):
        raise ValueError(f"it holds epoch {record['epoch']}")
    abstract = _named_leaves(like)
    _read_all(checkpoint / _STATE)
    with ocp.StandardCheckpointer() as reader:
        leaves = reader.restore(checkpoint / _STATE, abstract)
    state = jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in abstract])
    return Snapshot(record["epoch"], state, record)


def _read_all(arrays: Path) -> None:
    """Raises ValueError unless every byte of the arrays can be read and has its checksum.

    Orbax reads all arrays at once and leaves its event loop at the first that fails; the threads
    that read the others then find the loop closed, and each prints a traceback of its own.
    """
    spec = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{arrays}/"}}
    store = tensorstore.KvStore.open(spec).result()
    for key in store.list().result():
        store.read(key).result()


def _named_leaves(tree: PyTree) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
