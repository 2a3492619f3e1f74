"""G as a pytree under JAX's transformations, what it never writes down, and its errors."""

import functools
import itertools
import os
import re
import subprocess
import sys

import architectures
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from jax.extend.core import ClosedJaxpr, Jaxpr
from test_per_example import CLAIMS, oracle, rows

import sgd_jax as sj

# One architecture for each kind of factor: outer products and written down, rows by index and
# pulled back, sites in a scan, a penalty.
KINDS = ["sigmoid_mlp", "embedding_three_ways", "weight_normalized", "rnn", "penalty_and_fit"]


def assert_close(found, expected, rtol=1e-10):
    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.max(np.abs(b), initial=0))

    jax.tree.map(close, found, expected)


def jit(function):
    return jax.jit(function, compiler_options=quick.OPTIONS)


def answers(grads):
    return grads.mean(), grads.squared_norms(), grads.gram()


def answers_by_formula(G):
    matrix = rows(G)
    mean = jax.tree.map(lambda leaf: leaf.mean(axis=0), G)
    return mean, np.sum(matrix**2, axis=1), matrix @ matrix.T


@pytest.fixture(scope="module", params=KINDS)
def factored(request):
    """G of each kind, returned from a jit, and the same written down."""
    made = architectures.make(request.param)
    grads = jit(sj.per_example_grad(made.fun))(made.params, made.examples)
    return grads, oracle(*made)


def test_passes_from_one_jit_to_another(factored):
    grads, G = factored
    assert isinstance(grads, sj.PerExampleGrads)
    assert_close(jit(answers)(grads), answers_by_formula(G))


def test_flattens_and_unflattens(factored):
    grads, G = factored
    leaves, treedef = jax.tree.flatten(grads)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    again = jax.tree.unflatten(treedef, leaves)
    assert again.num_examples == grads.num_examples == architectures.NUM_EXAMPLES
    assert_close(jit(answers)(again), answers_by_formula(G))


@pytest.mark.parametrize("name", KINDS)
def test_vmap_over_stacked_params(name):
    fun, params, examples = architectures.make(name)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.5 * leaf, -leaf]), params)
    grads = jax.vmap(sj.per_example_grad(fun), in_axes=(0, None))
    found = jit(lambda stacked, x: jax.vmap(answers)(grads(stacked, x)))(stacked, examples)
    for k in range(3):
        one = jax.tree.map(lambda leaf, k=k: leaf[k], stacked)
        expected = answers_by_formula(oracle(fun, one, examples))
        assert_close(jax.tree.map(lambda leaf, k=k: leaf[k], found), expected)


@pytest.mark.parametrize("name", KINDS)
def test_scan_uses_it_inside_and_returns_it(name):
    fun, params, examples = architectures.make(name)

    def step(params, _):
        grads = sj.per_example_grad(fun)(params, examples)
        moved = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads.mean())
        return moved, (grads, grads.squared_norms())

    def train(params):
        last, (stacked, norms) = jax.lax.scan(step, params, length=2)
        return last, jax.vmap(answers)(stacked), norms

    last, (means, squared_norms, _), norms = jit(train)(params)
    for k in range(2):
        G = oracle(fun, params, examples)
        mean, expected, _ = answers_by_formula(G)
        assert_close(squared_norms[k], expected)
        assert_close(norms[k], expected)
        assert_close(jax.tree.map(lambda leaf, k=k: leaf[k], means), mean)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, mean)
    assert_close(last, params)


@pytest.mark.parametrize("name", KINDS)
def test_eval_shape_needs_no_numbers(name):
    fun, params, examples = architectures.make(name)
    shapes = jax.eval_shape(lambda tree: tree, (params, examples))
    grads = jax.eval_shape(sj.per_example_grad(fun), *shapes)
    assert grads.num_examples == architectures.NUM_EXAMPLES
    mean = jax.eval_shape(lambda grads: grads.mean(), grads)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), mean) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), params
    )


