"""Training on examples that stay on the disk: the programs of `_classifier`, fed chunk by chunk."""

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sgd_jax as sj
from experiments import _classifier
from experiments._classifier import PARTS, Part, Programs, Totals
from sgd_jax import data
from sgd_jax._tree import tree_norm
from sgd_jax._typing import Array, Params
from sgd_jax.data import Chunk, Examples
from sgd_jax.networks import InitScheme


def make_programs(
    dataset: data.Dataset,
    optimizer: optax.GradientTransformation,
    *,
    sizes: tuple[int, ...],
    cost: _classifier.Cost,
    init: InitScheme,
    seeds: range,
    dtype: jax.typing.DTypeLike,
    chunk_bytes: int,
    parts: Sequence[str] = PARTS,
    first_batch_size: int | None = None,
) -> Programs:
    """Compiles the programs; see `_classifier.make_programs`. No inputs are read for it.

    A part of an epoch is a chunk of many mini-batches, whose examples are put on the device while
    the chunk before is trained on. The order of epoch e is that of `data.index_shuffle` with
    (seed, e): as random as that in memory, but another one. What is measured is the same.

    Args:
      dataset: What `data.open_dataset` returns.
      optimizer: As there, and so on to ``dtype``.
      sizes: Of the network.
      cost: Of an example.
      init: Of the weights.
      seeds: Of the networks; each has an order of its own, and reads it.
      dtype: Of all computation.
      chunk_bytes: How large a chunk may be.
      parts: Of the data set, those measured.
      first_batch_size: Of the epoch that is compiled at once.
    """
    fun, output = _classifier.example_functions(cost, dataset.num_classes, dataset.scale, dtype)
    epoch = sj.make_epoch(fun, optimizer)
    numbers, init_all = _classifier.make_init(
        optimizer, sizes=sizes, init=init, seeds=seeds, dtype=dtype
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def train(state: sj.TrainState, chunk: Chunk) -> tuple[sj.TrainState, Array]:
        def train_one(state: sj.TrainState, batches: Array) -> tuple[sj.TrainState, Array]:
            state, info = epoch(state, chunk.examples, batches)
            return state, info.cost

        return jax.vmap(train_one)(state, chunk.batches)

    def put(chunk: Chunk) -> Chunk:
        return Chunk(_classifier.to_device(chunk.examples, dtype), jax.device_put(chunk.batches))

    def shape_of(chunks: data.ShuffledChunks, number: int, batch_size: int) -> Chunk:
        _, num_features = dataset.train.inputs.shape
        stored = dataset.train.inputs.dtype
        num_rows = chunks.num_rows(number)
        inputs_dtype = stored if stored == np.uint8 else dtype
        examples: Any = (
            jax.ShapeDtypeStruct((num_rows, num_features), inputs_dtype),
            jax.ShapeDtypeStruct((num_rows,), np.int32),
        )
        shape = (len(seeds), len(chunks.steps(number)), batch_size)
        return Chunk(Examples(*examples), jax.ShapeDtypeStruct(shape, np.int32))

    def open_epoch(batch_size: int, number: int) -> data.ShuffledChunks:
        orders = [(seed, number) for seed in seeds]
        return data.ShuffledChunks(dataset.train, batch_size, orders, chunk_bytes=chunk_bytes)

    pool = ThreadPoolExecutor()
    init_fn = pool.submit(jax.jit(init_all).lower(numbers).compile)
    state = jax.eval_shape(init_all, numbers)

    @functools.cache
    def compile_epoch(batch_size: int) -> dict[int, Future[jax.stages.Compiled]]:
        """Returns the program of a chunk by the number of its examples: the last one has fewer."""
        chunks = open_epoch(batch_size, 0)
        numbers_by_size = {chunks.num_rows(number): number for number in (0, len(chunks) - 1)}
        return {
            size: pool.submit(train.lower(state, shape_of(chunks, number, batch_size)).compile)
            for size, number in numbers_by_size.items()
        }

    if first_batch_size is not None:
        compile_epoch(first_batch_size)

    def make_epoch(batch_size: int) -> Callable[[sj.TrainState, int, int], Iterator[Part]]:
        compiled = {size: future.result() for size, future in compile_epoch(batch_size).items()}

        def run(state: sj.TrainState, number: int, num_done: int = 0) -> Iterator[Part]:
            chunks = open_epoch(batch_size, number)
            for index, chunk in enumerate(data.prefetched(chunks, put, num_done), num_done):
                state, costs = compiled[chunks.num_rows(index)](state, chunk)
                del chunk  # or it would be kept until the next one is here
                yield Part(state, costs, chunks.steps(index), chunks.num_steps)

        return run

    @functools.cache
    def make_add(with_gradient: bool) -> Callable[[Any, Params, Examples], Totals]:
        totals_fn = _classifier.make_totals(
            fun, output, dataset.num_classes, with_gradient=with_gradient
        )
        add_one = functools.partial(_classifier.add_over_chunks, totals_fn)

        def add(before: Any, params: Params, block: Examples) -> Totals:
            return jax.vmap(add_one, in_axes=(0, None, None, 0))(params, block, None, before)

        return jax.jit(add, donate_argnums=0)

    def measure(name: str, params: Params) -> Totals:
        add = make_add(name == "train")
        blocks = data.Blocks(getattr(dataset, name), chunk_bytes, _classifier.CHUNK_SIZE)
        totals = None
        for block in data.prefetched(blocks, functools.partial(_classifier.to_device, dtype=dtype)):
            if totals is None:
                shapes = jax.eval_shape(add, None, params, block)
                totals = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            totals = jax.block_until_ready(add(totals, params, block))  # one block at a time
            del block
        assert totals is not None  # no part is empty
        return totals

    norms = jax.jit(jax.vmap(tree_norm))
    sizes_of_classes = {
        name: _class_sizes(getattr(dataset, name).labels, dataset.num_classes) for name in parts
    }

    def evaluate(params: Params) -> dict[str, Any]:
        totals = {name: measure(name, params) for name in parts}
        if "train" in totals:
            norm = norms(totals["train"].gradient)
            totals["train"] = totals["train"]._replace(gradient=norm)
        return _classifier.to_columns(totals, sizes_of_classes)

    return Programs(
        init=lambda: init_fn.result()(numbers), make_epoch=make_epoch, evaluate=evaluate
    )


def _class_sizes(labels: data.Rows, num_classes: int) -> np.ndarray:
    sizes = [np.bincount(block, minlength=num_classes) for _, block in labels.blocks()]
    return np.sum(sizes, axis=0)
