"""The noise scale of a training run, averaged step by step in anyone's optax loop."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sgd_jax import _validate
from sgd_jax._tree import tree_dot
from sgd_jax.estimation._intervals import Spread
from sgd_jax.estimation._noise_scale import (
    NoiseParts,
    NoiseScale,
    scale_of_means,
    two_batch_noise_parts,
)
from sgd_jax.per_example import PerExampleGrads
from sgd_jax.typing import Array, Params


class NoiseTrackingState(NamedTuple):
    """What `track_noise_scale` carries from step to step; arrays of two hold tr Σ and ‖∇C‖²."""

    step: Array
    """Steps so far, int32."""
    weight: Array
    """Σ of the weights of all steps; scalar."""
    total: Array
    """Weighted sums of the two estimates, (2,)."""
    block_weight: Array
    """The weight of the block of steps under way; scalar."""
    block_total: Array
    """Weighted sums of the block under way, (2,)."""
    squares: Array
    """Σ over finished blocks of y yᵀ, y = (weight, weighted sums) of the block; (3, 3)."""

    def mean(self) -> NoiseParts:
        """The weighted means over the steps so far, unbiased; NaN before the first step.

        The noise scale is ``mean().ratio()``: a ratio of means, not a mean of ratios; NaN,
        undetermined, where the mean estimate of ‖∇C‖² is not above 0.
        """
        weight = jnp.where(self.weight > 0, self.weight, jnp.nan)
        return NoiseParts(*(self.total / weight))

    def noise_scale(self, confidence: float = 0.95) -> NoiseScale:
        """The noise scale of the steps so far with an interval from blocks of steps.

        With (W_b, y_b) the weight and the weighted sums of block b, μ the means and W = Σ W_b, the
        covariance of μ is K/(K − 1) Σ_b (y_b − W_b μ)(y_b − W_b μ)ᵀ/W², where K = W²/Σ W_b² is the
        number of blocks that count; the interval is Fieller's with Student's t of K − 1 degrees of
        freedom. Finished blocks only. Blocks long against the correlation of steps make it hold; a
        drift of B along training counts as spread. With less than three blocks ``low`` and ``high``
        are NaN, and ``undetermined`` says whether the mean of ‖∇C‖² is ≤ 0.
        """
        mean = self.mean()
        weights = self.weight - self.block_weight
        parts = (self.total - self.block_total) / jnp.where(weights > 0, weights, jnp.nan)
        toward = jnp.concatenate([-parts[:, None], jnp.eye(2, dtype=parts.dtype)], axis=1)  # (2, 3)
        blocks = jnp.square(weights) / jnp.where(self.squares[0, 0] > 0, self.squares[0, 0], 1)
        enough = blocks >= 3 - 1e-3
        scale = blocks / jnp.where(enough, blocks - 1, jnp.nan) / jnp.square(weights)
        covariance = toward @ self.squares @ toward.T * scale
        spread = Spread(covariance[0, 0], covariance[0, 1], covariance[1, 1])
        found = scale_of_means(mean, spread, self.step, blocks, confidence)
        known = mean.squared_norm > 0
        return dataclasses.replace(
            found,
            value=jnp.where(enough, found.value, mean.ratio()),
            low=jnp.where(enough, found.low, jnp.nan),
            high=jnp.where(enough, found.high, jnp.nan),
            undetermined=jnp.where(enough, found.undetermined, ~known),
        )


def track_noise_scale(
    decay: float | Array | None = None, block_size: int = 50
) -> optax.GradientTransformationExtraArgs:
    """Returns an optax transformation that averages tr Σ and ‖∇C‖²; updates pass through.

    Each step hands its two unbiased estimates to ``update(..., noise=parts)``; `noise_of_examples`,
    `noise_of_parts` and `noise_of_shards` make them. The state keeps weighted sums of each apart
    and the sum of the weights, so that ``state.mean()`` is unbiased from the first step on and
    ``state.mean().ratio()`` is the ratio of means. ``state.noise_scale()`` adds an interval, from
    blocks of steps.

    With decay β the weight of a step s steps ago is β^s, a memory of about 1/(1 − β) steps; None
    weighs all steps alike. An interval needs at least three blocks in that memory.

    Args:
      decay: β in (0, 1), or None.
      block_size: steps in a block, at least 1.

    Returns:
      An `optax.GradientTransformationExtraArgs` with `NoiseTrackingState`; find it in the state of
      a chain by its place, or by `optax.tree.get`.

    Raises:
      ValueError: a concrete decay outside (0, 1); block_size < 1; ``update`` raises it if noise is
        missing.
      TypeError: decay is not one number; ``update`` raises it if noise is not `NoiseParts`.

    >>> import jax.numpy as jnp, optax
    >>> optimizer = optax.chain(track_noise_scale(), optax.sgd(0.5))
    >>> w = jnp.array(1.0)
    >>> state = optimizer.init(w)
    >>> for noise in (NoiseParts(jnp.array(2.0), jnp.array(-1.0)), NoiseParts(6.0, 3.0)):
    ...     updates, state = optimizer.update(w, state, w, noise=noise)
    >>> float(state[0].mean().ratio())  # (2 + 6)/(−1 + 3); the mean of ratios would be 0
    4.0

    Source: McCandlish, Kaplan and Amodei 2018 (arXiv 1812.06162), appendix A.1.
    """
    if decay is not None:
        _validate.finite_float("decay", decay, low=0, low_allowed=False, high=1)
    _validate.positive_int("block_size", block_size)

    def init(params: Params) -> Any:
        del params
        zero, two = jnp.zeros([]), jnp.zeros(2)
        return NoiseTrackingState(jnp.zeros([], jnp.int32), zero, two, zero, two, jnp.zeros((3, 3)))

    def update(
        updates: Params,
        state: Any,
        params: Params | None = None,
        *,
        noise: NoiseParts | None = None,
        **extra_args: Any,
    ) -> tuple[Params, Any]:
        del params, extra_args
        if noise is None:
            raise ValueError(
                "track_noise_scale needs the noise of this step; in make_step and make_epoch give "
                "estimator=estimators.with_noise_scale(), in your own loop "
                "update(gradient, state, params, noise=noise_of_examples(grads))"
            )
        if not isinstance(noise, NoiseParts):
            raise TypeError(f"noise must be NoiseParts, got {type(noise).__name__}")
        return updates, _fold(state, noise, 1 if decay is None else decay, block_size)

    return optax.GradientTransformationExtraArgs(init, update)


def _fold(
    state: NoiseTrackingState, noise: NoiseParts, kept: float | Array, block_size: int
) -> NoiseTrackingState:
    """The state after one more step; a block that is full joins the finished ones."""
    values = jnp.stack([jnp.asarray(part, state.total.dtype) for part in noise])
    step = state.step + 1
    weight = kept * state.block_weight + 1
    total = kept * state.block_total + values
    squares = jnp.square(kept) * state.squares
    block = jnp.concatenate([weight[None], total])
    is_full = step % block_size == 0
    return NoiseTrackingState(
        step,
        kept * state.weight + 1,
        kept * state.total + values,
        jnp.where(is_full, 0, weight),
        jnp.where(is_full, 0, total),
        jnp.where(is_full, squares + jnp.outer(block, block), squares),
    )


def noise_of_examples(
    grads: PerExampleGrads, axis_name: str | tuple[str, ...] | None = None
) -> NoiseParts:
    """Returns unbiased estimates of tr Σ and ‖G‖² from the gradients of one mini-batch.

    With ĝ the mean of the m gradients, s² = (Σ‖g_i‖² − m‖ĝ‖²)/(m − 1) and ‖ĝ‖² − s²/m. Unbiased
    for draws with replacement, or from data so large that it is no matter; for a mini-batch of n
    examples drawn without replacement their expectations are n/(n − 1) tr Σ and
    ‖G‖² − tr Σ/(n − 1).

    Args:
      grads: of m ≥ 2 examples, from `per_example_grad`.
      axis_name: inside `jax.shard_map`, the mesh axes along which devices hold further examples of
        the mini-batch, each as many: the estimates are those of all together, on every device.

    Raises:
      ValueError: m = 1.

    >>> import jax.numpy as jnp
    >>> from sgd_jax.per_example import per_example_grad
    >>> grads = per_example_grad(lambda w, x: w * x)(jnp.array(0.0), jnp.array([1.0, 3.0]))
    >>> [float(part) for part in noise_of_examples(grads)]  # 2, 4 − 2/2
    [2.0, 3.0]
    """
    m, mean, squared_norms = grads.num_examples, grads.mean(), jnp.sum(grads.squared_norms())
    if axis_name is not None:
        m *= jax.lax.axis_size(axis_name)
        mean = jax.lax.pmean(mean, axis_name)
        squared_norms = jax.lax.psum(squared_norms, axis_name)
    if m < 2:
        raise ValueError("one example says nothing about noise: give at least 2")
    squared_norm = tree_dot(mean, mean)
    trace = (squared_norms - m * squared_norm) / (m - 1)
    return NoiseParts(trace, squared_norm - trace / m)


def noise_of_parts(gradients: Params, part_size: int) -> tuple[Params, NoiseParts]:
    """Returns the mean gradient of K equal parts of a batch, and its noise.

    For gradient accumulation: the parts are micro-batches of b examples, their mean the gradient
    of all K b. tr Σ and ‖G‖² follow from the two batch sizes b and K b (`two_batch_noise_parts`),
    with the mean of the K squared norms for the small one.

    Args:
      gradients: the mean gradient of each part; like params, with a leading axis K ≥ 2.
      part_size: b ≥ 1, examples in each part.

    Returns:
      ``(gradient, noise)``: the mean over the parts, like params, and `NoiseParts`.

    Raises:
      ValueError: part_size < 1, K < 2, or leading axes that differ.
      TypeError: part_size is not a whole number.

    >>> import jax.numpy as jnp
    >>> gradient, noise = noise_of_parts(jnp.array([1.0, 3.0]), part_size=5)
    >>> float(gradient), [float(part) for part in noise]  # 5·(variance 2), 4 − 2/2
    (2.0, [10.0, 3.0])
    """
    count = _validate.num_examples(gradients)
    if count < 2:
        raise ValueError("one part says nothing about noise: give at least 2")
    mean = jax.tree.map(lambda g: jnp.mean(g, axis=0), gradients)
    small = tree_dot(gradients, gradients) / count
    return mean, _from_two_sizes(small, mean, count, part_size)


def noise_of_shards(
    gradient: Params, axis_name: str | tuple[str, ...], shard_size: int
) -> tuple[Params, NoiseParts]:
    """Returns the mean gradient over the devices of a mesh axis, and its noise.

    For data parallelism: each device has the mean gradient of its own b examples. Averaging them is
    what training does anyway; one scalar more is averaged for the noise. Same formula as
    `noise_of_parts`. For use inside `jax.shard_map`.

    There ``jax.grad`` sums over devices by itself when params are the same on all: make them the
    device's own first, by ``jax.lax.pcast(params, axis_name, to="varying")``. Gradients already
    summed differ nowhere and would show no noise at all.

    Args:
      gradient: this device's mean gradient, not yet averaged over devices; like params.
      axis_name: one or more mesh axes, of K ≥ 2 devices in all.
      shard_size: b ≥ 1, examples on each device.

    Returns:
      ``(gradient, noise)``, the same on every device.

    Raises:
      ValueError: shard_size < 1, or a single device.
      TypeError: shard_size is not a whole number.
    """
    count = jax.lax.axis_size(axis_name)
    if count < 2:
        raise ValueError(f"axis {axis_name!r} has one device, which says nothing about noise")
    mean = jax.lax.pmean(gradient, axis_name)
    small = jax.lax.pmean(tree_dot(gradient, gradient), axis_name)
    return mean, _from_two_sizes(small, mean, count, shard_size)


def _from_two_sizes(small: Array, mean: Params, count: int, size: int) -> NoiseParts:
    size = _validate.positive_int("part_size", size)
    return two_batch_noise_parts(small, tree_dot(mean, mean), size, count * size)
