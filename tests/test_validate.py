"""The claims of sgd_jax._validate: what passes, and that each refusal names name, value, remedy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sgd_jax import _validate


@pytest.mark.parametrize("value", [1, 7, np.int32(7), np.uint8(1), jnp.array(3)])
def test_positive_int_returns_any_whole_number_as_int(value):
    result = _validate.positive_int("m", value)
    assert type(result) is int
    assert result == value


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (0, ValueError, "m must be at least 1, got 0"),
        (-5, ValueError, "m must be at least 1, got -5"),
        (2.0, TypeError, "m must be a whole number, got 2.0 of type float"),
        ("3", TypeError, "m must be a whole number, got '3' of type str"),
        (True, TypeError, "m must be a whole number, got True of type bool"),
        (None, TypeError, "m must be a whole number, got None of type NoneType"),
        (
            np.array([1, 2]),
            TypeError,
            r"m must be a whole number, got array\(\[1, 2\]\) of type nd",
        ),
    ],
)
def test_positive_int_refuses_all_else_by_name(value, kind, message):
    with pytest.raises(kind, match=message):
        _validate.positive_int("m", value)


def check_unit_interval(value, low_allowed=True):
    _validate.finite_float("momentum", value, low=0, low_allowed=low_allowed, high=1)


@pytest.mark.parametrize("value", [0, 0.5, np.float32(0.9), jnp.array(0.5), np.array(0.5)])
def test_finite_float_accepts_numbers_in_range(value):
    check_unit_interval(value)


def test_finite_float_leaves_a_traced_value_alone():
    jax.jit(lambda value: check_unit_interval(value) or value)(7.0)
    with pytest.raises(ValueError, match=r"got 7\.0"):
        check_unit_interval(7.0)


@pytest.mark.parametrize("value", [-0.1, 1, 1.5, float("nan"), float("inf"), -float("inf")])
def test_finite_float_refuses_what_is_out_of_range_or_not_finite(value):
    with pytest.raises(ValueError, match=rf"momentum must be .* in \[0, 1\), got {value}"):
        check_unit_interval(value)


def test_finite_float_excludes_the_lower_end_on_demand():
    with pytest.raises(ValueError, match=r"in \(0, 1\), got 0"):
        check_unit_interval(0, low_allowed=False)


@pytest.mark.parametrize(
    "value",
    ["0.5", None, 1j, True, np.bool_(False), np.array([0.1, 0.2]), jnp.array([0.1, 0.2])],
)
def test_finite_float_refuses_what_is_not_one_number(value):
    with pytest.raises(TypeError, match="momentum must be one number, got") as error:
        check_unit_interval(value)
    assert type(value).__name__ in str(error.value)


@pytest.mark.parametrize(
    "examples", [np.zeros((3, 2)), (np.zeros(3), {"key": np.zeros((3, 1))}), [jnp.zeros((3, 0))]]
)
def test_num_examples_is_the_shared_leading_axis(examples):
    assert _validate.num_examples(examples) == 3


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ({}, "examples holds no arrays; expected a pytree of arrays with leading axis n"),
        ((np.zeros(3), np.zeros(())), r"examples\[1\] is a scalar.*leaf\[None\]"),
        ((np.zeros(3), np.zeros(2)), r"differ \(examples\[0\]: 3, examples\[1\]: 2\)"),
        (np.zeros((0, 2)), r"examples is empty \(n = 0\)"),
    ],
)
def test_num_examples_refuses_by_name_and_with_the_remedy(examples, message):
    with pytest.raises(ValueError, match=message):
        _validate.num_examples(examples)


@pytest.mark.parametrize("params", [1.0, {"w": np.float32(1)}, (jnp.zeros(2, jnp.bfloat16),)])
def test_floating_params_accepts_any_real_floating_point(params):
    _validate.floating_params(params)


@pytest.mark.parametrize("leaf", [jnp.arange(3), np.ones(2, bool), 1, 1j])
def test_floating_params_refuses_other_dtypes_with_the_remedy(leaf):
    with pytest.raises(TypeError, match=r"params\['w'\] has dtype .*not trained inside `examples`"):
        _validate.floating_params({"w": leaf})


def test_floating_params_refuses_params_without_arrays():
    with pytest.raises(ValueError, match="params holds no arrays; there is nothing"):
        _validate.floating_params({"w": None})


def test_scalar_cost_accepts_a_floating_point_scalar():
    _validate.scalar_cost(jax.eval_shape(jnp.sum, np.ones(3)))


def test_scalar_cost_refuses_an_array_with_the_remedy():
    with pytest.raises(ValueError, match=r"must return a scalar.*Sum over the outputs"):
        _validate.scalar_cost(jax.eval_shape(jnp.square, np.ones(3)))


def test_scalar_cost_refuses_integers():
    with pytest.raises(TypeError, match="floating-point cost, got dtype int64"):
        _validate.scalar_cost(jax.eval_shape(jnp.sum, np.ones(3, np.int64)))
