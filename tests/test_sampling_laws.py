"""Every sampler: distribution, unbiasedness and exact error, by enumeration of all outcomes."""

import collections
import fractions
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from scipy import stats

import sgd_jax as sj
from sgd_jax import sampling
from sgd_jax.estimation import _error_laws, expected_squared_error, gradient_moments
from sgd_jax.estimation.svrg import control_variate, difference, refresh
from sgd_jax.sampling import (
    _schemes,
    neyman_allocation,
    optimal_probabilities,
    proportional_allocation,
)

GENERATOR = np.random.default_rng(0)
GRADIENTS = GENERATOR.normal(size=(41, 3)) + 0.5
STRATA = np.array([0, 1, 1, 0, 1, 2])
SIZES = (1, 2, 1)
LOPSIDED = np.array([0] * 40 + [1])
P = np.array([0.5, 0.25, 0.125, 0.125])
ORDER = np.array([2, 0, 3, 1, 5, 4])
KEY = jax.random.key(0)


def dot(w, x):
    """A cost whose gradient at any w is the example itself."""
    return jnp.dot(w, x)


def moments_of(gradients, **options):
    return gradient_moments(dot, jnp.zeros(3), jnp.asarray(gradients), **options)


def outcome(indices, weights):
    """The key under which an outcome is counted: the order of draws does not matter."""
    pairs = sorted(zip(map(int, indices), np.round(weights, 9).tolist(), strict=True))
    return tuple(pair for pair in pairs if pair[0] >= 0)


def table(draws):
    """Returns {outcome: probability} of (probability, indices, weights) triples."""
    result = collections.defaultdict(float)
    for probability, indices, weights in draws:
        result[outcome(indices, weights)] += probability
    assert math.isclose(sum(result.values()), 1)
    return result


def all_subsets(n, m, weight=None):
    subsets = list(itertools.combinations(range(n), m))
    return [(1 / len(subsets), s, [weight or 1 / m] * m) for s in subsets]


def all_ordered_draws(n, m):
    return [(n**-m, s, [1 / m] * m) for s in itertools.product(range(n), repeat=m)]


def all_poisson_draws(n, m, max_size):
    q = m / n
    for count in range(n + 1):
        kept = min(count, max_size)
        for drawn in itertools.combinations(range(n), count):
            chosen = list(itertools.combinations(drawn, kept))
            for subset in chosen:
                probability = q**count * (1 - q) ** (n - count) / len(chosen)
                yield probability, subset, [count / max(kept, 1) / m] * kept


def all_stratified_draws(strata, sizes):
    n = len(strata)
    members = [np.flatnonzero(strata == h) for h in range(len(sizes))]
    weights = [
        len(e) / n / size for e, size in zip(members, sizes, strict=True) for _ in [0] * size
    ]
    draws = itertools.product(
        *(itertools.combinations(e, size) for e, size in zip(members, sizes, strict=True))
    )
    draws = [sum(d, ()) for d in draws]
    return [(1 / len(draws), d, weights) for d in draws]


def all_importance_draws(p, m):
    for s in itertools.product(range(len(p)), repeat=m):
        yield math.prod(p[i] for i in s), s, [1 / (m * len(p) * p[i]) for i in s]


