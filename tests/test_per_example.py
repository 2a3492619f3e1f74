"""G in factors equals vmap(grad): every method, on every architecture."""

import architectures
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick

import sgd_jax as sj
from sgd_jax.per_example.factors import Outer, inner_by_forming, inner_by_gram
from sgd_jax.per_example.layout import Layout

# The oracle rounds cotangents to float32 where weights are cast to it.
ROUNDED = {"cast_weights": 1e-6, "mixed_dtypes": 1e-6}
TOLERANCES = {
    jnp.float64: 1e-10,
    jnp.float32: 1e-5,
    # bfloat16 keeps 8 bits, so a product of two rounded factors is off by about 2 · 2⁻⁸; sums over
    # positions and layers make a few of those.
    jnp.bfloat16: 0.05,
}


def slow(*values):
    """Values of a parameter with which a test runs in `make test-all` only."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def weights_of(n):
    """Weights of both signs, one of them zero."""
    return np.cos(np.arange(n) * 1.3) * (np.arange(n) != 1)


def mask_of(n):
    """Ones for examples, zeros for padding."""
    return np.arange(n) % 3 != 1


def some_reversed(leaf):
    """All but two of the rows, the last first."""
    if isinstance(leaf, jax.Array) and not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = np.asarray(leaf)  # without a program for every shape
    return leaf[: max(1, len(leaf) - 2)][::-1]


def direction_like(params):
    return jax.tree.map(
        lambda leaf: np.cos(np.arange(leaf.size)).reshape(leaf.shape).astype(leaf.dtype), params
    )


def rows(G):
    """The n × p matrix of a tree of (n, *shape)."""
    return np.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(G)], axis=1)


def contract(weights, G):
    return jax.tree.map(lambda leaf: np.tensordot(weights, leaf, 1), G)


def clip(G, max_norm):
    norms = np.linalg.norm(rows(G), axis=1)
    return np.minimum(1, max_norm / np.where(norms > 0, norms, 1)) / len(norms)


# claim: (what the factors answer, the same by its formula on G and H, written down in NumPy).
# grads, other: PerExampleGrads of n and n' examples; v: a direction; c: weights; r: a norm
CLAIMS = {
    "materialize": (lambda grads, other, v, c, r: grads.materialize(), lambda G, H, v, c, r: G),
    "sum": (
        lambda grads, other, v, c, r: grads.sum(),
        lambda G, H, v, c, r: contract(np.ones(len(c)), G),
    ),
    "weighted sum": (
        lambda grads, other, v, c, r: grads.sum(c),
        lambda G, H, v, c, r: contract(c, G),
    ),
    "mean": (
        lambda grads, other, v, c, r: grads.mean(),
        lambda G, H, v, c, r: contract(np.full(len(c), 1 / len(c)), G),
    ),
    "squared norms": (
        lambda grads, other, v, c, r: grads.squared_norms(),
        lambda G, H, v, c, r: np.sum(np.abs(rows(G)) ** 2, axis=1),
    ),
    "squared norms per leaf": (
        lambda grads, other, v, c, r: grads.squared_norms(per_leaf=True),
        lambda G, H, v, c, r: jax.tree.map(lambda leaf: np.sum(np.abs(rows(leaf)) ** 2, axis=1), G),
    ),
    "second moment": (
        lambda grads, other, v, c, r: grads.second_moment(),
        lambda G, H, v, c, r: jax.tree.map(lambda leaf: np.mean(np.abs(leaf) ** 2, axis=0), G),
    ),
    "weighted second moment": (
        lambda grads, other, v, c, r: grads.second_moment(c),
        lambda G, H, v, c, r: contract(c, jax.tree.map(squares, G)),
    ),
    "masked second moment": (
        lambda grads, other, v, c, r: grads.second_moment(mask_of(len(c))),
        lambda G, H, v, c, r: contract(np.asarray(mask_of(len(c))), jax.tree.map(squares, G)),
    ),
    "inner products": (
        lambda grads, other, v, c, r: grads.inner_products(v),
        lambda G, H, v, c, r: (
            (np.conj(rows(G)) @ rows(jax.tree.map(lambda leaf: leaf[None], v))[0]).real
        ),
    ),
    "gram": (
        lambda grads, other, v, c, r: grads.gram(),
        lambda G, H, v, c, r: (np.conj(rows(G)) @ rows(G).T).real,
    ),
    "gram with others": (
        lambda grads, other, v, c, r: grads.gram(other),
        lambda G, H, v, c, r: (np.conj(rows(G)) @ rows(H).T).real,
    ),
    "clipped mean": (
        lambda grads, other, v, c, r: grads.clipped_mean(r),
        lambda G, H, v, c, r: contract(clip(G, r), G),
    ),
}


def in_float64(tree):
    def widen(leaf):
        return np.asarray(leaf, np.complex128 if np.iscomplexobj(leaf) else np.float64)

    return jax.tree.map(widen, tree)


def squares(leaf):
    return np.abs(leaf) ** 2


def disagreements(found, expected, tolerance, floor=1e-3):
    """Returns the claims whose answers differ in structure, shape, dtype kind or value.

    An array may be off by ``tolerance`` of its own largest entry; one that is all but zero beside
    the rest of its tree, by ``tolerance`` of ``floor`` times the tree's largest entry.
    """
    wrong = []
    for claim in expected:
        if jax.tree.structure(found[claim]) != jax.tree.structure(expected[claim]):
            wrong.append(f"{claim}: {jax.tree.structure(found[claim])}")
            continue
        pairs = list(
            zip(jax.tree.leaves(found[claim]), jax.tree.leaves(expected[claim]), strict=True)
        )
        largest = max((np.max(np.abs(e), initial=0) for _, e in pairs), default=0)
        for f, e in pairs:
            if f.shape != e.shape:
                wrong.append(f"{claim}: shape {f.shape} for {e.shape}")
                continue
            error = np.max(np.abs(in_float64(f) - e), initial=0)
            if not error <= tolerance * max(np.max(np.abs(e), initial=0), floor * largest):
                wrong.append(f"{claim}: off by {error:.2g} of {largest:.2g}")
    return wrong


def oracle(fun, params, examples):
    """The gradients of all examples as vmap(grad) gives them, in NumPy float64."""
    gradient = jax.jit(jax.vmap(jax.grad(fun), in_axes=(None, 0)), compiler_options=quick.OPTIONS)
    return in_float64(gradient(params, examples))


def compare(fun, params, examples, tolerance, jit=True, claims=CLAIMS, truth=None, **options):
    """Returns the claims that disagree with the oracle, or with ``truth`` in its place."""
    n = jax.tree.leaves(examples)[0].shape[0]
    G = oracle(fun, params, examples) if truth is None else truth
    others, H = jax.tree.map(some_reversed, (examples, G))
    assert np.isfinite(rows(G)).all()
    weights, direction = weights_of(n), direction_like(params)
    max_norm = float(np.median(np.linalg.norm(rows(G), axis=1))) or 1.0

    def answers(params, examples, others, direction, weights, max_norm):
        per_example_grad = sj.per_example_grad(fun, **options)
        grads, other = per_example_grad(params, examples), per_example_grad(params, others)
        return {
            claim: claims[claim][0](grads, other, direction, weights, max_norm) for claim in claims
        }

    answers = jax.jit(answers, compiler_options=quick.OPTIONS) if jit else answers
    found = answers(params, examples, others, direction, weights, max_norm)
    v, c = in_float64(direction), in_float64(weights)
    expected = {claim: claims[claim][1](G, H, v, c, max_norm) for claim in claims}
    # Rounding to 8 bits shows where a sum over examples cancels.
    floor = 1.0 if tolerance == TOLERANCES[jnp.bfloat16] else 1e-3
    wrong = disagreements(found, expected, tolerance, floor)
    for claim in {
        "materialize",
        "sum",
        "weighted sum",
        "mean",
        "second moment",
        "clipped mean",
    } & set(claims):
        dtypes = [leaf.dtype for leaf in jax.tree.leaves(found[claim])]
        expected_dtypes = [leaf.dtype for leaf in jax.tree.leaves(params)]
        if claim == "second moment":
            expected_dtypes = [jnp.finfo(dtype).dtype for dtype in expected_dtypes]
        if dtypes != expected_dtypes:
            wrong.append(f"{claim}: dtypes {dtypes}")
    return wrong


LONG_TO_COMPILE = {
    *("transformer", "embedding_columns", "stack_by_fori", "narrow_indices", "experts_by_index"),
    *("cond_in_scan", "custom_rules_in_scan", "nested_scans", "lstm", "gru_unrolled"),
    *("mixture_by_switch", "grid_of_layers", "stack_by_python", "carried_params"),
}
"""Architectures that `make test-all` alone tries in float64."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in LONG_TO_COMPILE else name
        for name in architectures.ARCHITECTURES
    ],
)
def test_every_method_equals_vmap_of_grad_in_float64(name):
    tolerance = ROUNDED.get(name, TOLERANCES[jnp.float64])
    assert not compare(*architectures.make(name), tolerance)


