"""Training a network of sigmoid neurons to classify: its compiled programs, for several seeds."""

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import sgd_jax as sj
from sgd_jax._chunks import chunks, vary_like
from sgd_jax._tree import tree_norm
from sgd_jax.data import Dataset, Examples
from sgd_jax.distributed import sharding
from sgd_jax.networks import InitScheme
from sgd_jax.typing import Array, CostFn, Params

Cost = Literal["quadratic", "cross_entropy"]

PARTS = ("train", "validation", "test")
CHUNK_SIZE = 2048  # examples that an evaluation looks at together: bounds its memory

DrawEpoch = Callable[[Array, Array, int, int], Array]
"""From the key of a seed, the number of an epoch, n and the batch size to its mini-batches."""


def draw_reshuffled(key: Array, number: Array, n: int, batch_size: int) -> Array:
    """Returns the mini-batches of an epoch in a new random order, the short last one too."""
    return sj.sampling.epoch(jax.random.fold_in(key, number), n, batch_size, keep_last=True)


class Part(NamedTuple):
    """What was trained of an epoch, from one return to the caller to the next."""

    state: sj.TrainState
    """The states after it."""
    costs: Array
    """Of its mini-batches, (num_seeds, steps)."""
    steps: range
    """Which mini-batches of the epoch these are, counted from 0."""
    num_steps: int
    """Mini-batches of the whole epoch."""


MakeEpoch = Callable[..., Callable[..., Iterator[Part]]]
"""From the batch size and, unless it is `draw_reshuffled`, a `DrawEpoch` to an epoch."""


class Programs(NamedTuple):
    """What trains and measures the networks of all seeds at once, compiled.

    The state of each seed is a row: every leaf has a leading axis over seeds.
    """

    init: Callable[[], sj.TrainState]
    """The states before the first step."""
    make_epoch: MakeEpoch
    """From the batch size to an epoch, compiled once for each size: from the states, the number of
    the epoch and how many parts of it are done already to the other parts. There is one, unless the
    examples are streamed. The states given, and those of a part when the next is asked for, are
    used up. What draws the mini-batches may be given, too."""
    evaluate: Callable[[Params], dict[str, Any]]
    """From params to what is measured: Python numbers by name, lists of them for several seeds."""


def make_programs(
    dataset: Dataset,
    optimizer: optax.GradientTransformation,
    *,
    sizes: tuple[int, ...],
    cost: Cost,
    init: InitScheme,
    seeds: range,
    dtype: jax.typing.DTypeLike,
    parts: Sequence[str] = PARTS,
    first_batch_size: int | None = None,
    mesh: Mesh | None = None,
) -> Programs:
    """Compiles the programs and puts the data on the device, pixels as the bytes they came as.

    They are compiled side by side, in threads, while the caller goes on: each is waited for when it
    is first called. With ``first_batch_size`` the epoch of that size is among them.

    The order of epoch e is drawn from (seed, e) alone, so training can go on from the state after
    any epoch. A run of seed s does the same among other seeds as alone, up to rounding.

    `evaluate` measures, on each of train, validation and test, `cost_*`, the mean cost, and
    `accuracy_*`, the share of examples whose largest output is that of their class (the first
    among equals); further `gradient_norm`, ‖∇C‖ of the mean cost of the whole training set without
    weight decay, and `dead_classes_test`, the number of classes in the test set of whose examples
    fewer than one in ten are right: the mark of an output neuron that died, or has yet to wake.

    ``parts`` are those measured, if not all three. The devices of ``mesh`` share each mini-batch
    and what is measured; each holds all the data and all the state.
    """
    fun, output = example_functions(cost, dataset.num_classes, dataset.scale, dtype)
    epoch = sj.make_epoch(fun, optimizer, mesh=mesh)
    n = len(dataset.train.labels)
    train_data = to_device(dataset.train, dtype, mesh)
    data = {
        name: train_data if name == "train" else to_device(getattr(dataset, name), dtype, mesh)
        for name in parts
    }
    numbers, init_all = make_init(optimizer, sizes=sizes, init=init, seeds=seeds, dtype=dtype)

    def train(
        batch_size: int,
        draw_epoch: DrawEpoch,
        state: sj.TrainState,
        numbers: Array,
        number: Array,
        examples: Examples,
    ) -> tuple[sj.TrainState, Array]:
        def train_one(state: sj.TrainState, seed: Array) -> tuple[sj.TrainState, Array]:
            batches = draw_epoch(split_seed(seed)[1], number, n, batch_size)
            state, info = epoch(state, examples, batches)
            return state, info.cost

        return jax.vmap(train_one)(state, numbers)

    measure = functools.partial(measure_parts, fun, output, dataset.num_classes, mesh=mesh)

    def norms(params: Params, data: dict[str, Examples]) -> dict[str, Totals]:
        totals = jax.vmap(measure, in_axes=(0, None))(params, data)
        if "train" not in totals:
            return totals
        norm = jax.vmap(tree_norm)(totals["train"].gradient)
        return totals | {"train": totals["train"]._replace(gradient=norm)}

    pool = ThreadPoolExecutor()
    # What runs once need not be fast: half as long in the compiler, and the same bits.
    options: dict[str, str | bool] = {}
    if jax.default_backend() == "cpu":
        options["xla_backend_optimization_level"] = "1"
    whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    init_lowered = jax.jit(init_all, out_shardings=whole).lower(numbers)
    init_fn = pool.submit(init_lowered.compile, options)
    state = jax.eval_shape(init_all, numbers)
    if mesh is not None:
        state = sharding.like_replicated(state, mesh)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    train_fn = jax.jit(train, static_argnums=(0, 1), donate_argnums=2, out_shardings=whole)

    @functools.cache
    def compile_epoch(batch_size: int, draw_epoch: DrawEpoch) -> Future[jax.stages.Compiled]:
        lowered = train_fn.lower(batch_size, draw_epoch, state, numbers, number, train_data)
        return pool.submit(lowered.compile)

    if first_batch_size is not None:
        compile_epoch(first_batch_size, draw_reshuffled)
    measure_lowered = jax.jit(norms, out_shardings=whole).lower(state.params, data)
    measure_fn = pool.submit(measure_lowered.compile)

    def make_epoch(
        batch_size: int, draw_epoch: DrawEpoch = draw_reshuffled
    ) -> Callable[[sj.TrainState, int, int], Iterator[Part]]:
        compiled = compile_epoch(batch_size, draw_epoch).result()

        def run(state: sj.TrainState, number: int, num_done: int = 0) -> Iterator[Part]:
            state, costs = compiled(state, numbers, np.int32(number), train_data)
            num_steps = costs.shape[1]
            yield Part(state, costs, range(num_steps), num_steps)

        return run

    sizes_of_classes = {
        name: np.bincount(getattr(dataset, name).labels, minlength=dataset.num_classes)
        for name in data
    }
    return Programs(
        init=lambda: init_fn.result()(numbers),
        make_epoch=make_epoch,
        evaluate=lambda params: to_columns(measure_fn.result()(params, data), sizes_of_classes),
    )


