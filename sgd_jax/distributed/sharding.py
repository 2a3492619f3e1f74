"""Where arrays lie when there are several devices, on one host or on many.

A mesh is JAX's: the devices of all hosts in a grid with named axes. Examples are cut along its axis
``"data"``, one piece a device; parameters are the same everywhere, or cut by rules. Functions that
take ``mesh=`` give the same numbers whatever the mesh, to rounding: each device looks at its own
examples and sums go over the axis. No length need be a multiple of the number of devices.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sgd_jax import _validate
from sgd_jax.sampling import Sample
from sgd_jax.typing import Examples, Params, PyTree

DATA_AXIS = "data"
"""The axis of a mesh along which examples are cut."""

Rules: TypeAlias = Sequence[tuple[str, PartitionSpec]]
"""Which parameters are cut and how: the first pattern (`re.search`) that a path matches counts."""


def data_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh of one axis, ``"data"``, over devices: by default all of all hosts.

    For a second axis to cut parameters along, ``jax.make_mesh((4, 2), ("data", "model"))``.

    Args:
      devices: those of JAX, in the order that they take their pieces.

    Raises:
      ValueError: devices is empty.

    >>> data_mesh(jax.devices()[:1]).shape
    OrderedDict([('data', 1)])
    """
    devices = jax.devices() if devices is None else list(devices)
    if not devices:
        raise ValueError("devices is empty; expected at least one, such as jax.devices()[:1]")
    return Mesh(np.array(devices), (DATA_AXIS,), axis_types=(AxisType.Auto,))


