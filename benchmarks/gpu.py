"""The suite `gpu`: the same programs on an accelerator, the data on the device."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

import sgd_jax as sj
from benchmarks import epoch_peers, problems
from benchmarks.epoch import (
    OURS,
    EpochProblem,
    cost_of_one,
    make_epoch_problem,
    on_device,
    optax_epoch,
    our_epoch,
    read,
)
from benchmarks.harness import Contender, Prepared, Run, Suite
from benchmarks.moments import moments_suites
from benchmarks.per_example import network_suite
from sgd_jax.networks import Network

BATCH_SIZES = (10, 100, 1000, 10_000, 50_000)
NUM_RUNS = (1, 8, 64, 1024)
TORCH_WAYS = (
    epoch_peers.EAGER,
    epoch_peers.COMPILED,
    epoch_peers.GRAPHS,
    epoch_peers.GRAPHS_OF_COMPILED,
)
_PACE = {"min_turn_seconds": 0.1, "max_seconds": 5.0}


def gpu_suites(data_dir: str | None = None, tiny: bool = False) -> list[Suite]:
    """Returns the tables: an epoch, sweeps, per-example gradients of three networks, moments.

    All products are exact in float32, in JAX as in PyTorch: TF32 is off on both sides.

    Args:
      data_dir: folder of MNIST; None: random pixels of the same shape.
      tiny: tiny sizes, on any device: to try the code, as the times then mean nothing.

    Raises:
      RuntimeError: there is no accelerator, and ``tiny`` is not asked for.
    """
    if jax.default_backend() == "cpu" and not tiny:
        raise RuntimeError(
            "suite is 'gpu', but JAX finds no accelerator and computes on the CPU; expected a GPU "
            "or TPU, and a JAX that can use it: pip install 'sgd_jax[cuda13]', cuda12 or tpu. To "
            "try the code on this machine, with tiny sizes, give --tiny"
        )
    jax.config.update("jax_default_matmul_precision", "highest")
    if tiny:
        networks = [
            problems.mlp((6, 5, 4), 4),
            problems.conv(8, (2, 3), 4),
            problems.transformer(4, 8, 2, 7, 4, tied=False),
        ]
        return [
            epochs_suite(data_dir, 40, (10, 40)),
            sweeps_suite(data_dir, 40, (1, 3)),
            *(network_suite(network) for network in networks),
            *moments_suites(n=20),
        ]
    networks = [problems.mlp(), problems.conv(), problems.transformer(tied=False)]
    return [
        epochs_suite(data_dir, 50_000, BATCH_SIZES),
        sweeps_suite(data_dir, 10_000, NUM_RUNS),
        *(network_suite(network) for network in networks),
        *moments_suites(),
    ]


def epochs_suite(data_dir: str | None, n: int, batch_sizes: tuple[int, ...]) -> Suite:
    """Returns an epoch of the textbook network at several batch sizes, beside optax and PyTorch."""
    contenders, origin = [], ""
    for m in batch_sizes:
        problem = make_epoch_problem(data_dir, n, batch_size=m)
        origin = f"{problem.sizes}, n = {n:,} ({problem.origin})"
        ours = (OURS[0], f"m = {m:,}")
        ways = [
            (OURS[0], functools.partial(our_epoch, problem), ()),
            ("one scan, optax", functools.partial(optax_epoch, problem), ("optax",)),
        ]
        ways += [
            (way, functools.partial(epoch_peers.in_torch, way, problem), ("torch",))
            for way in TORCH_WAYS
        ]
        contenders += [
            Contender(name, functools.partial(_warm, make), needs, question=ours[1], baseline=ours)
            for name, make, needs in ways
        ]
    work = f"one epoch of {origin}, data on the device"
    return Suite("gpu_epoch", work, contenders, read, tolerance=1e-3, **_PACE)


def sweeps_suite(data_dir: str | None, n: int, num_runs: tuple[int, ...]) -> Suite:
    """Returns an epoch of many networks at once, timed by the network.

    The networks start apart and share the order of the examples and the learning rate. Ratios are
    to one network alone.
    """
    problem = make_epoch_problem(data_dir, n)
    baseline = ("sgd_jax.make_sweep", _runs(num_runs[0]))
    contenders = []
    for number in num_runs:
        networks = _networks(problem, number)
        makes = {baseline[0]: functools.partial(our_sweep, problem, networks)}
        makes |= {
            way: functools.partial(epoch_peers.many_in_torch, way, problem, networks)
            for way in TORCH_WAYS
        }
        contenders += [
            Contender(
                name,
                make,
                ("torch",) if name in TORCH_WAYS else (),
                question=_runs(number),
                baseline=baseline,
                units=number,
            )
            for name, make in makes.items()
        ]
    work = (
        f"one epoch of each of many {problem.sizes}, m = {problem.batches.shape[1]}, n = {n:,} "
        f"({problem.origin}), data on the device, time per run"
    )
    return Suite("gpu_sweep", work, contenders, read, tolerance=1e-3)


def _warm(make: Callable[[], Prepared | Run]) -> Prepared | Run:
    """Returns what has compiled all it needs: a first run that compiles for long is not timed."""
    run = make()
    jax.block_until_ready(run() if callable(run) else run.run())
    return run


def _runs(number: int) -> str:
    return f"{number:,} run{'s' * (number > 1)}"


def _networks(problem: EpochProblem, number: int) -> Network:
    init = functools.partial(sj.init_network, sizes=problem.sizes)
    return jax.vmap(init)(jax.random.split(jax.random.key(2), number))


def our_sweep(problem: EpochProblem, networks: Network) -> Run:
    """Returns an epoch of all the networks by `make_sweep`, in one order, at one learning rate."""
    sweep = sj.make_sweep(cost_of_one(problem), sj.sgd)
    params = jax.tree.map(lambda leaf: leaf[None], networks)
    number = len(params[0].biases[0])
    rates = jnp.full((1, number), problem.learning_rate, jnp.float32)
    states = sweep.init(params, rates)
    examples, batches = on_device(problem)

    def run() -> object:
        ended, _ = sweep.epoch(states, rates, examples, batches[None])
        return jax.tree.map(lambda leaf: leaf[0], ended.params)

    return run