DIFFERENTIABLE = [*KINDS, "custom_jvp", "stacked_remat", "mixture_by_cond", "scaled_weights"]


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_statistics_are_differentiable_in_the_parameters(name):
    fun, params, examples = architectures.make(name)

    def statistic(params):
        grads = sj.per_example_grad(fun)(params, examples)
        second = jax.tree.map(jnp.sum, grads.second_moment())
        return jnp.sum(jnp.sin(grads.squared_norms())) + sum(jax.tree.leaves(second))

    def statistic_by_vmap(params):
        G = jax.vmap(jax.grad(fun), in_axes=(None, 0))(params, examples)
        n = architectures.NUM_EXAMPLES
        flat = jnp.concatenate([leaf.reshape(n, -1) for leaf in jax.tree.leaves(G)], axis=1)
        norms = jnp.sum(flat**2, axis=1)
        return jnp.sum(jnp.sin(norms)) + jnp.sum(norms) / n

    found, expected = jit(jax.grad(statistic))(params), jit(jax.grad(statistic_by_vmap))(params)
    assert max(np.max(np.abs(leaf)) for leaf in jax.tree.leaves(expected)) > 1e-3
    assert_close(found, expected, rtol=1e-9)


def test_statistics_are_differentiable_through_a_custom_rule_that_computes_with_the_parameter():
    @jax.custom_jvp
    def sine_product(w, x):
        return jnp.sin(w) @ x

    @sine_product.defjvp
    def _(primals, tangents):
        (w, x), (dw, dx) = primals, tangents
        return sine_product(w, x), (dw * jnp.cos(w)) @ x + jnp.sin(w) @ dx

    def fun(w, x):
        return architectures.half_square(sine_product(w, x))

    def total(w):
        return jnp.sum(sj.per_example_grad(fun)(w, x).squared_norms())

    def total_by_vmap(w):
        return jnp.sum(jnp.square(jax.vmap(jax.grad(fun), in_axes=(None, 0))(w, x)))

    w, x = architectures.Draw()(3, 3), architectures.Draw().batch(3)
    assert_close(jit(jax.grad(total))(w), jit(jax.grad(total_by_vmap))(w), rtol=1e-9)


def test_a_second_call_does_not_trace_again():
    cost, params, examples = architectures.make("sigmoid_mlp")
    traces = []

    def fun(params, example):
        traces.append(None)
        return cost(params, example)

    step = jit(lambda params, examples: answers(sj.per_example_grad(fun)(params, examples)))
    step(params, examples)
    count = len(traces)
    step(jax.tree.map(lambda leaf: leaf + 1, params), examples)
    assert len(traces) == count


SHARDED = """
import jax, jax.numpy as jnp, numpy as np, sys
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
import architectures, sgd_jax as sj
from jax.sharding import PartitionSpec as P

mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
for name in sys.argv[1:]:
    fun, params, examples = architectures.make(name, num_examples=8)

    def shard(params, examples, fun=fun):
        grads = sj.per_example_grad(fun)(params, examples)
        total = jax.tree.map(lambda g: jax.lax.psum(g, "data"), grads.sum())
        return total, grads.squared_norms()

    specs = (P(), P("data"))
    sharded = jax.shard_map(shard, mesh=mesh, in_specs=specs, out_specs=(P(), P("data")))
    total, norms = jax.jit(sharded)(params, examples)
    G = jax.vmap(jax.grad(fun), in_axes=(None, 0))(params, examples)
    flat = np.concatenate([leaf.reshape(8, -1) for leaf in jax.tree.leaves(G)], axis=1)
    np.testing.assert_allclose(norms, np.sum(flat**2, axis=1), rtol=1e-10)
    for found, leaf in zip(jax.tree.leaves(total), jax.tree.leaves(G), strict=True):
        np.testing.assert_allclose(found, leaf.sum(0), rtol=1e-10, atol=1e-10)

    # The compiler may shard it too: same numbers from examples laid out over devices.
    laid_out = jax.device_put(examples, jax.sharding.NamedSharding(mesh, P("data")))
    norms = jax.jit(lambda p, x: sj.per_example_grad(fun)(p, x).squared_norms())(params, laid_out)
    np.testing.assert_allclose(norms, np.sum(flat**2, axis=1), rtol=1e-10)
    print(name)
"""


@pytest.mark.slow
def test_shard_map_and_sharded_examples_give_the_same_numbers():
    names = [*KINDS[:3], "custom_vjp", "cond_in_scan"]
    environment = {
        **os.environ,
        "XLA_FLAGS": f"{quick.FLAGS} --xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path]),
    }
    result = subprocess.run(
        [sys.executable, "-c", SHARDED, *names], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == names


def sizes_in(jaxpr):
    """The sizes of all arrays that a jaxpr, or any that it calls, computes."""
    for eqn in jaxpr.eqns:
        for variable in eqn.outvars:
            yield variable.aval.size
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda v: isinstance(v, Jaxpr | ClosedJaxpr)
        ):
            if isinstance(value, Jaxpr | ClosedJaxpr):
                yield from sizes_in(getattr(value, "jaxpr", value))


