"""Training on examples that stay on the disk: the programs of `_classifier`, fed chunk by chunk."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import sgd_jax as sj
from experiments import _classifier
from experiments._classifier import PARTS, Part, Programs, Totals
from sgd_jax import data
from sgd_jax._tree import tree_norm
from sgd_jax.data import Chunk, Examples
from sgd_jax.data._streams import Source
from sgd_jax.distributed import sharding
from sgd_jax.networks import InitScheme
from sgd_jax.typing import Array, Params

Element = TypeVar("Element")

_ROWS = PartitionSpec(sharding.DATA_AXIS)
_COLUMNS = PartitionSpec(None, None, sharding.DATA_AXIS)  # of (num_seeds, steps, m)
_CHUNK_SPECS = Chunk._make((_ROWS, _COLUMNS))


class _Shares(Generic[Element]):
    """What each device has of the elements of a source, from the disk onto that device.

    A source of grain, whose elements are those of this process's devices by their number.

    Args:
      make_source: From ``process_index`` and ``num_processes`` to the source for one device.
      mesh: Of all devices; None is one.
      specs: How the pieces of all devices make one, see `sharding.join_pieces`.
      dtype: Of all computation.
    """

    def __init__(
        self,
        make_source: Callable[..., Source[Element]],
        mesh: Mesh | None,
        specs: Any,
        dtype: jax.typing.DTypeLike,
    ):
        self._mesh, self._specs, self._dtype = mesh, specs, dtype
        self.num_devices, here = 1, [0]
        if mesh is not None:
            self.num_devices, here = sharding.num_shards(mesh), sharding.local_pieces(mesh)
        self._sources = {
            device: make_source(process_index=device, num_processes=self.num_devices)
            for device in here
        }

    @property
    def one(self) -> Any:
        """The source of one device: all are alike in lengths and shapes."""
        return next(iter(self._sources.values()))

    def __len__(self) -> int:
        return len(self.one)

    def __getitem__(self, number: int) -> dict[int, Element]:
        return {device: source[number] for device, source in self._sources.items()}

    def put(self, elements: dict[int, Element]) -> Element:
        """Returns the element of all devices, each with its own on it."""
        elements = jax.tree.map(
            lambda leaf: _classifier.as_computed(leaf, self._dtype) if _is_examples(leaf) else leaf,
            elements,
            is_leaf=_is_examples,
        )
        if self._mesh is None:
            return jax.device_put(elements[0])
        return sharding.join_pieces(elements, self._mesh, self._specs)


def _is_examples(leaf: Any) -> bool:
    return isinstance(leaf, Examples)


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
    mesh: Mesh | None = None,
) -> Programs:
    """Compiles the programs; see `_classifier.make_programs`. No inputs are read for it.

    A part of an epoch is a chunk of many mini-batches, whose examples are put on the device while
    the chunk before is trained on. The order of epoch e is that of `data.index_shuffle` with
    (seed, e): as random as that in memory, but another one. What is measured is the same.

    Of several devices each has its own columns of every mini-batch, and the examples they name
    alone, which its process reads from the disk; and its part of every block that is measured.

    Args:
      dataset: What `data.open_dataset` returns.
      optimizer: As there, and so on to ``dtype``.
      sizes: Of the network.
      cost: Of an example.
      init: Of the weights.
      seeds: Of the networks; each has an order of its own, and reads it.
      dtype: Of all computation.
      chunk_bytes: How large a chunk may be, of all devices together.
      parts: Of the data set, those measured.
      first_batch_size: Of the epoch that is compiled at once.
      mesh: Devices that share each mini-batch and what is measured; None is one device.
    """
    fun, output = _classifier.example_functions(cost, dataset.num_classes, dataset.scale, dtype)
    epoch = sj.make_epoch(fun, optimizer, mesh=mesh, own_rows=True)
    whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    numbers, init_all = _classifier.make_init(
        optimizer, sizes=sizes, init=init, seeds=seeds, dtype=dtype
    )

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=whole)
    def train(state: sj.TrainState, chunk: Chunk) -> tuple[sj.TrainState, Array]:
        def train_one(state: sj.TrainState, batches: Array) -> tuple[sj.TrainState, Array]:
            state, info = epoch(state, chunk.examples, batches)
            return state, info.cost

        return jax.vmap(train_one)(state, chunk.batches)

    def open_epoch(batch_size: int, number: int) -> _Shares[Chunk]:
        make_source = functools.partial(
            data.ShuffledChunks,
            dataset.train,
            batch_size,
            [(seed, number) for seed in seeds],
            chunk_bytes=chunk_bytes,
        )
        return _Shares(make_source, mesh, _CHUNK_SPECS, dtype)

    def shape_of(chunks: _Shares[Chunk], number: int, batch_size: int) -> Chunk:
        _, num_features = dataset.train.inputs.shape
        stored = dataset.train.inputs.dtype
        num_rows = chunks.num_devices * chunks.one.num_rows(number)
        num_columns = chunks.num_devices * math.ceil(batch_size / chunks.num_devices)

        def struct(shape: tuple[int, ...], dtype: Any, spec: PartitionSpec) -> Any:
            cut = None if mesh is None else NamedSharding(mesh, spec)
            return jax.ShapeDtypeStruct(shape, dtype, sharding=cut)

        examples = Examples(
            struct((num_rows, num_features), stored if stored == np.uint8 else dtype, _ROWS),
            struct((num_rows,), np.int32, _ROWS),
        )
        steps = len(chunks.one.steps(number))
        return Chunk(examples, struct((len(seeds), steps, num_columns), np.int32, _COLUMNS))

    pool = ThreadPoolExecutor()
    init_fn = pool.submit(jax.jit(init_all, out_shardings=whole).lower(numbers).compile)
    state = jax.eval_shape(init_all, numbers)
    if mesh is not None:
        state = sharding.like_replicated(state, mesh)

    @functools.cache
    def compile_epoch(batch_size: int) -> dict[int, Future[jax.stages.Compiled]]:
        """Returns the program of a chunk by the number of its examples: the last one has fewer."""
        chunks = open_epoch(batch_size, 0)
        numbers_by_size = {chunks.one.num_rows(number): number for number in (0, len(chunks) - 1)}
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
            loaded = data.prefetched(chunks, chunks.put, num_done)
            for index, chunk in enumerate(loaded, num_done):
                state, costs = compiled[chunks.one.num_rows(index)](state, chunk)
                del chunk  # or it would be kept until the next one is here
                yield Part(state, costs, chunks.one.steps(index), chunks.one.num_steps)

        return run

    @functools.cache
    def make_add(with_gradient: bool) -> Callable[[Any, Params, Examples, int], Totals]:
        totals_fn = _classifier.make_totals(
            fun, output, dataset.num_classes, with_gradient=with_gradient
        )

        def add(before: Any, params: Params, block: Examples, num_examples: int) -> Totals:
            def add_one(params: Params, before: Any) -> Totals:
                return _classifier.sum_over_chunks(
                    totals_fn, params, block, mesh, before=before, num_examples=num_examples
                )

            return jax.vmap(add_one)(params, before)

        return jax.jit(add, donate_argnums=0, static_argnums=3, out_shardings=whole)

    def measure(name: str, params: Params) -> Totals:
        add = make_add(name == "train")
        make_source = functools.partial(
            data.Blocks, getattr(dataset, name), chunk_bytes, _classifier.CHUNK_SIZE
        )
        blocks = _Shares(make_source, mesh, _ROWS, dtype)
        totals = None
        for index, block in enumerate(data.prefetched(blocks, blocks.put)):
            num_examples = blocks.one.num_rows(index)
            if totals is None:
                shapes = jax.eval_shape(lambda b=block, n=num_examples: add(None, params, b, n))
                totals = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
                totals = totals if mesh is None else sharding.replicate(totals, mesh)
            added = add(totals, params, block, num_examples)
            totals = jax.block_until_ready(added)  # one block at a time
            del block
        assert totals is not None  # no part is empty
        return totals

    norms = jax.jit(jax.vmap(tree_norm), out_shardings=whole)
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
