"""G in factors equals vmap(grad): every method, on every architecture."""

import architectures
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sgd_jax as sj

# The oracle rounds cotangents to float32 where weights are cast to it.
ROUNDED = {"cast_weights": 1e-6}
TOLERANCES = {
    jnp.float64: 1e-10,
    jnp.float32: 1e-5,
    # bfloat16 keeps 8 bits, so a product of two rounded factors is off by about 2 · 2⁻⁸; sums over
    # positions and layers make a few of those.
    jnp.bfloat16: 0.05,
}


QUICK = {"xla_backend_optimization_level": 0}
"""Compiler options: these programs are compiled once and run once."""


def weights_of(n):
    """Weights of both signs, one of them zero."""
    return jnp.cos(jnp.arange(n) * 1.3) * (jnp.arange(n) != 1)


def mask_of(n):
    """Ones for examples, zeros for padding."""
    return jnp.arange(n) % 3 != 1


def direction_like(params):
    return jax.tree.map(
        lambda leaf: jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape).astype(leaf.dtype), params
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
        lambda G, H, v, c, r: np.sum(rows(G) ** 2, axis=1),
    ),
    "squared norms per leaf": (
        lambda grads, other, v, c, r: grads.squared_norms(per_leaf=True),
        lambda G, H, v, c, r: jax.tree.map(lambda leaf: np.sum(rows(leaf) ** 2, axis=1), G),
    ),
    "second moment": (
        lambda grads, other, v, c, r: grads.second_moment(),
        lambda G, H, v, c, r: jax.tree.map(lambda leaf: np.mean(leaf**2, axis=0), G),
    ),
    "weighted second moment": (
        lambda grads, other, v, c, r: grads.second_moment(c),
        lambda G, H, v, c, r: contract(c, jax.tree.map(np.square, G)),
    ),
    "masked second moment": (
        lambda grads, other, v, c, r: grads.second_moment(mask_of(len(c))),
        lambda G, H, v, c, r: contract(np.asarray(mask_of(len(c))), jax.tree.map(np.square, G)),
    ),
    "inner products": (
        lambda grads, other, v, c, r: grads.inner_products(v),
        lambda G, H, v, c, r: rows(G) @ rows(jax.tree.map(lambda leaf: leaf[None], v))[0],
    ),
    "gram": (
        lambda grads, other, v, c, r: grads.gram(),
        lambda G, H, v, c, r: rows(G) @ rows(G).T,
    ),
    "gram with others": (
        lambda grads, other, v, c, r: grads.gram(other),
        lambda G, H, v, c, r: rows(G) @ rows(H).T,
    ),
    "clipped mean": (
        lambda grads, other, v, c, r: grads.clipped_mean(r),
        lambda G, H, v, c, r: contract(clip(G, r), G),
    ),
}


def in_float64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def disagreements(found, expected, tolerance):
    """Returns the claims whose answers differ in structure, shape, dtype kind or value.

    An array may be off by ``tolerance`` of its own largest entry; one that is all but zero beside
    the rest of its tree, by ``tolerance`` of a thousandth of the tree's largest entry.
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
            if not error <= tolerance * max(np.max(np.abs(e), initial=0), 1e-3 * largest):
                wrong.append(f"{claim}: off by {error:.2g} of {largest:.2g}")
    return wrong


def oracle(fun, params, examples):
    """The gradients of all examples as vmap(grad) gives them, in NumPy float64."""
    gradient = jax.jit(jax.vmap(jax.grad(fun), in_axes=(None, 0)), compiler_options=QUICK)
    return in_float64(gradient(params, examples))


def compare(fun, params, examples, tolerance, strategy="auto", jit=True, claims=CLAIMS):
    """Returns what disagrees with the oracle; asserts that it is finite and not trivial."""
    n = jax.tree.leaves(examples)[0].shape[0]
    others = jax.tree.map(lambda leaf: leaf[: max(1, n - 2)][::-1], examples)
    G = oracle(fun, params, examples)
    H = jax.tree.map(lambda leaf: leaf[: max(1, n - 2)][::-1], G)
    assert np.isfinite(rows(G)).all()
    weights, direction = weights_of(n), direction_like(params)
    max_norm = float(np.median(np.linalg.norm(rows(G), axis=1))) or 1.0

    def answers(params, examples, others, direction, weights, max_norm):
        per_example_grad = sj.per_example_grad(fun, strategy=strategy)
        grads, other = per_example_grad(params, examples), per_example_grad(params, others)
        return {
            claim: claims[claim][0](grads, other, direction, weights, max_norm) for claim in claims
        }

    answers = jax.jit(answers, compiler_options=QUICK) if jit else answers
    found = answers(params, examples, others, direction, weights, max_norm)
    v, c = in_float64(direction), in_float64(weights)
    expected = {claim: claims[claim][1](G, H, v, c, max_norm) for claim in claims}
    wrong = disagreements(found, expected, tolerance)
    for claim in {
        "materialize",
        "sum",
        "weighted sum",
        "mean",
        "second moment",
        "clipped mean",
    } & set(claims):
        dtypes = [leaf.dtype for leaf in jax.tree.leaves(found[claim])]
        if dtypes != [leaf.dtype for leaf in jax.tree.leaves(params)]:
            wrong.append(f"{claim}: dtypes {dtypes}")
    return wrong


@pytest.mark.parametrize("name", architectures.ARCHITECTURES)
def test_every_method_equals_vmap_of_grad_in_float64(name):
    tolerance = ROUNDED.get(name, TOLERANCES[jnp.float64])
    assert not compare(*architectures.make(name), tolerance)
