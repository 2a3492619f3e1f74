"""Many runs as one compiled program: other seeds, learning rates, hyperparameters, side by side."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from sgd_jax.distributed.sharding import DATA_AXIS, check_mesh, num_shards, on_mesh
from sgd_jax.estimation.estimators import mini_batch
from sgd_jax.training._epoch import make_epoch
from sgd_jax.training._step import StepInfo, TrainState, init_state
from sgd_jax.typing import Array, CostFn, Examples, MeanStrategy, Params, PyTree


class Sweep(NamedTuple):
    """The programs of a sweep; every leaf of states, params and settings has leading axes (G, R).

    G is the number of orders of the examples, R that of the runs that share each.
    """

    init: Callable[[Params, PyTree], TrainState]
    """From params and settings to the states before the first step."""
    epoch: Callable[[TrainState, PyTree, Examples, Array], tuple[TrainState, StepInfo]]
    """From states, settings, examples and mini-batches (G, steps, m) to the states after an epoch
    and the cost of each mini-batch, (G, R, steps)."""


def make_sweep(
    fun: CostFn,
    make_optimizer: Callable[[Any], optax.GradientTransformation],
    *,
    mesh: Mesh | None = None,
    donate: bool = False,
    strategy: MeanStrategy = "auto",
    orders: Literal["auto", "in_turn", "together"] = "auto",
) -> Sweep:
    """Returns an epoch of G × R training runs, compiled as one program.

    Run (g, r) is what `make_epoch` does with ``make_optimizer(settings[g, r])`` from params[g, r]
    on batches[g], to rounding. The R runs that share an order walk through it together: each
    mini-batch is gathered once, and their thin products become wide ones, (m, n_in) by
    (n_in, R·n_out).

    A seed usually decides both the first params and the order, so seeds × learning rates are
    G seeds of R learning rates each. Runs of other batch sizes have other shapes: a sweep for each.

    Args:
      fun: the cost of ONE example, ``(params, example) -> scalar``.
      make_optimizer: from the settings of one run, traced scalars such as a learning rate, to its
        optimizer; the structure of its state must not depend on them.
      mesh: divide the runs among the devices along ``"data"``: orders where their number is a
        multiple of the devices, otherwise the runs of each, filled up with copies that are dropped.
        Nothing is sent between devices. With ``jax.config.update("jax_num_cpu_devices", 2)`` before
        anything else, two CPU cores are two devices.
      donate: give the buffers of the incoming states to the outgoing ones.
      strategy: how a mini-batch gradient is computed, see `mean_value_and_grad`.
      orders: ``"in_turn"`` takes the orders that a device has one after the other, ``"together"``
        all at once, as products of stacks of matrices; ``"auto"`` is in turn on a CPU, where such
        products are slow, and together elsewhere, where starting many small ones is.

    Returns:
      A `Sweep`. Its functions raise `ValueError` where leading axes are not the (G, R) of all.

    Raises:
      ValueError: an unknown way to take orders or strategy; a mesh without axis ``"data"``.

    >>> import jax.numpy as jnp, sgd_jax as sj
    >>> sweep = make_sweep(sj.quadratic_cost, sj.sgd)
    >>> rates = jnp.array([[0.5, 1.0]])  # one order, two learning rates
    >>> states = sweep.init(jnp.zeros((1, 2)), rates)
    >>> batches = jnp.array([[[0, 1], [2, 2]]])  # one order of two mini-batches
    >>> states, info = sweep.epoch(states, rates, jnp.array([1.0, 3.0, 8.0]), batches)
    >>> states.params.tolist()  # 0 → 1 → 4.5 and 0 → 2 → 8
    [[4.5, 8.0]]
    """
    mesh = None if mesh is None else check_mesh(mesh)
    if orders not in ("auto", "in_turn", "together"):
        raise ValueError(f"orders must be auto, in_turn or together, got {orders!r}")
    if orders == "auto":
        devices = jax.devices() if mesh is None else mesh.devices.flat
        orders = "in_turn" if devices[0].platform == "cpu" else "together"

    def init_one(params: Params, setting: Any) -> TrainState:
        return init_state(params, make_optimizer(setting))

    def init(params: Params, settings: PyTree) -> TrainState:
        _check_axes(params=params, settings=settings)
        return jax.vmap(jax.vmap(init_one))(params, settings)

    def epoch(
        states: TrainState, settings: PyTree, examples: Examples, batches: Array
    ) -> tuple[TrainState, StepInfo]:
        num_orders, num_runs = _check_axes(states=states, settings=settings)
        if jnp.ndim(batches) != 3 or batches.shape[0] != num_orders:
            raise ValueError(
                f"batches must be ({num_orders}, steps, m), indices for each of {num_orders} "
                f"orders; got shape {jnp.shape(batches)}"
            )

        def run_orders(
            states: TrainState, settings: PyTree, examples: Examples, batches: Array
        ) -> tuple[TrainState, StepInfo]:
            def run_one(state: TrainState, setting: Any, batches: Array) -> Any:
                run = make_epoch(fun, make_optimizer(setting), estimator=mini_batch(strategy))
                return run(state, examples, batches)

            def run_order(order: tuple[TrainState, PyTree, Array]) -> Any:
                return jax.vmap(run_one, in_axes=(0, 0, None))(*order)

            take = jax.lax.map if orders == "in_turn" else lambda f, xs: jax.vmap(f)(xs)
            return take(run_order, (states, settings, batches))

        if mesh is None:
            return run_orders(states, settings, examples, batches)
        missing, whole = 0, PartitionSpec()
        cut = cut_batches = PartitionSpec(DATA_AXIS)
        if num_orders % num_shards(mesh):
            missing = -num_runs % num_shards(mesh)
            cut, cut_batches = PartitionSpec(None, DATA_AXIS), whole
        states, settings = jax.tree.map(lambda x: _fill_up(x, missing), (states, settings))
        run = jax.shard_map(
            run_orders,
            mesh=mesh,
            in_specs=(cut, cut, whole, cut_batches),
            out_specs=cut,
            check_vma=False,  # nothing crosses devices
        )
        ended = run(states, settings, examples, batches)
        return jax.tree.map(lambda x: x[:, :num_runs], ended) if missing else ended

    programs = jax.jit(init), jax.jit(epoch, donate_argnums=(0,) if donate else ())
    if mesh is None:
        return Sweep(*programs)
    return Sweep(*(functools.partial(_call_on_mesh, program, mesh) for program in programs))


def _call_on_mesh(program: Callable[..., Any], mesh: Mesh, *arguments: PyTree) -> Any:
    return program(*on_mesh(arguments, mesh))


def _check_axes(**trees: PyTree) -> tuple[int, int]:
    """Returns the leading (G, R) that all leaves share; raises ValueError where they do not."""
    leaves = [
        (name + jax.tree_util.keystr(path), jnp.shape(leaf)[:2])
        for name, tree in trees.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
    if not leaves:
        raise ValueError(f"{' and '.join(trees)} hold no arrays; expected leading axes (G, R)")
    first_name, first = leaves[0]
    for name, axes in leaves:
        if len(axes) < 2 or axes != first or 0 in axes:
            raise ValueError(
                f"{name} has leading axes {axes} and {first_name} {first}; expected one (G, R) for "
                "all: orders of the examples, and runs that share each. "
                "jnp.broadcast_to repeats what runs have in common"
            )
    return first[0], first[1]


def _fill_up(leaf: Array, missing: int) -> Array:
    """Adds copies of the last run of each order."""
    if not missing:
        return leaf
    copies = jnp.broadcast_to(leaf[:, -1:], (leaf.shape[0], missing, *leaf.shape[2:]))
    return jnp.concatenate([leaf, copies], axis=1)
