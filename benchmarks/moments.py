"""The suite `moments`: moments of a whole data set's gradients, beside its full gradient alone."""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import sgd_jax as sj
from benchmarks import problems
from benchmarks.harness import Contender, Prepared, Suite
from benchmarks.per_example import PLAIN, Answer, by_plain_gradient, compiled, read

TRACE, VARIANCE = "mean and trace", "mean, trace and variance"
CHUNK_SIZE = 1000


def moments_suites(data_dir: str | None = None, n: int = 50_000) -> list[Suite]:
    """Returns mean, trace and variance of the gradients of the textbook network on n examples.

    Every contender but the plain gradient takes 1000 examples at a time. `gradient_moments` also
    gives the mean cost and the mean norm, and checks on the host that all is finite.

    Args:
      data_dir: not used; the examples are drawn at random, as times do not depend on them.
      n: number of examples.
    """
    del data_dir
    problem = problems.mlp((784, 30, 10), n)
    plain = by_plain_gradient(problem)
    contenders = [Contender(PLAIN[0], lambda: compiled(plain, *problem.at), question=PLAIN[1])]
    for question in (TRACE, VARIANCE):
        per_coordinate = question == VARIANCE
        ours = functools.partial(_by_sgd_jax, problem, per_coordinate)
        theirs = functools.partial(_by_chunks, problem, per_coordinate)
        contenders += [
            Contender("sgd_jax.gradient_moments", ours, question=question, baseline=PLAIN),
            Contender("vmap(grad) in chunks", theirs, question=question, baseline=PLAIN),
        ]
    return [Suite("moments", problem.work, contenders, read, max_seconds=30.0)]


def _by_sgd_jax(problem: problems.Problem, per_coordinate: bool) -> Prepared:
    def run() -> Answer:
        moments = sj.gradient_moments(
            problem.fun, *problem.at, chunk_size=CHUNK_SIZE, per_coordinate=per_coordinate
        )
        return moments.trace[None], (moments.mean, moments.variance)

    return Prepared(run)


def _by_chunks(problem: problems.Problem, per_coordinate: bool) -> Prepared:
    gradient: Callable[[Any, Any], Any] = jax.vmap(jax.grad(problem.fun), in_axes=(None, 0))

    def moments(params: Any, examples: Any) -> Answer:
        n = len(jax.tree.leaves(examples)[0])
        size = min(CHUNK_SIZE, n)
        chunks = jax.tree.map(lambda leaf: leaf.reshape(-1, size, *leaf.shape[1:]), examples)

        def add(sums: Any, chunk: Any) -> tuple[Any, None]:
            written = gradient(params, chunk)
            squares = jax.tree.map(lambda g: jnp.sum(jnp.square(g), axis=0), written)
            first = jax.tree.map(lambda g: jnp.sum(g, axis=0), written)
            more = squares if per_coordinate else _total(squares)
            return jax.tree.map(jnp.add, sums, (first, more)), None

        zeros = jax.tree.map(jnp.zeros_like, params)
        start = (zeros, zeros if per_coordinate else jnp.zeros((), jnp.float32))
        sums, _ = jax.lax.scan(add, start, chunks)
        mean, second = jax.tree.map(lambda leaf: leaf / n, sums)
        if not per_coordinate:
            trace = second - _total(jax.tree.map(jnp.square, mean))
            return trace[None], mean
        variance = jax.tree.map(lambda s, g: s - jnp.square(g), second, mean)
        return _total(variance)[None], (mean, variance)

    return compiled(moments, *problem.at)


def _total(tree: Any) -> jax.Array:
    return functools.reduce(operator.add, (jnp.sum(leaf) for leaf in jax.tree.leaves(tree)))
