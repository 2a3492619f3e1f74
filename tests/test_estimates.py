"""The claims of estimates, noise_scale and subsets: by enumeration, identities and coverage."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from quick import slow

import sgd_jax as sj
from sgd_jax import sampling
from sgd_jax.estimation import (
    _intervals,
    _noise_scale,
    expected_cosine,
    expected_squared_error,
    gradient_moments,
    mean_cosine,
    subset_errors,
)
from sgd_jax.estimation.batch_size import (
    adascale_gain,
    cabs_batch_size,
    gradient_diversity,
    inner_product_test,
    norm_test,
    norm_test_batch_size,
    orthogonality_test,
)
from sgd_jax.estimation.noise import (
    NoiseParts,
    curvature_noise_scale,
    gradient_signal_to_noise,
    noise_scale,
    two_batch_noise_parts,
)
from sgd_jax.per_example import per_example_grad

ROWS = np.random.default_rng(0).normal(size=(7, 3)) + 0.5
W = jnp.zeros(3)


def dot(w, x):
    """A cost whose gradient at any w is the example itself."""
    return jnp.dot(w, x)


def moments_of(rows, **options):
    rows = jnp.asarray(rows)
    return gradient_moments(dot, jnp.zeros(rows.shape[1], rows.dtype), rows, **options)


ALL = moments_of(ROWS, per_coordinate=True, keep_norms=True, keep_alignments=True)
MEAN, TRACE, MEAN_NORM, VARIANCE = reference.moments(ROWS)
NORM2 = float(MEAN @ MEAN)
B = TRACE / NORM2


def close(actual, expected, atol=1e-12):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


# Cosine


@pytest.mark.parametrize("m", range(1, 8))
def test_the_cosine_of_expectations_is_exact_over_all_subsets(m):
    subsets = list(itertools.combinations(range(7), m))
    estimates = np.array([ROWS[list(s)].mean(axis=0) for s in subsets])
    inner = np.mean(estimates @ MEAN)
    exact = inner / np.sqrt(np.mean(np.sum(estimates**2, axis=1)) * NORM2)
    close(expected_cosine(ALL, m), exact)
    close(expected_cosine(ALL, m), 1 / np.sqrt(1 + (7 - m) / 6 * B / m))


def test_the_expectation_of_the_cosine_is_another_number():
    cosines = [ROWS[i] @ MEAN / np.linalg.norm(ROWS[i]) / np.linalg.norm(MEAN) for i in range(7)]
    assert abs(np.mean(cosines) - float(expected_cosine(ALL, 1))) > 0.01


@pytest.mark.parametrize("scheme", ["with_replacement", "poisson", "importance"])
def test_the_cosine_follows_from_the_error_in_every_scheme(scheme):
    error = expected_squared_error(ALL, 3, scheme)
    close(expected_cosine(ALL, 3, scheme), np.sqrt(NORM2 / (NORM2 + error)))


def test_the_cosine_of_a_stratified_estimate_takes_the_mean_of_all_strata():
    labels = np.array([0, 1, 0, 1, 0, 1, 1])
    strata = moments_of(ROWS, strata=labels)
    error = expected_squared_error(strata, (2, 2), "stratified")
    close(expected_cosine(strata, (2, 2), "stratified"), np.sqrt(NORM2 / (NORM2 + error)))


# Statistics with a name


def test_diversity_is_one_plus_b_over_n():
    close(7 * gradient_diversity(ALL), 1 + B)
    close(gradient_diversity(ALL), np.sum(ROWS**2) / np.sum(ROWS.sum(axis=0) ** 2))


@pytest.mark.parametrize("m", [1, 5, 100])
def test_the_norm_test_splits_into_inner_product_and_orthogonality(m):
    close(norm_test(ALL, m), B / m)
    close(inner_product_test(ALL, m) + orthogonality_test(ALL, m), B / m)
    along = (ROWS @ MEAN) / NORM2
    across = ROWS - np.outer(along, MEAN)
    close(inner_product_test(ALL, m), np.var(ROWS @ MEAN) / (m * NORM2**2))
    close(orthogonality_test(ALL, m), np.mean(np.sum(across**2, axis=1)) / (m * NORM2))


def test_at_its_batch_size_the_norm_test_holds_with_equality():
    close(norm_test_batch_size(ALL, 0.5), B / 0.25)


@pytest.mark.parametrize("scale", [1, 4, 32.5])
def test_adascale_gain_is_that_of_the_noise_scale(scale):
    close(adascale_gain(ALL, 5, scale), (1 + B / 5) / (1 + B / (5 * scale)))
    assert 1 <= adascale_gain(ALL, 5, scale) <= scale


def test_adascale_gain_without_signal_is_the_scale():
    opposed = moments_of(np.array([[1.0, 0.0], [-1.0, 0.0]]))
    assert adascale_gain(opposed, 5, 8) == 8


def test_gsnr_is_the_squared_mean_over_the_variance_of_each_coordinate():
    close(gradient_signal_to_noise(ALL), MEAN**2 / VARIANCE)


def test_cabs_is_learning_rate_times_trace_over_cost():
    x = jnp.array([1.0, 3.0])  # costs ½, 4½; gradients −1, −3: mean cost 2½, trace 1
    moments = gradient_moments(lambda w, x: (w - x) ** 2 / 2, jnp.array(0.0), x)
    close(cabs_batch_size(moments, 0.5), 0.5 * 1 / 2.5)


# Noise scale


@pytest.mark.parametrize("n", [3, 4, 6])
def test_the_parts_are_unbiased_over_all_samples_from_a_finite_population(n):
    scales = [
        noise_scale(moments_of(ROWS[list(s)]), of="subset", population=7)
        for s in itertools.combinations(range(7), n)
    ]
    close(np.mean([s.parts.trace for s in scales]), TRACE)
    close(np.mean([s.parts.squared_norm for s in scales]), NORM2)


def test_the_parts_are_unbiased_over_all_samples_from_an_endless_population():
    rows = ROWS[:4]
    mean, trace, *_ = reference.moments(rows)
    scales = [
        noise_scale(moments_of(rows[list(s)]), of="population")
        for s in itertools.product(range(4), repeat=3)
    ]
    close(np.mean([s.parts.trace for s in scales]), trace)
    close(np.mean([s.parts.squared_norm for s in scales]), mean @ mean)


def test_of_a_whole_population_the_noise_scale_is_known():
    scale = noise_scale(ALL, of="subset", population=7)
    close(scale.value, B)
    close((scale.low, scale.high), (B, B), atol=1e-7)  # a square root of rounding
    assert not scale.undetermined


@pytest.mark.parametrize("keep", [False, True])
def test_of_these_examples_the_noise_scale_is_exact(keep):
    moments = moments_of(ROWS, keep_norms=keep, keep_alignments=keep)
    scale = noise_scale(moments, of="these_examples")
    close([scale.value, scale.low, scale.high], [B, B, B])
    close(scale.parts, (TRACE, NORM2))
    assert not scale.undetermined
    assert repr(scale) == f"B = {B:.3g} of these 7 examples, exact"


def test_of_one_example_the_noise_scale_is_zero_and_at_a_stationary_point_infinite():
    assert noise_scale(moments_of(ROWS[:1]), of="these_examples").value == 0
    opposed = noise_scale(moments_of(np.array([[1.0], [-1.0]])), of="these_examples")
    assert opposed.value == np.inf
    assert not opposed.undetermined


def test_repr_says_in_one_line_what_b_is_and_of_what():
    rows = np.random.default_rng(1).normal(size=(400, 3)) + 1
    moments = moments_of(rows, keep_norms=True, keep_alignments=True)
    scale = noise_scale(moments, of="population")
    ends = f"B = {scale.value:.3g} ({scale.low:.3g} to {scale.high:.3g}) examples"
    assert repr(scale) == f"{ends} of the population, if params were not fitted to these 400"
    subset = repr(noise_scale(moments, of="subset", population=1204))
    assert subset.endswith(" of a set of 1204, from 400 of them")
    bare = repr(noise_scale(moments_of(rows), of="population"))
    assert bare.endswith("; an interval needs keep_norms=True and keep_alignments=True")
    still = noise_scale(
        moments_of(rows - rows.mean(axis=0), keep_norms=True, keep_alignments=True), of="population"
    )
    assert repr(still).startswith("B undetermined, at least ")
    assert "\n" not in repr(
        jax.vmap(lambda m: noise_scale(m, of="population"))(
            jax.tree.map(lambda leaf: leaf[None], moments)
        )
    )


def test_the_parts_of_the_leaves_add_up_and_are_those_of_the_leaf_alone():
    fun = lambda p, x: jnp.dot(p["a"], x[:1]) + jnp.dot(p["b"], x[1:])  # noqa: E731
    params = {"a": jnp.zeros(1), "b": jnp.zeros(2)}
    scale = noise_scale(gradient_moments(fun, params, jnp.array(ROWS)), of="population")
    alone = noise_scale(moments_of(ROWS[:, 1:]), of="population")
    close(scale.per_leaf["b"].ratio(), alone.value)
    close(scale.per_leaf["a"].trace + scale.per_leaf["b"].trace, scale.parts.trace)
    close(scale.per_leaf["a"].squared_norm + alone.parts.squared_norm, scale.parts.squared_norm)


def leave_one_out_covariance(rows):
    """Jackknife covariance of s² and ‖Ĝ‖² − s²/n, by leaving out each row in turn."""
    n = len(rows)
    parts = []
    for i in range(n):
        mean, trace, *_ = reference.moments(np.delete(rows, i, axis=0))
        s2 = trace * (n - 1) / (n - 2)
        parts.append((s2, mean @ mean - s2 / (n - 1)))
    parts = np.array(parts)
    return (n - 1) * np.cov(parts.T, bias=True)


def jackknife_of(moments):
    distances = moments.squared_norms - 2 * moments.alignments + moments.squared_norm
    return _noise_scale._jackknife(distances, moments.alignments - moments.squared_norm, 1.0)


def test_the_jackknife_is_that_of_leaving_each_example_out():
    var_s, cov, var_u = jackknife_of(ALL)
    close([[var_s, cov], [cov, var_u]], leave_one_out_covariance(ROWS))


def test_fieller_s_ends_solve_its_equation():
    """(S − B U)² = z² Var(S − B U) at both, with the textbook's z."""
    covariance = np.array([[0.3, 0.05], [0.05, 0.2]])
    spread = _intervals.Spread(0.3, 0.05, 0.2)
    z = _intervals.normal_quantile(0.95)
    low, high, determined = _intervals.fieller(jnp.array(5.0), jnp.array(2.0), spread, z)
    for end in (low, high):
        contrast = np.array([1.0, -float(end)])
        close((5 - end * 2) ** 2 / (contrast @ covariance @ contrast), 1.959963984540054**2, 1e-8)
    assert low < 2.5 < high
    assert determined