IN_FLOAT32 = [
    "sigmoid_mlp",
    "rnn",
    "embedding_three_ways",
    "penalty_and_fit",
    *slow(
        "conv_group_norm",
        "transformer",
        "lstm",
        "stacked_remat",
        "weight_normalized",
        "mixture_by_cond",
        "custom_rules_in_scan",
    ),
]


@pytest.mark.parametrize("name", IN_FLOAT32)
def test_every_method_equals_vmap_of_grad_in_float32(name):
    assert not compare(*architectures.make(name, jnp.float32), TOLERANCES[jnp.float32])


@pytest.mark.parametrize("name", ["sigmoid_mlp", "conv_1d", *slow("fused_qkv", "stacked_reverse")])
def test_in_bfloat16_every_method_is_within_its_rounding_of_float64(name):
    fun, params, examples = architectures.make(name, jnp.bfloat16)

    def widened(tree):
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), tree)

    truth = oracle(fun, widened(params), widened(examples))
    assert not compare(fun, params, examples, TOLERANCES[jnp.bfloat16], truth=truth, claims=CLAIMS)


def test_bfloat16_weights_used_in_float32_give_gradients_like_params():
    fun, params, examples = architectures.make("sequence_gram")
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)

    def mixed(params, x):
        return fun(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params), x)

    examples = examples.astype(jnp.float32)
    assert not compare(mixed, params, examples, TOLERANCES[jnp.bfloat16])


