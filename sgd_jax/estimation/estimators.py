"""Estimators of the gradient, in the shape of optax's optimizers: a pair of pure functions.

`make_step` and `make_epoch` take one as ``estimator=``. Each function here returns a maker: from
the cost of ONE example to an `Estimator`. Your own is a function ``fun -> Estimator`` too.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import optax

from sgd_jax import _validate
from sgd_jax._chunks import chunks
from sgd_jax.estimation import svrg as _svrg
from sgd_jax.estimation._estimate import chosen, estimate_by
from sgd_jax.estimation._mean_gradient import mean_value_and_grad
from sgd_jax.estimation._noise_scale import NoiseParts
from sgd_jax.per_example import per_example_value_and_grad
from sgd_jax.sampling import Sample
from sgd_jax.typing import Array, CostFn, Examples, MeanStrategy, Params, PyTree

__all__ = [
    "Estimator",
    "MakeEstimator",
    "MiniBatch",
    "SVRGState",
    "clipped",
    "mini_batch",
    "private",
    "svrg",
    "with_noise_scale",
]

_CHUNK_SIZE = 1000


class Estimator(NamedTuple):
    """Makes estimates of ∇C from samples: two pure functions, and the state between them."""

    init: Callable[[Params, Examples], PyTree]
    """``(params, examples) -> state`` before the first step; () where nothing is carried."""
    estimate: Callable[
        [PyTree, Params, Examples, Sample, Array | None],
        tuple[Array, Params, dict[str, Any], PyTree],
    ]
    """``(state, params, examples, sample, key) -> (cost, gradient, statistics, state)``.

    ``examples`` are all n; ``gradient`` is like params; ``statistics`` is a dict of pytrees of
    arrays by name. ``key`` is new in every step, None if training was started without one."""


MakeEstimator: TypeAlias = Callable[[CostFn], Estimator]
"""From the cost of ONE example to an estimator of the gradient of its mean."""


class MiniBatch(NamedTuple):
    """What `mini_batch` returns: `make_epoch` gathers many mini-batches of it at a time."""

    strategy: MeanStrategy

    def __call__(self, fun: CostFn) -> Estimator:
        """Returns the estimator of a cost."""
        mean = mean_value_and_grad(fun, strategy=self.strategy)

        def estimate(
            state: PyTree, params: Params, examples: Examples, sample: Sample, key: Array | None
        ) -> tuple[Array, Params, dict[str, Any], PyTree]:
            del key
            return *estimate_by(mean, params, examples, sample), {}, state

        return Estimator(_nothing, estimate)


def mini_batch(strategy: MeanStrategy = "auto") -> MiniBatch:
    """Returns the default estimator, ĝ = Σ_k c_k g_k: see `estimate`.

    With weights of 1/m it is the mini-batch gradient, with those of `sampling.importance` or
    `sampling.stratified` their estimates. Unbiased if the sample is.

    Args:
      strategy: how it is computed, see `mean_value_and_grad`.

    Raises:
      ValueError: an unknown strategy.
    """
    if strategy not in get_args(MeanStrategy):
        raise ValueError(f"strategy must be one of {get_args(MeanStrategy)}, got {strategy!r}")
    return MiniBatch(strategy)


def clipped(max_norm: float | Array) -> MakeEstimator:
    """Returns ĝ = Σ_k c_k min(1, max_norm/‖g_k‖) g_k: no example pulls harder than max_norm.

    Biased for ∇C as soon as one gradient is clipped. Its statistic ``"clipped"`` is the share of
    the sample's examples that were.

    Args:
      max_norm: bound of ‖g_k‖ over all parameters together, above 0.

    Raises:
      ValueError: a concrete max_norm that is not above 0 and finite.
      TypeError: max_norm is not one number.
    """
    _validate.finite_float("max_norm", max_norm, low=0, low_allowed=False, high=float("inf"))

    def make(fun: CostFn) -> Estimator:
        value_and_grad = per_example_value_and_grad(fun)

        def estimate(
            state: PyTree, params: Params, examples: Examples, sample: Sample, key: Array | None
        ) -> tuple[Array, Params, dict[str, Any], PyTree]:
            del key
            rows, weights, is_empty = chosen(examples, sample)
            costs, grads = value_and_grad(params, rows)
            is_clipped = (sample.indices >= 0) & (grads.squared_norms() > max_norm**2)
            share = jnp.sum(is_clipped) / jnp.maximum(jnp.sum(sample.indices >= 0), 1)
            cost, gradient = jax.tree.map(
                lambda value: jnp.where(is_empty, jnp.zeros_like(value), value),
                (_dot(weights, costs), grads.clipped_mean(max_norm, weights)),
            )
            return cost, gradient, {"clipped": share}, state

        return Estimator(_nothing, estimate)

    return make


def private(
    max_norm: float | Array, noise_multiplier: float | Array, *, expected_size: int | None = None
) -> MakeEstimator:
    """Returns the gradient of differentially private SGD: clipped, summed, noised, divided.

    ĝ = (Σ_k min(1, max_norm/‖g_k‖) g_k + ξ)/m, ξ ~ N(0, (noise_multiplier · max_norm)² I), one term
    for each example of the sample. The noise is that of the SUM, which one example more or less
    changes by at most max_norm; m is the EXPECTED size of a sample, not how many came, which is
    itself private. An empty draw is noise alone. Draw the samples by `sampling.poisson`: accounting
    for subsampled noise assumes it. No accounting is done here. The cost reported is not noised.

    Args:
      max_norm: bound of ‖g_k‖ over all parameters together, above 0.
      noise_multiplier: standard deviation of the noise over max_norm, at least 0.
      expected_size: m, the mean size of a sample. None takes it from the weights of the sample, 1/m
        each, or from those of the step before where a sample is empty; NaN if the very first one
        is. Give it if that may happen.

    Returns:
      A maker of estimators, which need a key: ``init_state(params, optimizer, key=…)``.

    Raises:
      ValueError: a concrete argument out of range; when estimating, no key.
      TypeError: an argument is not one number.

    Source: Abadi et al. 2016, "Deep learning with differential privacy", algorithm 1.
    """
    _validate.finite_float("max_norm", max_norm, low=0, low_allowed=False, high=float("inf"))
    _validate.finite_float(
        "noise_multiplier", noise_multiplier, low=0, low_allowed=True, high=float("inf")
    )
    if expected_size is not None:
        expected_size = _validate.positive_int("expected_size", expected_size)

    def make(fun: CostFn) -> Estimator:
        value_and_grad = per_example_value_and_grad(fun)

        def init(params: Params, examples: Examples) -> Array:
            del examples
            dtype = jnp.result_type(*jax.tree.leaves(params))
            return jnp.asarray(jnp.nan if expected_size is None else expected_size, dtype)

        def estimate(
            size: Array, params: Params, examples: Examples, sample: Sample, key: Array | None
        ) -> tuple[Array, Params, dict[str, Any], Array]:
            if key is None:
                raise ValueError(
                    "private draws noise and has no key; start training by "
                    "init_state(params, optimizer, key=jax.random.key(0))"
                )
            rows, weights, is_empty = chosen(examples, sample)
            costs, grads = value_and_grad(params, rows)
            if expected_size is None:
                size = jnp.where(is_empty, size, (1 / jnp.max(weights)).astype(size.dtype))
            valid = jnp.where(jnp.isnan(weights), weights, sample.indices >= 0)  # 1 each
            total = jax.tree.map(
                lambda g: jnp.where(is_empty, jnp.zeros_like(g), g),
                grads.clipped_mean(max_norm, valid),
            )
            noise = optax.tree.random_like(key, params, jax.random.normal)
            deviation = noise_multiplier * max_norm
            gradient = jax.tree.map(
                lambda g, z: (g + jnp.asarray(deviation, g.dtype) * z) / size.astype(g.dtype),
                total,
                noise,
            )
            cost = _dot(weights, costs)
            return jnp.where(is_empty, jnp.zeros_like(cost), cost), gradient, {}, size

        return Estimator(init, estimate)

    return make


class SVRGState(NamedTuple):
    """What `svrg` carries from step to step."""

    anchor: _svrg.Anchor
    steps: Array
    """Estimates made so far, int32 scalar."""


def svrg(refresh_every: int) -> MakeEstimator:
    """Returns ĝ = Σ_k c_k (g_k − h_k) + ∇C(a), h_k the gradient at an anchor a: see `sj.svrg`.

    Unbiased if the sample is, with an error that shrinks near the anchor. Every ``refresh_every``
    steps, and in the first, the anchor moves to the params of the moment, for one pass over all
    examples, none of which may be padding. An empty sample gives ∇C(a).

    Args:
      refresh_every: steps from one anchor to the next, at least 1.

    Raises:
      ValueError: refresh_every < 1.
      TypeError: refresh_every is not a whole number.

    Source: Johnson and Zhang 2013.
    """
    refresh_every = _validate.positive_int("refresh_every", refresh_every)

    def make(fun: CostFn) -> Estimator:
        mean = mean_value_and_grad(fun)

        def init(params: Params, examples: Examples) -> SVRGState:
            del examples
            start, zeros = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
            return SVRGState(_svrg.Anchor(start, zeros), jnp.zeros([], jnp.int32))

        def estimate(
            state: SVRGState, params: Params, examples: Examples, sample: Sample, key: Array | None
        ) -> tuple[Array, Params, dict[str, Any], SVRGState]:
            del key
            anchor = jax.lax.cond(
                state.steps % refresh_every == 0,
                lambda: _svrg.Anchor(params, _mean_gradient(fun, params, examples)),
                lambda: state.anchor,
            )
            cost, here = estimate_by(mean, params, examples, sample)
            _, there = estimate_by(mean, anchor.params, examples, sample)
            gradient = jax.tree.map(lambda g, h, H: g - h + H, here, there, anchor.gradient)
            return cost, gradient, {}, SVRGState(anchor, state.steps + 1)

        return Estimator(init, estimate)

    return make


def with_noise_scale(estimator: MakeEstimator | None = None) -> MakeEstimator:
    """Returns an estimator that also reports the noise of each sample, as statistic ``"noise"``.

    `sj.noise.track_noise_scale` finds it in an optimizer's chain. With the m examples of the sample
    that are there and ĝ their mean, s² = (Σ‖g_k‖² − m‖ĝ‖²)/(m − 1) estimates tr Σ and ‖ĝ‖² − s²/m
    estimates ‖∇C‖²: see `noise.noise_of_examples`. It is for schemes that draw all examples alike:
    weights, as of importance sampling, do not enter. NaN where fewer than two examples came.

    Args:
      estimator: whose estimates pass through; None is `mini_batch`.
    """
    inner = mini_batch() if estimator is None else estimator

    def make(fun: CostFn) -> Estimator:
        init, estimate_inner = inner(fun)
        value_and_grad = per_example_value_and_grad(fun)

        def estimate(
            state: PyTree, params: Params, examples: Examples, sample: Sample, key: Array | None
        ) -> tuple[Array, Params, dict[str, Any], PyTree]:
            cost, gradient, statistics, state = estimate_inner(state, params, examples, sample, key)
            rows, _, _ = chosen(examples, sample)
            _, grads = value_and_grad(params, rows)
            present = sample.indices >= 0
            squares = _dot(present, grads.squared_norms())
            m = jnp.sum(present).astype(squares.dtype)
            mean = grads.sum(jnp.where(present, 1 / jnp.maximum(m, 1), 0))
            squared_norm = optax.tree.norm(mean, squared=True)
            trace = jnp.where(m < 2, jnp.nan, (squares - m * squared_norm) / jnp.maximum(m - 1, 1))
            noise = NoiseParts(trace, squared_norm - trace / m)
            return cost, gradient, {**statistics, "noise": noise}, state

        return Estimator(init, estimate)

    return make


def _nothing(params: Params, examples: Examples) -> PyTree:
    """Is the `init` of an estimator without state."""
    del params, examples
    return ()


def _dot(weights: Array, costs: Array) -> Array:
    return jnp.dot(weights.astype(costs.dtype), costs)


def _mean_gradient(fun: CostFn, params: Params, examples: Examples) -> Params:
    """The gradient of the mean cost of all examples, chunk by chunk."""
    n = _validate.num_examples(examples)
    mean = mean_value_and_grad(fun)
    steps, _, chunk_of = chunks(examples, _CHUNK_SIZE)

    def add(total: Params, step: Array) -> tuple[Params, None]:
        chunk, fresh = chunk_of(examples, step)
        _, part = mean(params, chunk, fresh / n)
        return jax.tree.map(jnp.add, total, part), None

    return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), jnp.arange(steps))[0]
