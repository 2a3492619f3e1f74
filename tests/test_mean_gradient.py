"""The claims of mean_value_and_grad: one answer, by the way that costs least."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import sgd_jax as sj
from sgd_jax.estimation import _mean_gradient
from sgd_jax.typing import MeanStrategy

SIZES, M = (5, 4, 3), 6


def dense(network, example):
    x, y = example
    return sj.quadratic_cost(sj.feedforward(network, x), y)


def convolution(kernel, image):
    padded = jax.lax.conv_general_dilated(image[None], kernel, (1, 1), "SAME")
    return jnp.sum(jnp.tanh(padded))


def linear_system(w, x):
    """A matrix that meets the example where there is no factoring rule: n gradients of it."""
    return jnp.sum(jnp.square(jnp.linalg.solve(w, x)))


def problem(dtype=jnp.float64):
    keys = jax.random.split(jax.random.key(0), 4)
    examples = (
        jax.random.normal(keys[1], (M, SIZES[0]), dtype),
        jax.random.uniform(keys[2], (M, SIZES[-1]), dtype),
    )
    weights = jnp.abs(jax.random.normal(keys[3], (M,), dtype)).at[2].set(0)
    return sj.init_network(keys[0], SIZES, dtype=dtype), examples, weights


def oracle(network, examples, weights):
    """Σ c_i C_i and Σ c_i ∇C_i, an example at a time in NumPy float64."""
    flat = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(network)]
    cost, total = 0.0, [np.zeros_like(leaf) for leaf in flat]
    for x, y, weight in zip(*map(np.asarray, (*examples, weights)), strict=True):
        cost += weight * reference.quadratic_cost(reference.feedforward(flat, x), y)
        gradient = reference.backprop(flat, x, y, reference.quadratic_delta)
        total = [t + weight * g for t, g in zip(total, gradient, strict=True)]
    return cost, total


@pytest.mark.parametrize("strategy", get_args(MeanStrategy))
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float64, 1e-12), (jnp.float32, 1e-5)])
def test_every_strategy_gives_the_weighted_mean_of_the_oracle(strategy, dtype, tolerance):
    network, examples, weights = problem(dtype)
    mean = jax.jit(sj.mean_value_and_grad(dense, strategy=strategy))
    cost, gradient = mean(network, examples, weights)
    expected_cost, expected = oracle(network, examples, weights)
    np.testing.assert_allclose(cost, expected_cost, rtol=tolerance)
    for leaf, target in zip(jax.tree.leaves(gradient), expected, strict=True):
        assert leaf.dtype == dtype
        np.testing.assert_allclose(leaf, target, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("fun", "params", "examples", "chosen"),
    [
        (dense, sj.init_network(jax.random.key(0), (50, 20, 3)), problem, "factored"),
        (convolution, jnp.ones((8, 4, 3, 3)), jnp.ones((16, 4, 20, 20)), "mean_cost"),
        (linear_system, jnp.eye(20), jnp.ones((16, 20)), "mean_cost"),
    ],
    ids=["dense", "convolution", "no rule"],
)
def test_the_strategy_follows_from_the_shapes(fun, params, examples, chosen):
    if examples is problem:
        examples = (jnp.ones((16, 50)), jnp.ones((16, 3)))
    choice = sj.estimation.choose_mean_strategy(fun, params, examples)
    assert choice.name == chosen
    assert ("test_mean_gradient.py" in choice.reason) == (chosen == "mean_cost")


def test_shapes_are_enough_to_choose():
    network, examples, _ = problem()
    shapes = jax.eval_shape(lambda: (network, examples))
    assert sj.estimation.choose_mean_strategy(dense, *shapes) == sj.estimation.choose_mean_strategy(
        dense, network, examples
    )


def test_the_choice_is_followed_and_can_be_overridden(monkeypatch):
    network, examples, weights = problem()
    asked = []

    def dear(*arguments):
        asked.append(arguments)
        return sj.estimation.MeanStrategyChoice("mean_cost", "")

    monkeypatch.setattr(_mean_gradient, "choose_mean_strategy", dear)

    def largest(strategy):
        mean = sj.mean_value_and_grad(dense, strategy=strategy)
        jaxpr = jax.make_jaxpr(mean)(network, examples, weights).jaxpr
        return max(v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars)

    assert largest("materialized") >= M * SIZES[0] * SIZES[1]
    assert largest("auto") == largest("mean_cost")
    assert len(asked) == 1
    assert largest("mean_cost") < M * SIZES[0] * SIZES[1]
    assert largest("factored") < M * SIZES[0] * SIZES[1]
    assert len(asked) == 1


def test_the_choice_reads_as_a_line():
    choice = sj.estimation.choose_mean_strategy(
        convolution, jnp.ones((8, 4, 3, 3)), jnp.ones((16, 4, 20, 20))
    )
    assert str(choice).startswith(
        "mean_cost: a parameter meets the example in conv_general_dilated"
    )


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"strategy must be one of .*'fast'"):
        sj.mean_value_and_grad(dense, strategy="fast")
    network, examples, weights = problem()
    with pytest.raises(ValueError, match="fun must return a scalar"):
        sj.mean_value_and_grad(lambda w, e: e[0], strategy="mean_cost")(network, examples, weights)
    with pytest.raises(ValueError, match="no rule"):
        sj.mean_value_and_grad(linear_system, strategy="factored")(
            jnp.eye(4), jnp.ones((3, 4)), jnp.ones(3)
        )