def test_the_interval_holds_fieller_s():
    rows = np.random.default_rng(1).normal(size=(400, 3)) + 1
    moments = moments_of(rows, keep_norms=True, keep_alignments=True)
    scale = noise_scale(moments, of="population")
    spread = _intervals.Spread(*leave_one_out_covariance(rows)[[0, 0, 1], [0, 1, 1]])
    low, high, _ = _intervals.fieller(*scale.parts, spread, _intervals.normal_quantile(0.95))
    assert 0.9 * low < scale.low <= low + 1e-9
    assert high - 1e-9 <= scale.high < 1.5 * high


def test_the_lower_end_is_finite_whatever_the_sample():
    """‖∇C‖² ≥ 0 is known: however far its estimate is below 0, B is not certain to be infinite."""
    rows = np.random.default_rng(0).normal(size=(200, 1))
    moments = moments_of(rows - rows.mean(), keep_norms=True, keep_alignments=True)
    scale = noise_scale(moments, of="population")
    assert scale.parts.squared_norm < 0
    assert np.isfinite(scale.low)


def test_a_quantile_of_student_s_t_is_the_table_s():
    for degrees, table in ((5, 2.5706), (9, 2.2622), (19, 2.0930), (1000, 1.9623)):
        found = _intervals.student_quantile(0.95, jnp.array(degrees, jnp.float64))
        assert abs(found - table) < 3e-3


