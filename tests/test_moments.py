"""The claims of gradient_moments: equal to the oracle, mergeable, bounded in memory."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import PartitionSpec as Spec

import sgd_jax as sj
from sgd_jax.estimation import GradientMoments, _moment_streams, gradient_moments, merge_across
from sgd_jax.estimation.noise import alignments

SIZES = (4, 3, 2)
N = 23
ALL = {"per_coordinate": True, "keep_norms": True, "keep_alignments": True}


def cost(network, example):
    x, y = example
    return sj.quadratic_cost(sj.feedforward(network, x), y)


def dot(w, x):
    """A cost whose gradient at any w is the example itself."""
    return jnp.dot(w, x)


@functools.cache
def problem(n=N):
    network_key, x_key, y_key = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(x_key, (n, SIZES[0]), jnp.float64)
    y = jax.random.uniform(y_key, (n, SIZES[-1]), jnp.float64)
    return sj.init_network(network_key, SIZES, dtype=jnp.float64), (x, y)


@functools.cache
def oracle_gradients():
    """The gradients of all examples by the textbook's backpropagation, one flat row each."""
    network, examples = problem()
    network = [np.asarray(leaf) for leaf in jax.tree.leaves(network)]
    rows = [
        reference.backprop(network, np.asarray(x), np.asarray(y), reference.quadratic_delta)
        for x, y in zip(*examples, strict=True)
    ]
    return np.array([np.concatenate([g.ravel() for g in row]) for row in rows])


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def part(examples, choose):
    return jax.tree.map(lambda leaf: leaf[choose], examples)


def assert_moments_of(moments, rows, rtol=1e-11):
    """Asserts that moments are those of gradients written down in rows."""
    mean, trace, mean_norm, variance = reference.moments(rows)
    assert int(moments.count) == len(rows)
    close = functools.partial(np.testing.assert_allclose, rtol=rtol, atol=rtol)
    close(flat(moments.mean), mean)
    close(moments.trace, trace)
    close(moments.mean_norm, mean_norm)
    close(moments.squared_norm, mean @ mean)
    close(moments.mean_squared_norm, np.mean(np.sum(rows**2, axis=1)))
    if moments.variance is not None:
        close(flat(moments.variance), variance)
        sums = [np.sum(leaf) for leaf in jax.tree.leaves(moments.variance)]
        close(jax.tree.leaves(moments.trace_per_leaf), sums)
    if moments.squared_norms is not None:
        close(moments.squared_norms, np.sum(rows**2, axis=1))
    if moments.alignments is not None:
        close(moments.alignments, rows @ mean)


def assert_same(a, b, atol=1e-12):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=atol), a, b)


@pytest.mark.parametrize("chunk_size", [1, 5, 1000])
def test_moments_are_those_of_the_gradients_written_down(chunk_size):
    network, examples = problem()
    moments = gradient_moments(cost, network, examples, chunk_size=chunk_size, **ALL)
    assert_moments_of(moments, oracle_gradients())
    np.testing.assert_allclose(moments.cost, sj.mean_cost(cost)(network, examples), rtol=1e-12)


def test_what_is_not_asked_for_is_not_there():
    moments = gradient_moments(cost, *problem())
    assert (moments.variance, moments.squared_norms, moments.alignments) == (None, None, None)


def test_one_example_has_no_spread():
    network, examples = problem()
    moments = gradient_moments(cost, network, part(examples, slice(1)), per_coordinate=True)
    np.testing.assert_allclose(moments.trace, 0, atol=1e-15)
    np.testing.assert_allclose(flat(moments.variance), 0, atol=1e-15)


def halves(split, **options):
    network, examples = problem()
    return [
        gradient_moments(cost, network, part(examples, choose), **options)
        for choose in (slice(None, split), slice(split, None))
    ]


@pytest.mark.parametrize("split", [1, 9])
def test_merged_moments_are_those_of_all_at_once(split):
    a, b = halves(split, **ALL)
    merged = a.merge(b)
    assert merged.alignments is None
    assert_moments_of(merged, oracle_gradients())


def test_merging_is_associative_and_commutative():
    network, examples = problem()
    a, b, c = (
        gradient_moments(cost, network, part(examples, choose), per_coordinate=True)
        for choose in (slice(0, 4), slice(4, 15), slice(15, N))
    )
    for merged in (a.merge(b).merge(c), a.merge(b.merge(c)), c.merge(a).merge(b)):
        assert_moments_of(merged, oracle_gradients())


