"""Moments of the gradients of all examples, streamed in chunks through the factored G."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from sgd_jax import _validate
from sgd_jax._chunks import chunks, vary_like
from sgd_jax.distributed import sharding
from sgd_jax.estimation._moments import GradientMoments, merge, merge_across
from sgd_jax.per_example import (
    ChunkedPerExampleGrads,
    PerExampleGrads,
    per_example_grad,
    per_example_value_and_grad,
)
from sgd_jax.typing import Array, CostFn, Examples, Params, PyTree


def gradient_moments(
    fun: CostFn,
    params: Params,
    examples_or_batches: Examples | Iterable[Examples],
    *,
    chunk_size: int = 1000,
    per_coordinate: bool = False,
    keep_norms: bool = False,
    keep_alignments: bool = False,
    strata: Array | None = None,
    num_strata: int | None = None,
    mesh: Mesh | None = None,
) -> GradientMoments:
    """Returns the moments of the gradients of all examples, streamed through the factored G.

    One compiled program walks the examples chunk by chunk and merges centred moments, at about the
    cost of the full gradient (``keep_alignments``: one forward-mode pass more). Memory is that of
    the factors of one chunk; a parameter whose gradient has no factors (`explain` tells) takes
    chunk_size times its own size.

    Accuracy: each chunk gives Σ‖g_i − c‖² = Σ‖g_i‖² − k‖c‖², c its mean over k examples, which
    loses digits if noise is small beside the mean: the relative error of tr Σ is about
    ε (1 + ‖∇C‖²/tr Σ), ε the rounding of a long sum (10⁻⁶ in float32). Between chunks nothing
    cancels. If ‖∇C‖²/tr Σ exceeds 10⁻⁴/ε (some 800 in float32), tr Σ and the variance are taken
    again from the differences g_i − ∇C, written down a few at a time: an error below 10⁻³ up to a
    ratio of 10⁸ in float32. Not so inside a traced function, of strata, and with a mesh, where
    negative values by rounding are kept; ``squared_norms`` and ``alignments`` stay as they are. On
    NVIDIA GPUs ask for ``jax.default_matmul_precision("highest")``.

    Args:
      fun: the cost of ONE example, ``(params, example) -> scalar``. Define it once: another
        function, even of the same text, compiles anew.
      params: a pytree of floating-point arrays.
      examples_or_batches: a pytree whose leaves have leading axis n ≥ 1; or an iterator of such,
        or any other iterable that is no pytree (a data loader; wrap a list in ``iter``), whose
        batches may differ in length: each new length compiles anew.
      chunk_size: examples at a time, at least 1; the last chunk need not be full.
      per_coordinate: also the diagonal of Σ, ``variance``.
      keep_norms: also ‖g_i‖² of every example, ``squared_norms``.
      keep_alignments: also ⟨g_i, G⟩ of every example, ``alignments``: a second pass.
      strata: the stratum of each example, integers 0 … H − 1, (n,): moments of each stratum.
      num_strata: H; needed where strata is traced, otherwise max + 1.
      mesh: devices that share the examples, cut along its axis ``"data"``, each in its own chunks:
        one sum over the devices at the end, and the same numbers to rounding. See
        `sgd_jax.sharding`; params cut along another axis stay so.

    Returns:
      `GradientMoments` of the n examples, population convention (1/n); with strata, stacked with
      leading axis H, ``squared_norms`` excepted, which stay (n,) in order.

    Raises:
      ValueError: no examples; leading axes that differ; a bad chunk_size; strata of a wrong shape,
        an empty stratum; batches together with strata or, if they can be walked only once, with
        keep_alignments; strata with keep_alignments.
      TypeError: params or cost not floating point.
      FloatingPointError: gradients are not finite; the message names the examples. Checked on the
        host, and not where the function itself is being traced.

    >>> import jax.numpy as jnp
    >>> m = gradient_moments(lambda w, x: w * x, jnp.array(0.0), jnp.array([1.0, 3.0]))  # g_i = x_i
    >>> int(m.count), float(m.mean), float(m.trace), float(m.mean_norm)
    (2, 2.0, 1.0, 2.0)

    Source: Chan, Golub and LeVeque 1979, for the merge.
    """
    _validate.positive_int("chunk_size", chunk_size)
    _validate.floating_params(params)
    mesh = None if mesh is None else sharding.check_mesh(mesh)
    params = params if mesh is None else sharding.on_mesh(params, mesh)
    measure = functools.partial(
        _stream, fun, params, chunk_size=chunk_size, per_coordinate=per_coordinate, mesh=mesh
    )
    align = functools.partial(alignments, fun, params, chunk_size=chunk_size, mesh=mesh)
    batches = _batches(examples_or_batches)
    if batches is None:
        _validate.num_examples(examples_or_batches)
        labels, num_strata = _checked_strata(strata, num_strata, examples_or_batches)
        moments = measure(examples_or_batches, labels, keep_norms=keep_norms, num_strata=num_strata)
        if keep_alignments and strata is not None:
            raise ValueError("keep_alignments is of one mean gradient; it cannot go with strata")
        _refuse_non_finite(moments, fun, params, examples_or_batches, chunk_size, mesh)
        if strata is None and mesh is None:
            moments = _sharpened(moments, fun, params, examples_or_batches)
        if not keep_alignments:
            return moments
        values = align(examples_or_batches, moments.mean)
        return dataclasses.replace(moments, alignments=values)
    if strata is not None:
        raise ValueError("strata goes with examples in arrays; with batches, merge batch by batch")
    if keep_alignments and iter(batches) is batches:
        raise ValueError(
            "keep_alignments walks the batches twice, and this iterator can be walked once; "
            "give examples in arrays, or an iterable that starts anew"
        )
    moments, norms, first = None, [], 0
    for batch in batches:
        part = measure(batch, None, keep_norms=keep_norms, num_strata=None)
        _refuse_non_finite(part, fun, params, batch, chunk_size, mesh, first)
        part = part if mesh is not None else _sharpened(part, fun, params, batch)
        first += _validate.num_examples(batch)
        norms.append(part.squared_norms)
        part = dataclasses.replace(part, squared_norms=None)
        moments = part if moments is None else _merge_jitted(moments, part)
    if moments is None:
        raise ValueError("there are no batches; the moments of no examples are undefined")
    if keep_norms:
        moments = dataclasses.replace(moments, squared_norms=jnp.concatenate(norms))
    if not keep_alignments:
        return moments
    values = [align(batch, moments.mean) for batch in batches]
    return dataclasses.replace(moments, alignments=jnp.concatenate(values))


def alignments(
    fun: CostFn,
    params: Params,
    examples: Examples,
    direction: Params,
    *,
    chunk_size: int = 1000,
    mesh: Mesh | None = None,
) -> Array:
    """Returns ⟨g_i, v⟩ for every example, shape (n,), streamed in chunks as `gradient_moments` is.

    Args:
      fun: the cost of ONE example.
      params: a pytree of floating-point arrays.
      examples: a pytree whose leaves have leading axis n ≥ 1.
      direction: v, like params; the mean gradient, for what `noise_scale` needs.
      chunk_size: examples at a time, at least 1.
      mesh: devices that share the examples, as for `gradient_moments`.

    Raises:
      ValueError: no examples, leading axes that differ, a bad chunk_size or direction.
      TypeError: params or cost not floating point.

    >>> import jax.numpy as jnp
    >>> x = jnp.array([1.0, 3.0])
    >>> alignments(lambda w, x: w * x, jnp.array(0.0), x, jnp.array(2.0)).tolist()
    [2.0, 6.0]
    """
    _validate.positive_int("chunk_size", chunk_size)
    mesh = None if mesh is None else sharding.check_mesh(mesh)
    return _align(fun, params, examples, direction, chunk_size=chunk_size, mesh=mesh)


_merge_jitted = jax.jit(merge)


@functools.partial(
    jax.jit,
    static_argnums=0,
    static_argnames=("chunk_size", "per_coordinate", "keep_norms", "num_strata", "mesh"),
)
def _stream(
    fun: CostFn,
    params: Params,
    examples: Examples,
    strata: Array | None,
    *,
    chunk_size: int,
    per_coordinate: bool,
    keep_norms: bool,
    num_strata: int | None,
    mesh: Mesh | None = None,
) -> GradientMoments:
    """The moments of examples in arrays, one scan over chunks; with a mesh, one on each device."""
    walk = functools.partial(
        _walk,
        fun,
        chunk_size=chunk_size,
        per_coordinate=per_coordinate,
        keep_norms=keep_norms,
        num_strata=num_strata,
    )
    if mesh is None:
        moments, norms = walk(params, (examples, strata))
        return dataclasses.replace(moments, squared_norms=norms)

    def local(
        params: Params, data: tuple[Examples, Array | None], num_valid: Array
    ) -> tuple[GradientMoments, Array | None]:
        moments, norms = walk(params, data, num_valid)
        return merge_across(moments, sharding.DATA_AXIS), norms

    specs = (PartitionSpec(), PartitionSpec(sharding.DATA_AXIS))
    moments, norms = sharding.on_each_shard(local, mesh, params, (examples, strata), specs)
    if norms is not None:
        norms = sharding.replicate(norms[: _validate.num_examples(examples)], mesh)
    return dataclasses.replace(moments, squared_norms=norms)


def _walk(
    fun: CostFn,
    params: Params,
    data: tuple[Examples, Array | None],
    num_valid: Array | None = None,
    *,
    chunk_size: int,
    per_coordinate: bool,
    keep_norms: bool,
    num_strata: int | None,
) -> tuple[GradientMoments, Array | None]:
    """The moments of the first ``num_valid`` examples, or of all; ‖g_i‖² of all."""
    examples, strata = data
    value_and_grad = per_example_value_and_grad(fun)
    steps, size, chunk_of = chunks(examples, chunk_size, num_valid)
    padded = num_valid is not None or steps * size > _validate.num_examples(examples)

    def measure(step: Array) -> tuple[GradientMoments, Array | None]:
        (chunk, labels), fresh = chunk_of((examples, strata), step)
        costs, grads = value_and_grad(params, chunk)
        squared_norms = grads.squared_norms(per_leaf=True)
        norms = functools.reduce(jnp.add, jax.tree.leaves(squared_norms))
        of_weights = functools.partial(
            _of_chunk, costs, grads, squared_norms, norms, per_coordinate=per_coordinate
        )
        if num_strata is not None:
            weights = jax.nn.one_hot(labels, num_strata, axis=0) * fresh[None, :]
            part = jax.vmap(of_weights)(weights)
        else:
            part = of_weights(fresh.astype(norms.dtype) if padded else None)
        return part, norms if keep_norms else None

    join = merge if num_strata is None else jax.vmap(merge)

    def add(total: GradientMoments, step: Array) -> tuple[GradientMoments, Array | None]:
        part, norms = measure(step)
        return join(total, part), norms

    like, _ = jax.eval_shape(measure, jnp.array(0))
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
    nothing = vary_like((params, examples), nothing)
    moments, norms = jax.lax.scan(add, nothing, jnp.arange(steps))
    if norms is None:
        return moments, None
    again = norms.size - _validate.num_examples(examples)  # at the head of the last chunk
    return moments, jnp.concatenate([norms[:-1].reshape(-1), norms[-1, again:]])


@functools.partial(jax.jit, static_argnums=0, static_argnames=("chunk_size", "mesh"))
def _align(
    fun: CostFn,
    params: Params,
    examples: Examples,
    direction: Params,
    *,
    chunk_size: int,
    mesh: Mesh | None,
) -> Array:
    def products(shared: tuple[Params, Params], examples: Examples, _: Any = None) -> Array:
        params, direction = shared
        size = min(chunk_size, _validate.num_examples(examples))
        return per_example_grad(fun, chunk_size=size)(params, examples).inner_products(direction)

    if mesh is None:
        return products((params, direction), examples)
    cut = PartitionSpec(sharding.DATA_AXIS)
    values = sharding.on_each_shard(products, mesh, (params, direction), examples, cut)
    return sharding.replicate(values[: _validate.num_examples(examples)], mesh)


def _of_chunk(
    costs: Array,
    grads: PerExampleGrads | ChunkedPerExampleGrads,
    squared_norms: PyTree,
    norms: Array,
    weights: Array | None,
    *,
    per_coordinate: bool,
) -> GradientMoments:
    """The moments of the examples of a chunk whose weight is 1, not 0; None: of all."""
    ones = jnp.ones_like(norms) if weights is None else weights
    count = jnp.sum(ones).astype(jnp.int32)

    def mean_over_chunk(total: Array) -> Array:
        wide = total.astype(np.promote_types(total.dtype, np.float32))
        return wide / jnp.maximum(count, 1).astype(wide.dtype)

    def average(values: Array) -> Array:
        return mean_over_chunk(jnp.vdot(ones.astype(values.dtype), values))

    mean = jax.tree.map(mean_over_chunk, grads.sum(weights))
    trace = jax.tree.map(
        lambda a, g: average(a) - jnp.sum(jnp.square(g)).astype(a.dtype), squared_norms, mean
    )
    variance = None
    if per_coordinate:
        second = jax.tree.map(mean_over_chunk, grads.second_moment(ones))
        variance = jax.tree.map(lambda s, g: s - jnp.square(g), second, mean)
    return GradientMoments(count, average(costs), mean, trace, average(jnp.sqrt(norms)), variance)


_WRITTEN = 1 << 22
"""Numbers of gradients written down at a time where differences to the mean are taken."""


def _sharpened(
    moments: GradientMoments, fun: CostFn, params: Params, examples: Examples
) -> GradientMoments:
    """The moments with tr Σ and the variance from g_i − ∇C, if rounding reaches them otherwise."""
    trace, squared_norm = moments.trace, moments.squared_norm
    if isinstance(trace, jax.core.Tracer):
        return moments
    most = 1e-4 / float(jnp.finfo(trace.dtype).eps)
    if float(squared_norm) <= most * float(trace) or float(squared_norm) == 0:
        return moments
    mean, traces, variance = _differences(
        fun, params, examples, moments.mean, per_coordinate=moments.variance is not None
    )
    return dataclasses.replace(moments, mean=mean, trace_per_leaf=traces, variance=variance)


@functools.partial(jax.jit, static_argnums=0, static_argnames="per_coordinate")
def _differences(
    fun: CostFn, params: Params, examples: Examples, center: Params, *, per_coordinate: bool
) -> tuple[Params, PyTree, Params | None]:
    """The mean, tr Σ of each leaf and the variance from d_i = g_i − c, c ≈ ∇C.

    ∇C = c + D with D = 1/n Σ d_i, and Σ_jj = 1/n Σ d_ij² − D_j²: D is only the rounding of c.
    """
    n = _validate.num_examples(examples)
    p = sum(leaf.size for leaf in jax.tree.leaves(params))
    steps, _, chunk_of = chunks(examples, max(1, _WRITTEN // p))

    def add(sums: tuple[Params, Params], step: Array) -> tuple[tuple[Params, Params], None]:
        chunk, fresh = chunk_of(examples, step)
        gradients = jax.vmap(jax.grad(fun), in_axes=(None, 0))(params, chunk)

        def fold(total: Array, squares: Array, g: Array, c: Array) -> tuple[Array, Array]:
            kept = fresh.reshape((-1,) + (1,) * c.ndim)
            d = jnp.where(kept, g.astype(c.dtype) - c[None], 0)
            return total + jnp.sum(d, axis=0), squares + jnp.sum(jnp.square(d), axis=0)

        pairs = jax.tree.map(fold, *sums, gradients, center)
        return jax.tree.transpose(jax.tree.structure(center), None, pairs), None

    zeros = jax.tree.map(jnp.zeros_like, center)
    (total, squares), _ = jax.lax.scan(add, (zeros, zeros), jnp.arange(steps))
    shift = jax.tree.map(lambda leaf: leaf / n, total)
    variance = jax.tree.map(lambda q, d: q / n - jnp.square(d), squares, shift)
    mean = jax.tree.map(jnp.add, center, shift)
    return mean, jax.tree.map(jnp.sum, variance), variance if per_coordinate else None


def _batches(examples: Any) -> Iterable[Examples] | None:
    """The iterable of batches, or None where ``examples`` is a pytree of arrays."""
    is_container = jax.tree_util.default_registry.flatten_one_level(examples) is not None
    if is_container or hasattr(examples, "shape") or not hasattr(examples, "__iter__"):
        return None
    return examples


def _checked_strata(
    strata: Array | None, num_strata: int | None, examples: Examples
) -> tuple[Array | None, int | None]:
    if strata is None:
        if num_strata is not None:
            raise ValueError("num_strata is given without strata")
        return None, None
    n = _validate.num_examples(examples)
    if jnp.shape(strata) != (n,):
        raise ValueError(f"strata must have shape ({n},), got {jnp.shape(strata)}")
    if not jnp.issubdtype(jnp.result_type(strata), jnp.integer):
        raise TypeError(f"strata must hold integers, got dtype {jnp.result_type(strata)}")
    if isinstance(strata, jax.core.Tracer):
        if num_strata is None:
            raise ValueError("strata is traced: say how many there are by num_strata")
        return strata, _validate.positive_int("num_strata", num_strata)
    labels = np.asarray(strata)
    count = int(labels.max()) + 1 if num_strata is None else num_strata
    count = _validate.positive_int("num_strata", count)
    if labels.min() < 0 or labels.max() >= count:
        raise ValueError(f"strata must lie in 0 … {count - 1}, got {labels.min()} … {labels.max()}")
    (empty,) = np.nonzero(np.bincount(labels, minlength=count) == 0)
    if empty.size:
        raise ValueError(
            f"stratum {empty[0]} holds no examples; number the strata 0 … H − 1 without gaps"
        )
    return jnp.asarray(labels, jnp.int32), count


def _refuse_non_finite(
    moments: GradientMoments,
    fun: CostFn,
    params: Params,
    examples: Examples,
    chunk_size: int,
    mesh: Mesh | None,
    first: int = 0,
) -> None:
    """Raises where gradients are not finite, naming examples; counts batches from ``first``."""
    if isinstance(moments.trace, jax.core.Tracer):
        return
    if np.all(np.isfinite(moments.trace)) and np.all(np.isfinite(moments.mean_norm)):
        return
    norms = _stream(
        fun,
        params,
        examples,
        None,
        chunk_size=chunk_size,
        per_coordinate=False,
        keep_norms=True,
        num_strata=None,
        mesh=mesh,
    ).squared_norms
    bad = np.flatnonzero(~np.isfinite(np.asarray(norms))) + first
    if not bad.size:
        raise FloatingPointError("every ‖g_i‖² is finite, but their sum is not: it overflows")
    named = ", ".join(map(str, bad[:10])) + (", …" if bad.size > 10 else "")
    raise FloatingPointError(
        f"‖g_i‖² is not finite for {bad.size} examples: {named}. Look at these examples, or at "
        "params where it is all of them"
    )
