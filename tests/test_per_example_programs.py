"""G of small programs put together at random: whatever JAX computes, it equals vmap(grad)."""

import architectures
import jax
import jax.numpy as jnp
import pytest
from architectures import convolution, half_square
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from test_per_example import CLAIMS, TOLERANCES, compare

D = 3  # matrices are (3, 3), the state of a program is (2, 3)

# What a (3, 3) matrix of parameters may be read from; every reading shares entries with another.
SOURCES = {
    "matrix": lambda p: p["matrix"],
    "first of the stack": lambda p: p["stack"][0],
    "last of the stack": lambda p: p["stack"][-1],
    "window": lambda p: p["wide"][:, 1:4],
    "other window": lambda p: p["wide"][:, 2:],
    "flat": lambda p: p["flat"].reshape(D, D),
    "columns of the stack": lambda p: p["stack"][:, :, 0].reshape(2, D).T @ jnp.ones((2, D)),
}
MOVES = {
    "transpose": lambda W: W.T,
    "minus double": lambda W: -2 * W,
    "over three": lambda W: W / 3,
    "through a row": lambda W: W.reshape(1, D * D).reshape(D, 1, D).squeeze(1),
    "column by column": lambda W: W.T.reshape(D * D).reshape(D, D),
    "rolled": lambda W: jnp.concatenate([W[1:], W[:1]]),
    "flipped": lambda W: W[::-1],
    "symmetric": lambda W: (W + W.T) / 2,
    "squashed": jnp.tanh,
    "stopped in part": lambda W: W * lax.stop_gradient(jnp.cos(W)),
    "jitted": lambda W: jax.jit(lambda V: V.T * 0.5)(W),
}
# (state (2, 3), matrix of parameters, parameters, token of the example) → state
STEPS = {
    "dot": lambda h, W, p, k: h @ W,
    "dot of rows": lambda h, W, p, k: jnp.einsum("td,ed->te", h, W),
    "dot along the sequence": lambda h, W, p, k: (h.T @ W[:2, :2]).T,
    "add": lambda h, W, p, k: h + W[1:],
    "add a bias": lambda h, W, p, k: h + W[:, 1][None],
    "multiply": lambda h, W, p, k: h * W[0][None],
    "gather": lambda h, W, p, k: h + W[k],
    "gather columns": lambda h, W, p, k: h * W[:, k].T,
    "one row": lambda h, W, p, k: h + lax.dynamic_slice_in_dim(W, k[0], 1),
    "conv": lambda h, W, p, k: convolution(
        h, W[:, :, None].transpose(2, 0, 1), ("NWC", "WIO", "NWC"), (1,), "SAME"
    ),
    "conv with the stack": lambda h, W, p, k: convolution(
        h, p["stack"], ("NWC", "WOI", "NWC"), (1,), ((1, 0),)
    ),
    "layers": lambda h, W, p, k: lax.scan(lambda h, V: (jnp.tanh(h @ V), None), h, p["stack"])[0],
    "shared in layers": lambda h, W, p, k: lax.scan(
        lambda h, V: (jnp.tanh(h @ W + V[0][None]), None), h, p["stack"], reverse=True
    )[0],
    "recurrent": lambda h, W, p, k: lax.scan(
        lambda c, x: (jnp.tanh(W @ c + x), c), p["flat"][:D], h
    )[1],
    "remat": lambda h, W, p, k: jax.checkpoint(lambda h, W: jnp.sin(h @ W))(h, W),
    "choice": lambda h, W, p, k: lax.cond(h[0, 0] > 0, lambda: h @ W, lambda: h * W[0, 0]),
    "penalty": lambda h, W, p, k: h + 0.1 * half_square(W),
    "heads": lambda h, W, p, k: jax.vmap(lambda V: h @ V)(p["stack"]).sum(0) + W[:2],
}

programs = st.lists(
    st.tuples(
        st.sampled_from(sorted(STEPS)),
        st.sampled_from(sorted(SOURCES)),
        st.lists(st.sampled_from(sorted(MOVES)), max_size=3),
    ),
    min_size=1,
    max_size=4,
)
KEPT = ("materialize", "weighted sum", "squared norms", "second moment", "inner products", "gram")


@pytest.mark.slow
@given(programs)
@settings(max_examples=10)
def test_programs_at_random(program):
    draw = architectures.Draw(num_examples=3)
    params = {"matrix": draw(D, D), "stack": draw(2, D, D), "wide": draw(D, 5), "flat": draw(D * D)}
    examples = (draw.batch(2, D), draw.integers(0, D, 2))

    def fun(params, example):
        h, k = example
        for step, source, moves in program:
            W = SOURCES[source](params)
            for move in moves:
                W = MOVES[move](W)
            h = jnp.tanh(STEPS[step](h, W, params, k)) + 0.1 * h
        return half_square(h)

    claims = {claim: CLAIMS[claim] for claim in KEPT}
    assert not compare(fun, params, examples, TOLERANCES[jnp.float64], claims=claims)
