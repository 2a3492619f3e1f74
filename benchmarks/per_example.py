"""The suite `per_example`: what the rows of G cost, beside the plain gradient of the mean cost."""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sgd_jax as sj
from benchmarks import problems
from benchmarks.harness import Contender, Prepared, Suite, as_array
from benchmarks.problems import Problem
from sgd_jax.per_example.factors import Outer, inner_by_gram
from sgd_jax.per_example.layout import Layout

MEAN, NORMS, SECOND = "mean", "norms + mean", "second moment + mean"
CLIPPED, GRAM = "clipped mean", "Gram matrix"

PLAIN = ("plain gradient", MEAN)
TORCH_PLAIN = ("PyTorch, plain gradient", MEAN)
_PACE = {"min_turn_seconds": 0.3, "max_seconds": 5.0}

Answer = tuple[Any, Any]
"""What every contender returns: something with a row for each example, or None; and leaves."""


def per_example_suites(data_dir: str | None = None) -> list[Suite]:
    """Returns the tables: three networks, one of them also untied, tiny layers, and two routes.

    Args:
      data_dir: not used; the examples are drawn at random, as times do not depend on them.
    """
    del data_dir
    return [
        network_suite(problems.mlp()),
        network_suite(problems.conv()),
        network_suite(problems.transformer()),
        network_suite(problems.transformer(tied=False)),
        tiny_suite(10),
        tiny_suite(128),
        routes_suite(256, 256),
        routes_suite(256, 1024),
        routes_suite(32, 144),
    ]


# --- five questions about a network ---


def network_suite(problem: Problem) -> Suite:
    """Returns five questions about the gradients of one network, answered in several ways.

    The clipping norm is the median of ‖g_i‖. `optax.microbatching.micro_grad` computes ``vmap`` of
    the gradient for some examples at a time in a loop, applies a function to each gradient, and
    adds up. PyTorch runs eagerly. Opacus' ghost clipping takes norms in one backward pass, and the
    clipped sum in a second; BackPACK extends one backward pass.
    """
    plain = jax.grad(sj.mean_cost(problem.fun))
    contenders = [
        _in_jax(problem, *PLAIN, lambda params, examples: (None, plain(params, examples)))
    ]
    contenders += [
        _in_jax(problem, "sgd_jax", q, a) for q, a in by_sgd_jax(problem, "auto").items()
    ]
    contenders += [_in_jax(problem, "vmap(grad)", q, a) for q, a in by_vmap(problem).items()]
    name = f"optax micro_grad, {problem.microbatch_size} at a time"
    contenders += [_in_jax(problem, name, q, a) for q, a in by_optax(problem).items()]
    contenders.append(_in_torch(problem, *TORCH_PLAIN, ()))
    contenders += [
        _in_torch(problem, "torch.func, vmap(grad)", q, ()) for q in (NORMS, SECOND, CLIPPED, GRAM)
    ]
    contenders += [
        _in_torch(problem, "Opacus, ghost clipping", q, ("opacus",)) for q in (NORMS, CLIPPED)
    ]
    contenders += [
        _in_torch(problem, "BackPACK", NORMS, ("backpack",)),
        _in_torch(problem, "BackPACK", SECOND, ("backpack",)),
    ]
    return Suite(problem.name, problem.work, contenders, read, **_PACE)


def read(answer: object) -> list[np.ndarray]:
    """Returns an answer as arrays to compare: the rows, and all leaves joined.

    Libraries lay a weight out as they like, so that the entries of each leaf are sorted.
    """
    rows, leaves = answer  # pyright: ignore[reportGeneralTypeIssues]
    sorted_leaves = [np.sort(as_array(leaf).reshape(-1)) for leaf in jax.tree.leaves(leaves)]
    found = [] if rows is None else [as_array(rows)]
    return found + ([np.concatenate(sorted_leaves)[None]] if sorted_leaves else [])


def _in_jax(problem: Problem, name: str, question: str, function: Callable) -> Contender:
    return Contender(
        name,
        functools.partial(compiled, function, *problem.at),
        ("optax",) if name.startswith("optax") else (),
        question=question,
        baseline=PLAIN,
    )


def _in_torch(problem: Problem, name: str, question: str, needs: tuple[str, ...]) -> Contender:
    def make() -> Prepared:
        from benchmarks import per_example_torch

        return per_example_torch.prepare(problem, name, question)

    return Contender(name, make, ("torch", *needs), question=question, baseline=TORCH_PLAIN)


def compiled(function: Callable, *arguments: Any) -> Prepared:
    """Returns a JAX function compiled, with the memory XLA plans for what is in between and out."""
    program = jax.jit(function).lower(*arguments).compile()
    memory = program.memory_analysis()
    peak = None if memory is None else memory.temp_size_in_bytes + memory.output_size_in_bytes
    return Prepared(lambda: program(*arguments), peak)


def by_plain_gradient(problem: Problem) -> Callable[[Any, Any], Answer]:
    """The gradient of the mean cost."""
    plain = jax.grad(sj.mean_cost(problem.fun))
    return lambda params, examples: (None, plain(params, examples))


