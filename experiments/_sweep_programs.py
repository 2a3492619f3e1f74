"""The programs of a sweep: all seeds and learning rates of a mini-batch size as one."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import sgd_jax as sj
from experiments import _classifier
from experiments._config import Config, make_optimizer
from sgd_jax import data
from sgd_jax.distributed import sharding
from sgd_jax.typing import Array, Params


class SweepPrograms(NamedTuple):
    """What trains and measures all runs of one batch size; leading axes are (seeds, rates)."""

    init: Callable[[], sj.TrainState]
    make_epoch: Callable[[int], Callable[[sj.TrainState, int], tuple[sj.TrainState, Array]]]
    """From the batch size to an epoch: from states and the number of the epoch to the states after
    it and the mean cost of its mini-batches."""
    evaluate: Callable[[Params], dict[str, Any]]


def make_programs(
    config: Config, learning_rates: Sequence[float], dataset: data.Dataset
) -> SweepPrograms:
    """Compiles what trains all seeds with all learning rates, and puts the data on the devices."""
    n, dtype = len(dataset.train.labels), np.dtype(config.dtype)
    mesh = sharding.data_mesh()
    fun, output = _classifier.example_functions(
        config.cost, dataset.num_classes, dataset.scale, dtype
    )
    parts = {
        name: _classifier.to_device(getattr(dataset, name), dtype, mesh)
        for name in _classifier.PARTS
    }
    seeds = range(config.seed, config.seed + config.num_seeds)
    shape = (len(seeds), len(learning_rates))
    rates = np.broadcast_to(np.array(learning_rates, dtype), shape)
    sweep = sj.make_sweep(
        fun,
        lambda rate: make_optimizer(config, num_examples=n, learning_rate=rate),
        mesh=mesh,
        donate=True,
    )

    networks, keys = _classifier.first_networks(config.sizes or (), config.init, seeds, dtype)

    @functools.partial(jax.jit, static_argnums=2)
    def draw(keys: Array, epoch: Array, batch_size: int) -> Array:
        return jax.vmap(lambda key: _classifier.draw_reshuffled(key, epoch, n, batch_size))(keys)

    measure = functools.partial(
        _classifier.measure_parts, fun, output, dataset.num_classes, with_gradient=False
    )
    measured = {name: parts[name] for name in ("validation", "test")}
    measure_all = jax.jit(jax.vmap(jax.vmap(measure, in_axes=(0, None)), in_axes=(0, None)))

    def init() -> sj.TrainState:
        start = jax.tree.map(
            lambda x: jnp.broadcast_to(x[:, None], (*shape, *x.shape[1:])), networks
        )
        return sweep.init(start, rates)

    def make_epoch(
        batch_size: int,
    ) -> Callable[[sj.TrainState, int], tuple[sj.TrainState, Array]]:
        def epoch(state: sj.TrainState, number: int) -> tuple[sj.TrainState, Array]:
            batches = draw(keys, np.int32(number), batch_size)
            state, info = sweep.epoch(state, rates, parts["train"], batches)
            return state, jnp.mean(info.cost, axis=-1)

        return epoch

    def evaluate(params: Params) -> dict[str, Any]:
        found = {}
        for name, totals in measure_all(params, measured).items():
            right = np.asarray(totals.right)  # (seeds, rates, classes)
            labels = getattr(dataset, name).labels
            size = np.bincount(labels, minlength=dataset.num_classes)
            found[f"accuracy_{name}"] = (right.sum(axis=-1) / len(labels)).tolist()
            if name == "test":
                found["dead_classes_test"] = np.sum(10 * right < size, axis=-1).tolist()
        return found

    return SweepPrograms(init, make_epoch, evaluate)