def test_the_upper_end_of_a_tail_is_that_of_the_profile_likelihood():
    """The largest mean of a Pareto law within χ²₁/2 of the best, found by a dense search."""
    excess = np.sort(np.random.default_rng(0).pareto(3.0, size=50))
    excess /= excess.mean()
    shape, scale = np.meshgrid(np.linspace(0.002, 0.995, 400), np.geomspace(0.05, 5, 1500))
    stretched = np.log1p(shape[..., None] / scale[..., None] * excess).mean(axis=-1)
    likelihood = -np.log(scale) - (1 + 1 / shape) * stretched
    inside = likelihood >= likelihood.max() - 1.96**2 / 100
    expected = (scale / (1 - shape))[inside].max()
    found = _intervals._tail_stretch(jnp.array(excess), jnp.array(1.96**2 / 100))
    assert abs(found / expected - 1) < 0.02


def test_a_sample_whose_variance_rests_on_a_few_examples_gives_a_warning():
    rows = np.random.default_rng(0).normal(size=(200, 3)) + 1
    measured = moments_of(rows, keep_norms=True, keep_alignments=True)
    assert noise_scale(measured, of="population").effective_count > 50
    rows[0] *= 100
    moments = moments_of(rows, keep_norms=True, keep_alignments=True)
    with pytest.warns(RuntimeWarning, match=r"rests on 1\.0 of 200 examples"):
        scale = noise_scale(moments, of="population")
    assert scale.high == np.inf
    distances = np.sum((rows - rows.mean(axis=0)) ** 2, axis=1)
    close(scale.effective_count, distances.sum() ** 2 / np.sum(distances**2), 1e-9)


