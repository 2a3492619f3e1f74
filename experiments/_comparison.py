"""The error of estimates of a gradient, predicted from moments and measured over many samples."""

import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from experiments._starting_point import StartingPoint
from sgd_jax import sampling
from sgd_jax._chunks import vary_like
from sgd_jax._tree import tree_dot
from sgd_jax.data import Examples
from sgd_jax.distributed import sharding
from sgd_jax.estimation import (
    GradientMoments,
    estimate,
    expected_squared_error,
    gradient_moments,
)
from sgd_jax.estimation.svrg import difference
from sgd_jax.per_example import per_example_grad
from sgd_jax.sampling import (
    Sample,
    neyman_allocation,
    optimal_probabilities,
    proportional_allocation,
)
from sgd_jax.typing import Array, CostFn, Params

_CHUNK_SIZE = 1000  # examples whose gradients are taken together where all n are
_BLOCK_BYTES = 1 << 25  # what the estimates of one block may take
_TIMED_EXAMPLES = 20_000  # how many gradients a measurement of time takes at least


class Target(NamedTuple):
    """What is sampled: a cost, where its gradients are taken, and their moments."""

    fun: CostFn
    params: Params
    moments: GradientMoments


class Scheme(NamedTuple):
    """A way to estimate G; ``at(m)`` returns how to draw and the error predicted."""

    target: Target
    at: Callable[[int], tuple[Callable[[Array], Sample], Array]]
    least_batch_size: int
    """The smallest m it is defined for."""
    num_gradients: int
    """How many gradients each example costs."""


def make_schemes(point: StartingPoint, floor: float) -> Mapping[str, Callable[[], Scheme]]:
    """Returns what makes each scheme by name; moments are taken when one is made.

    Args:
      point: The network and its examples.
      floor: The share of uniform draws in importance sampling.
    """
    fun, params, examples = point.fun, point.params, point.examples
    n = len(point.labels)

    def plain(moments: GradientMoments) -> Target:
        return Target(fun, params, moments)

    def all_moments() -> GradientMoments:
        return gradient_moments(
            fun, params, examples, chunk_size=_CHUNK_SIZE, keep_norms=True, mesh=point.mesh
        )

    def uniform(name: str) -> Scheme:
        moments = all_moments()
        sampler = getattr(sampling, name)

        def at(m: int) -> tuple[Callable[[Array], Sample], Array]:
            predicted = expected_squared_error(moments, m, name)  # pyright: ignore[reportArgumentType]
            return lambda key: sampler(key, n, m), predicted

        return Scheme(plain(moments), at, 1, 1)

    def stratified(allocate: Callable[[np.ndarray, np.ndarray, int], tuple[int, ...]]) -> Scheme:
        moments = gradient_moments(
            fun,
            params,
            examples,
            chunk_size=_CHUNK_SIZE,
            strata=jnp.asarray(point.labels),
            num_strata=point.num_classes,
            mesh=point.mesh,
        )
        counts, traces = np.asarray(moments.count), np.asarray(moments.trace)
        labels = jnp.asarray(point.labels)

        def at(m: int) -> tuple[Callable[[Array], Sample], Array]:
            sizes = allocate(counts, traces, m)
            predicted = expected_squared_error(moments, sizes, "stratified")
            return lambda key: sampling.stratified(key, labels, sizes), predicted

        return Scheme(plain(moments.pooled()), at, point.num_classes, 1)

    def importance() -> Scheme:
        moments = all_moments()
        assert moments.squared_norms is not None
        p = optimal_probabilities(jnp.sqrt(moments.squared_norms), floor)

        def at(m: int) -> tuple[Callable[[Array], Sample], Array]:
            predicted = expected_squared_error(moments, m, "importance", probabilities=p)
            return lambda key: sampling.importance(key, p, m), predicted

        return Scheme(plain(moments), at, 1, 1)

    def control_variate() -> Scheme:
        offset = jax.tree.map(jnp.zeros_like, params)
        changed = difference(fun, params, point.anchor)
        moments = gradient_moments(
            changed, offset, examples, chunk_size=_CHUNK_SIZE, mesh=point.mesh
        )

        def at(m: int) -> tuple[Callable[[Array], Sample], Array]:
            predicted = expected_squared_error(moments, m, "without_replacement")
            return lambda key: sampling.without_replacement(key, n, m), predicted

        return Scheme(Target(changed, offset, moments), at, 1, 2)

    return {
        "without_replacement": lambda: uniform("without_replacement"),
        "with_replacement": lambda: uniform("with_replacement"),
        "poisson": lambda: uniform("poisson"),
        "stratified": lambda: stratified(lambda counts, _, m: proportional_allocation(counts, m)),
        "stratified_neyman": lambda: stratified(neyman_allocation),
        "importance": importance,
        "control_variate": control_variate,
    }


