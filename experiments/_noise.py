"""The gradient noise scale of networks in training, measured between epochs."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from experiments import _classifier, runs
from experiments._config import Config
from sgd_jax import data, sampling
from sgd_jax.estimation import gradient_moments
from sgd_jax.estimation.noise import NoiseParts, NoiseScale, Of, noise_scale
from sgd_jax.typing import Array, Params

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
    split: str = "train",
    mesh: Mesh | None = None,
) -> Measurement:
    """Returns a function that measures B = tr Σ/‖∇C‖² between epochs, of the question asked.

    With ``split="train"`` B is that of the cost that is minimized, of all n training examples:
    exact if ``num_examples`` is n or more (`sj.noise_scale` of "these_examples"), otherwise
    estimated from so many of them, drawn without replacement from (seed, epoch) alone ("subset"). A
    resumed run measures the same. With ``split="validation"`` B is that of the population, from
    validation examples, to which nothing was fitted ("population"). ``"both"`` measures both.

    The record gets `noise_scale`, `noise_scale_low` and `noise_scale_high`, in examples, None where
    ‖∇C‖² cannot be told from zero or an end is infinite (the lower end stands); `noise_trace` and
    `noise_squared_norm`, the parts, of which an estimate of the second may be negative; and
    `noise_scale_layer1`, …, the same ratio in the weights and biases of one layer. Of the held-out
    examples "both" adds `held_out_noise_scale`, `held_out_noise_scale_low`, ….

    Args:
      dataset: of examples; only the split is measured.
      cost: of an example.
      seeds: of the networks.
      dtype: of computation.
      num_examples: how many, at least 3; as many as there are, or more, is all.
      split: "train", "validation" or "both".
      mesh: devices that share the examples; None is one device.
    """
    make = functools.partial(
        _make_one,
        dataset,
        cost=cost,
        seeds=seeds,
        dtype=dtype,
        num_examples=num_examples,
        mesh=mesh,
    )
    if split != "both":
        return make(split)
    fitted, held_out = make("train"), make("validation")

    def to_record(params: Params, number: int) -> dict[str, Any]:
        extra = {
            f"held_out_{name}": value
            for name, value in held_out(params, number).items()
            if "layer" not in name
        }
        return fitted(params, number) | extra

    return to_record


def _make_one(
    dataset: data.Dataset,
    split: str,
    *,
    cost: _classifier.Cost,
    seeds: range,
    dtype: jax.typing.DTypeLike,
    num_examples: int,
    mesh: Mesh | None,
) -> Measurement:
    """What measures one split."""
    fun, _ = _classifier.example_functions(cost, dataset.num_classes, dataset.scale, dtype)
    part = getattr(dataset, split)
    n = len(part.labels)
    of: Of = "population"
    if split == "train":
        of = "subset" if num_examples < n else "these_examples"
    scale_of = functools.partial(
        noise_scale, of=of, population=n if of == "subset" else None, confidence=CONFIDENCE
    )
    read = _make_reader(part, seeds, dtype, num_examples, mesh)
    keeps = of != "these_examples"

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, 0 if num_examples < n else None))
    def measure(params: Params, examples: data.Examples) -> NoiseScale:
        moments = gradient_moments(
            fun,
            params,
            examples,
            chunk_size=_CHUNK_SIZE,
            keep_norms=keeps,
            keep_alignments=keeps,
            mesh=mesh,
        )
        return scale_of(moments)

    return lambda params, number: _to_columns(jax.device_get(measure(params, read(number))))


def _make_reader(
    part: data.Examples,
    seeds: range,
    dtype: jax.typing.DTypeLike,
    num_examples: int,
    mesh: Mesh | None,
) -> Callable[[int], data.Examples]:
    """What returns the examples of an epoch: all, or those drawn, (num_seeds, k, …)."""
    n, is_on_disk = len(part.labels), isinstance(part.inputs, data.Rows)
    if num_examples >= n:
        everything = _classifier.to_device(part, dtype, mesh)
        return lambda _: everything
    keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), _STREAM))(
        np.arange(seeds.start, seeds.stop, dtype=np.uint32)
    )

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    def draw(key: Array, number: Array) -> Array:
        key = jax.random.fold_in(key, number)
        return sampling.without_replacement(key, n, num_examples).indices

    def from_disk(number: int) -> data.Examples:
        drawn = [data.read_examples(part, i) for i in np.asarray(draw(keys, np.int32(number)))]
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *drawn)
        return _classifier.to_device(stacked, dtype, mesh)

    if is_on_disk:
        return from_disk
    everything = _classifier.to_device(part, dtype, mesh)
    gather = jax.jit(lambda leaves, indices: jax.tree.map(lambda leaf: leaf[indices], leaves))
    return lambda number: gather(everything, draw(keys, np.int32(number)))


def _to_columns(scale: NoiseScale) -> dict[str, Any]:
    columns: dict[str, Any] = {
        "noise_scale": scale.value,
        "noise_scale_low": scale.low,
        "noise_scale_high": scale.high,
        "noise_trace": scale.parts.trace,
        "noise_squared_norm": scale.parts.squared_norm,
    }
    for number, layer in enumerate(scale.per_leaf, start=1):
        trace = layer.weights.trace + layer.biases.trace
        squared_norm = layer.weights.squared_norm + layer.biases.squared_norm
        ratio = np.asarray(NoiseParts(trace, squared_norm).ratio())
        columns[f"noise_scale_layer{number}"] = ratio
    lists = {
        name: [float(value) if np.isfinite(value) else None for value in values]
        for name, values in columns.items()
    }
    return {name: v if len(v) > 1 else v[0] for name, v in lists.items()}


def wanted_batch_size(
    config: Config, record: runs.Record, before: runs.Record | None, n: int
) -> float:
    """Returns what the rule asks for, averaged over the epochs so far, from 1 to n.

    The rules, from the noise measured in this epoch::

        norm_test   tr Σ/‖∇C‖²   the error of a mini-batch gradient is at most as long as ∇C (θ = 1)
        cabs        η tr Σ/C     C the mean cost of the training examples, η the learning rate

    If ‖∇C‖² is not above 0, the norm test asks for n. The average is the geometric mean of what
    this epoch asks for and of the average of the epoch before, so a single measurement that is
    three times too large moves it by √3.

    Args:
      config: with ``adaptive``, of one seed.
      record: of this epoch.
      before: of the epoch before; None at the first.
      n: number of training examples.

    Source: Byrd, Chin, Nocedal and Wu 2012; Balles, Romero and Hennig 2017 (arXiv 1612.05086).
    """
    trace, squared_norm = record["noise_trace"], record["noise_squared_norm"]
    if config.adaptive == "cabs":
        wanted = config.learning_rate * trace / record["cost_train"]
    else:
        wanted = trace / squared_norm if squared_norm > 0 else math.inf
    wanted = min(max(wanted, 1.0), float(n))
    return wanted if before is None else math.sqrt(wanted * before["wanted_batch_size"])


def next_batch_size(config: Config, record: runs.Record, n: int) -> int:
    """Returns the batch size of the next epoch: that of the last, twice or half as many.

    It is doubled if at least twice as many are wanted (`wanted_batch_size`) and twice as many do
    not exceed n, and halved, though never below the first, if less than half are. In between
    nothing changes (hysteresis): a rule that wavers does not make the size waver, and at most
    log₂(n/first) programs are compiled. Everything comes from the record of the epoch before, so a
    resumed run goes on alike.

    Args:
      config: with ``adaptive``, of one seed.
      record: of the epoch before.
      n: number of training examples.
    """
    wanted, size = record["wanted_batch_size"], record["batch_size"]
    if wanted >= 2 * size and 2 * size <= n:
        return 2 * size
    first = config.batch_size or n
    return size // 2 if wanted < size / 2 and size >= 2 * first else size