def all_mirrored_draws(order, m):
    n = len(order)
    pairs = [(order[r], order[n - 1 - r]) for r in range(n // 2)]
    chosen = list(itertools.combinations(pairs, m // 2))
    return [(1 / len(chosen), sum(c, ()), [1 / m] * m) for c in chosen]


def row(batches, k):
    return sampling.plain_mean(batches[k])


def shuffled_once(key):
    return sampling.fixed_order(jax.random.permutation(key, 5), 2)


def from_a_random_start(key):
    return sampling.cyclic(5, 3, 2, start=jax.random.randint(key, (), 0, 5))


# name: (n, sampler, every outcome with its probability, predicted error from gradients)
SCHEMES = {
    "without replacement, by Floyd": (
        5,
        lambda key: sampling.without_replacement(key, 5, 2),
        all_subsets(5, 2),
        lambda g: expected_squared_error(moments_of(g), 2),
    ),
    "without replacement, by sorting": (
        40,
        lambda key: sampling.without_replacement(key, 40, 39),
        all_subsets(40, 39),
        lambda g: expected_squared_error(moments_of(g), 39),
    ),
    "with replacement": (
        3,
        lambda key: sampling.with_replacement(key, 3, 4),
        all_ordered_draws(3, 4),
        lambda g: expected_squared_error(moments_of(g), 4, "with_replacement"),
    ),
    "poisson": (
        4,
        lambda key: sampling.poisson(key, 4, 2),
        list(all_poisson_draws(4, 2, 4)),
        lambda g: expected_squared_error(moments_of(g), 2, "poisson"),
    ),
    "poisson with overflow": (
        4,
        lambda key: sampling.poisson(key, 4, 3, max_size=2),
        list(all_poisson_draws(4, 3, 2)),
        lambda g: expected_squared_error(moments_of(g), 3, "poisson", max_size=2),
    ),
    "stratified, by Floyd": (
        6,
        lambda key: sampling.stratified(key, STRATA, SIZES),
        all_stratified_draws(STRATA, SIZES),
        lambda g: expected_squared_error(moments_of(g, strata=STRATA), SIZES, "stratified"),
    ),
    "stratified, traced": (
        6,
        lambda key: jax.jit(sampling.stratified, static_argnums=2)(key, STRATA, SIZES),
        all_stratified_draws(STRATA, SIZES),
        lambda g: expected_squared_error(moments_of(g, strata=STRATA), SIZES, "stratified"),
    ),
    "stratified, by sorting": (
        41,
        lambda key: sampling.stratified(key, LOPSIDED, (39, 1)),
        all_stratified_draws(LOPSIDED, (39, 1)),
        lambda g: expected_squared_error(moments_of(g, strata=LOPSIDED), (39, 1), "stratified"),
    ),
    "importance": (
        4,
        lambda key: sampling.importance(key, jnp.array(P), 2),
        list(all_importance_draws(P, 2)),
        lambda g: expected_squared_error(
            moments_of(g, keep_norms=True), 2, "importance", probabilities=P
        ),
    ),
    "mirrored pairs": (
        6,
        lambda key: sampling.antithetic(key, ORDER, 4),
        all_mirrored_draws(ORDER, 4),
        lambda g: expected_squared_error(
            gradient_moments(
                lambda w, pair: (dot(w, pair[0]) + dot(w, pair[1])) / 2,
                jnp.zeros(3),
                (jnp.array(g[ORDER[:3]]), jnp.array(g[ORDER[:2:-1]])),
            ),
            2,
        ),
    ),
    "a row of a reshuffled epoch": (
        5,
        lambda key: row(sampling.epoch(key, 5, 2), 1),
        all_subsets(5, 2),
        lambda g: expected_squared_error(moments_of(g), 2),
    ),
    "a row of an order shuffled once": (
        5,
        lambda key: row(shuffled_once(key), 1),
        all_subsets(5, 2),
        lambda g: expected_squared_error(moments_of(g), 2),
    ),
    "a row of a cycle from a random start": (
        5,
        lambda key: row(from_a_random_start(key), 1),
        [(1 / 5, [s, (s + 1) % 5, (s + 2) % 5], [1 / 3] * 3) for s in range(5)],
        lambda g: np.mean(
            [reference.squared_error(g, np.arange(s, s + 3) % 5, [1 / 3] * 3) for s in range(5)]
        ),
    ),
}


def errors_of(draws, gradients):
    return sum(p * reference.squared_error(gradients, s, w) for p, s, w in draws)


@pytest.mark.parametrize("name", SCHEMES)
def test_the_mean_over_all_outcomes_is_the_full_gradient(name):
    n, _, draws, _ = SCHEMES[name]
    g = GRADIENTS[:n]
    mean = sum(p * reference.estimate(g, s, w) for p, s, w in draws)
    np.testing.assert_allclose(mean, g.mean(axis=0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SCHEMES)
def test_the_mean_squared_error_over_all_outcomes_is_the_predicted_one(name):
    n, _, draws, predict = SCHEMES[name]
    g = GRADIENTS[:n]
    np.testing.assert_allclose(predict(g), errors_of(draws, g), rtol=0, atol=1e-12)


def assert_distributed_as(draws, samples):
    """Asserts that outcomes are those of the table, with chi-squared below its 99.9 % quantile."""
    expected = table(draws)
    indices, weights = np.asarray(samples.indices), np.asarray(samples.weights)
    counts = collections.Counter(map(outcome, indices, weights))
    assert set(counts) <= set(expected), "an outcome that cannot be"
    if len(expected) == 1:
        return
    chi_squared = sum(
        (counts[key] - len(indices) * p) ** 2 / (len(indices) * p) for key, p in expected.items()
    )
    assert chi_squared < stats.chi2.ppf(0.999, len(expected) - 1)


@pytest.mark.parametrize("name", SCHEMES)
def test_the_sampler_gives_each_outcome_with_its_probability(name):
    _, sampler, draws, _ = SCHEMES[name]
    keys = jax.random.split(jax.random.key(1), 4000)
    samples = jax.jit(jax.vmap(sampler))(keys)
    assert (samples.indices.dtype, samples.weights.dtype) == (jnp.int32, jnp.float64)
    assert samples.indices.shape == samples.weights.shape
    assert_distributed_as(draws, samples)


@pytest.mark.parametrize(
    "careless",
    [
        lambda key: sampling.Sample(  # neighbours only
            (jax.random.randint(key, (), 0, 5) + jnp.arange(2)) % 5, jnp.full(2, 0.5)
        ),
        lambda key: sampling.with_replacement(key, 5, 2),
        lambda key: sampling.without_replacement(key, 5, 2)._replace(weights=jnp.full(2, 0.4)),
        lambda key: sampling.importance(  # 20 % too often
            key, jnp.array([0.24, 0.19, 0.19, 0.19, 0.19]), 2
        )._replace(weights=jnp.full(2, 0.5)),
    ],
)
def test_a_careless_sampler_is_caught(careless):
    samples = jax.jit(jax.vmap(careless))(jax.random.split(jax.random.key(1), 4000))
    with pytest.raises(AssertionError):
        assert_distributed_as(all_subsets(5, 2), samples)


@pytest.mark.parametrize("scheme", ["without_replacement", "with_replacement", "poisson"])
@pytest.mark.parametrize("m", range(1, 7))
def test_the_law_holds_at_every_batch_size(scheme, m):
    n = 6 if scheme != "with_replacement" else 3
    draws = {
        "without_replacement": lambda: all_subsets(n, m),
        "with_replacement": lambda: all_ordered_draws(n, m),
        "poisson": lambda: all_poisson_draws(n, m, n),
    }[scheme]()
    g = GRADIENTS[:n]
    predicted = expected_squared_error(moments_of(g), m, scheme)
    np.testing.assert_allclose(predicted, errors_of(draws, g), rtol=0, atol=1e-12)


@pytest.mark.parametrize("max_size", [1, 2, 4, 5])
def test_the_poisson_law_counts_overflow_exactly(max_size):
    g = GRADIENTS[:5]
    predicted = expected_squared_error(moments_of(g), 2, "poisson", max_size=max_size)
    draws = all_poisson_draws(5, 2, max_size)
    np.testing.assert_allclose(predicted, errors_of(draws, g), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("fault", "planted"),
    [
        ("no finite-population factor", lambda count, m: jnp.ones_like(count / m)),
        ("1 − m/n, which goes with 1/(n−1)", lambda count, m: 1 - m / count),
        ("two thirds of it", lambda count, m: 2 / 3 * (count - m) / (count - 1)),
        ("one and a half of it", lambda count, m: 3 / 2 * (count - m) / (count - 1)),
    ],
)
def test_a_planted_fault_breaks_the_laws(fault, planted, monkeypatch):
    monkeypatch.setattr(_error_laws, "_finite_population", planted)
    for name in ("without replacement, by Floyd", "stratified, by Floyd", "mirrored pairs"):
        with pytest.raises(AssertionError):
            test_the_mean_squared_error_over_all_outcomes_is_the_predicted_one(name)


@pytest.mark.parametrize("m", [1, 3])
def test_the_law_of_a_control_variate_is_that_of_the_differences(m):
    def fun(w, x):
        return jnp.sin(jnp.dot(w, x)) + jnp.sum(w**2) * x[0]

    x = jnp.array(GRADIENTS[:4])
    w, a = jnp.array([0.3, -0.2, 0.7]), jnp.array([0.1, 0.1, 0.1])
    anchor = refresh(fun, a, x, chunk_size=3)
    full = jax.grad(sj.mean_cost(fun))
    np.testing.assert_allclose(anchor.gradient, full(a, x), atol=1e-12)
    estimate = jax.jit(control_variate(fun))
    subsets = list(itertools.combinations(range(4), m))
    estimates_ = np.array(
        [estimate(w, anchor, x[jnp.array(s)], jnp.full(m, 1 / m)) for s in subsets]
    )
    gradient = np.asarray(full(w, x))
    np.testing.assert_allclose(estimates_.mean(axis=0), gradient, atol=1e-12)
    measured = np.mean(np.sum((estimates_ - gradient) ** 2, axis=1))
    moments = gradient_moments(difference(fun, w, a), jnp.zeros(3), x)
    np.testing.assert_allclose(expected_squared_error(moments, m), measured, atol=1e-12)


def test_a_control_variate_has_no_noise_at_its_anchor():
    x, w = jnp.array(GRADIENTS[:8]), jnp.ones(3)
    fun = lambda w, x: jnp.exp(jnp.dot(w, x))  # noqa: E731
    anchor = refresh(fun, w, x)
    alone = control_variate(fun)(w, anchor, x[:1], jnp.ones(1))
    np.testing.assert_allclose(alone, anchor.gradient, atol=1e-12)


def test_orders_hold_what_they_say():
    assert sampling.cyclic(5, 2, 4, start=3).tolist() == [[3, 4], [0, 1], [2, 3], [4, 0]]
    assert sampling.cyclic(3, 3, 1).dtype == jnp.int32
    order = jnp.array([3, 0, 2, 4, 1])
    assert sampling.fixed_order(order, 2).tolist() == [[3, 0], [2, 4]]
    assert sampling.fixed_order(order, 2, keep_last=True).tolist() == [[3, 0], [2, 4], [1, -1]]


def test_orders_go_into_an_epoch():
    optimizer = sj.sgd(0.1)
    epoch = sj.make_epoch(dot, optimizer)
    state = sj.init_state(jnp.zeros(3), optimizer)
    state, info = epoch(state, jnp.array(GRADIENTS[:5]), sampling.cyclic(5, 2, 5))
    assert info.cost.shape == (5,)
    # Ten places over five examples: each one twice, in five steps of 1/2.
    np.testing.assert_allclose(state.params, -0.1 * GRADIENTS[:5].sum(axis=0), atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("traced", [False, True])
def test_a_small_probability_is_drawn_and_weighted_as_given(dtype, traced):
    """2⁻³¹ · 1.5 was drawn as 2⁻³⁰: a third too often, and the law at the p given did not hold."""
    p = jnp.array([1 - 1.5 * 2.0**-31, 1.5 * 2.0**-31], dtype)
    draw = lambda p: sampling.importance(jax.random.key(0), p, 5)  # noqa: E731
    sample = (jax.jit(draw) if traced else draw)(p)
    np.testing.assert_allclose(sample.weights, 1 / (5 * 2 * p[sample.indices]), rtol=1e-6)
    high, low = _schemes._in_units(p)
    exact = [int(h) * 2**31 + int(k) for h, k in zip(high, low, strict=True)]
    assert exact[1] == 3 * 2**30  # 1.5 · 2⁻³¹ in units of 2⁻⁶²


def test_cumulated_units_are_found_by_bisection_and_carry():
    generator = np.random.default_rng(0)
    units = [int(u) for u in generator.integers(0, 2**58, size=13)]
    units[4] = 0
    pair = tuple(jnp.array([f(u) for u in units], jnp.uint32) for f in (
        lambda u: u >> 31, lambda u: u & (2**31 - 1)
    ))  # fmt: skip
    upper = jax.lax.associative_scan(_schemes._add, pair)
    sums = np.cumsum([0, *units], dtype=object)
    assert [int(h) * 2**31 + int(k) for h, k in zip(*upper, strict=True)] == list(sums[1:])
    for k in (i for i in range(13) if i != 4):
        for drawn in (sums[k], sums[k + 1] - 1):
            at = tuple(jnp.array([f], jnp.uint32) for f in (drawn >> 31, drawn & (2**31 - 1)))
            assert int(_schemes._first_above(upper, at)[0]) == k


@pytest.mark.parametrize("third", [1 << 29, 1 << 30])
def test_draws_are_uniform_below_a_total_of_two_words(third):
    """A third of them in each third: `jax.random.randint` gives 37 and 25 % for 3 · 2²⁹."""
    total = (jnp.array(3 * third, jnp.uint32), jnp.array(1, jnp.uint32))
    high, low = _schemes._draw_below(jax.random.key(1), 30_000, total)
    assert bool(jnp.all(_schemes._is_below((high, low), total)))
    counts = np.bincount(np.asarray(high) // third, minlength=3)[:3]
    assert stats.chisquare(counts).pvalue > 1e-3
    assert stats.kstest(np.asarray(low) / 2.0**31, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("small", [1e-16, 1e-30])
def test_a_probability_below_the_resolution_is_refused(small):
    p = jnp.array([1 - small, small])
    with pytest.raises(ValueError, match="at least 2⁻⁵⁰"):
        sampling.importance(jax.random.key(0), p, 5)
    sample = jax.jit(lambda p: sampling.importance(jax.random.key(0), p, 5))(p)
    assert np.all(np.isnan(sample.weights))


@pytest.mark.parametrize("n", [50, 50_000])
def test_the_default_length_of_a_poisson_sample_overflows_once_in_a_billion(n):
    for m in (1, 10, 40):
        size = sampling.poisson_max_size(n, m)
        assert stats.binom.sf(size, n, m / n) < 1e-9
        assert size == n or size < m + 30 * math.sqrt(m) + 15


@pytest.mark.parametrize(("dtype", "place"), [(np.uint8, np.asarray), (np.int32, jnp.asarray)])
def test_concrete_strata_and_probabilities_are_the_same_and_are_checked_inside_jit(dtype, place):
    strata, p, half = place(STRATA.astype(dtype)), place(P), place(P / 2)
    inside = jax.jit(lambda key: (sampling.stratified(key, strata, SIZES), importance(key, p)))
    outside = sampling.stratified(KEY, strata, SIZES), importance(KEY, p)
    jax.tree.map(np.testing.assert_array_equal, inside(KEY), outside)
    with pytest.raises(ValueError, match="stratum 0 holds 2 examples"):
        jax.jit(lambda key: sampling.stratified(key, strata, (3, 1, 1)))(KEY)
    with pytest.raises(ValueError, match="must sum to 1"):
        jax.jit(lambda key: importance(key, half))(KEY)


def importance(key, p):
    return sampling.importance(key, p, 3)


# Allocation


def stratified_error(counts, traces, sizes):
    n = sum(counts)
    return sum(
        fractions.Fraction(c, n) ** 2 * fractions.Fraction(c - s, max(c - 1, 1)) * t / s
        for c, t, s in zip(counts, map(fractions.Fraction, traces), sizes, strict=True)
    )


@pytest.mark.parametrize("m", range(3, 12))
@pytest.mark.parametrize("traces", [(1.0, 1.0, 1.0), (9.0, 1.0, 0.25), (0.0, 5.0, 5.0)])
def test_neyman_allocation_is_the_best_of_all(m, traces):
    counts = (5, 4, 2)
    every = itertools.product(*(range(1, c + 1) for c in counts))
    best = min(stratified_error(counts, traces, sizes) for sizes in every if sum(sizes) == m)
    chosen = neyman_allocation(counts, traces, m)
    assert sum(chosen) == m
    assert stratified_error(counts, traces, chosen) == best


def test_proportional_allocation_is_exact_where_it_can_be_and_never_empty():
    assert proportional_allocation([600, 300, 100], 10) == (6, 3, 1)
    assert proportional_allocation([600, 300, 100], 1000) == (600, 300, 100)
    assert proportional_allocation([998, 1, 1], 3) == (1, 1, 1)


def test_no_probabilities_beat_the_optimal_ones():
    moments = moments_of(GRADIENTS[:8], keep_norms=True)
    norms = jnp.sqrt(moments.squared_norms)
    best = expected_squared_error(moments, 3, "importance")
    p = optimal_probabilities(norms, floor=0.0)
    law = expected_squared_error(moments, 3, "importance", probabilities=p)
    np.testing.assert_allclose(law, best, atol=1e-12)
    for other in GENERATOR.dirichlet(np.ones(8), size=20):
        assert expected_squared_error(moments, 3, "importance", probabilities=other) > best


@pytest.mark.parametrize("floor", [0.1, 0.5, 1.0])
def test_the_floor_bounds_weights_and_error(floor):
    moments = moments_of(GRADIENTS[:8], keep_norms=True)
    old_norms = jnp.array([5.0, 0, 0, 0, 0, 0, 0, 0])  # all wrong
    p = optimal_probabilities(old_norms, floor)
    assert p.min() * 8 >= floor - 1e-12
    law = expected_squared_error(moments, 3, "importance", probabilities=p)
    uniform = expected_squared_error(moments, 3, "with_replacement")
    assert law <= uniform / floor + (1 / floor - 1) * moments.squared_norm / 3 + 1e-12


def test_norms_that_are_all_zero_give_uniform_probabilities():
    assert optimal_probabilities(jnp.zeros(4), 0.0).tolist() == [0.25] * 4


# Bad input

BAD = [
    (lambda: sampling.without_replacement(KEY, 5, 6), ValueError, "m = 6 > n = 5"),
    (lambda: sampling.without_replacement(KEY, 0, 1), ValueError, "n must be at least 1"),
    (lambda: sampling.with_replacement(KEY, 0, 1), ValueError, "n must be at least 1"),
    (lambda: sampling.with_replacement(KEY, 5, 2.0), TypeError, "m must be a whole number"),
    (lambda: sampling.poisson(KEY, 5, 6), ValueError, "m = 6 > n = 5"),
    (lambda: sampling.poisson(KEY, 5, 2, max_size=6), ValueError, "max_size = 6 > n = 5"),
    (lambda: sampling.poisson(KEY, 5, 2, max_size=0), ValueError, "max_size must be at least 1"),
    (lambda: sampling.poisson_max_size(5, 2, 0.0), ValueError, "overflow must be"),
    (lambda: sampling.stratified(KEY, STRATA, (1, 1)), ValueError, r"0 … 1.*strata\[5\] is 2"),
    (lambda: sampling.stratified(KEY, STRATA, (1, 0, 1)), ValueError, r"sizes\[1\] must be at l"),
    (lambda: sampling.stratified(KEY, STRATA, (3, 1, 1)), ValueError, "stratum 0 holds 2 exam"),
    (lambda: sampling.stratified(KEY, STRATA, (1, 1, 1, 1)), ValueError, "stratum 3 holds 0 ex"),
    (lambda: sampling.stratified(KEY, STRATA, ()), ValueError, "sizes is empty"),
    (lambda: sampling.stratified(KEY, STRATA * 1.0, SIZES), TypeError, "strata must hold integer"),
    (lambda: sampling.stratified(KEY, STRATA[None], SIZES), ValueError, "strata must be a vector"),
    (lambda: sampling.importance(KEY, P[:3], 2), ValueError, "must sum to 1, got 0.875"),
    (lambda: sampling.importance(KEY, np.array([1.5, -0.5]), 2), ValueError, r"\[1\] is -0.5"),
    (lambda: sampling.importance(KEY, np.array([np.nan, 1]), 2), ValueError, r"\[0\] is nan"),
    (lambda: sampling.importance(KEY, np.array([]), 2), ValueError, "n ≥ 1"),
    (lambda: sampling.importance(KEY, np.array([1]), 2), TypeError, "must be floating point"),
    (lambda: sampling.antithetic(KEY, ORDER[:5], 2), ValueError, "n and m must be even, got n = 5"),
    (lambda: sampling.antithetic(KEY, ORDER, 3), ValueError, "must be even"),
    (lambda: sampling.antithetic(KEY, ORDER, 8), ValueError, "m = 8 > n = 6"),
    (lambda: sampling.fixed_order(ORDER * 1.0, 2), TypeError, "order must hold integers"),
    (lambda: sampling.cyclic(5, 6, 1), ValueError, "m = 6 > n = 5"),
    (lambda: sampling.cyclic(5, 2, 0), ValueError, "num_steps must be at least 1"),
    (lambda: sampling.plain_mean(jnp.zeros((2, 2), int)), ValueError, "indices must be a vector"),
    (lambda: proportional_allocation([3, 0], 3), ValueError, r"counts\[1\] must be at least 1"),
    (lambda: proportional_allocation([3, 4], 1), ValueError, "between 2, one draw.* and n = 7"),
    (lambda: proportional_allocation([3, 4], 8), ValueError, "n = 7, got m = 8"),
    (lambda: neyman_allocation([3, 4], [1.0], 3), ValueError, r"traces must have shape \(2,\)"),
    (lambda: neyman_allocation([3, 4], [1.0, -1.0], 3), ValueError, r"traces\[1\] is -1.0"),
    (lambda: neyman_allocation([3, 4], [np.nan, 1.0], 3), ValueError, r"traces\[0\] is nan"),
    (lambda: optimal_probabilities(jnp.ones(3), 1.5), ValueError, "floor must be"),
    (lambda: optimal_probabilities(jnp.ones((3, 1)), 0.5), ValueError, "norms must be a vector"),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD)
def test_bad_input_is_refused_by_name(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize(
    "strata", [[0, 1, 1, 0, 1, 3], [0, 1, 1, 0, 1, -1], [0, 1, 1, 0, 1, 1], [0, 2, 1, 2, 2, 2]]
)
def test_traced_strata_that_would_bias_give_weights_of_nan(strata):
    sample = jax.jit(sampling.stratified, static_argnums=2)(KEY, jnp.array(strata), SIZES)
    assert np.all(np.isnan(sample.weights))


@pytest.mark.parametrize("p", [[0.5, 0.4], [1.5, -0.5], [np.nan, 1.0]])
def test_traced_probabilities_that_would_bias_give_weights_of_nan(p):
    sample = jax.jit(sampling.importance, static_argnums=2)(KEY, jnp.array(p), 3)
    assert np.all(np.isnan(sample.weights))


def test_a_step_on_a_poisson_sample_has_the_error_of_its_law_and_none_at_an_empty_draw():
    """Over all 32 subsets of 5, with their probabilities: weights 1/(nq), not 1/how many came."""
    rows = np.random.default_rng(4).normal(size=(5, 3)) + 1
    fun, w, optimizer = lambda w, x: jnp.dot(w, x), jnp.ones(3), sj.sgd(1.0)
    step = sj.make_step(fun, optimizer)
    state = sj.init_state(w, optimizer)
    error = ratio_error = 0.0
    for present in itertools.product([False, True], repeat=5):
        indices = np.flatnonzero(present)
        padded = jnp.asarray(np.append(indices, np.full(5 - len(indices), -1)), jnp.int32)
        sample = sampling.Sample(padded, jnp.where(padded >= 0, 0.5, 0.0))  # m = 2
        estimate = np.asarray(w - step(state, jnp.asarray(rows), sample)[0].params)
        np.testing.assert_allclose(estimate, rows[indices].sum(axis=0) / 2, atol=1e-12)
        chance = 0.4 ** len(indices) * 0.6 ** (5 - len(indices))
        error += chance * np.sum((estimate - rows.mean(axis=0)) ** 2)
        mean = rows[indices].mean(axis=0) if len(indices) else np.zeros(3)
        ratio_error += chance * np.sum((mean - rows.mean(axis=0)) ** 2)
    law = expected_squared_error(gradient_moments(fun, w, jnp.asarray(rows)), 2, "poisson")
    assert error == pytest.approx(float(law))
    assert ratio_error != pytest.approx(float(law), rel=0.05)
