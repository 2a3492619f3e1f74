"""The noise scale of a training run, averaged step by step in anyone's optax loop."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sgd_jax import _validate
from sgd_jax._tree import tree_dot
from sgd_jax.estimation._noise_scale import NoiseParts, two_batch_noise_parts
from sgd_jax.per_example import PerExampleGrads
from sgd_jax.typing import Array, Params


class NoiseTrackingState(NamedTuple):
    """What `track_noise_scale` carries from step to step."""

    weight: Array
    """Σ of the weights that steps have in the sums below; scalar."""
    trace: Array
    """Weighted sum of the estimates of tr Σ."""
    squared_norm: Array
    """Weighted sum of the estimates of ‖G‖²."""

    def mean(self) -> NoiseParts:
        """The weighted means over the steps so far, unbiased; NaN before the first step.

        The noise scale is ``mean().ratio()``: a ratio of means, not a mean of ratios; NaN,
        undetermined, where the mean estimate of ‖G‖² is not above 0.
        """
        weight = jnp.where(self.weight > 0, self.weight, jnp.nan)
        return NoiseParts(self.trace / weight, self.squared_norm / weight)


def track_noise_scale(decay: float | Array | None = None) -> optax.GradientTransformationExtraArgs:
    """Returns an optax transformation that averages tr Σ and ‖G‖² over steps; updates pass through.

    Each step hands its two unbiased estimates to ``update(..., noise=parts)``; `noise_of_examples`,
    `noise_of_parts` and `noise_of_shards` make them. The state keeps weighted sums of each apart
    and the sum of the weights, so that ``state.mean()`` is unbiased from the first step on and
    ``state.mean().ratio()`` is the ratio of means.

    With decay β the weight of a step s steps ago is β^s, a memory of about 1/(1 − β) steps; None
    weighs all steps alike.

    Args:
      decay: β in (0, 1), or None.

    Returns:
      An `optax.GradientTransformationExtraArgs` with `NoiseTrackingState`; find it in the state of
      a chain by its place, or by `optax.tree.get`.

    Raises:
      ValueError: a concrete decay outside (0, 1); ``update`` raises it where noise is missing.
      TypeError: decay is not one number; ``update`` raises it where noise is no `NoiseParts`.

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

    def init(params: Params) -> Any:
        del params
        zero = jnp.zeros([])
        return NoiseTrackingState(zero, zero, zero)

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
                "track_noise_scale needs the noise of this step: "
                "update(gradient, state, params, noise=noise_of_examples(grads))"
            )
        if not isinstance(noise, NoiseParts):
            raise TypeError(f"noise must be NoiseParts, got {type(noise).__name__}")
        kept = 1 if decay is None else decay

        def fold(total: Array, value: Array | float) -> Array:
            return kept * total + jnp.asarray(value, total.dtype)

        sums = NoiseTrackingState(
            fold(state.weight, 1.0),
            fold(state.trace, noise.trace),
            fold(state.squared_norm, noise.squared_norm),
        )
        return updates, sums

    return optax.GradientTransformationExtraArgs(init, update)


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