def make_init(
    optimizer: optax.GradientTransformation,
    *,
    sizes: tuple[int, ...],
    init: InitScheme,
    seeds: range,
    dtype: jax.typing.DTypeLike,
) -> tuple[np.ndarray, Callable[[Any], sj.TrainState]]:
    """Returns the seeds as an array, and the function from it to their first states."""

    @jax.vmap
    def init_all(seed: Array) -> sj.TrainState:
        network = sj.init_network(split_seed(seed)[0], sizes, init, dtype)
        return sj.init_state(network, optimizer)

    return np.arange(seeds.start, seeds.stop, dtype=np.uint32), init_all


def first_networks(
    sizes: tuple[int, ...], init: InitScheme, seeds: range, dtype: jax.typing.DTypeLike
) -> tuple[Params, Array]:
    """Returns the networks before the first step, and keys for their draws: a row for each seed."""

    @jax.jit
    @jax.vmap
    def first(seed: Array) -> tuple[Params, Array]:
        of_network, of_draws = split_seed(seed)
        return sj.init_network(of_network, sizes, init, dtype), of_draws

    return first(np.arange(seeds.start, seeds.stop, dtype=np.uint32))


def split_seed(seed: Array) -> Array:
    """Returns two keys: for the network, and for the order of its examples."""
    return jax.random.split(jax.random.key(seed))


def example_functions(
    cost: Cost, num_classes: int, scale: float, dtype: jax.typing.DTypeLike
) -> tuple[CostFn, Callable[[Params, Array], Array]]:
    """Returns the cost of one example, and the output for one input as it is stored."""

    def scaled(stored: Array) -> Array:
        return stored.astype(dtype) / scale

    def fun(params: Params, example: Examples) -> Array:
        x = scaled(jnp.asarray(example.inputs))
        y = jax.nn.one_hot(example.labels, num_classes, dtype=dtype)
        if cost == "quadratic":
            return sj.quadratic_cost(sj.feedforward(params, x), y)
        return sj.logit_cross_entropy_cost(sj.networks.weighted_input(params, x), y)

    def output(params: Params, stored: Array) -> Array:
        return sj.feedforward(params, scaled(stored))

    return fun, output


class Totals(NamedTuple):
    """Sums over examples."""

    cost: Array
    right: Array
    """Examples answered right, by class: (num_classes,) int32."""
    gradient: Params
    """Of the summed cost; None where it is not wanted."""