@functools.cache
def draw(kind, mean, n=200, p=20, repeats=1000):
    """Returns moments of ``repeats`` independent data sets, and the true noise scale."""
    key = jax.random.key(0)
    noise = {"normal": jax.random.normal, "laplace": jax.random.laplace}[kind](key, (repeats, n, p))
    variance = {"normal": 1.0, "laplace": 2.0}[kind]
    measure = jax.jit(jax.vmap(lambda x: moments_of(x, keep_norms=True, keep_alignments=True)))
    return measure(mean + noise), variance / mean**2 if mean else np.inf


def assert_covers(low, high, truth, confidence):
    """Asserts that the share of intervals that hold the truth is the confidence, ± 2.5 %."""
    share = np.mean((low <= truth) & (truth <= high))
    assert abs(share - confidence) < 0.025, f"coverage is {share:.3f}"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["normal", "laplace"])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_intervals_cover_the_truth_as_often_as_they_say(kind, confidence):
    moments, truth = draw(kind, mean=0.5)
    measure = functools.partial(noise_scale, of="population", confidence=confidence)
    scales = jax.jit(jax.vmap(measure))(moments)
    assert_covers(scales.low, scales.high, truth, confidence)
    middle = scales.value
    for factor in (2 / 3, 3 / 2):
        low, high = (middle + factor * (end - middle) for end in (scales.low, scales.high))
        with pytest.raises(AssertionError, match="coverage"):
            assert_covers(low, high, truth, confidence)


def test_without_a_signal_the_noise_scale_is_undetermined():
    moments, _ = draw("normal", mean=0.0)
    scales = jax.jit(jax.vmap(functools.partial(noise_scale, of="population")))(moments)
    assert np.mean(scales.undetermined) > 0.95
    undetermined = np.asarray(scales.undetermined)
    assert np.all(np.isnan(scales.value[undetermined]))
    assert np.all(np.isinf(scales.high[undetermined]))
    assert np.all(scales.low[undetermined] > 0)  # the data still say that B is large
    norms = scales.parts.squared_norm
    assert np.mean(norms < 0) > 0.3  # not clamped
    assert abs(np.mean(norms)) < 4 * np.std(norms) / np.sqrt(len(norms))


def test_with_a_signal_it_is_determined():
    moments, _ = draw("normal", mean=0.5)
    measure = functools.partial(noise_scale, of="population")
    assert not np.any(jax.jit(jax.vmap(measure))(moments).undetermined)


