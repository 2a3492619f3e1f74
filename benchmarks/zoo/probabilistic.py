"""Models that are densities: numpyro, tinygp, distrax, bijx; and losses of optax."""

# Each model imports its own library.
# pyright: reportMissingImports=false

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.zoo.model import Case, Model, cast, integers, normal


def hierarchical_regression(dtype: Any) -> Case:
    """Returns minus the log joint density of one observation."""
    import numpyro
    import numpyro.distributions as dist
    from numpyro.infer.util import log_density

    def model(x: Any, group: Any, y: Any) -> None:
        scale = numpyro.sample("scale", dist.HalfCauchy(1.0).expand([16]).to_event(1))
        beta = numpyro.sample("beta", dist.Normal(jnp.zeros(16), scale).to_event(1))
        offset = numpyro.sample("offset", dist.Normal(0.0, 1.0).expand([5]).to_event(1))
        numpyro.sample("y", dist.Bernoulli(logits=x @ beta + offset[group]), obs=y)

    params = {"scale": np.exp(normal(0, 16)), "beta": normal(1, 16), "offset": normal(2, 5)}

    def fun(params: Any, example: Any) -> jax.Array:
        return -log_density(model, example, {}, params)[0]

    examples = normal(3, 64, 16), integers(4, 5, 64), integers(5, 2, 64)
    return Case(fun, cast(params, dtype), cast(examples, dtype))


def gaussian_process(dtype: Any) -> Case:
    """Returns minus the log marginal likelihood of one data set."""
    import tinygp

    def fun(params: Any, example: Any) -> jax.Array:
        kernel = jnp.exp(params["amplitude"]) * tinygp.kernels.Matern32(jnp.exp(params["length"]))
        x, y = example
        process = tinygp.GaussianProcess(kernel, x, diag=jnp.exp(params["noise"]))
        return -process.log_probability(y - params["mean"])

    params = {"amplitude": 0.1, "length": -0.3, "noise": -1.0, "mean": 0.2}
    examples = np.sort(normal(0, 8, 24), axis=1), normal(1, 8, 24)
    return Case(fun, cast(params, dtype), cast(examples, dtype))


def spline_flow(dtype: Any) -> Case:
    """Returns minus the log density of a coupling flow."""
    import distrax

    def log_prob(params: Any, x: Any) -> jax.Array:
        hidden = jnp.tanh(x[:2] @ params["w"][0] + params["b"][0])
        knots = (hidden @ params["w"][1] + params["b"][1]).reshape(2, -1)
        spline = distrax.Block(distrax.RationalQuadraticSpline(knots, -4.0, 4.0), 1)
        z, log_det = spline.forward_and_log_det(x[2:])
        base = distrax.MultivariateNormalDiag(jnp.zeros(4, x.dtype), jnp.exp(params["scale"]))
        return base.log_prob(jnp.concatenate([x[:2], z])) + log_det

    params = {
        "w": [normal(0, 2, 64), normal(1, 64, 50) / 8],
        "b": [normal(2, 64), normal(3, 50)],
        "scale": 0.1 * normal(4, 4),
    }
    return Case(
        lambda p, x: -log_prob(p, x), cast(params, dtype), cast(normal(5, 32, 4), dtype)
    )  # fmt: skip


def hidden_markov(dtype: Any) -> Case:
    """Returns minus the log likelihood of one sequence."""
    import distrax

    def fun(params: Any, example: Any) -> jax.Array:
        model = distrax.HMM(
            distrax.Categorical(logits=params["start"]),
            distrax.Categorical(logits=params["move"]),
            distrax.Normal(params["mean"], jnp.exp(params["scale"])),
        )
        return -model.forward(example)[0]

    params = {
        "start": normal(0, 4), "move": normal(1, 4, 4), "mean": normal(2, 4),
        "scale": 0.1 * normal(3, 4),
    }  # fmt: skip
    return Case(fun, cast(params, dtype), cast(normal(4, 16, 20), dtype))


def temporal_classification(dtype: Any) -> Case:
    """Returns the cost of one unaligned sequence of labels."""
    import optax

    def fun(params: Any, example: Any) -> jax.Array:
        frames, labels = example
        h = jax.nn.relu(frames @ params["w"][0] + params["b"][0])
        logits = h @ params["w"][1] + params["b"][1]
        paddings = (jnp.zeros((1, frames.shape[0])), jnp.zeros((1, labels.shape[0])))
        return optax.ctc_loss(logits[None], paddings[0], labels[None], paddings[1])[0]

    params = {
        "w": [normal(0, 12, 128) / 4, normal(1, 128, 20) / 12],
        "b": [normal(2, 128), normal(3, 20)],
    }
    examples = normal(4, 8, 40, 12), 1 + integers(5, 19, 8, 6)
    return Case(fun, cast(params, dtype), cast(examples, dtype))


def mixture(dtype: Any) -> Case:
    """Returns minus the log density of a mixture of Gaussians."""
    import distrax

    def fun(params: Any, example: Any) -> jax.Array:
        components = distrax.MultivariateNormalTri(params["mean"], params["tril"])
        weights = distrax.Categorical(logits=params["logits"])
        return -distrax.MixtureSameFamily(weights, components).log_prob(example)

    tril = np.eye(4) + 0.1 * np.tril(normal(1, 6, 4, 4))
    params = {"mean": normal(0, 6, 4), "tril": tril, "logits": normal(2, 6)}
    return Case(fun, cast(params, dtype), cast(normal(3, 32, 4), dtype))


def _model(name: str, source: str, make: Callable[[Any], Case], need: str) -> Model:
    return Model(name, source, (need,), make)


MODELS = [
    _model(
        "numpyro",
        "numpyro log_density of a hierarchical regression",
        hierarchical_regression,
        "numpyro",
    ),
    _model("tinygp", "tinygp GaussianProcess, Matern32", gaussian_process, "tinygp"),
    _model("distrax.spline", "distrax RationalQuadraticSpline", spline_flow, "distrax"),
    _model("distrax.hmm", "distrax HMM", hidden_markov, "distrax"),
    _model(
        "distrax.mixture", "distrax MixtureSameFamily, MultivariateNormalTri", mixture, "distrax"
    ),
    _model("optax.ctc", "optax ctc_loss", temporal_classification, "optax"),
]