SCHEMES = (
    "without_replacement",
    "with_replacement",
    "poisson",
    "stratified",
    "stratified_neyman",
    "importance",
    "control_variate",
)


class Errors(NamedTuple):
    """Of many estimates ĝ, what decides how good they are; arrays (num_draws,)."""

    squared_error: np.ndarray
    """‖ĝ − G‖²."""
    inner: np.ndarray
    """⟨ĝ − G, G⟩, G the gradient of all examples."""
    draw_seconds: float
    """Of drawing one sample."""


def measure(
    target: Target,
    full_gradient: Params,
    examples: Examples,
    draw: Callable[[Array], Sample],
    key: Array,
    num_draws: int,
    mesh: Mesh | None = None,
) -> Errors:
    """Draws samples and measures their errors, exactly: ‖Gᵀc − G‖² for the weights c of each.

    Small samples are gathered and their gradients summed. For samples of a quarter of the examples
    or more the weights c are spread over all n, and the n gradients, taken once a block in chunks,
    are summed for all samples of the block by one matrix product: nothing of n × p is kept.

    Args:
      target: What is sampled.
      full_gradient: G, that of all examples; where ``target`` is a difference, not its mean.
      examples: All n.
      draw: From a key to a sample.
      key: Decides the samples.
      num_draws: How many.
      mesh: Devices that share the samples; None is one device.
    """
    size = jax.eval_shape(draw, key).indices.shape[0]
    num_parameters = sum(leaf.size for leaf in jax.tree.leaves(target.params))
    each = 4 * num_parameters + (0 if _is_large(size, examples) else 4000 * size)
    block = max(1, min(256, num_draws, _BLOCK_BYTES // each))
    keys = jax.random.split(key, (-(-num_draws // block), block))
    draw_block = jax.jit(lambda keys: jax.lax.map(draw, keys)).lower(keys[0]).compile()
    errors, seconds = [], 0.0
    for block_keys in keys:
        start = time.perf_counter()
        samples = jax.block_until_ready(draw_block(block_keys))
        seconds += time.perf_counter() - start
        found = _errors(
            target.fun,
            target.params,
            target.moments.mean,
            full_gradient,
            examples,
            samples,
            mesh=mesh,
        )
        errors.append([np.asarray(values, np.float64) for values in found])
    squared_error, inner = (np.concatenate(part)[:num_draws] for part in zip(*errors, strict=True))
    return Errors(squared_error, inner, seconds / keys.size)


def _is_large(size: int, examples: Examples) -> bool:
    return 4 * size >= len(examples.labels)


@functools.partial(jax.jit, static_argnums=0, static_argnames="mesh")
def _errors(
    fun: CostFn,
    params: Params,
    mean: Params,
    full: Params,
    examples: Examples,
    samples: Sample,
    *,
    mesh: Mesh | None,
) -> tuple[Array, Array]:
    """‖ĝ − mean‖² and ⟨ĝ − mean, full⟩ of each sample of a block; devices share the samples."""
    if mesh is None:
        return _errors_of_samples(fun, params, mean, full, examples, samples)

    def local(shared: Any, samples: Sample, _: Array) -> tuple[Array, Array]:
        params, mean, full, examples = vary_like(samples, shared)
        return _errors_of_samples(fun, params, mean, full, examples, samples)

    shared = (params, mean, full, examples)
    cut = PartitionSpec(sharding.DATA_AXIS)
    errors = sharding.on_each_shard(local, mesh, shared, samples, cut)
    num_samples = samples.indices.shape[0]
    return sharding.replicate(jax.tree.map(lambda values: values[:num_samples], errors), mesh)


def _errors_of_samples(
    fun: CostFn, params: Params, mean: Params, full: Params, examples: Examples, samples: Sample
) -> tuple[Array, Array]:
    if _is_large(samples.indices.shape[1], examples):
        grads = per_example_grad(fun, chunk_size=_CHUNK_SIZE)(params, examples)
        n = len(examples.labels)
        estimates = jax.vmap(lambda sample: grads.sum(_spread(sample, n)))(samples)
    else:
        _, estimates = jax.vmap(lambda sample: estimate(fun, params, examples, sample))(samples)

    def compare(estimated: Params) -> tuple[Array, Array]:
        error = jax.tree.map(jnp.subtract, estimated, mean)
        return tree_dot(error, error), tree_dot(error, full)

    return jax.vmap(compare)(estimates)


def _spread(sample: Sample, n: int) -> Array:
    """The weights of a sample as one weight for each of the n examples."""
    return jnp.zeros(n, sample.weights.dtype).at[jnp.maximum(sample.indices, 0)].add(sample.weights)


def seconds_per_gradient(target: Target, examples: Examples, size: int | None) -> float:
    """Returns the time of one estimate from a sample of so many examples, already drawn.

    The examples are gathered, the gradient is taken and added to a running sum, as a step of SGD
    does; one after another in one compiled program, the best of three. None is the gradient of all
    examples in order, with nothing to gather.
    """
    n = len(examples.labels)
    repeats = max(1, min(1000, _TIMED_EXAMPLES // (size or n)))

    def add(total: Params, sample: Sample | Array) -> tuple[Params, None]:
        if isinstance(sample, Sample):
            _, gradient = estimate(target.fun, target.params, examples, sample)
        else:
            grads = per_example_grad(target.fun, chunk_size=_CHUNK_SIZE)(target.params, examples)
            gradient = grads.sum(sample)
        return jax.tree.map(jnp.add, total, gradient), None

    weights = jnp.full((repeats, size or n), 1 / (size or n))
    if size is None:
        samples = weights
    else:
        key = jax.random.key(0)
        samples = Sample(jax.random.randint(key, (repeats, size), 0, n, jnp.int32), weights)
    zero = jax.tree.map(jnp.zeros_like, target.params)
    walk = jax.jit(lambda samples: jax.lax.scan(add, zero, samples)[0]).lower(samples).compile()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(walk(samples))
        times.append(time.perf_counter() - start)
    return min(times) / repeats


def reshuffling_seconds(n: int) -> float:
    """Returns the time to reshuffle an epoch, for one example: m of them make a mini-batch."""
    draw = jax.jit(lambda key: sampling.epoch(key, n, 1)).lower(jax.random.key(0)).compile()
    times = []
    for seed in range(3):
        key = jax.random.key(seed)
        start = time.perf_counter()
        jax.block_until_ready(draw(key))
        times.append(time.perf_counter() - start)
    return min(times) / n


def summarize(
    errors: Errors, predicted: float, squared_norm: float, fraction: float = 0.05
) -> dict[str, Any]:
    """Returns what a row of the table says of the errors of one scheme at one m.

    `cosine_of_means` is E⟨ĝ, G⟩/√(E‖ĝ‖² ‖G‖²) = 1/√(1 + E‖ĝ − G‖²/‖G‖²), exact for every unbiased
    ĝ; `mean_cosine` is the mean of the cosines measured, another number. The cosine of
    an estimate that is zero, as a Poisson sample of nobody gives, counts as 0.

    Args:
      errors: As measured.
      predicted: E‖ĝ − G‖².
      squared_norm: ‖G‖², of all examples.
      fraction: Of the quantiles, at either end.
    """
    num_draws = len(errors.squared_error)
    measured = float(errors.squared_error.mean())
    error = float(errors.squared_error.std(ddof=1)) / math.sqrt(num_draws)
    along = errors.inner + squared_norm
    squared_length = errors.squared_error + 2 * errors.inner + squared_norm
    is_zero = squared_length <= 1e-5 * squared_norm
    cosine = along / np.sqrt(np.where(is_zero, np.inf, squared_length * squared_norm))
    low, high = np.quantile(cosine, [fraction, 1 - fraction])
    return {
        "num_draws": num_draws,
        "predicted": predicted,
        "measured": measured,
        "standard_error": error,
        "ratio": measured / predicted if predicted > 0 else None,
        "ratio_standard_error": error / predicted if predicted > 0 else None,
        "cosine_of_means": 1 / math.sqrt(1 + max(predicted, 0.0) / squared_norm),
        "mean_cosine": float(cosine.mean()),
        "cosine_5": float(low),
        "cosine_95": float(high),
    }