def test_without_examples_kept_there_is_no_interval():
    scale = noise_scale(moments_of(ROWS), of="population")
    assert np.isnan(scale.low)
    assert np.isnan(scale.high)
    close(scale.value, scale.parts.trace / scale.parts.squared_norm)
    opposed = noise_scale(moments_of(np.array([[1.0], [-1.0]])), of="population")
    assert opposed.undetermined
    assert np.isnan(opposed.value)


# Two batch sizes


def mean_squared_norm_over_subsets(m):
    subsets = itertools.combinations(range(7), m)
    return np.mean([np.sum(ROWS[list(s)].mean(axis=0) ** 2) for s in subsets])


@pytest.mark.parametrize(("small", "big"), [(1, 2), (2, 5), (3, 7)])
def test_two_batch_sizes_give_trace_and_norm_over_all_subsets(small, big):
    norms = mean_squared_norm_over_subsets(small), mean_squared_norm_over_subsets(big)
    parts = two_batch_noise_parts(*norms, small, big, population=7)
    close(parts.trace, TRACE)
    close(parts.squared_norm, NORM2)
    uncorrected = two_batch_noise_parts(*norms, small, big)
    close(uncorrected.trace, TRACE * 7 / 6)
    close(uncorrected.squared_norm, NORM2 - TRACE / 6)


def test_two_batch_sizes_with_replacement_need_no_correction():
    small, big = [TRACE / m + NORM2 for m in (2, 6)]
    parts = two_batch_noise_parts(small, big, 2, 6)
    close(parts.trace, TRACE)
    close(parts.squared_norm, NORM2)


def test_a_negative_squared_norm_is_undetermined_not_clamped():
    parts = two_batch_noise_parts(5.0, 1.0, 1, 2)
    assert float(parts.squared_norm) == -3.0
    assert np.isnan(parts.ratio())


# Curvature


@functools.cache
def network_problem():
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (9, 3), jnp.float64)
    y = jax.random.uniform(keys[1], (9, 2), jnp.float64)
    fun = lambda w, e: sj.logit_cross_entropy_cost(sj.networks.weighted_input(w, e[0]), e[1])  # noqa: E731
    return fun, sj.init_network(keys[2], (3, 2, 2), dtype=jnp.float64), (x, y)


@functools.cache
def dense_curvature():
    """tr(HΣ) and GᵀHG from the whole Hessian and all gradients."""
    fun, network, examples = network_problem()
    vector, unravel = jax.flatten_util.ravel_pytree(network)
    mean_cost = sj.mean_cost(lambda v, e: fun(unravel(v), e))
    H = np.asarray(jax.hessian(mean_cost)(vector, examples))
    one = lambda v, e: fun(unravel(v), e)  # noqa: E731
    g = np.asarray(jax.vmap(jax.grad(one), (None, 0))(vector, examples))
    mean = g.mean(axis=0)
    covariance = (g - mean).T @ (g - mean) / len(g)
    return np.trace(H @ covariance), mean @ H @ mean


@pytest.mark.slow
def test_the_exact_curvature_noise_is_that_of_the_dense_hessian():
    found = curvature_noise_scale(*network_problem(), chunk_size=4)
    noise, curvature = dense_curvature()
    close(found.noise, noise)
    close(found.curvature, curvature)
    assert found.standard_error == 0
    assert curvature <= 0 or np.isclose(found.value, noise / curvature, rtol=1e-10)


def assert_mean_is(found, noise):
    error = float(found.noise_standard_error)
    assert found.curvature <= 0 or np.isclose(error, found.standard_error * found.curvature)
    assert abs(found.noise - noise) < 3 * error
    assert error < 0.1 * abs(noise)


def test_random_probes_agree_with_it_within_their_standard_error():
    noise, _ = dense_curvature()
    options = {"key": jax.random.key(0), "num_probes": 400}
    found = curvature_noise_scale(*network_problem(), **options)
    assert_mean_is(found, noise)
    for factor in (2 / 3, 3 / 2):
        with pytest.raises(AssertionError):
            assert_mean_is(found, factor * noise)


# Gaussian linear regression: x ~ N(0, I), y = ⟨w*, x⟩ + noise; g = x (⟨x, w − w*⟩ − noise)


