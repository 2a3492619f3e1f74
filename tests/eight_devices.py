"""What `test_sharding` compares: everything that takes ``mesh=``, on 1, 2 and 8 devices.

A program of its own, for the number of devices of a process is set before JAX starts:

  XLA_FLAGS=--xla_force_host_platform_device_count=8 python tests/eight_devices.py OUT.npz

It stores what each call returns, by the names in `results`.
"""

import re
import sys
import tempfile
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

import sgd_jax as sj
from experiments import _classifier, train
from experiments._config import Config
from sgd_jax import sampling
from sgd_jax.distributed import sharding

N, M, STEPS = 43, 10, 3  # 2 and 8 divide neither n nor, 8, m
SIZES = (12, 16, 4)


def fun(params, example):
    return sj.quadratic_cost(sj.feedforward(params, example[0]), example[1])


def problem():
    """Returns params and N examples, the same in every process."""
    params = sj.init_network(jax.random.key(0), SIZES, dtype=jnp.float64)
    inputs, targets = (
        jax.random.normal(jax.random.key(k), (N, size)) for k, size in ((1, 12), (2, 4))
    )
    return params, (np.asarray(inputs), np.asarray(targets))


def moments(mesh, params=None):
    start, examples = problem()
    params = start if params is None else params
    return sj.gradient_moments(
        fun, params, examples, chunk_size=3, per_coordinate=True, keep_norms=True,
        keep_alignments=True, mesh=mesh,
    )  # fmt: skip


def moments_of_strata(mesh):
    params, examples = problem()
    return sj.gradient_moments(fun, params, examples, strata=np.arange(N) % 3, mesh=mesh)


def curvature(mesh):
    params, examples = problem()
    key = jax.random.key(4)
    return sj.noise.curvature_noise_scale(fun, params, examples, key=key, num_probes=3, mesh=mesh)


def samples(mesh):
    """Returns a draw of every sampler, as one program."""
    strata, order = np.arange(N) % 3, np.arange(N - 1)
    p = np.arange(1, N + 1) / (N * (N + 1) / 2)

    @jax.jit
    def draw(key):
        drawn = {
            "without_replacement": sampling.without_replacement(key, N, M),
            "with_replacement": sampling.with_replacement(key, N, M),
            "poisson": sampling.poisson(key, N, M, max_size=15),
            "stratified": sampling.stratified(key, strata, (3, 3, 5)),
            "importance": sampling.importance(key, p, M),
            "antithetic": sampling.antithetic(key, order, M),
            "plain_mean": sampling.plain_mean(jnp.array([3, 1, -1])),
            "epoch": sampling.epoch(key, N, M, keep_last=True),
            "fixed_order": sampling.fixed_order(order, M),
            "cyclic": sampling.cyclic(N, M, 2, start=7),
        }
        if mesh is None:
            return drawn
        return {name: sharding.lay_out(sample, mesh) for name, sample in drawn.items()}

    drawn = draw(jax.random.key(5))
    num = 1 if mesh is None else sharding.num_shards(mesh)
    for leaf in jax.tree.leaves(drawn):
        assert leaf.sharding.shard_shape(leaf.shape)[-1] * num == leaf.shape[-1]  # all are cut
    return drawn


def sweep(mesh):
    """Returns two orders of three learning rates: 2 devices divide the orders, 8 fill up runs."""
    params, examples = problem()
    rates = jnp.broadcast_to(jnp.array([0.1, 1.0, 3.0]), (2, 3))
    params = jax.tree.map(lambda x: jnp.broadcast_to(x, (2, 3, *x.shape)), params)
    batches = jnp.stack([sampling.epoch(jax.random.key(k), N, M) for k in range(2)])
    program = sj.make_sweep(fun, sj.sgd, mesh=mesh)
    return program.epoch(program.init(params, rates), rates, examples, batches)


OPTIMIZER = optax.adam(0.1)  # no plain sum, and with a state of its own


def epoch(mesh, rules=(), cut=False):
    """Returns state and costs after an epoch whose last mini-batch is short."""
    params, examples = problem()
    batches = sampling.epoch(jax.random.key(6), N, M, keep_last=True)
    if cut:
        examples = sharding.shard_examples(examples, mesh, pad=True)
        assert sharding.is_cut(examples, mesh)
    state = sj.init_state(params, OPTIMIZER)
    state, info = sj.make_epoch(fun, OPTIMIZER, mesh=mesh, rules=rules)(state, examples, batches)
    weights = state.params[0].weights
    assert mesh is None or weights.sharding.spec == dict(rules).get("0/weights", P())
    return state, info


