"""Training as pure, compiled functions: one step, one epoch. No printing, no files."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sgd_jax import _validate, sampling
from sgd_jax.distributed import sharding
from sgd_jax.estimation._mean_gradient import mean_value_and_grad
from sgd_jax.typing import Array, CostFn, Examples, MeanStrategy, Params


class TrainState(NamedTuple):
    """What training carries from step to step."""

    params: Params
    opt_state: optax.OptState
    step: Array
    """Number of steps taken, int32 scalar."""


class StepInfo(NamedTuple):
    """What a step reports; from an epoch, each field with leading axis (steps,)."""

    cost: Array
    """Mean cost of the mini-batch at the params BEFORE the step."""


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first step.

    Args:
      params: a pytree of floating-point arrays.
      optimizer: `sgd` or any optax optimizer.

    Returns:
      A `TrainState` at step 0. It shares the buffers of ``params``.

    Raises:
      ValueError: params holds no arrays.
      TypeError: a leaf of params is not real floating point, or optimizer is no optimizer.
    """
    _validate.floating_params(params)
    _validate.optimizer(optimizer)
    # An explicit dtype makes weakly typed leaves strong, as every step returns them.
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf)), params)
    return TrainState(params, optimizer.init(params), jnp.zeros([], jnp.int32))


def make_step(
    fun: CostFn,
    optimizer: optax.GradientTransformation,
    *,
    donate: bool = False,
    strategy: MeanStrategy = "auto",
    mesh: Mesh | None = None,
    rules: sharding.Rules = (),
) -> Callable[[TrainState, Examples], tuple[TrainState, StepInfo]]:
    """Returns one step of training on a mini-batch, compiled.

    The step takes ĝ = 1/m Σ_j ∇fun(w, X_j) over the m examples given, all at the old w, hands it to
    the optimizer and adds the update. With `sgd` that is w ← w − (η/m) Σ_j ∇fun(w, X_j).

    Args:
      fun: the cost of ONE example, ``(params, example) -> scalar``.
      optimizer: `sgd` or any optax optimizer; one that asks for ``value`` gets the mean cost of the
        mini-batch, one that asks for more is refused by optax.
      donate: give the buffers of the incoming state to the outgoing one. Saves one copy of params
        and optimizer state; the state handed in must then not be used again, nor hold one array at
        two places (copy it: XLA refuses to take a buffer twice).
      strategy: how the mini-batch gradient is computed, see `mean_value_and_grad`.
      mesh: devices that share each mini-batch, cut along the mesh axis ``"data"``; the numbers are
        the same to rounding, and m need be no multiple of the devices. See `sgd_jax.sharding`.
      rules: which parameters, with their optimizer state, are cut over the mesh and how, see
        `sharding.param_shardings`; the rest lies whole on every device.

    Returns:
      A jitted function ``(state, examples) -> (state, info)``. It compiles once per shape and
      dtype. It raises `ValueError` where examples is empty or its leading axes differ.

    >>> import jax.numpy as jnp, sgd_jax as sj
    >>> fun = lambda w, x: sj.quadratic_cost(w, x)
    >>> optimizer = sj.sgd(learning_rate=0.5)
    >>> step = make_step(fun, optimizer)
    >>> state, info = step(sj.init_state(jnp.array(0.0), optimizer), jnp.array([1.0, 3.0]))
    >>> float(state.params), float(info.cost)  # w = 0 + ½·2;  C = (½·1 + ½·9) / 2
    (1.0, 2.5)
    """
    mesh = _checked(mesh, rules)
    update = _make_update(fun, optimizer, strategy, mesh, rules)

    def step(state: TrainState, examples: Examples) -> tuple[TrainState, StepInfo]:
        m = _validate.num_examples(examples)
        return update(state, examples, jnp.full((m,), 1 / m))

    return _placed(jax.jit(step, donate_argnums=(0,) if donate else ()), mesh, rules)