@pytest.mark.parametrize("name", ["bare_array", *slow("penalty_and_fit")])
def test_no_jit_is_needed(name):
    assert not compare(*architectures.make(name), TOLERANCES[jnp.float64], jit=False)


@pytest.mark.parametrize("name", ["sigmoid_mlp", "embedding_modes", "rnn", "weight_normalized"])
def test_one_example_is_enough(name):
    assert not compare(*architectures.make(name, num_examples=1), TOLERANCES[jnp.float64])


@pytest.mark.parametrize("name", ["transposed_use", "solved"])
def test_materialized_is_the_same_behind_the_same_interface(name):
    made = architectures.make(name)
    assert not compare(*made, TOLERANCES[jnp.float64], strategy="materialized")


WITHOUT_RULE = {
    "batched_gather",
    "conv_transposed_and_input",
    "custom_vjp_not_linear",
    "solved",
    "vmap_inside",
    "while_without_gradient",
}


@pytest.mark.parametrize(
    "name", ["sequence_outer", "used_twice", "stacked_remat", "experts_by_index"]
)
def test_factored_equals_vmap_of_grad_where_every_use_has_a_rule(name):
    made = architectures.make(name)
    assert not compare(*made, TOLERANCES[jnp.float64], strategy="factored")


@pytest.mark.parametrize("name", architectures.ARCHITECTURES)
def test_factored_raises_exactly_where_a_use_has_no_rule(name):
    fun, params, examples = architectures.make(name)
    gradient = sj.per_example_grad(fun, strategy="factored")
    if name in WITHOUT_RULE:
        with pytest.raises(ValueError, match='strategy="factored"'):
            jax.eval_shape(gradient, params, examples)
    else:
        jax.eval_shape(gradient, params, examples)


@pytest.mark.parametrize("chunk_size", [3, *slow(1, 100)])
def test_chunks_of_any_size_give_the_same(chunk_size):
    made = architectures.make("penalty_and_fit")
    assert not compare(*made, TOLERANCES[jnp.float64], chunk_size=chunk_size)


def test_costs_and_aux_come_with_the_gradients():
    cost, params, examples = architectures.make("sigmoid_mlp")

    def fun(params, example):
        aux = {"output": params[0][0] @ example[0], "one": 1, "bias": params[0][1], "none": None}
        return cost(params, example), aux

    def both(params, examples):
        return sj.per_example_value_and_grad(fun, has_aux=True)(params, examples)

    (costs, aux), grads = jax.jit(both)(params, examples)
    plain = jax.vmap(jax.value_and_grad(fun, has_aux=True), in_axes=(None, 0))
    (expected_costs, expected_aux), G = jax.jit(plain)(params, examples)
    np.testing.assert_allclose(costs, expected_costs, rtol=1e-12)
    assert jax.tree.map(jnp.result_type, aux) == jax.tree.map(jnp.result_type, expected_aux)
    pairs = (aux, grads.mean()), (expected_aux, jax.tree.map(lambda g: jnp.mean(g, 0), G))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), *pairs)


def test_both_routes_to_the_norms_are_exact_on_either_side_of_the_crossover():
    for terms, gram in ((1, True), (3, True), (4, True), (5, True), (9, False)):
        x = architectures.Draw().batch(terms, 8)
        W = architectures.Draw(seed=1)(8, 8)
        layout = Layout.of((8, 8), left=[0], right=[1])
        factor = Outer(x[:, None], jnp.sin(x)[:, None] @ W, layout)
        assert factor.norm_route() == ("product" if terms == 1 else "gram" if gram else "formed")
        written = np.einsum("nta,ntb->nab", x, jnp.sin(x) @ W)
        expected = np.sum(written**2, axis=(1, 2))
        for found in (
            factor.squared_norms()[0],
            inner_by_gram(factor, factor),
            inner_by_forming(factor, factor),
        ):
            np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_weights_may_be_integers_or_booleans():
    fun, params, examples = architectures.make("sequence_outer")
    grads = jax.jit(sj.per_example_grad(fun))(params, examples)
    G = oracle(fun, params, examples)
    for weights in (jnp.arange(architectures.NUM_EXAMPLES), mask_of(architectures.NUM_EXAMPLES)):
        expected = contract(in_float64(weights), G)
        found = grads.sum(weights)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), found, expected)