def step(mesh):
    """Returns state and cost after a step on M examples, by the gradient of their mean cost."""
    params, examples = problem()
    few = jax.tree.map(lambda leaf: leaf[:M], examples)
    take = sj.make_step(fun, OPTIMIZER, estimator=sj.estimators.mini_batch("mean_cost"), mesh=mesh)
    return take(sj.init_state(params, OPTIMIZER), few)


def mesh_with_model(mesh):
    """Returns the same devices in a grid with a second axis, of 2."""
    return None if mesh is None else jax.make_mesh((mesh.size // 2, 2), ("data", "model"))


def epoch_by_rules(mesh):
    """Returns the same as `epoch`, with a layer and its optimizer state cut over a second axis."""
    rules = [("0/weights", P("model")), ("0/biases", P("model"))]
    return epoch(mesh_with_model(mesh), rules if mesh else ())


def epoch_all_cut(mesh):
    """Returns the same as `epoch`, with a layer and the examples cut over the axis of the batch."""
    return epoch(mesh, [("0/weights", P("data"))], cut=True) if mesh else epoch(None)


def rows(mesh):
    """Returns rows of bytes, floats, truths and random keys, in any order, some of them twice."""
    _, (inputs, _) = problem()
    examples = {
        "bytes": (inputs > 0).astype(np.uint8),
        "floats": inputs,
        "truths": inputs[:, 0] > 0,
        "keys": jax.random.split(jax.random.key(7), N),
    }
    indices = jax.random.randint(jax.random.key(8), (3, 16), 0, N)
    if mesh is None:
        found = jax.tree.map(lambda leaf: leaf[indices], examples)
    else:
        examples = sharding.shard_examples(examples, mesh, pad=True)
        found = _take(mesh)(examples, indices)
    return {**found, "keys": jax.random.key_data(found["keys"])}


def _take(mesh):
    return jax.jit(lambda examples, indices: sharding.take_rows(examples, indices, mesh))


def write_images(folder):
    """Writes N images of 2 × 3 pixels to train on, in two shards, and 13 and 9 to be measured."""
    random = np.random.default_rng(0)
    for name, n in (("train-0", 30), ("train-1", N - 30), ("validation", 13), ("test", 9)):
        np.save(Path(folder, f"x_{name}.npy"), random.integers(0, 200, (n, 2, 3), np.uint8))
        np.save(Path(folder, f"y_{name}.npy"), np.arange(n) % 3)


def streamed(mesh):
    """Returns two networks after an epoch of examples on the disk, and all that was measured.

    Of the 5 mini-batches 2 go into a chunk, and 8 examples into a block that is measured.
    """
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(_classifier, "CHUNK_SIZE", 8):
        write_images(folder)
        config = Config(
            dataset=folder, stream=True, chunk_mib=2 * 2 * M * (6 + 4) / 2**20, sizes=(6, 4, 3),
            batch_size=M, epochs=1, num_seeds=2, dtype="float64",
        )  # fmt: skip
        result = train.run(config, mesh=mesh)
    measured = [
        {name: np.array(value) for name, value in line.items() if "second" not in name}
        for line in result.records
    ]
    return result.state, measured


def own_rows():
    """Returns 40 examples and 4 mini-batches of 16, as 8 pieces of 5 rows and 2 columns each."""
    examples = jax.tree.map(lambda leaf: leaf[:40], problem()[1])
    return examples, np.random.default_rng(0).integers(-1, 5, (4, 16))


def epoch_of_own_rows(mesh):
    """Returns the same of mini-batches that each device takes from the examples that it holds."""
    params, _ = problem()
    examples, batches = own_rows()
    state = sj.init_state(params, OPTIMIZER)
    if mesh is None:  # the same rows, as they are numbered among all
        batches = np.where(batches < 0, -1, batches + 5 * (np.arange(16) // 2))
    else:
        examples = sharding.shard_examples(examples, mesh)
    return sj.make_epoch(fun, OPTIMIZER, mesh=mesh, own_rows=True)(state, examples, batches)


def refusals_of_own_rows():
    """Returns what is said of examples, and of mini-batches, that 8 devices do not divide."""
    params, _ = problem()
    examples, batches = own_rows()
    epoch = sj.make_epoch(fun, OPTIMIZER, mesh=sharding.data_mesh(), own_rows=True)
    said = []
    for n, m in ((39, 16), (40, 15)):
        few = jax.tree.map(lambda leaf, n=n: leaf[:n], examples)
        try:
            epoch(sj.init_state(params, OPTIMIZER), few, batches[:, :m])
        except ValueError as error:
            said.append(str(error))
    return said


def moments_by_rules(mesh):
    if mesh is None:
        return moments(None)
    mesh, (params, _) = mesh_with_model(mesh), problem()
    shardings = sharding.param_shardings(params, mesh, [("0/weights", P("model"))])
    return moments(mesh, sharding.place(params, shardings))


RESULTS = {
    "epoch": (epoch, (1, 2, 8)),
    "step": (step, (1, 2, 8)),
    "rows": (rows, (2, 8)),
    "epoch_by_rules": (epoch_by_rules, (8,)),
    "epoch_all_cut": (epoch_all_cut, (8,)),
    "epoch_of_own_rows": (epoch_of_own_rows, (8,)),
    "streamed": (streamed, (1, 2, 8)),
    "moments_by_rules": (moments_by_rules, (8,)),
    "sweep": (sweep, (2, 8)),
    "moments": (moments, (1, 2, 8)),
    "moments_of_strata": (moments_of_strata, (8,)),
    "curvature": (curvature, (8,)),
    "samples": (samples, (1, 2, 8)),
}
"""By name, a function from a mesh, or None, to what is compared, and the numbers of devices."""


def collectives_of_rows():
    """Returns the same of what takes 16 rows of float64 out of examples that are cut."""
    mesh = sharding.data_mesh()
    examples = sharding.shard_examples(problem()[1][0], mesh, pad=True)
    indices = sharding.replicate(np.arange(16)[None], mesh)
    return _collectives_in(_take(mesh).lower(examples, indices).compile().as_text())


def collectives():
    """Returns kind and bytes of each collective in the program of an epoch on 8 devices."""
    params, examples = problem()
    optimizer, mesh = sj.sgd(1.0), sharding.data_mesh()
    batches = sampling.epoch(jax.random.key(6), N, 16)
    run = jax.jit(sj.make_epoch(fun, optimizer, mesh=mesh))
    lowered = run.lower(sj.init_state(params, optimizer), examples, batches)
    return _collectives_in(lowered.compile().as_text())


def collectives_of_own_rows():
    """Returns the same of an epoch whose rows each device takes from the examples it holds."""
    params, _ = problem()
    optimizer, mesh = sj.sgd(1.0), sharding.data_mesh()
    examples, batches = own_rows()
    examples = sharding.shard_examples(examples, mesh)
    batches = sharding.place(batches, jax.NamedSharding(mesh, P(None, "data")))
    run = jax.jit(sj.make_epoch(fun, optimizer, mesh=mesh, own_rows=True))
    state = sharding.replicate(sj.init_state(params, optimizer), mesh)
    return _collectives_in(run.lower(state, examples, batches).compile().as_text())


def _collectives_in(text):
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|ragged-all-to-all"
    found = re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", text)
    return [
        (kind, sum(map(_bytes, re.findall(r"(\w+)\[([\d,]*)\]", shape)))) for shape, kind in found
    ]


def _bytes(shape):
    dtype, lengths = shape
    return int(dtype[1:]) // 8 * int(np.prod([int(n) for n in lengths.split(",") if n]))


def flat(name, tree):
    """Returns the leaves of a tree by name, as NumPy arrays."""
    return {
        name + jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def main(path):
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    assert jax.device_count() == 8
    kinds, sizes = zip(*collectives(), strict=True)
    found = {"collective_kinds": np.array(kinds), "collective_bytes": np.array(sizes)}
    kinds, sizes = zip(*collectives_of_rows(), strict=True)
    found |= {"row_kinds": np.array(kinds), "row_bytes": np.array(sizes)}
    kinds, sizes = zip(*collectives_of_own_rows(), strict=True)
    found |= {"own_row_kinds": np.array(kinds), "own_row_bytes": np.array(sizes)}
    found["own_row_refusals"] = np.array(refusals_of_own_rows())
    for name, (function, nums) in RESULTS.items():
        for num in nums:
            mesh = sharding.data_mesh(jax.devices()[:num])
            found |= flat(f"{num}/{name}", function(mesh))
    np.savez(path, **found)


if __name__ == "__main__":
    main(sys.argv[1])