def gaussian_regression(n=100_000, d=5, sigma=0.7):
    keys = jax.random.split(jax.random.key(3), 2)
    x, noise = jax.random.normal(keys[0], (n, d)), sigma * jax.random.normal(keys[1], (n,))
    away = jnp.linspace(0.2, 1.0, d)  # w − w*
    fun = lambda w, e: (jnp.dot(w, e[0]) - e[1]) ** 2 / 2  # noqa: E731
    moments = gradient_moments(fun, away, (x, noise), keep_norms=True, keep_alignments=True)
    squared = float(away @ away)
    return moments, (fun, away, (x, noise)), (d + 1) * squared + sigma**2 * d, squared


def assert_within(actual, expected, standard_error):
    assert abs(actual - expected) < 4 * standard_error
    assert standard_error < 0.02 * expected


def test_gaussian_linear_regression_has_its_closed_form():
    moments, _, trace, squared_norm = gaussian_regression()
    scale = noise_scale(moments, of="population")
    var_trace, _, var_norm = jackknife_of(moments)
    for actual, expected, variance in (
        (scale.parts.trace, trace, var_trace),
        (scale.parts.squared_norm, squared_norm, var_norm),
    ):
        assert_within(actual, expected, np.sqrt(variance))
        for factor in (2 / 3, 3 / 2):
            with pytest.raises(AssertionError):
                assert_within(actual, factor * expected, np.sqrt(variance))
    assert scale.low < trace / squared_norm < scale.high


@pytest.mark.slow
def test_with_the_unit_hessian_of_gaussian_regression_both_noise_scales_agree():
    moments, problem, *_ = gaussian_regression(n=5_000)
    simple = noise_scale(moments, of="these_examples").value
    found = curvature_noise_scale(*problem, key=jax.random.key(0), num_probes=50)
    assert abs(found.value - simple) < 4 * found.standard_error + 0.05 * simple


# Subsets


def test_the_alignment_of_a_control_variate_needs_the_norm_of_the_mean_gradient():
    """Enumerated over all mini-batches of 2: ĝ = mean(g − h) + H."""
    generator = np.random.default_rng(3)
    g, h = generator.normal(size=(2, 6, 3)) + 0.5
    h = g + 0.3 * h
    estimates = np.array(
        [
            (g - h)[list(s)].mean(axis=0) + h.mean(axis=0)
            for s in itertools.combinations(range(6), 2)
        ]
    )
    mean = g.mean(axis=0)
    alignment = np.mean(estimates @ mean) / np.sqrt(
        np.mean(np.sum(estimates**2, axis=1)) * (mean @ mean)
    )
    moments = moments_of(g - h)
    close(expected_cosine(moments, 2, squared_norm=mean @ mean), alignment)
    assert abs(expected_cosine(moments, 2) - alignment) > 0.05


@pytest.mark.parametrize("heavy", [False, True])
def test_the_mean_cosine_is_that_of_all_subsets_and_not_the_alignment(heavy):
    rows = (
        np.random.default_rng(5).normal(size=(7, 3))
        * (np.exp(2 * np.random.default_rng(6).normal(size=(7, 1))) if heavy else 1)
        + 0.3
    )
    gram = jnp.array(rows @ rows.T)
    indices = jnp.array(list(itertools.combinations(range(7), 2)))
    found = mean_cosine(gram, sampling.Sample(indices, jnp.full(indices.shape, 0.5)))
    mean = rows.mean(axis=0)
    estimates = rows[np.asarray(indices)].mean(axis=1)
    cosines = estimates @ mean / np.linalg.norm(estimates, axis=1) / np.linalg.norm(mean)
    close(found.mean, cosines.mean(), 1e-10)
    close(found.standard_error, cosines.std(ddof=1) / np.sqrt(len(cosines)), 1e-10)
    alignment = float(expected_cosine(moments_of(rows), 2))
    assert abs(cosines.mean() - alignment) > 0.01


def test_a_cosine_that_is_undefined_is_left_out_of_the_mean():
    samples = sampling.Sample(jnp.array([[0], [-1], [1]]), jnp.array([[1.0], [0.0], [1.0]]))
    found = mean_cosine(jnp.eye(2), samples)
    close(found.mean, 0.5**0.5)
    close(found.standard_error, 0)


