"""The claims of estimate and estimators: each trains through make_epoch as a NumPy loop does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from quick import slow

import sgd_jax as sj
from sgd_jax import estimators, sampling
from sgd_jax.estimation import estimators as estimators_module
from sgd_jax.sampling import Sample

N, M, STEPS, RATE = 12, 4, 9, 0.1
RNG = np.random.default_rng(0)
XS, YS = RNG.normal(size=(N, 3)), RNG.normal(size=N)
EXAMPLES = (jnp.asarray(XS), jnp.asarray(YS))
START = np.array([0.5, -1.0, 2.0])
KEYS = jax.random.split(jax.random.key(1), STEPS)
MAX_NORM, MULTIPLIER, KEY = 0.8, 0.7, jax.random.key(5)


def linear(w, example):
    x, y = example
    return (w @ x - y) ** 2 / 2


def stacked(draw):
    return jax.vmap(draw)(KEYS)


SAMPLES = {
    "importance": lambda: stacked(
        lambda key: sampling.importance(key, jnp.arange(1, N + 1) / 78.0, M)
    ),
    "stratified": lambda: stacked(
        lambda key: sampling.stratified(key, jnp.arange(N) // 4, sizes=(2, 1, 1))
    ),
    "Poisson": lambda: stacked(lambda key: sampling.poisson(key, N, 1)),
    "plain": lambda: stacked(lambda key: sampling.without_replacement(key, N, M)),
}


@functools.cache
def samples(name):
    drawn = SAMPLES[name]()
    if name == "Poisson":  # some draws are empty: that is the case to test
        assert 0 < jnp.sum(jnp.all(drawn.indices == -1, axis=1)) < STEPS
        first = int(jnp.argmax(jnp.any(drawn.indices >= 0, axis=1)))
        drawn = jax.tree.map(lambda leaf: jnp.roll(leaf, -first, axis=0), drawn)
    return drawn


def gradients(w):
    return reference.linear_gradients(w, XS, YS)


def loop(drawn, estimate):
    """Returns w after SGD in NumPy, and the costs before each step."""
    w, costs = START, []
    for step, (indices, weights) in enumerate(zip(*map(np.asarray, drawn), strict=True)):
        cost = np.array([[(w @ x - y) ** 2 / 2] for x, y in zip(XS, YS, strict=True)])
        costs.append(reference.estimate(cost, indices, weights)[0])
        w = w - RATE * estimate(w, indices, weights, step)
    return w, costs


def train(drawn, estimator=None, optimizer=None, examples=EXAMPLES, **options):
    optimizer = optimizer or sj.sgd(RATE)
    state = sj.init_state(jnp.asarray(START), optimizer, key=KEY)
    epoch = sj.make_epoch(linear, optimizer, estimator=estimator, **options)
    return epoch(state, examples, drawn)


def assert_equals_loop(drawn, estimator, estimate):
    state, info = train(drawn, estimator)
    w, costs = loop(drawn, estimate)
    np.testing.assert_allclose(state.params, w, rtol=0, atol=1e-12)
    np.testing.assert_allclose(info.cost, costs, rtol=1e-12, atol=1e-14)


def plain(w, indices, weights, step):
    return reference.estimate(gradients(w), indices, weights)


def clip(w, indices, weights, step):
    return reference.clipped_estimate(gradients(w), indices, weights, MAX_NORM)


def noise_of(step):
    return np.asarray(
        optax.tree.random_like(jax.random.fold_in(KEY, step), jnp.asarray(START), jax.random.normal)
    )


def privately(expected_size, deviation=MULTIPLIER * MAX_NORM):
    def estimate(w, indices, weights, step):
        noise = deviation * noise_of(step)
        return reference.private_estimate(gradients(w), indices, MAX_NORM, noise, expected_size)

    return estimate


def anchored(refresh_every):
    anchors = {}

    def estimate(w, indices, weights, step):
        if step % refresh_every == 0:
            anchors["now"] = gradients(w)
        return reference.svrg_estimate(gradients(w), anchors["now"], indices, weights)

    return estimate


# --- each estimator, each scheme, against the loop ---


@pytest.mark.parametrize("estimator", [None, *slow(estimators.mini_batch("materialized"))])
@pytest.mark.parametrize("scheme", SAMPLES)
def test_training_on_samples_uses_their_weights(scheme, estimator):
    assert_equals_loop(samples(scheme), estimator, plain)


@pytest.mark.parametrize("scheme", SAMPLES)
def test_clipped_training_equals_the_loop(scheme):
    assert_equals_loop(samples(scheme), estimators.clipped(MAX_NORM), clip)


@pytest.mark.parametrize("scheme", SAMPLES)
def test_svrg_training_equals_the_loop_with_anchors_of_its_own(scheme):
    assert_equals_loop(samples(scheme), estimators.svrg(4), anchored(4))


@pytest.mark.parametrize("expected_size", [None, 1])
def test_private_training_equals_the_loop_empty_draws_and_all(expected_size):
    estimator = estimators.private(MAX_NORM, MULTIPLIER, expected_size=expected_size)
    assert_equals_loop(samples("Poisson"), estimator, privately(1))


def test_a_matrix_of_indices_is_averaged_by_every_estimator():
    drawn = samples("plain")
    for estimator in (estimators.clipped(MAX_NORM), estimators.svrg(4)):
        by_sample, _ = train(drawn, estimator)
        by_index, _ = train(drawn.indices, estimator)
        np.testing.assert_allclose(by_index.params, by_sample.params, rtol=1e-12)


def test_a_step_on_a_sample_is_a_step_of_an_epoch():
    drawn = samples("importance")
    optimizer = sj.sgd(RATE)
    for estimator in (None, estimators.clipped(MAX_NORM), estimators.svrg(4)):
        step = sj.make_step(linear, optimizer, estimator=estimator)
        state = sj.init_state(jnp.asarray(START), optimizer, key=KEY)
        for s in range(STEPS):
            state, _ = step(state, EXAMPLES, jax.tree.map(lambda leaf, s=s: leaf[s], drawn))
        np.testing.assert_allclose(state.params, train(drawn, estimator)[0].params, rtol=1e-12)


# --- planted faults ---


def test_noise_scaled_for_the_mean_is_caught():
    wrong = estimators.private(MAX_NORM, MULTIPLIER / M)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_equals_loop(samples("plain"), wrong, privately(M))


def test_the_size_that_came_for_the_size_expected_is_caught():
    def ratio(w, indices, weights, step):
        return privately(max(1, (indices >= 0).sum()))(w, indices, weights, step)

    estimator = estimators.private(MAX_NORM, MULTIPLIER)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_equals_loop(samples("Poisson"), estimator, ratio)


def test_weights_of_the_mean_for_those_of_the_sample_are_caught():
    def mean(w, indices, weights, step):
        return reference.estimate(gradients(w), indices, np.full(M, 1 / M))

    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_equals_loop(samples("importance"), None, mean)


def test_a_stale_anchor_is_caught():
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_equals_loop(samples("plain"), estimators.svrg(4), anchored(3))


# --- estimate and take ---


@pytest.mark.parametrize("scheme", SAMPLES)
def test_estimate_is_the_weighted_sum_of_the_rows_of_g(scheme):
    for s in range(STEPS):
        sample = jax.tree.map(lambda leaf, s=s: leaf[s], samples(scheme))
        _, gradient = sj.estimate(linear, jnp.asarray(START), EXAMPLES, sample)
        expected = plain(START, *map(np.asarray, sample), s)
        np.testing.assert_allclose(gradient, expected, atol=1e-14)


def test_an_empty_sample_is_a_gradient_of_zero_even_beside_nan():
    poisoned = (EXAMPLES[0].at[0].set(jnp.nan), EXAMPLES[1])
    sample = Sample(jnp.array([-1, -1]), jnp.zeros(2))
    cost, gradient = sj.estimate(linear, jnp.asarray(START), poisoned, sample)
    assert float(cost) == 0
    assert gradient.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "estimator", [None, estimators.clipped(MAX_NORM), estimators.private(1, 1)]
)
def test_padding_brings_in_no_example_that_was_not_drawn(estimator):
    poisoned = (EXAMPLES[0].at[0].set(jnp.nan), EXAMPLES[1])
    drawn = Sample(jnp.array([[3, -1], [-1, 5]]), jnp.array([[0.5, 0.0], [0.0, 0.5]]))
    state, info = train(drawn, estimator, examples=poisoned)
    assert np.isfinite(state.params).all()
    assert np.isfinite(info.cost).all()


@pytest.mark.parametrize("as_array", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("compile_", [jax.jit, lambda function: function])
def test_take_works_on_numpy_and_jax_examples_compiled_and_not(as_array, compile_):
    examples = {"x": as_array(XS)}
    taken = compile_(lambda indices: sampling.take(examples, indices))(jnp.array([3, 0]))
    np.testing.assert_array_equal(taken["x"], XS[[3, 0]])


@pytest.mark.parametrize("indices", [[0, N], [-2, 1]])
def test_an_index_that_names_no_example_is_refused_or_nan(indices):
    sample = Sample(jnp.array(indices), jnp.full(2, 0.5))
    with pytest.raises(ValueError, match="expected indices from 0 to n - 1 = 11, or -1"):
        sj.estimate(linear, jnp.asarray(START), EXAMPLES, sample)
    _, gradient = jax.jit(lambda s: sj.estimate(linear, jnp.asarray(START), EXAMPLES, s))(sample)
    assert np.isnan(gradient).all()
    state, _ = train(jax.tree.map(lambda leaf: leaf[None], sample))
    assert np.isnan(state.params).all()


# --- statistics, metrics, optimizers ---


def test_the_noise_scale_is_tracked_by_the_optimizer_inside_an_epoch():
    optimizer = optax.chain(sj.noise.track_noise_scale(), optax.sgd(RATE))
    drawn = samples("plain")
    state, info = train(drawn, estimators.with_noise_scale(), optimizer)
    w, parts = START, []
    for indices in np.asarray(drawn.indices):
        rows = gradients(w)[indices]
        mean = rows.mean(axis=0)
        trace = ((rows - mean) ** 2).sum() / (M - 1)
        parts.append((trace, mean @ mean - trace / M))
        w = w - RATE * mean
    np.testing.assert_allclose(np.stack(info.statistics["noise"][:2], 1), parts, rtol=1e-10)
    tracked = state.opt_state[0].mean()
    np.testing.assert_allclose(tracked[:2], np.mean(parts, axis=0), rtol=1e-10)
    np.testing.assert_allclose(state.params, w, rtol=1e-12)


def test_a_chain_that_misses_its_statistics_says_which_estimator_has_them():
    optimizer = optax.chain(sj.noise.track_noise_scale(), optax.sgd(RATE))
    with pytest.raises(ValueError, match=r"estimators\.with_noise_scale"):
        train(samples("plain"), None, optimizer)


def test_the_share_of_clipped_examples_is_reported():
    drawn = samples("plain")
    _, info = train(drawn, estimators.clipped(MAX_NORM))
    norms = np.linalg.norm(gradients(START)[np.asarray(drawn.indices[0])], axis=1)
    assert float(info.statistics["clipped"][0]) == np.mean(norms > MAX_NORM)


@pytest.mark.parametrize("estimator", [None, estimators.clipped(1e9)])
def test_metrics_of_examples_arrive_averaged(estimator):
    def with_metrics(w, example):
        return linear(w, example), {"right": example[1] > 0, "double": 2 * linear(w, example)}

    optimizer = sj.sgd(RATE)
    state = sj.init_state(jnp.asarray(START), optimizer)
    epoch = sj.make_epoch(with_metrics, optimizer, estimator=estimator, has_aux=True)
    drawn = samples("plain")
    state, info = epoch(state, EXAMPLES, drawn.indices)
    np.testing.assert_allclose(info.metrics["double"], 2 * info.cost, rtol=1e-12)
    expected = (YS[np.asarray(drawn.indices)] > 0).mean(axis=1)
    np.testing.assert_allclose(info.metrics["right"], expected)
    np.testing.assert_allclose(state.params, train(drawn)[0].params, rtol=1e-12)


@pytest.mark.parametrize("estimator", [None, estimators.clipped(1e9)])
def test_a_line_search_sees_the_cost_of_the_same_sample(estimator):
    everything = jnp.tile(jnp.arange(N), (8, 1))
    state, info = train(everything, estimator, optax.lbfgs())
    best = np.linalg.lstsq(XS, YS, rcond=None)[0]
    np.testing.assert_allclose(state.params, best, atol=1e-6)
    assert (np.diff(info.cost) <= 1e-12).all()


def test_the_second_epoch_does_not_compile_again():
    optimizer = sj.sgd(RATE)
    traced = []

    def counted(w, example):
        traced.append(None)
        return linear(w, example)

    epoch = sj.make_epoch(counted, optimizer, estimator=estimators.svrg(4))
    state, _ = epoch(sj.init_state(jnp.asarray(START), optimizer), EXAMPLES, samples("plain"))
    first = len(traced)
    epoch(state, EXAMPLES, samples("plain"))
    assert len(traced) == first


# --- what is refused, before any work ---


def test_a_state_of_another_kind_or_optimizer_is_refused():
    adam = sj.init_state(jnp.asarray(START), optax.adam(0.1))
    for estimator in (None, estimators.clipped(1.0)):
        step = sj.make_step(linear, sj.sgd(RATE), estimator=estimator)
        with pytest.raises(TypeError, match=r"must be a TrainState, got .*init_state"):
            step(jnp.asarray(START), EXAMPLES)
        with pytest.raises(ValueError, match="that of another optimizer or of other params"):
            step(adam, EXAMPLES)


def test_lists_of_batches_are_refused_with_their_lengths():
    with pytest.raises(TypeError, match=r"list of 2 with lengths \[2, 3\]; pad shorter ones"):
        train([jnp.array([0, 1, 2]), jnp.array([3, 4])])


def test_weights_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="as many weights as indices"):
        train(Sample(jnp.zeros((3, 2), int), jnp.ones((3, 1))))


def test_an_estimator_in_place_of_its_maker_is_refused():
    made = estimators.clipped(1.0)(linear)
    with pytest.raises(TypeError, match="lambda fun: e"):
        sj.make_step(linear, sj.sgd(RATE), estimator=made)


def test_private_without_a_key_is_refused():
    optimizer = sj.sgd(RATE)
    step = sj.make_step(linear, optimizer, estimator=estimators.private(1.0, 1.0))
    with pytest.raises(ValueError, match="init_state\\(params, optimizer, key="):
        step(sj.init_state(jnp.asarray(START), optimizer), EXAMPLES)


@pytest.mark.parametrize("max_norm", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("make", [estimators.clipped, lambda c: estimators.private(c, 1.0)])
def test_a_bound_that_bounds_nothing_is_refused(make, max_norm):
    with pytest.raises(ValueError, match="max_norm must be a finite number"):
        make(max_norm)


def test_the_full_gradient_of_an_anchor_is_exact_over_chunks(monkeypatch):
    monkeypatch.setattr(estimators_module, "_CHUNK_SIZE", 5)
    found = estimators_module._mean_gradient(linear, jnp.asarray(START), EXAMPLES)
    np.testing.assert_allclose(found, gradients(START).mean(axis=0), rtol=1e-12)