@pytest.mark.parametrize(
    "fault",
    [
        lambda merged, a, b: dataclasses.replace(  # no term for the distance of the two means
            merged,
            trace_per_leaf=jax.tree.map(
                lambda s, t: (a.count * s + b.count * t) / merged.count,
                a.trace_per_leaf,
                b.trace_per_leaf,
            ),
        ),
        lambda merged, a, b: dataclasses.replace(  # 1/(n − 1) for 1/n
            merged,
            trace_per_leaf=jax.tree.map(lambda t: t * N / (N - 1), merged.trace_per_leaf),
        ),
        lambda merged, a, b: dataclasses.replace(  # the mean of two means
            merged, mean=jax.tree.map(lambda g, h: (g + h) / 2, a.mean, b.mean)
        ),
        lambda merged, a, b: dataclasses.replace(  # a sum for a mean
            merged, mean=jax.tree.map(lambda g: g * N, merged.mean)
        ),
    ],
)
def test_a_planted_fault_breaks_the_comparison(fault):
    a, b = halves(9)
    with pytest.raises(AssertionError):
        assert_moments_of(fault(a.merge(b), a, b), oracle_gradients())


def test_a_pytree_passes_through_jit_and_back():
    moments = gradient_moments(cost, *problem(), **ALL)
    again = jax.jit(lambda m: m)(moments)
    assert isinstance(again, GradientMoments)
    assert_same(again, moments)
    leaves, treedef = jax.tree.flatten(moments)
    assert_same(jax.tree.unflatten(treedef, leaves), moments)


def test_a_merge_across_an_axis_is_that_of_all_at_once():
    num_devices = 4
    network, examples = problem(24)
    split = jax.tree.map(lambda leaf: leaf.reshape(num_devices, -1, *leaf.shape[1:]), examples)

    def on_one(examples):
        return merge_across(gradient_moments(cost, network, examples, chunk_size=4), "data")

    each = jax.jit(jax.vmap(on_one, axis_name="data"))(split)
    whole = gradient_moments(cost, network, examples)
    for k in range(num_devices):
        assert_same(jax.tree.map(lambda leaf, k=k: leaf[k], each), whole)


def test_moments_are_taken_and_merged_under_shard_map():
    network, examples = problem()
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(Spec(), Spec("data")), out_specs=Spec())
    def on_each(network, examples):
        options = {"per_coordinate": True, "chunk_size": 4}
        return merge_across(gradient_moments(cost, network, examples, **options), "data")

    assert_moments_of(jax.jit(on_each)(network, examples), oracle_gradients())


def test_batches_of_an_iterator_give_the_same_as_arrays():
    network, examples = problem()
    whole = gradient_moments(cost, network, examples, **ALL)
    batches = [part(examples, slice(k, k + 10)) for k in range(0, N, 10)]

    class Loader:
        def __iter__(self):
            return iter(batches)

    assert_same(gradient_moments(cost, network, Loader(), **ALL), whole)
    once = gradient_moments(cost, network, iter(batches), per_coordinate=True, keep_norms=True)
    assert_same(once, dataclasses.replace(whole, alignments=None))


def test_moments_of_strata_are_those_of_each_stratum_and_pool_to_the_whole():
    network, examples = problem()
    labels = np.arange(N) % 3
    options = {"per_coordinate": True, "keep_norms": True}
    strata = gradient_moments(cost, network, examples, strata=labels, chunk_size=5, **options)
    assert strata.trace.shape == (3,)
    for h in range(3):
        mine = jax.tree.map(lambda x: x[h], dataclasses.replace(strata, squared_norms=None))  # noqa: B023
        assert_moments_of(mine, oracle_gradients()[labels == h])
    assert_moments_of(strata.pooled(), oracle_gradients())


def test_a_stratum_absent_from_a_chunk_changes_nothing():
    network, examples = problem()
    labels = np.sort(np.arange(N) % 3)
    strata = gradient_moments(cost, network, examples, strata=labels, chunk_size=2)
    assert_moments_of(strata.pooled(), oracle_gradients())


def test_strata_may_be_traced():
    network, examples = problem()
    labels = np.arange(N) % 3
    traced = jax.jit(
        lambda labels: gradient_moments(cost, network, examples, strata=labels, num_strata=3)
    )
    assert_same(traced(labels), gradient_moments(cost, network, examples, strata=labels))


