"""An accelerator and the CPU give the same numbers, at matrix products of full precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sgd_jax as sj

pytestmark = pytest.mark.gpu

TOLERANCES = {np.float32: 1e-4, np.float64: 1e-10}
SIZES, N = (20, 12, 5), 60


def cost(params, example):
    x, label = example
    target = jax.nn.one_hot(label, SIZES[-1], dtype=x.dtype)
    return sj.quadratic_cost(sj.feedforward(params, x), target)


def problem(dtype):
    """Returns params and examples as arrays of NumPy, so that they are on no device yet."""
    random = np.random.default_rng(0)
    inputs, labels = random.normal(size=(N, SIZES[0])), np.arange(N) % SIZES[-1]
    network = sj.init_network(jax.random.key(0), SIZES, dtype=dtype)
    return jax.tree.map(np.asarray, network), (inputs.astype(dtype), labels.astype(np.int32))


def assert_same_on_both(function, dtype, *arguments):
    """Compares by norm, leaf by leaf, what a function returns on the CPU and on the first device.

    Where an accelerator's default is a product in TF32 or bfloat16, full precision is asked for.
    """
    found = []
    for device in (jax.devices("cpu")[0], jax.devices()[0]):
        with jax.default_device(device), jax.default_matmul_precision("highest"):
            result = function(*jax.device_put(arguments, device))
        for leaf in jax.tree.leaves(result):
            assert leaf.devices() == {device}
        found.append([np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(result)])
    for expected, other in zip(*found, strict=True):
        error = np.linalg.norm(other - expected)
        assert error <= TOLERANCES[dtype] * np.linalg.norm(expected)
        assert np.linalg.norm(expected) > 0


@pytest.fixture(params=[np.float32, np.float64], ids=["float32", "float64"])
def dtype(request):
    if request.param is np.float64 and jax.default_backend() == "tpu":
        pytest.skip("a TPU has no float64")
    return request.param


@pytest.mark.parametrize("strategy", ["auto", "materialized"])
def test_an_epoch_is_the_same(dtype, strategy):
    optimizer = sj.sgd(0.5, momentum=0.9)
    epoch = sj.make_epoch(cost, optimizer, estimator=sj.estimators.mini_batch(strategy))
    batches = np.random.default_rng(1).permutation(N).reshape(-1, 6).astype(np.int32)

    def train(params, examples, batches):
        state, info = epoch(sj.init_state(params, optimizer), examples, batches)
        return state.params, info.cost

    assert_same_on_both(train, dtype, *problem(dtype), batches)


def test_a_sweep_is_the_same(dtype):
    sweep = sj.make_sweep(cost, sj.sgd)
    params, examples = problem(dtype)
    params = jax.tree.map(lambda leaf: np.stack([[leaf, leaf / 2, leaf / 4]]), params)
    rates = np.array([[0.1, 0.5, 1.0]], dtype)
    batches = np.arange(N, dtype=np.int32).reshape(1, -1, 6)

    def train(params, rates, examples, batches):
        states, info = sweep.epoch(sweep.init(params, rates), rates, examples, batches)
        return states.params, info.cost

    assert_same_on_both(train, dtype, params, rates, examples, batches)


@pytest.mark.parametrize("strategy", ["auto", "factored", "materialized"])
def test_per_example_norms_second_moment_and_gram_matrix_are_the_same(dtype, strategy):
    grad = sj.per_example_grad(cost, estimator=sj.estimators.mini_batch(strategy))

    @jax.jit
    def ask(params, examples):
        grads = grad(params, examples)
        return grads.squared_norms(), grads.mean(), grads.second_moment(), grads.gram()

    assert_same_on_both(ask, dtype, *problem(dtype))


def test_moments_and_the_noise_scale_are_the_same(dtype):
    def ask(params, examples):
        m = sj.gradient_moments(cost, params, examples, chunk_size=16, per_coordinate=True)
        return (
            m.mean,
            jnp.asarray(m.trace),
            m.variance,
            jnp.asarray(sj.noise_scale(m, of="these_examples").value),
        )

    assert_same_on_both(ask, dtype, *problem(dtype))


def test_the_order_of_an_epoch_is_the_same_to_the_last_bit():
    def draw(key_data):
        key = jax.random.wrap_key_data(key_data)
        return sj.sampling.epoch(key, N, 6)

    key_data = np.asarray(jax.random.key_data(jax.random.key(3)))
    orders = []
    for device in (jax.devices("cpu")[0], jax.devices()[0]):
        with jax.default_device(device):
            orders.append(np.asarray(draw(jax.device_put(key_data, device))))
    np.testing.assert_array_equal(*orders)