def make_epoch(
    fun: CostFn,
    optimizer: optax.GradientTransformation,
    *,
    donate: bool = False,
    strategy: MeanStrategy = "auto",
    mesh: Mesh | None = None,
    rules: sharding.Rules = (),
    own_rows: bool = False,
) -> Callable[[TrainState, Examples, Array], tuple[TrainState, StepInfo]]:
    """Returns an epoch of training: one compiled program that walks explicit mini-batches.

    Row s of ``batches`` holds the indices of mini-batch s; the rows are taken in order, each one a
    step as in `make_step`. An entry of −1 means "no example here": it has weight zero, and the step
    divides by the number of entries that are not −1. So a short last mini-batch is a row filled up
    with −1, as `sampling.epoch(..., keep_last=True)` makes it. Any order goes: reshuffled, fixed,
    with repetitions.

    Args:
      fun: the cost of ONE example, ``(params, example) -> scalar``.
      optimizer: as in `make_step`.
      donate: give the buffers of the incoming state to the outgoing one; the state handed in must
        then not be used again, nor hold one array at two places.
      strategy: how the mini-batch gradient is computed, see `mean_value_and_grad`.
      mesh: devices that share each mini-batch, cut along the mesh axis ``"data"``; the numbers are
        the same to rounding, and m need be no multiple of the devices. See `sgd_jax.sharding`.
      rules: which parameters, with their optimizer state, are cut over the mesh and how, see
        `sharding.param_shardings`; the rest lies whole on every device. Examples may be cut too,
        by `sharding.shard_examples`: of a mini-batch only its rows are then sent.
      own_rows: with D devices along ``"data"``, the examples are D pieces of n/D rows, the columns
        of batches D pieces of m/D, and piece d of the columns counts the rows of piece d of the
        examples, from 0. Then no row is sent: what `data.ShuffledChunks` makes for each device.

    Returns:
      A jitted function ``(state, examples, batches) -> (state, info)``: examples has leading axis n
      and stays where it is, batches is (steps, m) of any integer dtype, and ``info.cost`` is
      (steps,). Under `jax.vmap` it trains many states at a time. Indices live on the device, where
      nothing can be raised: one outside of [−1, n), or [−1, n/D) with ``own_rows``, and a row of −1
      alone give a NaN cost and NaN params. It raises `ValueError` where batches is not a matrix, or
      n or m no multiple of D with ``own_rows``, and `TypeError` where batches is not of integers.

    >>> import jax.numpy as jnp, sgd_jax as sj
    >>> optimizer = sj.sgd(learning_rate=0.5)
    >>> epoch = make_epoch(sj.quadratic_cost, optimizer)
    >>> state = sj.init_state(jnp.array(0.0), optimizer)
    >>> state, info = epoch(state, jnp.array([1.0, 3.0, 8.0]), jnp.array([[0, 1], [2, -1]]))
    >>> float(state.params), int(state.step)  # 0 → ½·2 = 1 → 1 + ½·7 = 4.5
    (4.5, 2)
    """
    mesh = _checked(mesh, rules)
    update = _make_update(fun, optimizer, strategy, mesh, rules)

    def epoch(
        state: TrainState, examples: Examples, batches: Array, *, is_cut: bool = False
    ) -> tuple[TrainState, StepInfo]:
        n = _validate.num_examples(examples)
        if not hasattr(batches, "shape"):
            raise TypeError(
                f"batches must be one array of (steps, m) indices, got a {type(batches).__name__}; "
                "make it one by jnp.asarray"
            )
        if jnp.ndim(batches) != 2:
            raise ValueError(f"batches must be (steps, m), got shape {jnp.shape(batches)}")
        if batches.shape[1] == 0:
            raise ValueError(f"batches must name examples, got m = 0 in shape {batches.shape}")
        if not jnp.issubdtype(jnp.result_type(batches), jnp.integer):
            raise TypeError(f"batches must hold indices, got dtype {jnp.result_type(batches)}")
        batches = batches.astype(jnp.promote_types(batches.dtype, jnp.int32))  # has −1 and n
        num_rows = n  # that an index may name
        if own_rows and mesh is not None:
            _check_pieces(n, batches.shape[1], sharding.num_shards(mesh))
            num_rows = n // sharding.num_shards(mesh)
        batches = sampling.lay_out(batches, mesh)

        def step(state: TrainState, batch: tuple[Examples, Array]) -> tuple[TrainState, StepInfo]:
            return update(state, *batch)

        def block(state: TrainState, indices: Array) -> tuple[TrainState, StepInfo]:
            present, named = indices >= 0, jnp.maximum(indices, 0)
            if mesh is not None and own_rows:
                gathered = sharding.take_own_rows(examples, named, mesh)
            elif mesh is not None and is_cut:
                gathered = sharding.take_rows(examples, named, mesh)
            else:
                gathered = jax.tree.map(
                    lambda leaf: leaf.at[named].get(mode="promise_in_bounds"), examples
                )
            if mesh is not None:  # each device gathers its own share of every mini-batch
                cut = NamedSharding(mesh, PartitionSpec(None, sharding.DATA_AXIS))
                gathered = jax.lax.with_sharding_constraint(gathered, cut)
            num_present = jnp.sum(present, axis=1, keepdims=True)
            # NaN said outright: XLA turns a division of bools by zero into zero.
            absent_weight = jnp.where(num_present > 0, 0.0, jnp.nan)
            weights = jnp.where(present, 1 / num_present, absent_weight)
            weights = jnp.where((indices >= -1) & (indices < num_rows), weights, jnp.nan)
            return jax.lax.scan(step, state, (gathered, weights))

        steps, m = batches.shape
        length = _block_length(steps, m * _bytes_per_example(examples))
        whole = steps - steps % length
        blocks = batches[:whole].reshape(whole // length, length, m)
        state, info = jax.lax.scan(block, state, blocks)
        info = jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), info)
        if whole < steps:
            state, rest = block(state, batches[whole:])
            info = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), info, rest)
        return state, info

    donated = (0,) if donate else ()
    compiled = jax.jit(epoch, donate_argnums=donated, static_argnames="is_cut")
    if mesh is None:
        return compiled
    return _placed(
        compiled, mesh, rules, lambda examples, _: {"is_cut": sharding.is_cut(examples, mesh)}
    )


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