def test_alignments_are_products_with_any_direction():
    network, examples = problem()
    direction = jax.tree.map(jnp.cos, network)
    found = alignments(cost, network, examples, direction, chunk_size=7)
    np.testing.assert_allclose(found, oracle_gradients() @ flat(direction), atol=1e-12)


@pytest.mark.parametrize("noise", [10.0, 1.0, 0.1, 0.01])
def test_float32_loses_no_more_than_is_documented(noise):
    """tr Σ in float32, for gradients of mean 1 in every coordinate and this standard deviation."""
    rows = (1 + noise * np.random.default_rng(0).normal(size=(20_000, 30))).astype(np.float32)
    moments = gradient_moments(
        dot, jnp.zeros(30, jnp.float32), jnp.array(rows), per_coordinate=True
    )
    assert moments.trace.dtype == jnp.float32
    exact = rows.astype(np.float64).var(axis=0)
    bound = 1e-6 * (1 + 1 / noise**2)
    assert abs(moments.trace / exact.sum() - 1) < bound
    assert np.max(np.abs(moments.variance / exact - 1)) < bound


def test_bfloat16_gradients_are_counted_in_float32():
    rows = np.random.default_rng(0).normal(size=(3000, 5))
    examples = jnp.array(rows, jnp.bfloat16)
    moments = gradient_moments(dot, jnp.zeros(5, jnp.bfloat16), examples, chunk_size=10)
    assert moments.mean.dtype == jnp.float32
    exact = np.asarray(examples, np.float64).var(axis=0).sum()
    np.testing.assert_allclose(moments.trace, exact, rtol=0.02)


def test_moments_are_found_under_strict_promotion_too():
    x = jnp.arange(6.0).reshape(3, 2)
    with jax.numpy_dtype_promotion("strict"):
        moments = sj.gradient_moments(sj.quadratic_cost, jnp.zeros(2), x, chunk_size=2)
        moments.merge(moments)
    assert moments.trace == pytest.approx(16 / 3)


def test_memory_is_that_of_one_chunk():
    w = jnp.zeros((50, 40))
    fun = lambda w, x: jnp.sum(jnp.tanh(w @ x))  # noqa: E731

    def temporary(n):
        compiled = _moment_streams._stream.lower(
            fun,
            w,
            jax.ShapeDtypeStruct((n, 40), jnp.float64),
            None,
            chunk_size=64,
            per_coordinate=True,
            keep_norms=False,
            num_strata=None,
        ).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(6400) < 1.2 * temporary(640)


def test_the_second_call_does_not_trace_again():
    calls = itertools.count()

    def fun(w, x):
        next(calls)
        return jnp.dot(w, x)

    gradient_moments(fun, jnp.zeros(3), jnp.ones((5, 3)), chunk_size=2)
    traced = next(calls)
    assert traced > 0
    gradient_moments(fun, jnp.ones(3), jnp.zeros((5, 3)), chunk_size=2)
    assert next(calls) == traced + 1


X = jnp.ones((4, 3))
W = jnp.zeros(3)
WHOLE = gradient_moments(dot, W, X)
BAD = [
    (lambda: gradient_moments(dot, W, X[:0]), ValueError, "examples is empty"),
    (lambda: gradient_moments(dot, W, iter([])), ValueError, "there are no batches"),
    (lambda: gradient_moments(dot, W, X, chunk_size=0), ValueError, "chunk_size must be at least"),
    (lambda: gradient_moments(dot, W, X, chunk_size=2.5), TypeError, "chunk_size must be a whole"),
    (lambda: gradient_moments(dot, W.astype(int), X), TypeError, "floating point"),
    (lambda: gradient_moments(dot, W, (X, X[:2])), ValueError, "leading axes of examples differ"),
    (
        lambda: gradient_moments(dot, W, X, strata=np.array([0, 1])),
        ValueError,
        r"strata must have shape \(4",
    ),
    (
        lambda: gradient_moments(dot, W, X, strata=np.array([0, 2, 0, 0])),
        ValueError,
        "stratum 1 holds no examples",
    ),
    (
        lambda: gradient_moments(dot, W, X, strata=np.array([0, -1, 0, 0])),
        ValueError,
        "strata must lie in 0 … 0, got -1 … 0",
    ),
    (
        lambda: gradient_moments(dot, W, X, strata=np.zeros(4)),
        TypeError,
        "strata must hold integers",
    ),
    (lambda: gradient_moments(dot, W, X, num_strata=2), ValueError, "num_strata is given without"),
    (
        lambda: jax.jit(lambda s: gradient_moments(dot, W, X, strata=s))(np.zeros(4, int)),
        ValueError,
        "strata is traced",
    ),
    (
        lambda: gradient_moments(dot, W, iter([X]), strata=np.zeros(4, int)),
        ValueError,
        "merge batch by batch",
    ),
    (
        lambda: gradient_moments(dot, W, X, strata=np.zeros(4, int), keep_alignments=True),
        ValueError,
        "cannot go with strata",
    ),
    (
        lambda: gradient_moments(dot, W, iter([X]), keep_alignments=True),
        ValueError,
        "walked once",
    ),
    (lambda: WHOLE.pooled(), ValueError, "of one set"),
    (
        lambda: WHOLE.merge(gradient_moments(dot, W, X, strata=np.zeros(4, int))),
        ValueError,
        "whole sets",
    ),
    (lambda: WHOLE.merge(gradient_moments(lambda w, x: w[0], (1.0,), X)), ValueError, "differ"),
    (lambda: alignments(dot, W, X, jnp.ones(2)), ValueError, "direction must be like params"),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD)
