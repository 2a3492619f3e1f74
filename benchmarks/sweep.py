"""The suite `sweep`: many runs as one program, beside the same runs one after the other."""

import functools

import jax
import jax.numpy as jnp

import sgd_jax as sj
from benchmarks import epoch_c
from benchmarks.epoch import EpochProblem, cost_of_one, make_epoch_problem, on_device
from benchmarks.harness import Contender, Run, Suite
from sgd_jax.distributed import sharding

NUM_RUNS = 32
ONE = ("sgd_jax.make_epoch, one run", "seconds of all, one after the other")


def sweep_suites(
    data_dir: str | None = None, n: int = 50_000, num_runs: int = NUM_RUNS
) -> list[Suite]:
    """Returns an epoch of the textbook network for 32 learning rates, from one start in one order.

    Single runs are timed as one run; a table of theirs would take minutes. So each contender does
    what it says, and its time is divided by its number of runs.

    Args:
      data_dir: folder of MNIST; None: random pixels of the same shape.
      n: number of examples.
      num_runs: how many runs the sweep has.
    """
    problem = make_epoch_problem(data_dir, n)
    return [sweep_suite("sweep", problem, num_runs)]


def sweep_suite(name: str, problem: EpochProblem, num_runs: int) -> Suite:
    """Returns one run, and sweeps of several, each timed by the run.

    Sweeps of seeds take as many orders as seeds; those of rates share one.
    """
    contenders = [
        Contender("sgd_jax.make_epoch", functools.partial(single_run, problem), question="1 run"),
        Contender("C, one core", lambda: epoch_c.c_epoch(problem), question="1 run"),
    ]
    shapes = ((1, num_runs), (num_runs // 8, 8), (num_runs, 1))
    for num_orders, num_rates in dict.fromkeys(shape for shape in shapes if min(shape)):
        question = f"{num_orders} × {num_rates} runs"
        make = functools.partial(sweep, problem, num_orders, num_rates)
        contenders.append(
            Contender("sgd_jax.make_sweep", make, question=question, units=num_orders * num_rates)
        )
    work = (
        f"one epoch of {problem.sizes}, m = {problem.batches.shape[1]}, n = "
        f"{len(problem.labels):,} ({problem.origin}), time per run; "
        f"orders × learning rates on {jax.device_count()} device(s)"
    )
    return Suite(name, work, contenders)


def single_run(problem: EpochProblem) -> Run:
    """Returns an epoch of one run on one device."""
    optimizer = sj.sgd(problem.learning_rate)
    epoch = sj.make_epoch(cost_of_one(problem), optimizer)
    state = sj.init_state(problem.network, optimizer)
    examples, batches = on_device(problem)
    return lambda: epoch(state, examples, batches)[0].params


def sweep(problem: EpochProblem, num_orders: int, num_rates: int) -> Run:
    """Returns an epoch of a sweep on all devices: learning rates up to that of the problem."""
    mesh = sharding.data_mesh()
    program = sj.make_sweep(cost_of_one(problem), sj.sgd, mesh=mesh)
    lead = (num_orders, num_rates)
    rates = problem.learning_rate * jnp.arange(1, num_rates + 1) / num_rates
    rates = jnp.broadcast_to(rates, lead)
    params = jax.tree.map(lambda x: jnp.broadcast_to(x, (*lead, *x.shape)), problem.network)
    examples, batches = on_device(problem)
    batches = jnp.broadcast_to(batches, (num_orders, *batches.shape))
    placed = sharding.replicate((program.init(params, rates), rates, examples, batches), mesh)
    return lambda: program.epoch(*placed)[0].params
