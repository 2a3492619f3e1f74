"""Where a network stands when its gradients are looked at: a point in training, and its data."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from experiments import _classifier, _recorded, runs, train
from experiments._config import Config, load, make_optimizer, read_config, resolve
from experiments._recorded import Output
from sgd_jax import data
from sgd_jax.data import Examples
from sgd_jax.distributed import processes, sharding
from sgd_jax.typing import CostFn, Params


class StartingPoint(NamedTuple):
    """A network, the examples it is trained on, and what was there an epoch before."""

    params: Params
    anchor: Params | None
    """The params an epoch earlier, where they are known: what SVRG would compare with."""
    fun: CostFn
    """The cost of one example, as it is stored."""
    examples: Examples
    """The training examples, on the device."""
    labels: np.ndarray
    """Their classes, numbered without gaps: (n,) int32."""
    num_classes: int
    """How many classes there are in ``labels``."""
    mesh: Mesh | None
    """Devices that all of this lies on; None is one device."""
    description: str
    """Such as "digits, 64-30-10, after 5 epochs"."""


def read_run(
    path: str, given: dict[str, Any], output: Output, mesh: Mesh | None = None
) -> tuple[Config, data.Dataset, jax.Array]:
    """Returns settings, data and params of a run of `experiments.train` at its last checkpoint.

    Args:
      path: The run folder; a plain name is looked for in ``output.out_dir``.
      given: Settings of `Config` that the command line names; they must be those of the run, but
        for ``data_dir``. ``seed`` says which of its seeds.
      output: Of the program that asks.
      mesh: Devices that params are to lie on; None is one device.

    Raises:
      FileNotFoundError: there is no such run, or it has no checkpoint.
      ValueError: settings or data differ from those of the run, or its checkpoint does.
    """
    folder = runs.RunFolder(Path(path) if len(Path(path).parts) > 1 else Path(output.out_dir, path))
    if not folder.config_path.is_file():
        raise FileNotFoundError(
            f"run is {path!r}, but {folder.config_path} does not exist; expected the folder of a "
            "run of experiments.train, such as --run=runs/mine"
        )
    stored = folder.read_config()
    if not folder.checkpoints_path.is_dir() or stored.get("experiment") != "train":
        raise FileNotFoundError(
            f"run is {path!r}, which holds no checkpoint of a training; expected the folder of a "
            "run of experiments.train"
        )
    before = dataclasses.asdict(read_config(stored))
    seeds = range(before["seed"], before["seed"] + before["num_seeds"])
    seed = given.get("seed", seeds.start)
    if seed not in seeds:
        raise ValueError(
            f"seed is {seed}; expected one that {folder.path} has trained, {seeds.start} to "
            f"{seeds.stop - 1}"
        )
    kept = {name: value for name, value in given.items() if name != "seed"}
    config = Config(**_recorded.merge_settings(before, kept, frozenset({"data_dir"}), flag="run"))
    _enable(config)
    config = dataclasses.replace(config, stream=False)
    dataset = processes.in_all(lambda: _load_same(config, stored["data_sha256"], folder.path))
    numbers, init_all = _classifier.make_init(
        make_optimizer(config, num_examples=len(dataset.train.labels)),
        sizes=config.sizes or (),
        init=config.init,
        seeds=seeds,
        dtype=np.dtype(config.dtype),
    )
    like = jax.eval_shape(init_all, numbers)
    if mesh is not None:
        like = sharding.like_replicated(like, mesh)
    snapshot = runs.read_checkpoint(folder.checkpoints_path, like)
    params = jax.tree.map(lambda leaf: leaf[seed - seeds.start], snapshot.state.params)
    return (
        dataclasses.replace(config, epochs=snapshot.epoch, seed=seed, num_seeds=1),
        dataset,
        params,
    )


def _load_same(config: Config, digest: str, path: Path) -> data.Dataset:
    """Returns the data of a run; raises ValueError unless they have the digest."""
    dataset = load(config)
    if _recorded.digest_of(dataset) != digest:
        raise ValueError(
            f"dataset {dataset.name} holds other data than when {path} was trained; expected the "
            "same examples in the same order"
        )
    return dataset


def prepare(given: dict[str, Any]) -> tuple[Config, data.Dataset]:
    """Returns checked settings and their data, for a network that is yet to be trained."""
    config = Config(**given)
    _enable(config)
    dataset = processes.in_all(lambda: load(config))
    return processes.in_all(lambda: resolve(config, dataset)), dataset


def find_point(
    config: Config,
    dataset: data.Dataset,
    params: Params | None = None,
    on_epoch: Any = lambda state, record: None,
    mesh: Mesh | None = None,
) -> StartingPoint:
    """Returns the network after ``config.epochs`` epochs, training it unless ``params`` are given.

    Args:
      config: What to train, one seed; with ``params``, what was trained.
      dataset: Its examples.
      params: The network, where it is there already.
      on_epoch: Called as `train.run` does.
      mesh: Devices to compute on; None is one device.
    """
    fun, _ = _classifier.example_functions(
        config.cost, dataset.num_classes, dataset.scale, np.dtype(config.dtype)
    )
    anchor = None
    if params is None:

        def keep_anchor(state: Any, record: runs.Record) -> None:
            nonlocal anchor
            if record["epoch"] == config.epochs - 1:
                anchor = jax.tree.map(lambda leaf: jnp.copy(leaf[0]), state.params)
            on_epoch(state, record)

        state = train.run(config, dataset, mesh=mesh, on_epoch=keep_anchor).state
        params = jax.tree.map(lambda leaf: leaf[0], state.params)
    classes, labels = np.unique(dataset.train.labels, return_inverse=True)
    net = "-".join(map(str, config.sizes or ()))
    when = (
        f"after {config.epochs} epoch{'s' * (config.epochs > 1)}" if config.epochs else "untrained"
    )
    return StartingPoint(
        params=params,
        anchor=anchor,
        fun=fun,
        examples=_classifier.to_device(dataset.train, np.dtype(config.dtype), mesh),
        labels=labels.astype(np.int32),
        num_classes=len(classes),
        mesh=mesh,
        description=f"{Path(dataset.name).stem}, {net}, {when}",
    )


def _enable(config: Config) -> None:
    if config.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