def largest_array(fun, params, examples, method, **options):
    def compute(params, examples):
        return method(sj.per_example_grad(fun, **options)(params, examples))

    return max(sizes_in(jax.make_jaxpr(compute)(params, examples).jaxpr))


MEMORY = {
    "mean": lambda grads: grads.mean(),
    "squared norms": lambda grads: grads.squared_norms(),
    "second moment": lambda grads: grads.second_moment(),
    "inner products": lambda grads: grads.inner_products(grads.mean()),
    "clipped mean": lambda grads: grads.clipped_mean(1.0),
    "gram": lambda grads: grads.gram(),
}


@pytest.mark.parametrize("method", MEMORY)
def test_an_mlp_never_has_an_array_of_n_gradients(method):
    n, widths = 32, (64, 96, 80)
    draw = architectures.Draw(num_examples=n)
    params = [(draw(b, a), draw(b)) for a, b in itertools.pairwise(widths)]
    fun, _, _ = architectures.make("sigmoid_mlp")
    examples = (draw.batch(widths[0]), draw.batch(widths[-1]))
    smallest_weight = min(W.size for W, _ in params)
    assert largest_array(fun, params, examples, MEMORY[method]) < n * smallest_weight / 4
    # The twin that must be rejected: the measure sees what vmap(grad) writes down.
    written = largest_array(fun, params, examples, MEMORY[method], strategy="materialized")
    assert written >= n * smallest_weight


@pytest.mark.parametrize("method", ["mean", "squared norms", "second moment"])
def test_an_embedding_never_has_an_array_of_n_tables(method):
    n, vocabulary = 8, 1000
    E = architectures.Draw()(vocabulary, 4)
    tokens = architectures.Draw(num_examples=n).integers(0, vocabulary, 6)

    def fun(E, tokens):
        return architectures.half_square(jnp.tanh(E[tokens]))

    assert largest_array(fun, E, tokens, MEMORY[method]) <= E.size


def table_of(explained):
    """Rows of cells of what `explain` returns."""
    return [re.split(r"\s{2,}", line.strip()) for line in explained.splitlines()]


def test_explain_lists_every_parameter_with_primitive_line_and_rule():
    fun, params, examples = architectures.make("transformer")
    lines = table_of(sj.explain(fun, params, examples))[1:]
    named = {name for line in lines for name in line[0].split()}
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    assert named == {"params" + jax.tree_util.keystr(path) for path in paths}
    uses = {(line[0], line[1].split()[0]) for line in lines}
    assert {("params['embedding']", "gather"), ("params['embedding']", "dot_general")} <= uses
    assert all("architectures.py:" in line[1] for line in lines)
    assert not any("fallback" in line[2] for line in lines)


def test_explain_names_the_fallback_the_unused_and_the_pulled_back():
    solved = table_of(sj.explain(*architectures.make("solved")))
    assert any("fallback" in line[2] and line[0] == "params['A']" for line in solved)
    assert any("fallback" not in line[2] and line[0] == "params['b']" for line in solved)
    scalars = table_of(sj.explain(*architectures.make("scalars")))
    assert ["params['unused']", "nothing", "gradient is zero"] in [line[:3] for line in scalars]
    chosen = sj.explain(*architectures.make("choice_by_parameter"))
    assert "pulled back" in chosen


def test_explain_takes_shapes_and_numbers_of_python():
    fun, params, examples = architectures.make("sigmoid_mlp")
    shapes = jax.eval_shape(lambda tree: tree, (params, examples))
    assert sj.explain(fun, *shapes) == sj.explain(fun, params, examples)
    assert "params['w']" in sj.explain(lambda p, x: p["w"] * x, {"w": 1.0}, jnp.ones(3))


def test_python_numbers_and_numpy_arrays_are_parameters_too():
    params = {"a": 2.0, "b": np.arange(3.0)}
    grads = sj.per_example_grad(lambda p, x: p["a"] * jnp.dot(p["b"], x))(params, np.eye(3))
    assert_close(grads.mean(), {"a": np.mean(np.arange(3.0)), "b": np.full(3, 2 / 3)})


