# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Finding wrong labels by their gradients
#
# An example whose label is wrong pulls the network its own way: its gradient stays long while those
# of the others shrink, and points against theirs. One pass over the data gives both, for every
# example. It needs `pip install 'sgd_jax[experiments]'` and takes a few seconds.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import sgd_jax as sj
from sgd_jax import data

digits = data.load("digits").train
n = len(digits.labels)
rng = np.random.default_rng(0)

# %% [markdown]
# Sixty of 1,204 digits get another label than their own. The network is trained on all of them,
# none the wiser.

# %%
wrong = np.zeros(n, bool)
wrong[rng.choice(n, 60, replace=False)] = True
labels = np.where(wrong, (digits.labels + rng.integers(1, 10, n)) % 10, digits.labels)
examples = (digits.inputs / 16, labels)


def fun(params, example):
    """The cost of ONE example: cross-entropy of the right digit."""
    x, label = example
    logits = sj.networks.weighted_input(params, x)
    return -jax.nn.log_softmax(logits)[label]


optimizer = sj.sgd(learning_rate=0.3)
epoch = sj.make_epoch(fun, optimizer)
state = sj.init_state(sj.init_network(jax.random.key(0), (64, 30, 10), scheme="scaled"), optimizer)
for number in range(10):
    state, _ = epoch(state, examples, sj.sampling.epoch(jax.random.key(number), n, 10))

# %% [markdown]
# ## One pass: how long is each gradient, and does it agree with the others?
#
# `squared_norms` and `inner_products` come from the same factors. Written down, the gradients would
# be 1,204 × 2,260 numbers; here they never are.


# %%
@jax.jit
def look(params):
    grads = sj.per_example_grad(fun)(params, examples)
    return jnp.sqrt(grads.squared_norms()), grads.inner_products(grads.mean())


norms, agreement = map(np.asarray, look(state.params))
suspects = np.argsort(-norms)  # the longest gradients first
found = np.cumsum(wrong[suspects])
print(f"of the 60 longest gradients {found[59]} belong to wrong labels; by chance it would be 3")
assert found[59] >= 48
needed = 1 + int(np.flatnonzero(found == 60)[0])
print(f"to find all 60, {needed} labels have to be looked at, of {n:,}")
assert needed < 120

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
bins = np.geomspace(max(norms.min(), 1e-3), norms.max(), 40)
left.hist(norms[~wrong], bins, color="#4477aa", alpha=0.7, label="right label")
left.hist(norms[wrong], bins, color="#cc3355", alpha=0.7, label="wrong label")
left.set(
    xscale="log", yscale="log", xlabel="‖∇C_x‖", ylabel="examples", title="length of gradients"
)
left.legend()
checked = np.arange(1, n + 1)
right.plot(checked, found, color="#228833", label="longest gradients first")
right.plot(checked, 60 * checked / n, ":", color="#888888", label="in random order")
right.set(xlim=(0, 300), xlabel="labels checked", ylabel="wrong ones found")
right.set_title("how soon they are found")
right.legend()
plt.show()

# %% [markdown]
# ## What it costs the gradient
#
# The wrong labels are 5 % of the data. What is their share of tr Σ, of the noise in every
# mini-batch?

# %%
moments = sj.gradient_moments(fun, state.params, examples)
deviations = norms**2 - 2 * agreement + float(moments.squared_norm)  # ‖∇C_x − ∇C‖²
share = deviations[wrong].sum() / deviations.sum()
print(f"{wrong.mean():.0%} of the examples make {share:.0%} of tr Σ = {moments.trace:.2f}")
np.testing.assert_allclose(deviations.mean(), moments.trace, rtol=1e-3)
assert share > 0.45

# %% [markdown]
# And a gradient clipped example by example, `clipped_mean`, at the length that nine in ten do not
# reach:


# %%
@jax.jit
def pulls(params, clip):
    """Returns the mean gradient, clipped and plain, and that of the right labels alone."""
    grads = sj.per_example_grad(fun)(params, examples)
    return grads.clipped_mean(clip), grads.mean(), grads.sum(~wrong / (~wrong).sum())


def distance(a, b):
    squares = jax.tree.map(lambda x, y: jnp.sum((x - y) ** 2), a, b)
    return float(jnp.sqrt(sum(jax.tree.leaves(squares))))


clipped, plain, clean = pulls(state.params, np.quantile(norms, 0.9))
print(
    f"from the gradient of the right labels alone, the mean is {distance(plain, clean):.3f} away,"
)
print(f"the clipped mean {distance(clipped, clean):.3f}")
assert distance(clipped, clean) < distance(plain, clean)
