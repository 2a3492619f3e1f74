"""Rounds of SGD by four samplers: what they take, where they lead, how far off they are."""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import sgd_jax as sj
from sgd_jax import sampling
from sgd_jax._tree import tree_dot
from sgd_jax.estimation import expected_squared_error
from sgd_jax.estimation.svrg import difference
from sgd_jax.sampling import optimal_probabilities, proportional_allocation
from sgd_jax.typing import Array, CostFn, Params

SAMPLERS = ("uniform", "stratified", "importance", "svrg")
SCHEDULES = ("constant", "decaying", "averaged")
RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_CHUNK_SIZE = 1000


def gradients_of_round(sampler: str, n: int, m: int) -> int:
    """Returns how many gradients of examples a round takes: in its steps, and before them."""
    of_steps = (n // m) * m
    return {
        "uniform": of_steps,
        "stratified": of_steps,
        "importance": n + of_steps,
        "svrg": n + 2 * of_steps,
    }[sampler]


Round = Callable[[Params, Any, Array, Array], Params]
"""From params, examples, a key and the learning rate to the params n/m steps later."""


def make_round(
    sampler: str, fun: CostFn, labels: np.ndarray, m: int, uniform_share: float
) -> Round:
    """Returns a round of SGD with a sampler: what it begins with, then n/m steps.

    Args:
      sampler: One of `SAMPLERS`.
      fun: The cost of one example.
      labels: The class of each, (n,).
      m: The mini-batch size.
      uniform_share: Of uniform draws in importance sampling.
    """
    n = len(labels)
    strata = jnp.asarray(np.unique(labels, return_inverse=True)[1])
    sizes = proportional_allocation(np.bincount(strata), m) if sampler == "stratified" else ()
    num_steps = n // m
    estimator = sj.estimators.svrg(num_steps) if sampler == "svrg" else None

    def walk(params: Params, examples: Any, key: Array, rate: Array) -> Params:
        probabilities = jnp.zeros(0)
        if sampler == "importance":
            norms = _norms(fun, params, examples)
            probabilities = optimal_probabilities(norms, uniform_share)

        def draw(key: Array) -> sampling.Sample:
            if sampler == "stratified":
                return sampling.stratified(key, strata, sizes)
            if sampler == "importance":
                return sampling.importance(key, probabilities, m)
            return sampling.without_replacement(key, n, m)

        optimizer = sj.sgd(rate)
        epoch = sj.make_epoch(fun, optimizer, estimator=estimator)
        samples = jax.vmap(draw)(jax.random.split(key, num_steps))
        return epoch(sj.init_state(params, optimizer), examples, samples)[0].params

    return walk


def _norms(fun: CostFn, params: Params, examples: Any) -> Array:
    """‖g_i‖ of all examples."""
    size = min(_CHUNK_SIZE, len(examples.labels))
    return jnp.sqrt(sj.per_example_grad(fun, chunk_size=size)(params, examples).squared_norms())


class Trained(NamedTuple):
    """What training with every learning rate and seed leaves; R rates, S seeds, K rounds."""

    costs: np.ndarray
    """Mean training cost after each round, (R, S, K + 1)."""
    norms: np.ndarray
    """‖∇C‖² after each round, (R, S, K + 1)."""
    averaged: np.ndarray
    """Mean training cost at the mean of the params after the rounds of the second half, (R, S)."""
    path: Params
    """The params after each round, leaves (K + 1, R, S, …)."""


def train(
    fun: CostFn,
    take_round: Round,
    examples: Any,
    first: tuple[Params, Array],
    num_rounds: int,
    *,
    is_decaying: bool = False,
) -> Trained:
    """Trains with all learning rates and seeds at once.

    Seeds share their first networks and draws among samplers and schedules. A decaying rate is
    η (1 − k/K) in round k of K.

    Args:
      fun: The cost of one example.
      take_round: As `make_round` returns it.
      examples: All n.
      first: Networks and keys of the seeds.
      num_rounds: K.
      is_decaying: Whether the learning rate falls linearly, round by round.
    """
    mean_cost = jax.value_and_grad(sj.mean_cost(fun))
    half = (num_rounds + 1) // 2

    def measure(params: Params) -> tuple[Array, Array]:
        cost, gradient = mean_cost(params, examples)
        return cost, tree_dot(gradient, gradient)

    def train_one(rate: Array, first: tuple[Params, Array]) -> tuple[Array, Array, Array, Params]:
        params, key = first

        def one(params: Params, number: Array) -> tuple[Params, Params]:
            now = rate * (1 - number / num_rounds) if is_decaying else rate
            return take_round(params, examples, jax.random.fold_in(key, number), now), params

        last, path = jax.lax.scan(one, params, jnp.arange(num_rounds))
        path = jax.tree.map(lambda leaf, end: jnp.concatenate([leaf, end[None]]), path, last)
        averaged = jax.tree.map(lambda leaf: jnp.mean(leaf[half:], axis=0), path)
        costs, norms = jax.lax.map(measure, path)
        return costs, norms, measure(averaged)[0], path

    over_seeds = jax.vmap(train_one, in_axes=(None, 0), out_axes=(0, 0, 0, 1))
    train_all = jax.jit(jax.vmap(over_seeds, in_axes=(0, None), out_axes=(0, 0, 0, 1)))
    rates = jnp.asarray(RATES, jax.tree.leaves(first[0])[0].dtype)
    costs, norms, averaged, path = train_all(rates, first)
    return Trained(*(np.asarray(v, np.float64) for v in (costs, norms, averaged)), path=path)


def measure_errors(
    fun: CostFn, path: Params, examples: Any, labels: np.ndarray, m: int, uniform_share: float
) -> list[dict[str, float]]:
    """Returns E‖ĝ − G‖² of each sampler after each round of a path, norms and anchor a round old.

    By the names of `SAMPLERS`; further `trace`, tr Σ, and `noise_scale`, tr Σ/‖G‖². The leaves of
    ``path`` have a leading axis of rounds; the other arguments are those of `make_round`.
    """
    strata = jnp.asarray(np.unique(labels, return_inverse=True)[1])
    counts = np.bincount(np.asarray(strata))
    sizes = proportional_allocation(counts, m)
    moments_of = functools.partial(sj.gradient_moments, chunk_size=_CHUNK_SIZE)

    @jax.jit
    def measure(before: Params, params: Params) -> dict[str, Array]:
        moments = moments_of(fun, params, examples, keep_norms=True)
        classes = moments_of(fun, params, examples, strata=strata, num_strata=len(counts))
        p = optimal_probabilities(_norms(fun, before, examples), uniform_share)
        offset = jax.tree.map(jnp.zeros_like, params)
        changed = moments_of(difference(fun, params, before), offset, examples)
        return {
            "uniform": expected_squared_error(moments, m),
            "stratified": expected_squared_error(classes, sizes, "stratified"),
            "importance": expected_squared_error(moments, m, "importance", probabilities=p),
            "svrg": expected_squared_error(changed, m),
            "trace": moments.trace,
            "noise_scale": moments.trace / moments.squared_norm,
        }

    points = [
        jax.tree.map(lambda leaf, k=k: leaf[k], path) for k in range(len(jax.tree.leaves(path)[0]))
    ]
    return [
        {name: float(value) for name, value in measure(before, params).items()}
        for before, params in itertools.pairwise(points)
    ]