def measure_parts(
    fun: CostFn,
    output: Callable[[Params, Array], Array],
    num_classes: int,
    params: Params,
    data: dict[str, Examples],
    *,
    with_gradient: bool = True,
    mesh: Mesh | None = None,
) -> dict[str, Totals]:
    """Returns the totals of one network over each part of the data, by its name.

    Of the part ``"train"`` the gradient too, where it is wanted.
    """
    return {
        name: sum_over_chunks(
            make_totals(fun, output, num_classes, with_gradient=with_gradient and name == "train"),
            params,
            examples,
            mesh,
        )
        for name, examples in data.items()
    }


def make_totals(
    fun: CostFn, output: Callable[[Params, Array], Array], num_classes: int, *, with_gradient: bool
) -> Callable[[Params, Examples, Array], Totals]:
    """Returns a function (params, examples, present) -> totals over the examples present."""

    def totals(params: Params, examples: Examples, present: Array) -> Totals:
        def summed_cost(params: Params) -> Array:
            costs = jax.vmap(fun, in_axes=(None, 0))(params, examples)
            return jnp.sum(jnp.where(present, costs, 0))

        if with_gradient:
            cost, gradient = jax.value_and_grad(summed_cost)(params)
        else:
            cost, gradient = summed_cost(params), None
        outputs = jax.vmap(output, in_axes=(None, 0))(params, jnp.asarray(examples.inputs))
        is_right = present & (jnp.argmax(outputs, axis=1) == examples.labels)
        right = (
            jnp.zeros(num_classes, jnp.int32).at[examples.labels].add(is_right.astype(jnp.int32))
        )
        return Totals(cost, right, gradient)

    return totals


def sum_over_chunks(
    totals_fn: Callable[[Params, Examples, Array], Totals],
    params: Params,
    examples: Examples,
    mesh: Mesh | None = None,
    *,
    before: Any = None,
    num_examples: int | None = None,
) -> Totals:
    """Returns the totals over all examples, of which few are looked at together.

    Those ``before`` are added. Of examples that are filled up for the devices of ``mesh``,
    ``num_examples`` count: see `sharding.on_each_shard`.
    """

    def local(params: Params, examples: Examples, num_valid: Array) -> Totals:
        totals = add_over_chunks(totals_fn, params, examples, num_valid)
        return jax.lax.psum(totals, sharding.DATA_AXIS)

    if mesh is None:
        return add_over_chunks(totals_fn, params, examples, before=before)
    totals = sharding.on_each_shard(local, mesh, params, examples, num_examples=num_examples)
    return totals if before is None else jax.tree.map(jnp.add, before, totals)


def add_over_chunks(
    totals_fn: Callable[[Params, Examples, Array], Totals],
    params: Params,
    examples: Examples,
    num_valid: Array | None = None,
    before: Any = None,
) -> Totals:
    """Returns the totals over the first ``num_valid`` examples, or all, and those ``before``."""
    params = vary_like(examples, params)
    steps, _, chunk_of = chunks(examples, CHUNK_SIZE, num_valid)

    def total(number: Array) -> Totals:
        return totals_fn(params, *chunk_of(examples, number))

    def body(totals: Totals, number: Array) -> tuple[Totals, None]:
        return jax.tree.map(jnp.add, totals, total(number)), None

    if before is None:
        before = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(total, jnp.int32(0))
        )
        before = vary_like(examples, before)
    return jax.lax.scan(body, before, jnp.arange(steps, dtype=jnp.int32))[0]


def to_device(examples: Examples, dtype: jax.typing.DTypeLike, mesh: Mesh | None = None) -> Any:
    """Puts examples on the device, or whole on each of a mesh, pixels as the bytes they came as."""
    examples = as_computed(examples, dtype)
    return jax.device_put(examples) if mesh is None else sharding.replicate(examples, mesh)


def as_computed(examples: Examples, dtype: jax.typing.DTypeLike) -> Examples:
    """Returns the examples as they go on a device: pixels as bytes, other inputs in ``dtype``."""
    inputs = examples.inputs
    return examples if inputs.dtype == np.uint8 else Examples(inputs.astype(dtype), examples.labels)


def to_columns(totals: dict[str, Totals], sizes: dict[str, np.ndarray]) -> dict[str, Any]:
    """Returns what was measured, from totals with a leading axis over seeds and class sizes."""
    columns = {}
    for name, size in sizes.items():
        cost, right, gradient = map(np.asarray, totals[name])
        columns[f"cost_{name}"] = cost / size.sum()
        columns[f"accuracy_{name}"] = right.sum(axis=1) / size.sum()
        if name == "train":
            columns["gradient_norm"] = gradient / size.sum()
        if name == "test":
            columns["dead_classes_test"] = np.sum(10 * right < size, axis=1)
    lists = {name: values.tolist() for name, values in columns.items()}
    return {name: v if len(v) > 1 else v[0] for name, v in lists.items()}
