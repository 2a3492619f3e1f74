"""The claims of sgd_jax.networks, one test each."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st

import sgd_jax as sj

SIZES = (5, 4, 3)
RTOL = {jnp.float64: 1e-12, jnp.float32: 1e-5}


def as_reference(network):
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(network)]


@pytest.mark.parametrize("sizes", [(1, 1), (6, 2), (5, 4, 3), (2, 1, 6, 3)])
def test_layers_have_weights_out_by_in_and_biases_out(sizes):
    network = sj.init_network(jax.random.key(0), sizes)
    pairs = itertools.pairwise(sizes)
    assert [layer.weights.shape for layer in network] == [(n_out, n_in) for n_in, n_out in pairs]
    assert [layer.biases.shape for layer in network] == [(n_out,) for n_out in sizes[1:]]


def test_init_network_is_float32_unless_told_otherwise():
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(sj.init_network(jax.random.key(0), SIZES))}
    assert dtypes == {jnp.dtype(jnp.float32)}
    wide = sj.init_network(jax.random.key(0), SIZES, dtype=jnp.float64)
    assert {leaf.dtype for leaf in jax.tree.leaves(wide)} == {jnp.dtype(jnp.float64)}


def assert_normal(draws, variance):
    """Asserts mean 0 and the variance given, each to five of its standard errors."""
    draws = np.ravel(draws)
    assert abs(draws.mean()) < 5 * np.sqrt(variance / draws.size)
    assert abs(np.mean(draws**2) / variance - 1) < 5 * np.sqrt(2 / draws.size)


@pytest.mark.parametrize("scheme", ["normal", "scaled"])
def test_weights_and_biases_have_the_variance_of_their_scheme(scheme):
    n_in = 200
    (layer,) = sj.init_network(jax.random.key(1), (n_in, 500), scheme)
    assert_normal(layer.biases, 1)
    assert_normal(layer.weights, 1 if scheme == "normal" else 1 / n_in)


@pytest.mark.parametrize("factor", [2 / 3, 3 / 2])
def test_weights_of_another_variance_are_caught(factor):
    (layer,) = sj.init_network(jax.random.key(1), (200, 500))
    with pytest.raises(AssertionError):
        assert_normal(layer.weights, factor)


def test_the_schemes_differ_by_the_root_of_the_number_of_inputs_in_the_weights_alone():
    normal = sj.init_network(jax.random.key(2), SIZES, "normal", jnp.float64)
    scaled = sj.init_network(jax.random.key(2), SIZES, "scaled", jnp.float64)
    for n_in, a, b in zip(SIZES, normal, scaled, strict=False):
        np.testing.assert_allclose(b.weights * np.sqrt(n_in), a.weights, rtol=1e-14)
        np.testing.assert_array_equal(b.biases, a.biases)


def test_no_two_arrays_of_a_network_share_their_draws():
    leaves = jax.tree.leaves(sj.init_network(jax.random.key(3), (4, 4, 4), dtype=jnp.float64))
    draws = np.concatenate([np.ravel(leaf) for leaf in leaves])
    assert len(np.unique(draws)) == draws.size


def test_the_key_decides_the_network():
    first, again, other = (sj.init_network(jax.random.key(k), SIZES) for k in (4, 4, 5))
    assert all(map(np.array_equal, jax.tree.leaves(first), jax.tree.leaves(again)))
    assert not any(map(np.array_equal, jax.tree.leaves(first), jax.tree.leaves(other)))


@pytest.mark.parametrize("dtype", RTOL)
@given(st.sampled_from([(1, 1), (6, 2), (5, 4, 3), (2, 1, 6, 3)]), st.integers(0, 2**16))
def test_feedforward_equals_the_oracle(dtype, sizes, seed):
    network_key, input_key = jax.random.split(jax.random.key(seed))
    network = sj.init_network(network_key, sizes, dtype=dtype)
    x = jax.random.normal(input_key, (sizes[0],), dtype)
    output = sj.feedforward(network, x)
    assert output.dtype == dtype
    np.testing.assert_allclose(
        output, reference.feedforward(as_reference(network), x), rtol=RTOL[dtype]
    )


def test_the_output_is_the_sigmoid_of_the_weighted_input():
    network = sj.init_network(jax.random.key(6), SIZES)
    x = jnp.arange(5, dtype=jnp.float32)
    np.testing.assert_array_equal(
        sj.feedforward(network, x), jax.nn.sigmoid(sj.networks.weighted_input(network, x))
    )


def test_one_layer_is_an_affine_map_before_its_sigmoid():
    layer = sj.Layer(jnp.array([[1.0, 2.0], [0.0, -1.0]]), jnp.array([10.0, 20.0]))
    np.testing.assert_array_equal(
        sj.networks.weighted_input((layer,), jnp.array([3.0, 4.0])), [21.0, 16.0]
    )


@pytest.mark.parametrize(("bias", "expected"), [(-1e30, 0.0), (1e30, 1.0)])
def test_outputs_stay_in_0_1_however_large_the_weighted_input(bias, expected):
    layer = sj.Layer(jnp.ones((1, 2)), jnp.array([bias]))
    assert sj.feedforward((layer,), jnp.zeros(2)).tolist() == [expected]


def test_vmap_takes_many_inputs_row_by_row():
    network = sj.init_network(jax.random.key(7), SIZES, dtype=jnp.float64)
    x = jax.random.normal(jax.random.key(8), (6, SIZES[0]))
    outputs = jax.vmap(sj.feedforward, in_axes=(None, 0))(network, x)
    rows = jnp.stack([sj.feedforward(network, row) for row in x])
    np.testing.assert_allclose(outputs, rows, rtol=1e-13)


@pytest.mark.parametrize("shape", [(6, 5), (4,), (), (5, 1)])
@pytest.mark.parametrize("function", [sj.feedforward, sj.networks.weighted_input])
def test_what_is_not_one_input_is_refused_with_the_remedy(function, shape):
    network = sj.init_network(jax.random.key(0), SIZES)
    with pytest.raises(ValueError, match=r"expected \(5,\).*jax\.vmap") as error:
        function(network, jnp.ones(shape))
    assert f"x has shape {shape}" in str(error.value)


def test_a_network_without_layers_is_refused():
    with pytest.raises(ValueError, match="params holds no layers"):
        sj.feedforward((), jnp.ones(5))


@pytest.mark.parametrize(
    ("sizes", "scheme", "kind", "message"),
    [
        ((5,), "normal", ValueError, r"at least inputs and outputs, got \(5,\)"),
        ((5, 0), "normal", ValueError, r"sizes\[1\] must be at least 1, got 0"),
        ((5, -3, 2), "normal", ValueError, r"sizes\[1\] must be at least 1, got -3"),
        ((5.0, 2), "normal", TypeError, r"sizes\[0\] must be a whole number, got 5.0"),
        ((5, 2), "glorot", ValueError, r"scheme must be one of .*scaled.*got 'glorot'"),
    ],
)
def test_init_network_refuses_bad_input_by_name(sizes, scheme, kind, message):
    with pytest.raises(kind, match=message):
        sj.init_network(jax.random.key(0), sizes, scheme)
