"""The claims of sgd_jax.sampling, one test each."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sgd_jax as sj

n_and_m = st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))


@given(n_and_m)
def test_full_batches_hold_no_example_twice_and_leave_n_mod_m_out(sizes):
    n, m = sizes
    batches = sj.sampling.epoch(jax.random.key(0), n, m)
    assert batches.shape == (n // m, m)
    assert batches.dtype == jnp.int32
    drawn = np.ravel(batches)
    assert len(set(drawn.tolist())) == n - n % m
    assert drawn.min() >= 0
    assert drawn.max() < n


@given(n_and_m)
def test_keep_last_holds_every_example_once_and_fills_the_last_row_up_with_minus_1(sizes):
    n, m = sizes
    batches = sj.sampling.epoch(jax.random.key(0), n, m, keep_last=True)
    assert batches.shape == (-(-n // m), m)
    assert batches.dtype == jnp.int32
    drawn = np.ravel(batches).tolist()
    assert sorted(drawn[:n]) == list(range(n))
    assert drawn[n:] == [-1] * (-n % m)


def test_keep_last_only_adds_the_short_row():
    key = jax.random.key(1)
    whole = sj.sampling.epoch(key, 10, 4)
    np.testing.assert_array_equal(sj.sampling.epoch(key, 10, 4, keep_last=True)[:-1], whole)


def test_m_equal_to_n_is_one_full_batch():
    for keep_last in (False, True):
        batches = sj.sampling.epoch(jax.random.key(2), 7, 7, keep_last=keep_last)
        assert batches.shape == (1, 7)
        assert sorted(batches[0].tolist()) == list(range(7))


def test_the_key_decides_the_order():
    first, again, other = (sj.sampling.epoch(jax.random.key(k), 100, 10) for k in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_epoch_can_be_compiled_and_vmapped_over_keys():
    keys = jax.random.split(jax.random.key(5), 3)
    together = jax.jit(jax.vmap(lambda key: sj.sampling.epoch(key, 6, 2)))(keys)
    np.testing.assert_array_equal(together, [sj.sampling.epoch(key, 6, 2) for key in keys])


def assert_uniform_over_all_permutations(orders, n):
    """Asserts that chi-squared over the n! orders stays below its 99.9 % quantile."""
    counts = dict.fromkeys(itertools.permutations(range(n)), 0)
    for order in orders.tolist():
        counts[tuple(order)] += 1
    expected = len(orders) / len(counts)
    chi_squared = sum((count - expected) ** 2 / expected for count in counts.values())
    quantile = {3: 20.515, 4: 49.728}[n]  # degrees of freedom: 5 and 23
    assert chi_squared < quantile


@pytest.mark.parametrize("n", [3, 4])
def test_every_order_is_equally_likely(n):
    keys = jax.random.split(jax.random.key(6), 4_800)
    orders = jax.vmap(lambda key: sj.sampling.epoch(key, n, n)[0])(keys)
    assert_uniform_over_all_permutations(orders, n)


def test_a_careless_shuffle_is_caught():
    """Swapping each place with any place, not only a later one, is not uniform."""
    generator = np.random.default_rng(0)
    orders = np.tile(np.arange(3), (4_800, 1))
    for order in orders:
        for i in range(3):
            j = generator.integers(3)
            order[[i, j]] = order[[j, i]]
    with pytest.raises(AssertionError, match=r"< 20\.515"):
        assert_uniform_over_all_permutations(orders, 3)


@pytest.mark.parametrize("keep_last", [False, True])
@pytest.mark.parametrize(
    ("n", "m", "kind", "message"),
    [
        (5, 6, ValueError, r"m must be at most n.*m = 6 > n = 5; m = n is full-batch"),
        (5, 0, ValueError, "m must be at least 1, got 0"),
        (5, -1, ValueError, "m must be at least 1, got -1"),
        (0, 1, ValueError, "n must be at least 1, got 0"),
        (5, 2.0, TypeError, "m must be a whole number, got 2.0 of type float"),
        (5.0, 2, TypeError, "n must be a whole number, got 5.0 of type float"),
        (5, True, TypeError, "m must be a whole number, got True of type bool"),
    ],
)
def test_bad_sizes_are_refused_by_name(n, m, keep_last, kind, message):
    with pytest.raises(kind, match=message):
        sj.sampling.epoch(jax.random.key(0), n, m, keep_last=keep_last)
