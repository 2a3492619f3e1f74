"""The claims of sgd_jax._validate: what passes, and that each refusal names name, value, remedy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sgd_jax as sj
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


@pytest.mark.parametrize("leaf", [jnp.arange(3), np.ones(2, bool), 1])
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


# --- Modules of libraries, and arrays in another byte order --------------------------------------


def eqx_model():
    import equinox as eqx

    return eqx.nn.MLP(3, 1, 8, 1, key=jax.random.key(0))


def nnx_model():
    from flax import nnx

    rngs = nnx.Rngs(0)
    return nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), nnx.Dropout(0.5, rngs=rngs))


FUNCTIONS = {
    "per_example_grad": lambda fun, w, x: sj.per_example_grad(fun)(w, x),
    "gradient_moments": sj.gradient_moments,
    "explain": sj.explain,
    "init_state": lambda fun, w, x: sj.init_state(w, sj.sgd(0.1)),
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (eqx_model, r"activation is .*, not an array; .* eqx\.partition\(model, .* eqx\.combine"),
        (nnx_model, r"rngs\S* has dtype .* nnx\.split\(model, nnx\.Param, \.\.\.\), .* nnx\.merge"),
    ],
)
def test_a_module_given_whole_is_refused_with_the_two_lines_to_write(function, make, message):
    def fun(model, x):
        return jnp.sum(model(x) ** 2)

    for params in (make(), {"inside": [make()]}):
        with pytest.raises(TypeError, match=message):
            FUNCTIONS[function](fun, params, jnp.ones((5, 3)))


@pytest.mark.parametrize("function", ["per_example_grad", "gradient_moments"])
@pytest.mark.parametrize("name", ["params", "examples"])
def test_an_array_in_another_byte_order_is_refused_with_the_remedy(function, name):
    arrays = {"params": jnp.ones(3), "examples": jnp.ones((5, 3))}
    arrays[name] = np.asarray(arrays[name]).astype(">f4")
    with pytest.raises(TypeError, match=rf"{name} has dtype >f4, .* x\.astype\(x\.dtype\.newbyte"):
        FUNCTIONS[function](lambda w, x: w @ x, arrays["params"], arrays["examples"])