def test_subset_errors_are_those_of_the_gradients_written_down():
    gram = per_example_grad(dot)(W, jnp.array(ROWS)).gram()
    generator = np.random.default_rng(0)
    indices = generator.integers(-1, 7, size=(2, 5, 4))
    weights = generator.normal(size=(2, 5, 4))
    errors = subset_errors(gram, sampling.Sample(jnp.array(indices), jnp.array(weights)))
    assert errors.squared_error.shape == (2, 5)
    for k in np.ndindex(2, 5):
        estimate = reference.estimate(ROWS, indices[k], weights[k])
        close(errors.squared_error[k], np.sum((estimate - MEAN) ** 2), atol=1e-11)
        cosine = estimate @ MEAN / np.linalg.norm(estimate) / np.linalg.norm(MEAN)
        close(errors.cosine[k], cosine, atol=1e-11)


@pytest.mark.parametrize("m", [1, 3, 7, *slow(2, 4, 5, 6)])
def test_the_mean_of_the_errors_of_all_subsets_is_the_law(m):
    gram = per_example_grad(dot)(W, jnp.array(ROWS)).gram()
    indices = jnp.array(list(itertools.combinations(range(7), m)))
    errors = subset_errors(gram, sampling.Sample(indices, jnp.full(indices.shape, 1 / m)))
    close(np.mean(errors.squared_error), expected_squared_error(ALL, m))


@pytest.mark.slow
def test_thousands_of_drawn_subsets_agree_with_the_law():
    rows = np.random.default_rng(2).normal(size=(300, 50)) + 0.3
    moments = moments_of(rows)
    keys = jax.random.split(jax.random.key(0), 3000)
    samples = jax.jit(jax.vmap(lambda key: sampling.without_replacement(key, 300, 20)))(keys)
    errors = subset_errors(jnp.array(rows @ rows.T), samples)
    law = float(expected_squared_error(moments, 20))
    standard_error = float(jnp.std(errors.squared_error)) / np.sqrt(3000)
    assert_within(np.mean(errors.squared_error), law, standard_error)
    for factor in (2 / 3, 3 / 2):
        with pytest.raises(AssertionError):
            assert_within(np.mean(errors.squared_error), factor * law, standard_error)
    formula = float(expected_cosine(moments, 20))
    assert abs(np.mean(errors.cosine) / formula - 1) < 0.05


# Bad input