def by_sgd_jax(problem: Problem, strategy: Any) -> dict[str, Callable[[Any, Any], Answer]]:
    """Each question asked of the factored G."""
    grad = sj.per_example_grad(problem.fun, strategy=strategy)
    questions = {
        MEAN: lambda g: (None, g.mean()),
        NORMS: lambda g: (g.squared_norms(), g.mean()),
        SECOND: lambda g: (None, (g.second_moment(), g.mean())),
        CLIPPED: lambda g: (None, g.clipped_mean(problem.max_norm)),
        GRAM: lambda g: (g.gram(), ()),
    }

    def answer(question: str) -> Callable[[Any, Any], Answer]:
        return lambda params, examples: questions[question](grad(params, examples))

    return {question: answer(question) for question in questions}


def by_vmap(problem: Problem) -> dict[str, Callable[[Any, Any], Answer]]:
    """Each question asked of all gradients written down."""
    gradients = jax.vmap(jax.grad(problem.fun), in_axes=(None, 0))

    def norms(params: Any, examples: Any) -> Answer:
        written = gradients(params, examples)
        return jax.vmap(_squared_norm)(written), _mean(written)

    def second(params: Any, examples: Any) -> Answer:
        written = gradients(params, examples)
        return None, (_mean(jax.tree.map(jnp.square, written)), _mean(written))

    def clipped(params: Any, examples: Any) -> Answer:
        clip = functools.partial(_clip, max_norm=problem.max_norm)
        return None, _mean(jax.vmap(clip)(gradients(params, examples)))

    def gram(params: Any, examples: Any) -> Answer:
        rows = [g.reshape(len(g), -1) for g in jax.tree.leaves(gradients(params, examples))]
        return functools.reduce(operator.add, (g @ g.T for g in rows)), ()

    return {NORMS: norms, SECOND: second, CLIPPED: clipped, GRAM: gram}


def by_optax(problem: Problem) -> dict[str, Callable[[Any, Any], Answer]]:
    """Each question that optax's microbatching has a place for: per-example metrics, and means."""

    def micro_grad(params: Any, examples: Any, **functions: Any) -> Answer:
        from optax import microbatching

        gradient, others = microbatching.micro_grad(
            problem.fun,
            batch_argnums=1,
            keep_batch_dim=False,
            microbatch_size=problem.microbatch_size,
            accumulator=microbatching.AccumulationType.MEAN,
            **functions,
        )(params, examples)
        return others.metrics, gradient

    return {
        NORMS: functools.partial(micro_grad, metrics_fn=_squared_norm),
        SECOND: functools.partial(
            micro_grad, transform_fn=lambda g: (jax.tree.map(jnp.square, g), g)
        ),
        CLIPPED: functools.partial(micro_grad, transform_fn=lambda g: _clip(g, problem.max_norm)),
    }


def _mean(written: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), written)


def _squared_norm(gradient: Any) -> jax.Array:
    squares = (jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(gradient))
    return functools.reduce(operator.add, squares)


def _clip(gradient: Any, max_norm: float) -> Any:
    clip = jnp.minimum(1, max_norm / jnp.sqrt(_squared_norm(gradient)))
    return jax.tree.map(lambda leaf: clip * leaf, gradient)


# --- tiny layers: to factor, or to write down? ---


def tiny_suite(m: int, sizes: tuple[int, ...] = (784, 30, 10)) -> Suite:
    """Returns norms + mean of the textbook network, by each strategy."""
    problem = problems.mlp(sizes, m)
    plain = jax.grad(sj.mean_cost(problem.fun))
    contenders = [
        _in_jax(problem, *PLAIN, lambda params, examples: (None, plain(params, examples)))
    ]
    for strategy in ("auto", "factored", "materialized"):
        answer = by_sgd_jax(problem, strategy)[NORMS]
        contenders.append(_in_jax(problem, f'strategy="{strategy}"', NORMS, answer))
    name = f"tiny_{m}"
    return Suite(name, problem.work, contenders, read, **_PACE)


# --- two routes to the norms of a dense layer with a sequence axis ---


def routes_suite(
    a: int, b: int, n: int = 16, lengths: tuple[int, ...] = (16, 32, 64, 128, 256, 512)
) -> Suite:
    """Returns ‖Σ_t δ_t ⊗ a_t‖² of a dense layer by the Gram and by the outer-product route.

    Args:
      a: outputs of the layer.
      b: inputs of the layer.
      n: examples.
      lengths: T, positions in each example.
    """
    layout = Layout.of((a, b), left=(0,), right=(1,))

    def by_gram(left: jax.Array, right: jax.Array) -> Answer:
        factor = Outer(left, right, layout)
        return inner_by_gram(factor, factor), ()

    def by_forming(left: jax.Array, right: jax.Array) -> Answer:
        matrices = Outer(left, right, layout).matrices()
        return jnp.sum(jnp.square(matrices), axis=(1, 2, 3)), ()

    contenders = []
    for length in lengths:
        keys = jax.random.split(jax.random.key(length))
        left = jax.random.normal(keys[0], (n, 1, length, a), jnp.float32)
        right = jax.random.normal(keys[1], (n, 1, length, b), jnp.float32)
        question = f"T = {length}"
        routes = {"outer-product route": by_forming, "Gram route": by_gram}
        by_cost = Outer(left, right, layout).norm_route()
        chosen = "Gram route" if by_cost == "gram" else "outer-product route"
        names = {route: route + ", chosen" * (route == chosen) for route in routes}
        baseline = (names["outer-product route"], question)
        for route, function in routes.items():
            make = functools.partial(compiled, function, left, right)
            contenders.append(Contender(names[route], make, question=question, baseline=baseline))
    work = f"norms of a dense layer {a} × {b} by two routes, n = {n}"
    return Suite(f"routes_{a}_{b}", work, contenders, read, **_PACE)