def _make_update(
    fun: CostFn,
    optimizer: optax.GradientTransformation,
    strategy: MeanStrategy,
    mesh: Mesh | None,
    rules: sharding.Rules,
) -> Callable[[TrainState, Examples, Array], tuple[TrainState, StepInfo]]:
    """Returns one step on weighted examples, not compiled: what a step and an epoch share."""
    _validate.optimizer(optimizer)
    optimizer = optax.with_extra_args_support(optimizer)
    gradient = mean_value_and_grad(fun, strategy=strategy, mesh=mesh)

    def update(
        state: TrainState, examples: Examples, weights: Array
    ) -> tuple[TrainState, StepInfo]:
        cost, grads = gradient(state.params, examples, weights)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, value=cost)
        params: Any = optax.apply_updates(state.params, updates)
        after = TrainState(params, opt_state, state.step + 1)
        if mesh is not None:
            after = sharding.place(after, _shardings(after, mesh, rules))
        return after, StepInfo(cost)

    return update


def _shardings(state: TrainState, mesh: Mesh, rules: sharding.Rules) -> TrainState:
    return sharding.state_shardings(state, state.params, mesh, rules)


def _placed(
    compiled: Any,
    mesh: Mesh | None,
    rules: sharding.Rules,
    options: Callable[..., dict[str, Any]] = lambda *data: {},
) -> Any:
    """Returns a compiled function of (state, examples, ...) that lays these out first.

    ``options`` says, of what is laid out, what the function is compiled for.
    """
    if mesh is None:
        return compiled

    def run(state: TrainState, *data: Any) -> tuple[TrainState, StepInfo]:
        state = sharding.place(state, _shardings(state, mesh, rules))
        placed = [sharding.on_mesh(leaves, mesh) for leaves in data]
        return compiled(state, *placed, **options(*placed))

    return run


def _check_pieces(n: int, m: int, num_shards: int) -> None:
    for name, length in (("n", n), ("m", m)):
        if length % num_shards:
            raise ValueError(
                f"own_rows is set with {name} = {length}, no multiple of the {num_shards} devices "
                "of the mesh; fill up each device's piece, examples with any rows and batches with "
                "−1"
            )


def _checked(mesh: Mesh | None, rules: sharding.Rules) -> Mesh | None:
    if mesh is None and rules:
        raise ValueError("rules say how parameters lie on a mesh; give mesh too")
    return None if mesh is None else sharding.check_mesh(mesh)
