"""The gradient noise scale of networks in training, measured between epochs."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from experiments import _classifier
from experiments._config import Config
from sgd_jax import data, runs, sampling
from sgd_jax._typing import Array, Params
from sgd_jax.moment_streams import gradient_moments
from sgd_jax.noise_scale import NoiseParts, NoiseScale, noise_scale

_CHUNK_SIZE = 1000
_STREAM = 0x6E6F6973  # sets the keys of measurements apart from those of training
CONFIDENCE = 0.95

Measurement = Callable[[Params, int], dict[str, Any]]
"""From the params of all seeds and the number of the epoch to what belongs into its record."""


def make_measurement(
    dataset: data.Dataset,
    *,
    cost: _classifier.Cost,
    seeds: range,
    dtype: jax.typing.DTypeLike,
    num_examples: int,
    mesh: Mesh | None = None,
) -> Measurement:
    """Returns what measures B_simple = tr Σ/‖G‖² between epochs, by gradients of single examples.

    Of n training examples it takes ``num_examples``, drawn without replacement from (seed, epoch)
    alone, so a run that is resumed measures the same. With k < n of them it estimates tr Σ and
    ‖G‖² of the n, free of bias: (n − 1)/n s² and ‖Ĝ‖² − (1 − k/n) s²/k, where Ĝ is the mean and
    s² = 1/(k − 1) Σ‖g_i − Ĝ‖². All n are taken for a sample of what they were drawn from: s² and
    ‖Ĝ‖² − s²/n. Intervals are of 95 %, by `sj.noise_scale`'s jackknife.

    The record gets `noise_scale`, `noise_scale_low` and `noise_scale_high`, in examples, None where
    ‖G‖² cannot be told from zero (the lower end stands); `noise_trace` and `noise_squared_norm`,
    the unbiased estimates, of which the second may be negative; and `noise_scale_layer1`, …, the
    same ratio in the weights and biases of one layer, None where its ‖G‖² is not above 0.

    Args:
      dataset: Its training examples are measured.
      cost: Of an example.
      seeds: Of the networks.
      dtype: Of computation.
      num_examples: k, at least 3; n or more is all.
      mesh: Devices that share the examples; None is one device.
    """
    fun, _ = _classifier.example_functions(cost, dataset.num_classes, dataset.scale, dtype)
    is_on_disk = isinstance(dataset.train.inputs, data.Rows)
    examples = None if is_on_disk else _classifier.to_device(dataset.train, dtype, mesh)
    n = len(dataset.train.labels)
    keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), _STREAM))(
        np.arange(seeds.start, seeds.stop, dtype=np.uint32)
    )

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    def draw(key: Array, number: Array) -> Array:
        key = jax.random.fold_in(key, number)
        return sampling.without_replacement(key, n, num_examples).indices

    def read(number: int) -> data.Examples:
        """Returns the examples drawn for each seed, from the disk: leaves (num_seeds, k, ...)."""
        drawn = [
            data.read_examples(dataset.train, i) for i in np.asarray(draw(keys, np.int32(number)))
        ]
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *drawn)
        return _classifier.to_device(stacked, dtype, mesh)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, 0, None, 0 if is_on_disk else None))
    def measure(params: Params, key: Array, number: Array, examples: data.Examples) -> NoiseScale:
        population = None
        if num_examples < n:
            population = n
            if not is_on_disk:
                indices = draw(key[None], number)[0]
                examples = jax.tree.map(lambda leaf: leaf[indices], examples)
        moments = gradient_moments(
            fun,
            params,
            examples,
            chunk_size=_CHUNK_SIZE,
            keep_norms=True,
            keep_alignments=True,
            mesh=mesh,
        )
        return noise_scale(moments, confidence=CONFIDENCE, population=population)

    def to_record(params: Params, number: int) -> dict[str, Any]:
        chosen = read(number) if is_on_disk else examples
        scale = jax.device_get(measure(params, keys, np.int32(number), chosen))
        columns = {
            "noise_scale": scale.value,
            "noise_scale_low": scale.low,
            "noise_scale_high": scale.high,
            "noise_trace": scale.parts.trace,
            "noise_squared_norm": scale.parts.squared_norm,
        }
        for number_of_layer, layer in enumerate(scale.per_leaf, start=1):
            trace = layer.weights.trace + layer.biases.trace
            squared_norm = layer.weights.squared_norm + layer.biases.squared_norm
            ratio = np.asarray(NoiseParts(trace, squared_norm).ratio())
            columns[f"noise_scale_layer{number_of_layer}"] = ratio
        lists = {
            name: [float(value) if np.isfinite(value) else None for value in values]
            for name, values in columns.items()
        }
        return {name: v if len(v) > 1 else v[0] for name, v in lists.items()}

    return to_record


def grow_batch_size(config: Config, record: runs.Record, n: int) -> int:
    """Returns the batch size of the next epoch: that of the last, or twice as many.

    It is doubled where it is below what the rule asks for and does not exceed n/2, and never falls:
    at most log₂(n/first) programs are compiled, and one noisy measurement cannot run away with it.
    The rules, by the unbiased estimates of tr Σ and ‖G‖² in the record::

        norm_test   tr Σ/‖G‖²    the error of a mini-batch gradient is at most as long as G (θ = 1)
        cabs        η tr Σ/C     C the mean cost of the training examples, η the learning rate

    Where ‖G‖² is not above 0, the norm test asks for more than there is. Everything comes from the
    record of the epoch before, so a run that is resumed goes on alike.

    Args:
      config: With ``adaptive``, of one seed.
      record: Of the epoch before.
      n: Number of training examples.

    Source: Byrd, Chin, Nocedal and Wu 2012; Balles, Romero and Hennig 2017 (arXiv 1612.05086).
    """
    trace, squared_norm = record["noise_trace"], record["noise_squared_norm"]
    if config.adaptive == "cabs":
        wanted = config.learning_rate * trace / record["cost_train"]
    else:
        wanted = trace / squared_norm if squared_norm > 0 else math.inf
    size = record["batch_size"]
    return 2 * size if size < wanted and 2 * size <= n else size