def test_examples_of_numpy_in_float64_are_float32_where_jax_has_no_float64():
    with jax.enable_x64(False):
        grads = sj.per_example_grad(lambda w, x: jnp.dot(w, x) ** 2)(jnp.ones(2), np.eye(2))
        assert (
            grads.mean().dtype == grads.squared_norms().dtype == grads.gram().dtype == jnp.float32
        )


def test_factored_names_parameter_primitive_line_and_remedy():
    def fun(p, x):
        return jnp.sum(jax.lax.cumsum(p["fine"] * x)) + jnp.sum(jnp.linalg.solve(p["matrix"], x))

    params = {"fine": jnp.ones(2), "matrix": jnp.eye(2)}
    with pytest.raises(ValueError, match=r"params\['matrix'\]") as error:
        sj.per_example_grad(fun, strategy="factored")(params, jnp.ones((3, 2)))
    message = str(error.value)
    assert "params['fine']" not in message
    assert f"{os.path.basename(__file__)}:" in message
    assert 'strategy="auto"' in message
    sj.per_example_grad(fun)(params, jnp.ones((3, 2)))  # auto does not raise


@functools.cache
def bad_calls():
    fun, params, examples = architectures.make("sigmoid_mlp")
    grads = sj.per_example_grad(fun)(params, examples)
    other_fun, other_params, other_examples = architectures.make("sequence_outer")
    other = sj.per_example_grad(other_fun)(other_params, other_examples)
    gradient = sj.per_example_grad(fun)
    empty = jax.tree.map(lambda leaf: leaf[:0], examples)
    return {
        "strategy": (lambda: sj.per_example_grad(fun, strategy="fast"), "strategy.*'auto'.*'fast'"),
        "no examples": (lambda: gradient(params, empty), "n = 0"),
        "no example leaves": (lambda: gradient(params, ()), "examples holds no arrays"),
        "a scalar among examples": (lambda: gradient(params, (1.0, 2.0)), "leading axis"),
        "two lengths": (
            lambda: gradient(params, (examples[0], examples[1][:2])),
            r"examples\[0\]: 5, examples\[1\]: 2",
        ),
        "no parameters": (lambda: gradient((), examples), "params holds no arrays"),
        "cost that is no scalar": (
            lambda: sj.per_example_grad(lambda p, x: p * x)(jnp.ones(2), jnp.ones((3, 2))),
            "scalar, the cost of ONE example",
        ),
        "weights": (lambda: grads.sum(jnp.ones(4)), r"weights.*\(5,\).*got \(4,\)"),
        "weights of a moment": (
            lambda: grads.second_moment(jnp.ones((5, 1))),
            r"weights.*\(5,\).*got \(5, 1\)",
        ),
        "direction": (lambda: grads.inner_products(params[:1]), "direction must be like params"),
        "direction's shapes": (
            lambda: grads.inner_products(jax.tree.map(lambda leaf: leaf.T, params)),
            r"direction.*\(4, 3\).*\(3, 4\)",
        ),
        "other": (lambda: grads.gram(other), "other must have the same parameters"),
    }


@pytest.mark.parametrize("case", bad_calls())
def test_bad_input_is_named_with_what_was_expected(case):
    call, message = bad_calls()[case]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("params", "cost", "message"),
    [
        ({"k": jnp.arange(3)}, lambda p, x: jnp.sum(p["k"] * x), r"params\['k'\].*int"),
        (jnp.ones(3), lambda p, x: jnp.sum(p * x).astype(int), "floating-point cost.*int"),
    ],
)
def test_dtypes_that_have_no_gradient_are_refused(params, cost, message):
    for strategy in ("auto", "materialized"):
        with pytest.raises(TypeError, match=message):
            sj.per_example_grad(cost, strategy=strategy)(params, jnp.ones((2, 3)))


def test_every_method_is_claimed():
    """A method added to PerExampleGrads must come with a claim."""
    methods = {name for name in dir(sj.PerExampleGrads) if not name.startswith("_")}
    fields = {"factors", "pulled", "treedef", "shapes", "num_examples", "num_params"}
    claimed = {claim.replace(" ", "_") for claim in CLAIMS}
    assert methods - fields <= claimed