def test_bad_input_is_refused_by_name(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_examples_whose_gradients_are_not_finite_are_named():
    x = X.at[1, 0].set(jnp.nan).at[3, 2].set(jnp.inf)
    with pytest.raises(FloatingPointError, match="not finite for 2 examples: 1, 3"):
        gradient_moments(dot, W, x, chunk_size=3)
    with pytest.raises(FloatingPointError, match="for 1 examples: 5"):
        gradient_moments(dot, W, iter([X, x[:2]]))


def test_many_examples_whose_gradients_are_not_finite_are_counted():
    with pytest.raises(FloatingPointError, match=r"for 40 examples: 0, 1, .* 9, …"):
        gradient_moments(dot, W, jnp.full((40, 3), jnp.nan))


def test_a_sum_that_overflows_is_told_apart():
    huge = jnp.full((4, 3), 1e19, jnp.float32)
    with pytest.raises(FloatingPointError, match="their sum is not: it overflows"):
        gradient_moments(dot, W.astype(jnp.float32), huge)


def test_under_a_trace_nothing_is_raised():
    moments = jax.jit(lambda x: gradient_moments(dot, W, x))(X * jnp.nan)
    assert np.isnan(moments.trace)


@pytest.mark.parametrize("ratio", [1e4, 1e6, 1e8])
@pytest.mark.parametrize("in_batches", [False, True])
def test_the_trace_is_right_to_a_thousandth_where_the_mean_is_ten_thousand_times_the_noise(
    ratio, in_batches
):
    """In float32, of rows whose entries are exact; from sums of squares it is 5 to 500 % off."""
    random = np.random.default_rng(0)
    noise = random.normal(size=(500, 40))
    mean = random.normal(size=40)
    mean *= np.sqrt(ratio * np.mean(np.sum(noise**2, axis=1)) / np.sum(mean**2))
    rows = np.asarray(noise + mean, np.float32)
    exact = reference.moments(rows.astype(np.float64))
    params = jnp.zeros(40, jnp.float32)
    examples = iter([rows[:300], rows[300:]]) if in_batches else rows
    fun = lambda w, x: jnp.dot(w, x)  # noqa: E731
    found = gradient_moments(fun, params, examples, chunk_size=70, per_coordinate=True)
    np.testing.assert_allclose(found.trace, exact[1], rtol=1e-3)
    np.testing.assert_allclose(found.variance, exact[3], rtol=5e-3)
    np.testing.assert_allclose(found.mean, exact[0], rtol=1e-6)
    if ratio >= 1e6 and not in_batches:
        rough = jax.jit(lambda w, x: gradient_moments(fun, w, x, chunk_size=70))(params, rows)
        assert abs(float(rough.trace) / exact[1] - 1) > 1e-3  # traced: not taken again


def test_examples_that_all_agree_have_a_trace_of_zero():
    rows = np.full((10, 3), 0.1, np.float32)
    found = gradient_moments(lambda w, x: jnp.dot(w, x), jnp.zeros(3, jnp.float32), rows)
    assert 0 <= float(found.trace) < 1e-15