def check_mesh(mesh: Mesh) -> Mesh:
    """Returns ``mesh`` with the compiler free to choose layouts inside a program.

    Raises:
      TypeError: it is no mesh of devices.
      ValueError: it has no axis ``"data"``.
    """
    if not isinstance(mesh, Mesh):
        raise TypeError(
            f"mesh must be a jax.sharding.Mesh, got {type(mesh).__name__}; "
            "sgd_jax.sharding.data_mesh() makes one of all devices"
        )
    if DATA_AXIS not in mesh.shape:
        raise ValueError(
            f"mesh has the axes {mesh.axis_names}; expected one called {DATA_AXIS!r}, along which "
            "examples are cut"
        )
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def num_shards(mesh: Mesh) -> int:
    """Returns into how many pieces examples are cut: the length of the axis ``"data"``."""
    return check_mesh(mesh).shape[DATA_AXIS]


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Returns the arrays of a tree laid out whole on every device of a mesh.

    Args:
      tree: arrays, of NumPy too, and random keys; on several hosts the same on each, or already
        laid out over them.
      mesh: with an axis ``"data"``.
    """
    everywhere = NamedSharding(check_mesh(mesh), PartitionSpec())
    return jax.tree.map(lambda leaf: _put(leaf, everywhere), tree)


def like_replicated(tree: PyTree, mesh: Mesh) -> PyTree:
    """Returns shapes and dtypes of a tree as `jax.ShapeDtypeStruct`, whole on every device."""
    everywhere = NamedSharding(check_mesh(mesh), PartitionSpec())
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), tree
    )


def shard_examples(examples: Examples, mesh: Mesh, *, pad: bool = False) -> Examples:
    """Returns examples cut along the mesh axis ``"data"``: each device holds its share of rows.

    For means over a data set larger than one device, as in `gradient_moments`. Indices count as
    before; but in `make_epoch` the compiler may put the examples together again.

    Args:
      examples: a pytree whose leaves have leading axis n; on several hosts the same on each, which
        then moves only the rows of its own devices, or already laid out over them.
      mesh: with an axis ``"data"``, of D devices.
      pad: add copies of the last example until n is a multiple of D. An index never names them, so
        `make_epoch` may be given them; a mean over all examples would count them.

    Raises:
      ValueError: n is no multiple of D and ``pad`` is not set; no examples.
    """
    mesh, n = check_mesh(mesh), _validate.num_examples(examples)
    if n % num_shards(mesh):
        if not pad:
            raise ValueError(
                f"examples has n = {n}, no multiple of the {num_shards(mesh)} devices of the mesh; "
                "give pad=True, which adds copies of the last one that no index names, or replicate"
            )
        examples = _pad_rows(examples, -(-n // num_shards(mesh)) * num_shards(mesh))
    cut = NamedSharding(mesh, PartitionSpec(DATA_AXIS))
    return jax.tree.map(lambda leaf: _put(leaf, cut), examples)


def shard_local_examples(examples: Examples, mesh: Mesh) -> Examples:
    """Returns the examples of all processes as one set, each process giving only its own.

    Process k's examples follow those of process k − 1, and stay on its devices: nothing is sent.

    Args:
      examples: this process's; leading axis n/P with P processes, the same on each, and a multiple
        of the number of its devices.
      mesh: with an axis ``"data"`` over the devices of all processes, process by process.

    Returns:
      A pytree whose leaves have leading axis n, cut along ``"data"``.

    Raises:
      ValueError: a number of rows that is no multiple of the devices here; no examples.
    """
    mesh, n = check_mesh(mesh), _validate.num_examples(examples)
    local = num_shards(mesh) * jax.local_device_count() // jax.device_count()
    if n % max(local, 1):
        raise ValueError(
            f"this process has {n} examples, no multiple of its {local} devices; leave some out"
        )
    cut = NamedSharding(mesh, PartitionSpec(DATA_AXIS))
    return jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(cut, np.asarray(leaf)), examples
    )


def local_pieces(mesh: Mesh) -> list[int]:
    """Returns which pieces along the mesh axis ``"data"`` the devices of this process hold.

    >>> local_pieces(data_mesh(jax.devices()[:1]))
    [0]
    """
    mesh = check_mesh(mesh)
    axis = mesh.axis_names.index(DATA_AXIS)
    here = jax.process_index()
    return sorted({at[axis] for at, d in np.ndenumerate(mesh.devices) if d.process_index == here})


def join_pieces(
    pieces: Mapping[int, PyTree],
    mesh: Mesh,
    specs: PyTree = PartitionSpec(DATA_AXIS),  # noqa: B008  # immutable
) -> PyTree:
    """Returns arrays over all devices of a mesh, each process giving the pieces of its own.

    Each piece goes to its device, or devices where the mesh has further axes, and nowhere else.

    Args:
      pieces: by their number along ``"data"``, those that `local_pieces` names: trees of NumPy
        arrays, alike in structure, shapes and dtypes in all processes.
      mesh: with an axis ``"data"``, of D devices.
      specs: along which axis of each array the pieces follow each other, D times as long as that of
        one: a tree like a piece, or the beginning of one, of `jax.sharding.PartitionSpec` that
        name ``"data"`` and nothing else.

    >>> joined = join_pieces({0: np.arange(3)}, data_mesh(jax.devices()[:1]))
    >>> joined.sharding.spec, joined.tolist()
    (P('data',), [0, 1, 2])
    """
    mesh = check_mesh(mesh)

    def join(spec: PartitionSpec, *trees: PyTree) -> PyTree:
        axis = tuple(spec).index(DATA_AXIS)

        def join_leaf(*leaves: np.ndarray) -> jax.Array:
            by_number = dict(zip(pieces, leaves, strict=True))
            shape = list(leaves[0].shape)
            length, shape[axis] = shape[axis], shape[axis] * num_shards(mesh)

            def piece_at(index: Any) -> np.ndarray:
                return by_number[(index[axis].start or 0) // length]

            return jax.make_array_from_callback(tuple(shape), NamedSharding(mesh, spec), piece_at)

        return jax.tree.map(join_leaf, *trees)

    return jax.tree.map(
        join, specs, *pieces.values(), is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)
    )


def on_mesh(tree: PyTree, mesh: Mesh, *, cut: bool = False) -> PyTree:
    """Returns the arrays of a tree as a program with ``mesh=`` takes them.

    What lies on the devices of the mesh already, whole or in pieces, stays as it is. All else is
    laid out whole on each; or, with ``cut``, in pieces along ``"data"`` where the number of rows
    is a multiple of the devices.
    """
    devices = set(mesh.devices.flat)
    pieces = NamedSharding(mesh, PartitionSpec(DATA_AXIS))

    def put(leaf: Any) -> Any:
        if isinstance(leaf, jax.core.Tracer):
            return leaf
        if isinstance(leaf, jax.Array) and leaf.sharding.device_set == devices:
            return leaf
        if cut and jnp.ndim(leaf) and leaf.shape[0] % num_shards(mesh) == 0:
            return _put(leaf, pieces)
        return replicate(leaf, mesh)

    return jax.tree.map(put, tree)


def is_cut(examples: Examples, mesh: Mesh) -> bool:
    """Whether examples are cut along the mesh axis ``"data"``, as `shard_examples` leaves them.

    Not seen of what is traced.
    """
    pieces = NamedSharding(check_mesh(mesh), PartitionSpec(DATA_AXIS))
    return num_shards(mesh) > 1 and all(
        isinstance(leaf, jax.Array)
        and not isinstance(leaf, jax.core.Tracer)
        and leaf.sharding.is_equivalent_to(pieces, leaf.ndim)
        for leaf in jax.tree.leaves(examples)
    )


def take_rows(examples: Examples, indices: jax.Array, mesh: Mesh) -> Examples:
    """Returns the rows of cut examples that each device needs; for use under `jax.jit`.

    Every device looks up those that it holds of all the mini-batches, zeros for the rest, and a sum
    that leaves each device its share, a reduce-scatter, sends them where they belong. So nothing
    but the rows named is ever put together.

    Args:
      examples: cut along ``"data"``, see `is_cut`.
      indices: mini-batches (steps, m), m a multiple of the devices.
      mesh: with an axis ``"data"``.

    Returns:
      A pytree whose leaves are (steps, m, ...), cut along m.
    """

    def local(examples: Examples, indices: jax.Array) -> Examples:
        def take(leaf: jax.Array) -> jax.Array:
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                data = take(jax.random.key_data(leaf))
                return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
            if leaf.dtype == jnp.bool_:
                return take(leaf.astype(jnp.uint8)).astype(jnp.bool_)
            held = leaf.shape[0]
            at = indices - jax.lax.axis_index(DATA_AXIS) * held
            is_here = (at >= 0) & (at < held)
            rows = leaf.at[jnp.clip(at, 0, held - 1)].get(mode="promise_in_bounds")
            is_here = is_here.reshape(is_here.shape + (1,) * (rows.ndim - is_here.ndim))
            rows = jnp.where(is_here, rows, jnp.zeros((), rows.dtype))
            return jax.lax.psum_scatter(rows, DATA_AXIS, scatter_dimension=1, tiled=True)

        return jax.tree.map(take, examples)

    return jax.shard_map(
        local,
        mesh=check_mesh(mesh),
        in_specs=(PartitionSpec(DATA_AXIS), PartitionSpec()),
        out_specs=PartitionSpec(None, DATA_AXIS),
        axis_names={DATA_AXIS},
    )(examples, indices)


def take_own_rows(examples: Examples, indices: jax.Array, mesh: Mesh) -> Examples:
    """Returns rows that each device looks up in its own piece of the examples: nothing is sent.

    Args:
      examples: n of them, in D pieces of n/D; see `is_cut`.
      indices: mini-batches (steps, m) in D pieces of m/D columns, each of which counts the rows of
        the piece of the same number, from 0.
      mesh: with an axis ``"data"``, of D devices.

    Returns:
      A pytree whose leaves are (steps, m, ...), cut along m.
    """

    def local(examples: Examples, indices: jax.Array) -> Examples:
        return jax.tree.map(lambda leaf: leaf.at[indices].get(mode="promise_in_bounds"), examples)

    return jax.shard_map(
        local,
        mesh=check_mesh(mesh),
        in_specs=(PartitionSpec(DATA_AXIS), PartitionSpec(None, DATA_AXIS)),
        out_specs=PartitionSpec(None, DATA_AXIS),
        axis_names={DATA_AXIS},
    )(examples, indices)


def param_shardings(params: Params, mesh: Mesh, rules: Rules = ()) -> PyTree:
    """Returns how each parameter lies on a mesh: cut by the first rule it matches, or whole.

    A rule is a pattern and a `jax.sharding.PartitionSpec`. The path of a leaf is its keys with
    slashes between, such as ``0/weights``.

    Args:
      params: a pytree of arrays, or of their shapes.
      mesh: with an axis ``"data"``, and those that rules name.
      rules: pairs (pattern, spec). A parameter cut along ``"data"`` is put together where a
        gradient is taken and kept in pieces otherwise, as is its optimizer state.

    Returns:
      A pytree like params of `jax.sharding.NamedSharding`.

    Raises:
      ValueError: a rule that no parameter matches; a spec with an unknown axis, more entries than
        the parameter has axes, or along an axis whose length is no multiple of the mesh's.
      TypeError: a spec that is none.

    >>> import sgd_jax as sj
    >>> params = sj.Layer(weights=jnp.zeros((4, 2)), biases=jnp.zeros(4))
    >>> rules = [("weights", PartitionSpec("data"))]
    >>> found = param_shardings(params, data_mesh(jax.devices()[:1]), rules)
    >>> found.weights.spec, found.biases.spec
    (P('data',), P())
    """
    mesh = check_mesh(mesh)
    paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
    for pattern, spec in rules:
        if not isinstance(spec, PartitionSpec):
            raise TypeError(
                f"the rule for {pattern!r} must hold a jax.sharding.PartitionSpec, got {spec!r}"
            )
        if not any(re.search(pattern, name) for name in names):
            raise ValueError(
                f"rules hold {pattern!r}, which no parameter matches; they are {', '.join(names)}"
            )

    def sharding(name: str, leaf: Any) -> NamedSharding:
        for pattern, spec in rules:
            if re.search(pattern, name):
                _check_spec(f"{name}, by the rule {pattern!r}", jnp.shape(leaf), spec, mesh)
                return NamedSharding(mesh, spec)
        return NamedSharding(mesh, PartitionSpec())

    leaves = [sharding(name, leaf) for name, (_, leaf) in zip(names, paths, strict=True)]
    return jax.tree.unflatten(treedef, leaves)


def state_shardings(state: PyTree, params: Params, mesh: Mesh, rules: Rules = ()) -> PyTree:
    """Returns how each array of a training state lies on a mesh.

    What belongs to a parameter, such as its momentum, lies as the parameter does: its path ends
    with that of the parameter and its shape is the same. All else lies whole on every device.

    Args:
      state: that of an optimizer, or a whole `TrainState`.
      params: the parameters, or their shapes.
      mesh: as for `param_shardings`.
      rules: as for `param_shardings`.

    Raises:
      ValueError, TypeError: as `param_shardings`.
    """
    shardings = jax.tree.leaves(param_shardings(params, mesh, rules))
    paths = jax.tree_util.tree_leaves_with_path(params)
    whole = NamedSharding(check_mesh(mesh), PartitionSpec())

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        fitting = [
            (len(end), k)
            for k, (end, param) in enumerate(paths)
            if path[len(path) - len(end) :] == end and jnp.shape(leaf) == jnp.shape(param)
        ]
        return shardings[max(fitting)[1]] if fitting else whole

    return jax.tree_util.tree_map_with_path(sharding, state)


def place(tree: PyTree, shardings: PyTree) -> PyTree:
    """Returns arrays laid out as said; inside a program, tells the compiler to."""
    return jax.tree.map(_put, tree, shardings)


def lay_out(sample: Sample | jax.Array, mesh: Mesh) -> Any:
    """Returns a sample, or mini-batches of indices, laid out over a mesh.

    Every draw is the same whatever the mesh; only where its entries lie differs.

    Args:
      sample: a `Sample`, stacked or not, or indices; the last axis is the mini-batch.
      mesh: D devices along ``"data"``.

    Returns:
      The same entries, the last axis padded to a multiple of D, with indices of −1 (no example) and
      weights of 0, and sharded along ``"data"``.
    """
    if isinstance(sample, Sample):
        return Sample(_lay_out(sample.indices, mesh, -1), _lay_out(sample.weights, mesh, 0))
    return _lay_out(sample, mesh, -1)


def _lay_out(batches: jax.Array, mesh: Mesh, fill: int) -> jax.Array:
    leading = batches.ndim - 1
    missing = -batches.shape[-1] % num_shards(check_mesh(mesh))
    if missing:
        batches = jnp.pad(batches, [(0, 0)] * leading + [(0, missing)], constant_values=fill)
    return place(batches, NamedSharding(mesh, PartitionSpec(*[None] * leading, DATA_AXIS)))


def on_each_shard(
    function: Callable[..., PyTree],
    mesh: Mesh,
    shared: PyTree,
    examples: Examples,
    out_specs: PyTree = PartitionSpec(),  # noqa: B008  # immutable
    num_examples: int | None = None,
) -> PyTree:
    """Runs a function on every device on its own rows of the examples; for use under `jax.jit`.

    The function gets ``(shared, rows, num_valid)``: ``rows`` are ⌈n/D⌉ consecutive examples, of
    which the first ``num_valid`` count; what follows are copies of the last. It makes what it
    returns the same on all devices, by sums over `DATA_AXIS`, or returns one value a row. Axes of
    the mesh other than ``"data"`` are the compiler's.

    Args:
      function: as above.
      mesh: with an axis ``"data"``, of D devices.
      shared: what each device gets whole.
      examples: leading axis n.
      out_specs: ``PartitionSpec(DATA_AXIS)`` for one value a row: those of all rows of all
        devices, D⌈n/D⌉ in order, the last not counting.
      num_examples: n, where the examples are filled up to D⌈n/D⌉ already.
    """
    mesh, n = check_mesh(mesh), num_examples or _validate.num_examples(examples)
    rows = -(-n // num_shards(mesh))
    padded = _pad_rows(examples, rows * num_shards(mesh))

    def local(shared: PyTree, examples: Examples) -> PyTree:
        start = jax.lax.axis_index(DATA_AXIS) * rows
        return function(shared, examples, jnp.clip(n - start, 0, rows))

    specs = (PartitionSpec(), PartitionSpec(DATA_AXIS))
    run = jax.shard_map(
        local, mesh=mesh, in_specs=specs, out_specs=out_specs, axis_names={DATA_AXIS}
    )
    return run(shared, padded)


def _pad_rows(examples: Examples, rows: int) -> Examples:
    """Adds copies of the last example."""

    def pad(leaf: Any) -> Any:
        missing = rows - leaf.shape[0]
        if not missing:
            return leaf
        numpy = np if isinstance(leaf, np.ndarray) else jnp
        copies = numpy.broadcast_to(leaf[-1:], (missing, *leaf.shape[1:]))
        return numpy.concatenate([leaf, copies])

    return jax.tree.map(pad, examples)


def _put(leaf: Any, sharding: NamedSharding) -> Any:
    if isinstance(leaf, jax.core.Tracer):
        return jax.lax.with_sharding_constraint(leaf, sharding)
    is_global = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
    if is_global or sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
        data = _put(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    host = np.asarray(leaf, jnp.result_type(leaf))
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _check_spec(name: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh) -> None:
    if len(spec) > len(shape):
        raise ValueError(
            f"{name}, has shape {shape}; expected at least {len(spec)} axes for {spec}"
        )
    for axis, entry in enumerate(spec):
        names = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
        unknown = [axis_name for axis_name in names if axis_name not in mesh.shape]
        if unknown:
            raise ValueError(
                f"{name}, is cut along {unknown[0]!r}; expected an axis of the mesh: "
                f"{', '.join(mesh.axis_names)}"
            )
        parts = int(np.prod([mesh.shape[axis_name] for axis_name in names]))
        if shape[axis] % parts:
            raise ValueError(
                f"{name}, has shape {shape}; expected axis {axis} to be a multiple of {parts}, the "
                f"devices along {entry!r}. Cut another axis, or leave it whole"
            )
