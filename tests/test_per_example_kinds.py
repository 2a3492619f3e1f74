"""G equals vmap(grad) on every kind of use of a parameter, and keeps its factors where it can."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kinds import CASES
from test_per_example import TOLERANCES, compare

import sgd_jax as sj


@pytest.fixture(autouse=True)
def _as_other_people_write():
    with jax.numpy_rank_promotion("allow"):
        yield


FAST = {
    *("backward_rule_clip", "backward_rule_scan_norm", "backward_rule_remat_add"),
    *("tril", "split", "concat0", "lora", "weightnorm", "spectral", "mulsum2", "fori_rev"),
    *("embed_big", "convT_d", "conv_big", "cplx_bias", "cplx_fno", "platform", "softmax_w"),
}
"""What the fast tests try; `make test-all` tries all of CASES."""


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_every_kind_of_use_equals_vmap_of_grad(name):
    assert not compare(*CASES[name], TOLERANCES[jnp.float64])


def test_complex_parameters_in_chunks():
    assert not compare(*CASES["cplx_bias"], TOLERANCES[jnp.float64], chunk_size=3)


STAYS_FACTORED = (
    *("scale_scalar", "tril", "rev", "split", "concat", "lora", "weightnorm", "softplus_w"),
    *("softmax_w", "standardized", "mulsum", "mulsum2", "fori", "scan_arange", "scan_lora"),
    *("scan_wn", "name", "optbar", "tile_w", "gqa", "qkvw", "batchdot_mask", "cumsum_w"),
)


@pytest.mark.parametrize("name", STAYS_FACTORED)
def test_nothing_falls_back_or_stops_at_a_computed_value(name):
    table = sj.explain(*CASES[name])
    assert "fallback" not in table
    assert "pulled back" not in table


@pytest.mark.parametrize(
    "name", [n for n in CASES if n.startswith("backward_rule") and "cond" not in n]
)
def test_a_backward_rule_that_is_not_linear_falls_back(name):
    fallback = "fallback" in sj.explain(*CASES[name])
    assert fallback == (not name.endswith("straight_through"))


def siamese(distance):
    w = jax.random.normal(jax.random.key(0), (64, 64), jnp.float32) / 8
    a = jax.random.normal(jax.random.key(1), (16, 64), jnp.float32)
    b = a + distance * jax.random.normal(jax.random.key(2), a.shape, jnp.float32)
    return (lambda w, e: jnp.sum(jnp.tanh(e[0] @ w)) - jnp.sum(jnp.tanh(e[1] @ w))), w, (a, b)


def float64_rows(fun, w, examples):
    wide = jax.tree.map(lambda x: x.astype(jnp.float64), (w, examples))
    return np.asarray(jax.vmap(jax.grad(fun), (None, 0))(*wide)).reshape(16, -1)


@pytest.mark.parametrize("distance", [1e-2, 1e-4])
def test_norms_where_uses_of_a_weight_cancel_are_as_good_as_those_of_vmap_of_grad(distance):
    fun, w, examples = siamese(distance)
    true = np.sum(float64_rows(fun, w, examples) ** 2, axis=1)
    plain = jnp.sum(jnp.square(jax.vmap(jax.grad(fun), (None, 0))(w, examples)), axis=(1, 2))
    grads = jax.jit(sj.per_example_grad(fun))(w, examples)
    error = np.max(np.abs(grads.squared_norms() - true) / true)
    assert error <= 3 * np.max(np.abs(plain - true) / true)


def test_no_clipped_gradient_is_longer_than_the_bound_where_uses_cancel():
    fun, w, examples = siamese(1e-4)
    norms = np.linalg.norm(float64_rows(fun, w, examples), axis=1)
    bound = 0.5 * float(norms.min())
    one = jax.jit(lambda e: sj.per_example_grad(fun)(w, e).clipped_mean(bound))
    for k in range(3):
        clipped = one(jax.tree.map(lambda x, k=k: x[k : k + 1], examples))
        assert np.linalg.norm(np.asarray(clipped, np.float64)) <= bound * 1.002


def test_bfloat16_norms_accumulate_in_float32():
    def fun(w, x):
        return jnp.sum(jnp.tanh(x @ w)).astype(jnp.float32)

    w = jax.random.normal(jax.random.key(0), (64, 64), jnp.bfloat16)
    x = jax.random.normal(jax.random.key(1), (8, 3, 64), jnp.bfloat16)
    grads = sj.per_example_grad(fun)(w, x)
    plain = jax.vmap(jax.grad(fun), (None, 0))(w, x).astype(jnp.float32)
    expected = jnp.sum(jnp.square(plain), axis=(1, 2))
    assert grads.squared_norms().dtype == jnp.float32
    np.testing.assert_allclose(grads.squared_norms(), expected, rtol=1e-3)


def test_the_cost_stays_finite_where_a_derivative_rule_is_not():
    @jax.custom_jvp
    def product(w, x):
        return x @ w

    @product.defjvp
    def _(primals, tangents):
        (w, x), (w_dot, x_dot) = primals, tangents
        return product(w, x), (x @ w_dot + x_dot @ w) / x[0]  # infinite at x₀ = 0

    w, x = jnp.eye(3), jnp.array([[0.0, 1.0, 2.0]])
    costs, _ = sj.per_example_value_and_grad(lambda w, x: jnp.sum(product(w, x)))(w, x)
    assert costs.tolist() == [3.0]


def test_a_clipped_mean_takes_weights():
    fun, params, examples = CASES["tril"]
    grads = sj.per_example_grad(fun)(params, examples)
    weights = jnp.array([0.5, 0.0, 0.25, 0.0])
    norms = jnp.sqrt(grads.squared_norms())
    bound = float(norms[2]) / 2
    expected = grads.sum(weights * jnp.minimum(1, bound / norms))
    np.testing.assert_allclose(grads.clipped_mean(bound, weights), expected, rtol=1e-12)


@pytest.mark.parametrize("bound", [-1.0, float("nan")])
def test_a_bound_that_is_no_norm_is_refused(bound):
    grads = sj.per_example_grad(lambda w, x: w * x)(1.0, jnp.ones(3))
    with pytest.raises(ValueError, match="max_norm="):
        grads.clipped_mean(bound)


def test_a_lookup_of_one_row_under_vmap_is_kept_as_rows():
    params, examples = jnp.zeros((90, 8)), jnp.zeros((4, 12), jnp.int32)
    table = sj.explain(lambda p, e: jnp.sum(jax.vmap(lambda i: p[i])(e) ** 2), params, examples)
    assert "rows by index" in table
    assert "fallback" not in table
