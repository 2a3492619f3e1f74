"""The same numbers on 1, 2 and 8 devices; arrays where they should lie; rules that are refused."""

import os
import re
import subprocess
import sys

import eight_devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from jax.sharding import PartitionSpec as P

import sgd_jax as sj
from sgd_jax.distributed import sharding


@pytest.fixture(scope="module")
def on_devices(tmp_path_factory):
    """Everything in `eight_devices.RESULTS` on meshes of 1, 2 and 8 devices, by one process."""
    path = tmp_path_factory.mktemp("sharding") / "out.npz"
    flags = f"--xla_force_host_platform_device_count=8 {quick.FLAGS}"
    done = subprocess.run(
        [sys.executable, eight_devices.__file__, path],
        env=dict(os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS=flags),
        capture_output=True, text=True, check=False, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with np.load(path) as file:
        return dict(file)


@pytest.mark.slow
@pytest.mark.parametrize("name", eight_devices.RESULTS)
def test_the_number_of_devices_changes_nothing_beyond_rounding(on_devices, name):
    function, nums = eight_devices.RESULTS[name]
    alone = eight_devices.flat(name, function(None))
    assert alone
    for num in nums:
        for key, expected in alone.items():
            found = on_devices[f"{num}/{key}"]
            if name == "samples":  # what fills it up to a multiple of the devices is no example
                m = expected.shape[-1]
                assert (found[..., m:] == (0 if key.endswith("weights") else -1)).all()
                found = found[..., :m]
            assert found.shape == expected.shape, (num, key)
            scale = np.abs(expected).max()
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * scale, err_msg=key)


@pytest.mark.slow
def test_a_step_sums_the_gradient_and_the_cost_over_devices_and_little_else(on_devices):
    params, _ = eight_devices.problem()
    num_parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    num_steps = eight_devices.N // 16
    assert set(on_devices["collective_kinds"]) == {"all-reduce"}
    rest, of_a_step = sorted(on_devices["collective_bytes"])
    assert of_a_step == 8 * (num_parameters + 1)  # float64
    assert rest == 8 * num_steps  # outside the loop: how many examples each mini-batch has


@pytest.mark.slow
def test_of_examples_that_are_cut_only_the_rows_named_are_sent(on_devices):
    assert list(on_devices["row_kinds"]) == ["reduce-scatter"]
    kept = 16 // 8 * eight_devices.SIZES[0]  # numbers that stay on a device
    assert list(on_devices["row_bytes"]) == [8 * kept]


@pytest.mark.slow
def test_of_examples_that_each_device_takes_from_its_own_none_is_sent(on_devices):
    params, _ = eight_devices.problem()
    num_parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert set(on_devices["own_row_kinds"]) == {"all-reduce"}
    sizes = sorted(on_devices["own_row_bytes"])
    assert sizes == [8 * 4, 8 * (num_parameters + 1)]  # how many each of 4 mini-batches has


@pytest.mark.slow
def test_own_rows_that_the_devices_do_not_divide_are_refused(on_devices):
    of_examples, of_batches = on_devices["own_row_refusals"]
    assert "own_rows is set with n = 39, no multiple of the 8 devices" in of_examples
    assert "own_rows is set with m = 15, no multiple of the 8 devices" in of_batches


MESH = sharding.data_mesh()  # of one device


def test_pieces_go_where_they_belong_whatever_axis_they_are_cut_along():
    assert sharding.local_pieces(MESH) == [0]
    tree = {"rows": np.arange(6).reshape(3, 2), "columns": np.ones((2, 4))}
    specs = {"rows": P("data"), "columns": P(None, "data")}
    joined = sharding.join_pieces({0: tree}, MESH, specs)
    for name, leaf in tree.items():
        np.testing.assert_array_equal(joined[name], leaf)
        assert joined[name].sharding.spec == specs[name]


def test_a_mesh_without_the_axis_data_is_refused():
    mesh = jax.make_mesh((1,), ("batch",))
    message = r"mesh has the axes \('batch',\); expected one called 'data'"
    with pytest.raises(ValueError, match=message):
        sj.gradient_moments(lambda w, x: w * x, jnp.array(0.0), jnp.ones(3), mesh=mesh)


def test_what_is_no_mesh_is_refused():
    with pytest.raises(TypeError, match=re.escape("got int; sgd_jax.sharding.data_mesh() makes")):
        sharding.replicate(jnp.ones(3), 8)


def test_no_devices_are_refused():
    with pytest.raises(ValueError, match="devices is empty"):
        sharding.data_mesh([])


PARAMS = {"hidden": sj.Layer(jnp.zeros((3, 2)), jnp.zeros(3)), "scale": jnp.zeros(())}


@pytest.mark.parametrize(
    ("rules", "error", "message"),
    [
        ([("wieghts", P("data"))], ValueError, "'wieghts', which no parameter matches; they are "
         "hidden/weights, hidden/biases, scale"),
        ([("weights", P("model"))], ValueError, "hidden/weights, by the rule 'weights', is cut "
         "along 'model'; expected an axis of the mesh: data"),
        ([("scale", P("data"))], ValueError, "shape (); expected at least 1 axes"),
        ([("scale", "data")], TypeError, "must hold a jax.sharding.PartitionSpec, got 'data'"),
    ],
)  # fmt: skip
def test_a_rule_that_cannot_be_is_refused(rules, error, message):
    with pytest.raises(error, match=re.escape(message)):
        sharding.param_shardings(PARAMS, MESH, rules)


def test_the_first_rule_that_matches_counts_and_the_rest_is_whole():
    rules = [("hidden/weights", P(None, "data")), ("hidden", P("data"))]
    found = sharding.param_shardings(PARAMS, MESH, rules)
    specs = jax.tree.map(lambda sharding: sharding.spec, found)
    assert specs == {"hidden": sj.Layer(P(None, "data"), P("data")), "scale": P()}


def test_what_belongs_to_a_parameter_in_a_state_lies_as_the_parameter_does():
    optimizer = sj.sgd(0.1, momentum=0.9)
    state = sj.init_state(PARAMS, optimizer)
    found = sharding.state_shardings(state, PARAMS, MESH, [("weights", P("data"))])
    cut = [
        jax.tree_util.keystr(path)
        for path, sharding in jax.tree_util.tree_leaves_with_path(found)
        if sharding.spec == P("data")
    ]
    assert len(cut) == 2  # the weights and their momentum
    assert all("weights" in name for name in cut)


def test_a_leaf_is_matched_by_the_longest_path_that_fits():
    params = {"a": {"w": jnp.zeros(2)}, "w": jnp.zeros(2)}
    found = sharding.state_shardings({"trace": params}, params, MESH, [("^w$", P("data"))])
    specs = jax.tree.map(lambda sharding: sharding.spec, found)
    assert specs == {"trace": {"a": {"w": P()}, "w": P("data")}}