STRATA = moments_of(ROWS, strata=np.array([0, 1, 0, 1, 0, 1, 1]))
ZERO_P = np.array([0, 0, 1, 1, 1, 1, 1]) / 5
ONE = moments_of(ROWS[:1])
BAD = [
    (lambda: expected_squared_error(ALL, 2, "bootstrap"), ValueError, "scheme must be one of"),
    (lambda: expected_squared_error(ALL, 8), ValueError, "batch_size must be at most n, got 8 > 7"),
    (lambda: expected_squared_error(ALL, 8, "poisson"), ValueError, "at most n, got 8 > 7"),
    (lambda: expected_squared_error(ALL, 0), ValueError, "batch_size must be at least 1"),
    (lambda: expected_squared_error(ALL, 2.0), TypeError, "batch_size must be a whole number"),
    (lambda: expected_squared_error(STRATA, 2), ValueError, "moments of one set"),
    (
        lambda: expected_squared_error(ALL, (1, 2), "stratified"),
        ValueError,
        "needs moments of strata",
    ),
    (lambda: expected_squared_error(STRATA, 2, "stratified"), ValueError, "of the 2 strata"),
    (lambda: expected_squared_error(STRATA, (1,), "stratified"), ValueError, "of the 2 strata"),
    (
        lambda: expected_squared_error(STRATA, (1, 0), "stratified"),
        ValueError,
        r"batch_size\[1\] must be at least 1",
    ),
    (
        lambda: expected_squared_error(STRATA, (4, 1), "stratified"),
        ValueError,
        r"batch_size\[0\] is 4, but stratum 0 holds 3",
    ),
    (
        lambda: expected_squared_error(ALL, 2, "importance", probabilities=ZERO_P),
        ValueError,
        r"probabilities\[0\] is 0 but the gradient .* \(2 such examples\)",
    ),
    (
        lambda: expected_squared_error(ALL, 2, "importance", probabilities=np.ones(7) / 8),
        ValueError,
        "must sum to 1",
    ),
    (
        lambda: expected_squared_error(ALL, 2, "importance", probabilities=np.ones(6) / 6),
        ValueError,
        r"must have shape \(7,\)",
    ),
    (
        lambda: expected_squared_error(moments_of(ROWS), 2, "importance", probabilities=ZERO_P),
        ValueError,
        "keep_norms=True",
    ),
    (lambda: expected_squared_error(ALL, 2, probabilities=ZERO_P), ValueError, "belong to scheme"),
    (lambda: expected_squared_error(ALL, 2, max_size=3), ValueError, "max_size belongs to"),
    (
        lambda: expected_squared_error(ALL, 2, "poisson", max_size=8),
        ValueError,
        "max_size = 8 > n = 7",
    ),
    (lambda: inner_product_test(moments_of(ROWS), 2), ValueError, "keep_alignments=True"),
    (lambda: gradient_signal_to_noise(moments_of(ROWS)), ValueError, "per_coordinate=True"),
    (lambda: norm_test(ALL, 0), ValueError, "batch_size must be at least 1"),
    (lambda: norm_test_batch_size(ALL, 0.0), ValueError, "theta must be"),
    (lambda: cabs_batch_size(ALL, -1.0), ValueError, "learning_rate must be"),
    (lambda: adascale_gain(ALL, 5, 0.5), ValueError, "scale must be"),
    (lambda: noise_scale(ONE, of="population"), ValueError, "at least 2 examples, got n = 1"),
    (lambda: noise_scale(STRATA, of="these_examples"), ValueError, "of strata take moments.pooled"),
    (lambda: noise_scale(ALL, of="population", confidence=1.0), ValueError, "confidence must be"),
    (
        lambda: noise_scale(ALL, of="subset", population=6),
        ValueError,
        "population must be at least n",
    ),
    (lambda: noise_scale(ALL, of="sample"), ValueError, "of='sample': expected 'these_examples'"),
    (lambda: noise_scale(ALL, of="subset"), ValueError, "population=None with of='subset'"),
    (
        lambda: noise_scale(ALL, of="population", population=9),
        ValueError,
        "population=9 with of='population'",
    ),
    (lambda: two_batch_noise_parts(1.0, 1.0, 2, 2), ValueError, "must exceed small_batch_size"),
    (
        lambda: two_batch_noise_parts(1.0, 1.0, 2, 5, population=4),
        ValueError,
        "at least big_batch_size",
    ),
    (
        lambda: curvature_noise_scale(dot, W, ROWS, num_probes=5),
        ValueError,
        "key and num_probes together",
    ),
    (
        lambda: curvature_noise_scale(dot, W, ROWS, key=jax.random.key(0), num_probes=1),
        ValueError,
        "num_probes must be at least 2",
    ),
    (
        lambda: subset_errors(jnp.ones((2, 3)), sampling.plain_mean(jnp.array([0]))),
        ValueError,
        r"gram must be \(n, n\)",
    ),
    (
        lambda: subset_errors(jnp.ones((2, 2)), sampling.Sample(jnp.zeros(2, int), jnp.ones(3))),
        ValueError,
        "of one shape",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD)
def test_bad_input_is_refused_by_name(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_a_probability_of_zero_is_allowed_where_the_gradient_is_zero():
    rows = ROWS.copy()
    rows[0] = 0
    moments = moments_of(rows, keep_norms=True)
    p = np.array([0, 1, 1, 1, 1, 1, 1]) / 6
    assert np.isfinite(expected_squared_error(moments, 2, "importance", probabilities=p))


def test_a_ratio_of_parts_is_nan_at_zero():
    assert np.isnan(NoiseParts(jnp.array(1.0), jnp.array(0.0)).ratio())


def test_estimates_run_under_jit():
    inside = jax.jit(
        lambda m: (
            expected_squared_error(m, 3),
            expected_cosine(m, 3),
            noise_scale(m, of="population"),
        )
    )
    outside = (
        expected_squared_error(ALL, 3),
        expected_cosine(ALL, 3),
        noise_scale(ALL, of="population"),
    )
    jax.tree.map(close, inside(ALL), outside)
