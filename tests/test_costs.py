"""The claims of sgd_jax.costs, one test each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st

import sgd_jax as sj

COSTS = {
    "quadratic": (sj.quadratic_cost, reference.quadratic_cost),
    "cross-entropy": (sj.cross_entropy_cost, reference.cross_entropy_cost),
}
RTOL = {jnp.float64: 1e-13, jnp.float32: 1e-5}
shapes = st.sampled_from([(), (1,), (3,), (2, 3), (2, 1, 2)])
seeds = st.integers(0, 2**16)


def draw(seed, shape, low=0.01, high=0.99):
    return np.random.default_rng(seed).uniform(low, high, (2, *shape))


def assert_equals_oracle(cost, oracle, dtype=jnp.float64, seed=0, shape=(3,)):
    output, target = (jnp.asarray(a, dtype) for a in draw(seed, shape))
    value = cost(output, target)
    assert value.shape == ()
    assert value.dtype == dtype
    np.testing.assert_allclose(value, oracle(output, target), rtol=RTOL[dtype])


@pytest.mark.parametrize("dtype", RTOL)
@pytest.mark.parametrize("name", COSTS)
@given(seed=seeds, shape=shapes)
def test_a_cost_equals_the_oracle_for_any_one_shape_and_keeps_the_dtype(name, dtype, seed, shape):
    assert_equals_oracle(*COSTS[name], dtype, seed, shape)


def test_the_quadratic_cost_has_its_half():
    assert sj.quadratic_cost(jnp.array([3.0]), jnp.array([1.0])) == 2.0


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(lambda a, y: jnp.sum(jnp.square(y - a)), id="the half is dropped"),
        pytest.param(lambda a, y: jnp.mean(jnp.square(y - a)) / 2, id="mean for sum"),
    ],
)
def test_a_planted_fault_in_the_quadratic_cost_is_caught(fault):
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_equals_oracle(fault, reference.quadratic_cost)


@pytest.mark.parametrize("cost", [cost for cost, _ in COSTS.values()])
def test_a_cost_sums_over_the_coordinates_of_the_output(cost):
    output, target = map(jnp.asarray, draw(0, (5,)))
    one_by_one = sum(cost(a, y) for a, y in zip(output, target, strict=True))
    np.testing.assert_allclose(cost(output, target), one_by_one, rtol=1e-14)


@given(seed=seeds, shape=shapes)
def test_the_gradient_of_the_quadratic_cost_is_output_minus_target(seed, shape):
    output, target = map(jnp.asarray, draw(seed, shape, -3, 3))
    np.testing.assert_allclose(jax.grad(sj.quadratic_cost)(output, target), output - target)


@given(seed=seeds, shape=shapes)
def test_the_gradient_of_the_cross_entropy_is_that_of_the_textbook(seed, shape):
    a, y = map(jnp.asarray, draw(seed, shape))
    gradient = jax.grad(sj.cross_entropy_cost)(a, y)
    np.testing.assert_allclose(gradient, (a - y) / (a * (1 - a)), rtol=1e-10, atol=1e-13)


def assert_finite_at_the_ends(cost, dtype):
    """Asserts a finite value and gradient at every corner of output × target."""
    corners = jnp.array([(a, y) for a in (0, 1) for y in (0, 0.5, 1)], dtype)
    values, gradients = jax.vmap(jax.value_and_grad(cost))(corners[:, 0], corners[:, 1])
    assert jnp.all(jnp.isfinite(values))
    assert jnp.all(jnp.isfinite(gradients))


@pytest.mark.parametrize("dtype", RTOL)
def test_the_cross_entropy_and_its_gradient_are_finite_at_0_and_1(dtype):
    assert_finite_at_the_ends(sj.cross_entropy_cost, dtype)


def test_a_cross_entropy_without_guards_is_caught():
    with pytest.raises(AssertionError):
        assert_finite_at_the_ends(
            lambda a, y: -jnp.sum(y * jnp.log(a) + (1 - y) * jnp.log(1 - a)), jnp.float64
        )


@pytest.mark.parametrize("end", [0.0, 1.0])
def test_a_perfect_output_costs_nothing_in_cross_entropy(end):
    assert sj.cross_entropy_cost(jnp.array([end]), jnp.array([end])) == 0.0


@pytest.mark.parametrize(
    ("dtype", "output", "nats"),
    [
        (jnp.float32, 1.0, 16.6),
        (jnp.float64, 1.0, 36.7),
        (jnp.float32, 0.0, 87.3),
        (jnp.float64, 0.0, 708.4),
    ],
)
def test_a_completely_wrong_output_costs_what_the_docstring_says_at_gradient_zero(
    dtype, output, nats
):
    a = jnp.array(output, dtype)
    value, gradient = jax.value_and_grad(sj.cross_entropy_cost)(a, 1 - a)
    assert float(value) == pytest.approx(nats, abs=0.06)
    assert gradient == 0.0


@pytest.mark.parametrize("dtype", RTOL)
@given(seed=seeds, shape=shapes)
def test_the_logit_form_equals_the_cross_entropy_of_the_sigmoid(dtype, seed, shape):
    rng = np.random.default_rng(seed)
    z = jnp.asarray(rng.uniform(-5, 5, shape), dtype)
    y = jnp.asarray(rng.uniform(0, 1, shape), dtype)
    of_logits = sj.logit_cross_entropy_cost(z, y)
    assert of_logits.dtype == dtype
    np.testing.assert_allclose(
        of_logits, sj.cross_entropy_cost(jax.nn.sigmoid(z), y), rtol=10 * RTOL[dtype]
    )


@pytest.mark.parametrize("dtype", RTOL)
@pytest.mark.parametrize("target", [0.0, 0.5, 1.0])
def test_the_gradient_of_the_logit_form_is_sigmoid_minus_target_however_saturated(dtype, target):
    z = jnp.array([-1e30, -1e3, -40.0, -1.0, 0.0, 1.0, 40.0, 1e3, 1e30], dtype)
    y = jnp.full_like(z, target)
    gradient = jax.grad(sj.logit_cross_entropy_cost)(z, y)
    np.testing.assert_allclose(
        gradient, jax.nn.sigmoid(z) - y, rtol=RTOL[dtype], atol=jnp.finfo(dtype).eps
    )


@pytest.mark.parametrize("dtype", RTOL)
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("target", [0.0, 1.0])
def test_the_logit_form_is_finite_wherever_the_weighted_input_is(dtype, sign, target):
    z = jnp.array(sign * jnp.finfo(dtype).max, dtype)
    value, gradient = jax.value_and_grad(sj.logit_cross_entropy_cost)(z, jnp.array(target, dtype))
    assert jnp.isfinite(value)
    assert jnp.isfinite(gradient)


@pytest.mark.parametrize(
    "cost", [sj.quadratic_cost, sj.cross_entropy_cost, sj.logit_cross_entropy_cost]
)
@pytest.mark.parametrize("shape", [(1,), (), (3, 1)])
def test_shapes_that_differ_are_refused_and_never_broadcast(cost, shape):
    with pytest.raises(ValueError, match="one_hot") as error:
        cost(jnp.full((3,), 0.5), jnp.full(shape, 0.5))
    assert "(3,)" in str(error.value)
    assert str(shape) in str(error.value)


def half_square(w, example):
    return sj.quadratic_cost(w * example["x"], example["y"])


def some_examples(n, dtype=jnp.float64):
    x, y = draw(n, (n, 2))
    return {"x": jnp.asarray(x, dtype), "y": jnp.asarray(y, dtype)}


def assert_is_the_mean(mean_of, n):
    examples = some_examples(n)
    w = jnp.array([0.5, -2.0])
    pairs = zip(examples["x"], examples["y"], strict=True)
    expected = sum(reference.quadratic_cost(w * x, y) for x, y in pairs) / n
    np.testing.assert_allclose(mean_of(half_square)(w, examples), expected, rtol=1e-14)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_mean_cost_is_the_mean_over_a_pytree_of_examples(n):
    assert_is_the_mean(sj.mean_cost, n)


def test_a_sum_in_place_of_the_mean_cost_is_caught():
    def sum_cost(fun):
        return lambda w, examples: jnp.sum(jax.vmap(fun, in_axes=(None, 0))(w, examples))

    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_is_the_mean(sum_cost, 7)


@pytest.mark.parametrize("dtype", RTOL)
@pytest.mark.parametrize("n", [1, 6])
def test_the_gradient_of_mean_cost_is_the_mean_of_per_example_gradients(dtype, n):
    examples = some_examples(n, dtype)
    w = jnp.array([0.5, -2.0], dtype)
    per_example = jax.vmap(jax.grad(half_square), in_axes=(None, 0))(w, examples)
    gradient = jax.grad(sj.mean_cost(half_square))(w, examples)
    assert gradient.dtype == dtype
    np.testing.assert_allclose(gradient, jnp.mean(per_example, axis=0), rtol=RTOL[dtype])


def test_mean_cost_refuses_no_examples():
    with pytest.raises(ValueError, match=r"examples is empty \(n = 0\)"):
        sj.mean_cost(half_square)(jnp.ones(2), some_examples(0))


def test_mean_cost_refuses_leading_axes_that_differ():
    examples = some_examples(3) | {"y": some_examples(2)["y"]}
    with pytest.raises(ValueError, match=r"examples\['x'\]: 3, examples\['y'\]: 2"):
        sj.mean_cost(half_square)(jnp.ones(2), examples)


def test_mean_cost_refuses_a_cost_that_is_not_a_scalar():
    with pytest.raises(ValueError, match=r"scalar, the cost of ONE example.*shape=\(2,\)"):
        sj.mean_cost(lambda w, example: w * example["x"])(jnp.ones(2), some_examples(3))


def test_mean_cost_refuses_a_cost_of_integers():
    with pytest.raises(TypeError, match="floating-point cost, got dtype int32"):
        sj.mean_cost(lambda w, example: jnp.int32(1))(jnp.ones(2), some_examples(3))
