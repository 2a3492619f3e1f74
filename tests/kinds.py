"""Ways in which functions of other people use their parameters, one small cost function each.

CASES maps a name to (fun, params, examples); most stand for a kind that was once wrong or slow.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

jax.config.update("jax_enable_x64", True)


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def sq(y):
    return jnp.sum(jnp.tanh(y) ** 2)


CASES = {}
W = draw(0, 6, 6)
X = draw(1, 4, 5, 6)
V = draw(1, 4, 6)


@jax.custom_vjp
def clip_cotangent(w):
    return w


clip_cotangent.defvjp(lambda w: (w, None), lambda _, c: (jnp.clip(c, -0.1, 0.1),))


@jax.custom_vjp
def round_cotangent(w):
    return w * 2


round_cotangent.defvjp(lambda w: (w * 2, None), lambda _, c: (jnp.round(c * 4) / 4,))


@jax.custom_vjp
def normalize_cotangent(w):
    return w


normalize_cotangent.defvjp(lambda w: (w, None), lambda _, c: (c / jnp.linalg.norm(c),))


@jax.custom_vjp
def add_to_cotangent(w):
    return w


add_to_cotangent.defvjp(lambda w: (w, w), lambda w, c: (c + w,))


@jax.custom_vjp
def straight_through(w):
    return jnp.round(w)


straight_through.defvjp(lambda w: (jnp.round(w), None), lambda _, c: (c,))
for nm, g in dict(
    clip=clip_cotangent,
    round=round_cotangent,
    norm=normalize_cotangent,
    add=add_to_cotangent,
    straight_through=straight_through,
).items():
    CASES["backward_rule_" + nm] = (lambda w, x, g=g: sq(x @ g(w)), W, X)
    CASES["backward_rule_scan_" + nm] = (
        lambda w, x, g=g: jnp.sum(
            jax.lax.scan(lambda h, t: (jnp.tanh(h @ g(w) + t),) * 2, x[0], x)[1]
        ),
        W,
        X,
    )
    CASES["backward_rule_jit_" + nm] = (
        lambda w, x, g=g: sq(x @ jax.jit(lambda w: g(w) * 2)(w)),
        W,
        X,
    )
    CASES["backward_rule_of_parameters_in_scan_" + nm] = (
        lambda w, x, g=g: sq(
            x @ jax.lax.scan(lambda c, _: (g(c) * 0.9, None), w, None, length=3)[0]
        ),
        W,
        X,
    )
    CASES["backward_rule_cond_" + nm] = (
        lambda w, x, g=g: sq(x @ jax.lax.cond(w[0, 0] > 0, g, lambda w: w * 1.0, w)),
        W,
        X,
    )
    CASES["backward_rule_penalty_" + nm] = (
        lambda w, x, g=g: (lambda q: sq(x @ q) + jnp.sum(q**2))(g(w)),
        W,
        X,
    )
    CASES["backward_rule_remat_" + nm] = (
        lambda w, x, g=g: sq(jax.checkpoint(lambda w, x: x @ g(w))(w, x)),
        W,
        X,
    )
CASES["scale_scalar"] = (lambda w, x: sq(x @ (w * jnp.sqrt(2 / 6))), W, X)
CASES["tril"] = (lambda w, x: sq(x @ jnp.tril(w)), W, X)
CASES["tril_t1"] = (lambda w, x: sq(x @ jnp.tril(w)), W, V)
CASES["rev"] = (lambda w, x: sq(x @ w[::-1]), W, X)
CASES["rev1"] = (lambda w, x: sq(x @ w[:, ::-1].T), W, X)
CASES["split"] = (
    lambda w, x: sum(sq(x @ u * (k + 1)) for k, u in enumerate(jnp.split(w, 3, axis=1))),
    W,
    X,
)
CASES["concat"] = (
    lambda p, x: sq(x @ jnp.concatenate([p[0], p[1]], 1)),
    (draw(0, 6, 2), draw(3, 6, 5)),
    X,
)
CASES["concat0"] = (
    lambda p, x: sq(x @ jnp.concatenate([p[0], p[1].T], 0)),
    (draw(0, 2, 7), draw(3, 7, 4)),
    X,
)
CASES["lora"] = (lambda p, x: sq(x @ (W + p[0] @ p[1])), (draw(0, 6, 2), draw(1, 2, 6)), X)
CASES["loraT"] = (lambda p, x: sq(x @ (W + (p[0] @ p[1]).T * 2)), (draw(0, 6, 2), draw(1, 2, 6)), X)
CASES["lora3"] = (
    lambda p, x: sq(x @ (p[0] @ p[1] @ p[2])),
    (draw(0, 6, 2), draw(1, 2, 3), draw(5, 3, 6)),
    X,
)
CASES["weightnorm"] = (
    lambda p, x: sq(x @ (p[0] * p[1] / jnp.linalg.norm(p[0], axis=0))),
    (W, draw(3, 6)),
    X,
)
CASES["weightnorm1"] = (
    lambda p, x: sq(x @ (p[0] * p[1] / jnp.linalg.norm(p[0], axis=0))),
    (W, draw(3, 6)),
    V,
)
CASES["weightnorm_axis1"] = (
    lambda p, x: sq(x @ (p[0] * p[1] / jnp.linalg.norm(p[0], axis=1, keepdims=True))),
    (W, draw(3, 6, 1)),
    X,
)
CASES["globalnorm"] = (lambda p, x: sq(x @ (p / jnp.linalg.norm(p))), W, X)


def specnorm(w):
    u = jnp.ones(6) / 6
    for _ in range(2):
        v = w @ u
        v /= jnp.linalg.norm(v)
        u = w.T @ v
        u /= jnp.linalg.norm(u)
    return w / (v @ w @ u)


CASES["spectral"] = (lambda w, x: sq(x @ specnorm(w)), W, X)
CASES["spectral_sg"] = (
    lambda w, x: sq(x @ (w / jax.lax.stop_gradient(jnp.linalg.norm(w, 2)))),
    W,
    X,
)
CASES["softplus_w"] = (lambda w, x: sq(x @ jax.nn.softplus(w)), W, X)
CASES["exp_w"] = (lambda w, x: sq(x @ jnp.exp(w)), W, V)
CASES["softmax_w"] = (lambda w, x: sq(x @ jax.nn.softmax(w, axis=0)), W, X)
CASES["softmax_w1"] = (lambda w, x: sq(x @ jax.nn.softmax(w, axis=1)), W, V)
CASES["centered_w"] = (lambda w, x: sq(x @ (w - w.mean(0))), W, X)
CASES["standardized"] = (lambda w, x: sq(x @ ((w - w.mean(0)) / (w.std(0) + 0.1))), W, X)
CASES["where_w"] = (lambda w, x: sq(x @ jnp.where(W > 0, w, 0.0)), W, X)
CASES["wsq"] = (lambda w, x: sq(x @ (w * w)), W, X)
CASES["wwT"] = (lambda w, x: sq(x @ (w @ w.T)), W, X)
CASES["w_sym"] = (lambda w, x: sq(x @ (w + w.T)), W, X)
CASES["mulsum"] = (lambda w, x: sq((w * x[:, None]).sum(0)), W, V)
CASES["mulsum2"] = (lambda w, x: sq((w[None] * x[:, :, None]).sum(1)), W, X)
CASES["mulsum3"] = (lambda w, x: sq((w[None] * x[:, None, :]).sum(-1)), W, X)
CASES["mulsum4"] = (lambda w, x: sq((w[None] * x[:, None, :]).sum((0, -1))), W, X)
CASES["mulsum5"] = (lambda w, x: sq((w * x).sum(0)), draw(2, 5, 6), X)
CASES["mulsum6"] = (lambda w, x: sq((w[:, None] * x[:, 0][None]).sum()), draw(2, 6), X)
CASES["fori"] = (
    lambda p, x: sq(jax.lax.fori_loop(0, 4, lambda i, h: jnp.tanh(h @ p[i]), x)),
    draw(0, 4, 6, 6) / 2,
    X,
)
CASES["fori13"] = (
    lambda p, x: sq(jax.lax.fori_loop(1, 3, lambda i, h: jnp.tanh(h @ p[i]), x)),
    draw(0, 4, 6, 6) / 2,
    X,
)
CASES["fori_rev"] = (
    lambda p, x: sq(jax.lax.fori_loop(0, 4, lambda i, h: jnp.tanh(h @ p[3 - i]), x)),
    draw(0, 4, 6, 6) / 2,
    X,
)
CASES["fori_bias"] = (
    lambda p, x: sq(jax.lax.fori_loop(0, 4, lambda i, h: jnp.tanh(h @ p[0][i] + p[1][i]), x)),
    (draw(0, 4, 6, 6) / 2, draw(7, 4, 6)),
    X,
)
CASES["scan_arange"] = (
    lambda p, x: sq(jax.lax.scan(lambda h, i: (jnp.tanh(h @ p[i]), None), x, jnp.arange(4))[0]),
    draw(0, 4, 6, 6) / 2,
    X,
)
CASES["scan_arange_rev"] = (
    lambda p, x: sq(
        jax.lax.scan(lambda h, i: (jnp.tanh(h @ p[i]), None), x, jnp.arange(4), reverse=True)[0]
    ),
    draw(0, 4, 6, 6) / 2,
    X,
)
CASES["scan_arange_stride"] = (
    lambda p, x: sq(
        jax.lax.scan(lambda h, i: (jnp.tanh(h @ p[i]), None), x, jnp.arange(0, 4, 2))[0]
    ),
    draw(0, 4, 6, 6) / 2,
    X,
)
CASES["scan_reuse"] = (
    lambda p, x: sq(jax.lax.scan(lambda h, i: (jnp.tanh(h @ p[i % 2]), None), x, jnp.arange(4))[0]),
    draw(0, 4, 6, 6) / 2,
    X,
)
CASES["scan_lora"] = (
    lambda p, x: sq(jax.lax.scan(lambda h, w: (jnp.tanh(h @ (w[0] @ w[1])), None), x, p)[0]),
    (draw(0, 3, 6, 2), draw(1, 3, 2, 6)),
    X,
)
CASES["scan_wn"] = (
    lambda p, x: sq(
        jax.lax.scan(lambda h, w: (jnp.tanh(h @ (w / jnp.linalg.norm(w, axis=0))), None), x, p)[0]
    ),
    draw(0, 3, 6, 6),
    X,
)
CASES["embed"] = (
    lambda p, e: sq(p[e]),
    draw(0, 7, 3),
    jax.random.randint(jax.random.key(1), (4, 40), 0, 7),
)
CASES["embed_vmapped"] = (
    lambda p, e: sq(jax.vmap(lambda i: p[i])(e)),
    draw(0, 90, 3),
    jax.random.randint(jax.random.key(1), (4, 12), -95, 95),
)
CASES["embed_vmapped_middle"] = (
    lambda p, e: sq(jax.vmap(lambda i, j: p[i, :, j])(e, e[::-1])),
    draw(0, 5, 6, 3),
    jax.random.randint(jax.random.key(1), (4, 9), 0, 5),
)
CASES["embed_big"] = (
    lambda p, e: sq(jnp.cumsum(p[e], 0)),
    draw(0, 90, 3),
    jax.random.randint(jax.random.key(1), (4, 50), -90, 90),
)
CASES["embed_short"] = (
    lambda p, e: sq(jnp.cumsum(p[e], 0)),
    draw(0, 90, 3),
    jax.random.randint(jax.random.key(1), (4, 12), 0, 9),
)
CASES["embed_scaled"] = (
    lambda p, e: sq((p * 3.0)[e]),
    draw(0, 90, 3),
    jax.random.randint(jax.random.key(1), (4, 12), 0, 9),
)
CASES["embed_rowscale"] = (
    lambda p, e: sq((p * jnp.arange(90.0)[:, None])[e]),
    draw(0, 90, 3),
    jax.random.randint(jax.random.key(1), (4, 12), 0, 9),
)
CASES["embed_mask"] = (
    lambda p, e: sq((p * jnp.cos(jnp.arange(270.0).reshape(90, 3)))[e]),
    draw(0, 90, 3),
    jax.random.randint(jax.random.key(1), (4, 12), 0, 9),
)
CASES["embed_tied"] = (
    lambda p, e: sq(jnp.tanh(p[e]) @ p.T),
    draw(0, 9, 3),
    jax.random.randint(jax.random.key(1), (4, 12), 0, 9),
)
rel = np.abs(np.arange(5)[:, None] - np.arange(5))
CASES["relpos"] = (lambda p, x: sq(x @ x.T + p[rel]), draw(0, 5), X)
CASES["relpos2"] = (lambda p, x: sq((x @ x.T)[..., None] + p[rel]), draw(0, 5, 2), X)


def conv(w, x, s, pad, ld=(1, 1), rd=(1, 1), g=1):
    return jax.lax.conv_general_dilated(
        x[None], w, s, pad, ld, rd, ("NHWC", "HWIO", "NHWC"), feature_group_count=g
    )


IMAGES = draw(1, 3, 8, 9, 4)
CASES["conv"] = (lambda w, x: sq(conv(w, x, (1, 1), "SAME")), draw(0, 3, 3, 4, 2), IMAGES)
CASES["conv_s"] = (
    lambda w, x: sq(conv(w, x, (2, 3), "SAME", rd=(2, 1))),
    draw(0, 3, 3, 4, 2),
    IMAGES,
)
CASES["conv_patch"] = (lambda w, x: sq(conv(w, x, (3, 3), "VALID")), draw(0, 3, 3, 4, 2), IMAGES)
CASES["conv_big"] = (lambda w, x: sq(conv(w, x, (2, 2), "SAME")), draw(0, 9, 9, 4, 2), IMAGES)
CASES["convT"] = (
    lambda w, x: sq(conv(w, x, (1, 1), ((2, 1), (1, 2)), ld=(2, 2))),
    draw(0, 3, 3, 4, 2),
    IMAGES,
)
CASES["convT_d"] = (
    lambda w, x: sq(conv(w, x, (1, 1), ((2, 3), (0, 2)), ld=(3, 2), rd=(2, 1))),
    draw(0, 3, 4, 4, 2),
    IMAGES,
)
CASES["convT_g"] = (
    lambda w, x: sq(conv(w, x, (1, 1), ((2, 1), (1, 2)), ld=(2, 2), g=2)),
    draw(0, 3, 3, 2, 6),
    IMAGES,
)
CASES["conv_transpose"] = (
    lambda w, x: sq(
        jax.lax.conv_transpose(
            x[None], w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    ),
    draw(0, 3, 3, 4, 2),
    IMAGES,
)
CASES["conv_masked"] = (
    lambda w, x: sq(conv(w * jnp.cos(jnp.arange(72.0)).reshape(3, 3, 4, 2), x, (1, 1), "SAME")),
    draw(0, 3, 3, 4, 2),
    IMAGES,
)
CASES["conv_wn"] = (
    lambda w, x: sq(conv((w - w.mean((0, 1, 2))) / (w.std((0, 1, 2)) + 0.1), x, (1, 1), "SAME")),
    draw(0, 3, 3, 4, 2),
    IMAGES,
)
CASES["conv_group"] = (
    lambda w, x: sq(conv(w, x, (1, 1), "SAME", g=2)),
    draw(0, 3, 3, 2, 6),
    IMAGES,
)
for ls in (True, False):
    for lo in (True, False):
        for ta in (True, False):
            for ud in (True, False):
                B = draw(5, 4, 6, 3) if ls else draw(5, 4, 3, 6)
                CASES[f"tri_{ls}_{lo}_{ta}_{ud}"] = (
                    lambda w, b, a=(ls, lo, ta, ud): sq(
                        jax.lax.linalg.triangular_solve(
                            w + 3 * jnp.eye(6),
                            b,
                            left_side=a[0],
                            lower=a[1],
                            transpose_a=a[2],
                            unit_diagonal=a[3],
                        )
                    ),
                    W / 3,
                    B,
                )
CASES["chol"] = (
    lambda w, x: sq(
        jax.scipy.linalg.solve_triangular(
            jnp.linalg.cholesky(w @ w.T + jnp.eye(6)), x.T, lower=True
        )
    ),
    W,
    X,
)
CASES["cplx_param"] = (
    lambda w, x: jnp.sum(jnp.abs(jnp.tanh(x @ w)) ** 2),
    draw(0, 6, 3) + 1j * draw(1, 6, 3),
    X,
)
CASES["cplx_bias"] = (
    lambda p, x: jnp.sum(jnp.abs(x @ p[0] + p[1]) ** 2),
    (draw(0, 6, 3) + 1j * draw(1, 6, 3), draw(2, 3) + 1j * draw(3, 3)),
    X,
)
CASES["cplx_fft"] = (
    lambda w, x: jnp.sum(
        jnp.abs(jnp.fft.fft(x, axis=0) * w) ** 2 * 0.1
        + jnp.real(jnp.fft.ifft(jnp.fft.fft(x, axis=0) * jnp.fft.fft(w, axis=0), axis=0)) ** 3
    ),
    draw(0, 5, 6),
    X,
)
CASES["cplx_fno"] = (
    lambda p, x: jnp.sum(
        jnp.tanh(
            jnp.fft.irfft(
                jnp.einsum("ti,io->to", jnp.fft.rfft(x, axis=0), p[0] + 1j * p[1]), axis=0
            )
        )
    ),
    (draw(0, 6, 6), draw(1, 6, 6)),
    X,
)
CASES["cplx_ssm"] = (
    lambda p, x: jnp.sum(
        jnp.tanh(
            (
                jax.lax.scan(
                    lambda h, u: (
                        (jnp.exp(-jnp.exp(p[0]) + 1j * p[1]) * h + (p[2] + 1j * p[3]) @ u,) * 2
                    ),
                    jnp.zeros(6, complex),
                    x,
                )[1]
                @ (p[4] + 1j * p[5])
            ).real
        )
    ),
    (
        draw(0, 6) * 0.1,
        draw(1, 6),
        draw(2, 6, 6) * 0.1,
        draw(3, 6, 6) * 0.1,
        draw(4, 6, 3),
        draw(5, 6, 3),
    ),
    X,
)
CASES["cplx_assoc"] = (
    lambda p, x: jnp.sum(
        jnp.tanh(
            jax.lax.associative_scan(
                lambda a, b: (a[0] * b[0], a[1] * b[0] + b[1]),
                (
                    jnp.broadcast_to(jnp.exp(-jnp.exp(p[0]) + 1j * p[1]), (5, 6)),
                    x @ (p[2] + 1j * p[3]),
                ),
            )[1].real
        )
    ),
    (draw(0, 6) * 0.1, draw(1, 6), draw(2, 6, 6) * 0.1, draw(3, 6, 6) * 0.1),
    X,
)


@jax.custom_jvp
def safe(w, x):
    return jnp.where(x > 0, jnp.sqrt(jnp.abs(w) * jnp.where(x > 0, x, 1.0)), 0.0)


@safe.defjvp
def _(p, t):
    w, x = p
    return safe(w, x), jnp.where(
        x > 0, 0.5 / jnp.sqrt(jnp.abs(w) * x) * (x * jnp.sign(w) * t[0] + jnp.abs(w) * t[1]), 0.0
    )


@jax.custom_jvp
def infj(w, x):
    return x @ w


@infj.defjvp
def _(p, t):
    w, x = p
    s = jnp.where(jnp.arange(6) == 2, 1.0, 1.0)
    return x @ w, (x @ t[0] + t[1] @ w) * s


@jax.custom_jvp
def inf0(w, x):
    return jnp.tanh(x @ w)


@inf0.defjvp
def _(p, t):
    w, x = p
    y = jnp.tanh(x @ w)
    return y, (x @ t[0] + t[1] @ w) * jnp.where(
        jnp.abs(y) < 0.99, 1 / (1 - y**2) * (1 - y**2) ** 2, 0.0
    )


CASES["jvp_inf"] = (lambda w, x: jnp.sum(infj(w, x) ** 2), W, X)
CASES["jvp_tanh"] = (lambda w, x: jnp.sum(inf0(w, x) ** 2), W, X)
CASES["platform"] = (
    lambda w, x: sq(
        jax.lax.platform_dependent(
            x, w, cpu=lambda x, w: x @ w, default=lambda x, w: jnp.einsum("ti,ij->tj", x, w)
        )
    ),
    W,
    X,
)
CASES["siamese"] = (lambda w, e: sq(e[0] @ w) - sq(e[1] @ w), W, (X, X + 0.1))
CASES["vmap_in"] = (lambda w, x: sq(jax.vmap(lambda a: a @ w)(x)), W, X)
CASES["moe"] = (lambda p, x: sq(x @ p[jnp.argmax(x[0]) % 3]), draw(0, 3, 6, 6), X)
CASES["onehot_moe"] = (
    lambda p, x: sq(jnp.einsum("td,edk,e->tk", x, p, jax.nn.softmax(x[0, :3]))),
    draw(0, 3, 6, 6),
    X,
)
CASES["spline"] = (
    lambda p, x: sq(
        jnp.einsum("td,dko->to", x, (p[0] * p[1][:, None])[..., None].transpose(0, 2, 1))
    ),
    (W, draw(3, 6)),
    X,
)
CASES["name"] = (lambda w, x: sq(x @ checkpoint_name(w, "w")), W, X)
CASES["optbar"] = (
    lambda p, x: (lambda q: sq(x @ q[0] + q[1]))(jax.lax.optimization_barrier(p)),
    (W, draw(3, 6)),
    X,
)
CASES["diag"] = (lambda p, x: sq(x @ jnp.diag(p)), draw(3, 6), X)
CASES["kron"] = (lambda p, x: sq(x @ jnp.kron(p[0], p[1])), (draw(0, 2, 3), draw(1, 3, 2)), X)
CASES["lstm"] = (
    lambda p, x: sq(
        jax.lax.scan(
            lambda h, t: (jnp.tanh(sum(jnp.split(jnp.concatenate([t, h]) @ p, 2))),) * 2, x[0], x
        )[1]
    ),
    draw(0, 12, 12) / 3,
    X,
)
CASES["cumsum_w"] = (lambda w, x: sq(x @ jnp.cumsum(w, 0)), W, X)
CASES["sort_w"] = (lambda w, x: sq(x @ jnp.sort(w, 0)), W, X)
CASES["roll_w"] = (lambda w, x: sq(x @ jnp.roll(w, 2, 0)), W, X)
CASES["pad_w"] = (lambda w, x: sq(x @ jnp.pad(w, ((0, 0), (1, 2)))), W, X)
CASES["pad_w0"] = (lambda w, x: sq(x[:, :4] @ jnp.pad(w, ((1, 1), (1, 2)))), draw(0, 2, 6), X)
CASES["tile_w"] = (lambda w, x: sq(x @ jnp.tile(w, (2, 3))), draw(0, 3, 2), X)
CASES["repeat_w"] = (lambda w, x: sq(x @ jnp.repeat(w, 2, 0)), draw(0, 3, 2), X)
CASES["gqa"] = (
    lambda w, x: sq(jnp.einsum("td,dhk->thk", x, jnp.repeat(w, 2, 1))),
    draw(0, 6, 2, 3),
    X,
)
CASES["qkv"] = (
    lambda w, x: (
        lambda q, k, v: sq(jax.nn.softmax(jnp.einsum("thd,shd->hts", q, k)) @ v.swapaxes(0, 1))
    )(*jnp.moveaxis(jnp.einsum("ti,io->to", x, w).reshape(5, 3, 2, 3), 1, 0)),
    draw(0, 6, 18),
    X,
)
CASES["qkvw"] = (
    lambda w, x: (
        lambda w: sq(
            (x @ w[:, 0].reshape(6, 6)) * (x @ w[:, 1].reshape(6, 6)) + x @ w[:, 2].reshape(6, 6)
        )
    )(w.reshape(6, 3, 2, 3)),
    draw(0, 6, 18),
    X,
)
CASES["batchdot"] = (
    lambda w, x: sq(jnp.einsum("tgi,gio->tgo", x.reshape(5, 2, 3), w)),
    draw(0, 2, 3, 4),
    X,
)
CASES["batchdot_mask"] = (
    lambda w, x: sq(jnp.einsum("tgi,gio->tgo", x.reshape(5, 2, 3), jnp.tril(w))),
    draw(0, 2, 3, 4),
    X,
)
