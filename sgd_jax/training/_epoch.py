"""One epoch of training as a single compiled program. No printing, no files."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sgd_jax import _validate
from sgd_jax.distributed import sharding
from sgd_jax.estimation._estimate import checked_weights
from sgd_jax.estimation.estimators import MakeEstimator
from sgd_jax.sampling import Sample
from sgd_jax.training._step import StepInfo, TrainState, Update, averaging, checked_mesh
from sgd_jax.typing import Array, CostAndMetricsFn, CostFn, Examples


def make_epoch(
    fun: CostFn | CostAndMetricsFn,
    optimizer: optax.GradientTransformation,
    *,
    estimator: MakeEstimator | None = None,
    has_aux: bool = False,
    donate: bool = False,
    mesh: Mesh | None = None,
    rules: sharding.Rules = (),
    own_rows: bool = False,
) -> Callable[[TrainState, Examples, Array | Sample], tuple[TrainState, StepInfo]]:
    """Returns an epoch of training: one compiled program that walks explicit samples.

    Row s of ``batches`` is sample s; the rows are taken in order, each one a step as in
    `make_step`. A matrix of indices stands for plain means: an entry of −1 means "no example here",
    has weight zero, and the step divides by the number of entries that are not −1. So a short last
    mini-batch is a row padded with −1, as `sampling.epoch(..., keep_last=True)` makes it. Any order
    goes: reshuffled, fixed, with repetitions. A stacked `Sample`, indices and weights (steps, m),
    is taken with its weights: make it by `jax.vmap` of a sampler over keys. An empty row of it is a
    step with a gradient of 0.

    Args:
      fun: the cost of ONE example, ``(params, example) -> scalar``.
      optimizer: as in `make_step`.
      estimator: as in `make_step`.
      has_aux: as in `make_step`.
      donate: give the buffers of the incoming state to the outgoing one; the state handed in must
        then not be used again, nor hold one array at two places.
      mesh: devices that share each mini-batch, sharded along the mesh axis ``"data"``; the numbers
        are the same to rounding, and m need be no multiple of the devices. See `sj.sharding`.
      rules: which parameters, with their optimizer state, are sharded over the mesh and how, see
        `sharding.param_shardings`; the rest is replicated. Examples may be sharded too, by
        `sharding.shard_examples`: of a mini-batch only its rows are then sent.
      own_rows: with D devices along ``"data"``, the examples are D pieces of n/D rows, the columns
        of batches D pieces of m/D, and piece d of the columns counts the rows of piece d of the
        examples, from 0. Then no row is sent: what `data.ShuffledChunks` makes for each device.
        For the default estimator only.

    Returns:
      A compiled function ``(state, examples, batches) -> (state, info)``: examples has leading axis
      n and stays where it is, batches is (steps, m) of any integer dtype or a stacked `Sample`, and
      ``info.cost`` is (steps,). Under `jax.vmap` it trains many states at a time. Indices live on
      the device, where nothing can be raised: one outside of [−1, n), or [−1, n/D) with
      ``own_rows``, and a matrix's row of −1 alone give a NaN cost and NaN params.

    Raises:
      ValueError: own_rows with another estimator; when called: batches is not a matrix, n or m is
        no multiple of D with ``own_rows``, the optimizer's state is that of another one.
      TypeError: when called: batches is not of integers, or not one array or `Sample`; the first
        argument is no `TrainState`.

    >>> import jax.numpy as jnp, sgd_jax as sj
    >>> optimizer = sj.sgd(learning_rate=0.5)
    >>> epoch = make_epoch(sj.quadratic_cost, optimizer)
    >>> state = sj.init_state(jnp.array(0.0), optimizer)
    >>> state, info = epoch(state, jnp.array([1.0, 3.0, 8.0]), jnp.array([[0, 1], [2, -1]]))
    >>> float(state.params), int(state.step)  # 0 → ½·2 = 1 → 1 + ½·7 = 4.5
    (4.5, 2)
    """
    mesh = checked_mesh(mesh, rules)
    update = Update(fun, optimizer, estimator, has_aux, mesh, rules)
    if own_rows and not update.takes_rows:
        raise ValueError("own_rows is for the default estimator; leave it out")

    def epoch(
        state: TrainState, examples: Examples, batches: Array | Sample, *, is_cut: bool = False
    ) -> tuple[TrainState, StepInfo]:
        update.check(state)
        num_rows = _validate.num_examples(examples)  # that an index may name
        batches = _checked_batches(batches)
        if not update.takes_rows:
            return _walk_samples(update, state, examples, batches)
        indices = batches.indices if isinstance(batches, Sample) else batches
        if own_rows and mesh is not None:
            _check_pieces(num_rows, indices.shape[1], sharding.num_shards(mesh))
            num_rows //= sharding.num_shards(mesh)
        if mesh is not None:
            batches = sharding.lay_out(batches, mesh)

        def step(state: TrainState, batch: tuple[Examples, Array]) -> tuple[TrainState, StepInfo]:
            return update.on_rows(state, *batch)

        def block(state: TrainState, batches: Array | Sample) -> tuple[TrainState, StepInfo]:
            named = _named(batches)
            if mesh is not None and own_rows:
                rows = sharding.take_own_rows(examples, named, mesh)
            elif mesh is not None and is_cut:
                rows = sharding.take_rows(examples, named, mesh)
            else:
                rows = jax.tree.map(
                    lambda leaf: leaf.at[named].get(mode="promise_in_bounds"), examples
                )
            if mesh is not None:  # each device gathers its own share of every mini-batch
                shares = NamedSharding(mesh, PartitionSpec(None, sharding.DATA_AXIS))
                rows = jax.lax.with_sharding_constraint(rows, shares)
            if isinstance(batches, Sample):
                weights = checked_weights(*batches, num_rows)
            else:
                is_index = (batches >= -1) & (batches < num_rows)
                weights = jnp.where(is_index, averaging(batches).weights, jnp.nan)
            return jax.lax.scan(step, state, (rows, weights))

        return _walk_blocks(block, state, batches, _bytes_per_example(examples))

    donated = (0,) if donate else ()
    program = jax.jit(epoch, donate_argnums=donated, static_argnames="is_cut")
    if mesh is None:
        return update.compiled(program)
    return update.compiled(program, lambda examples, _: {"is_cut": sharding.is_cut(examples, mesh)})


def _walk_samples(
    update: Update, state: TrainState, examples: Examples, batches: Array | Sample
) -> tuple[TrainState, StepInfo]:
    """Walks samples one by one; the estimator sees all examples."""
    samples = batches if isinstance(batches, Sample) else averaging(batches)

    def step(state: TrainState, sample: Sample) -> tuple[TrainState, StepInfo]:
        return update.on_sample(state, examples, sample)

    return jax.lax.scan(step, state, samples)


def _walk_blocks(
    block: Callable[[TrainState, Any], tuple[TrainState, StepInfo]],
    state: TrainState,
    batches: Array | Sample,
    bytes_per_example: int,
) -> tuple[TrainState, StepInfo]:
    """Walks mini-batches in blocks whose rows are gathered together."""
    steps, m = jax.tree.leaves(batches)[0].shape
    length = _block_length(steps, m * bytes_per_example)
    whole = steps - steps % length
    blocks = jax.tree.map(lambda x: x[:whole].reshape(whole // length, length, m), batches)
    state, info = jax.lax.scan(block, state, blocks)
    info = jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), info)
    if whole < steps:
        state, rest = block(state, jax.tree.map(lambda x: x[whole:], batches))
        info = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), info, rest)
    return state, info


def _named(batches: Array | Sample) -> Array:
    """The rows to gather: for −1 example 0, or one of the same sample, which is no stranger."""
    if isinstance(batches, Sample):
        stand_in = jnp.max(batches.indices, axis=-1, keepdims=True, initial=0)
        return jnp.where(batches.indices >= 0, batches.indices, stand_in)
    return jnp.maximum(batches, 0)


_BLOCK_BYTES = 1 << 19
"""How much is gathered at a time: half a second cache."""

_SINGLE_BYTES = 3 << 15
"""A mini-batch of so many bytes is gathered by itself: XLA then divides the work among threads."""


def _block_length(steps: int, bytes_per_step: int) -> int:
    """How many steps' mini-batches are gathered together.

    Gathering rows is slow one small mini-batch at a time, and large ones are better not kept
    waiting (`docs/performance.md`). What divides the steps is preferred: a rest at the end is
    compiled by itself.
    """
    if bytes_per_step >= _SINGLE_BYTES:
        return 1
    best = max(1, min(steps, _BLOCK_BYTES // max(1, bytes_per_step)))
    near = range(max(1, best // 2), min(2 * best, steps) + 1)
    dividing = [length for length in near if steps % length == 0]
    return min(dividing, key=lambda length: abs(length - best), default=best)


def _bytes_per_example(examples: Examples) -> int:
    leaves = jax.tree.leaves(examples)
    return sum(math.prod(leaf.shape[1:]) * leaf.dtype.itemsize for leaf in leaves)


def _checked_batches(batches: Any) -> Any:
    """Returns batches with indices that hold −1 and n; raises unless they are (steps, m)."""
    if isinstance(batches, Sample):
        if jnp.shape(batches.weights) != jnp.shape(batches.indices):
            raise ValueError(
                "batches must hold as many weights as indices, got "
                f"{jnp.shape(batches.weights)} and {jnp.shape(batches.indices)}"
            )
        return Sample(_checked_batches(batches.indices), jnp.asarray(batches.weights))
    if isinstance(batches, (list, tuple)):
        lengths = sorted({len(batch) if hasattr(batch, "__len__") else 1 for batch in batches})
        raise TypeError(
            f"batches must be one array of (steps, m) indices or a stacked Sample, got a "
            f"{type(batches).__name__} of {len(batches)} with lengths {lengths}; pad shorter ones "
            "with -1 and stack them by jnp.stack"
        )
    if not hasattr(batches, "shape"):
        raise TypeError(
            f"batches must be one array of (steps, m) indices or a stacked Sample, got a "
            f"{type(batches).__name__}"
        )
    if jnp.ndim(batches) != 2:
        raise ValueError(f"batches must be (steps, m), got shape {jnp.shape(batches)}")
    if batches.shape[1] == 0:
        raise ValueError(f"batches must name examples, got m = 0 in shape {batches.shape}")
    if not jnp.issubdtype(jnp.result_type(batches), jnp.integer):
        raise TypeError(f"batches must hold indices, got dtype {jnp.result_type(batches)}")
    return batches.astype(jnp.promote_types(batches.dtype, jnp.int32))


def _check_pieces(n: int, m: int, num_shards: int) -> None:
    for name, length in (("n", n), ("m", m)):
        if length % num_shards:
            raise ValueError(
                f"own_rows is set with {name} = {length}, no multiple of the {num_shards} devices "
                "of the mesh; pad each device's piece, examples with any rows and batches with −1"
            )
