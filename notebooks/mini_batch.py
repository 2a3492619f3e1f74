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
# # Ten examples against a thousand
#
# How far is a mini-batch gradient from the gradient of all examples, and which way does it point?
# The exact laws, and thousands of mini-batches beside them, in pictures. It needs `pip install
# 'sgd_jax[experiments]'` and takes a few seconds.

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np

import sgd_jax as sj
from sgd_jax import data

digits = data.load("digits").train
examples = (digits.inputs / 16, jax.nn.one_hot(digits.labels, 10))
n = len(digits.labels)


def fun(params, example):
    """The cost of ONE example."""
    x, y = example
    return sj.quadratic_cost(sj.feedforward(params, x), y)


params = sj.init_network(jax.random.key(0), (64, 30, 10))

# %% [markdown]
# ## Everything about every mini-batch, from one matrix
#
# With the weights c of its examples a mini-batch estimate is ĝ = Gᵀc, so its error ‖ĝ − ∇C‖² = (c −
# 1/n)ᵀ G Gᵀ (c − 1/n), and its product with ∇C, need only the Gram matrix G Gᵀ. It is made once;
# then mini-batches are drawn by the thousand without another gradient.


# %%
@jax.jit
def gram_at(params):
    return sj.per_example_grad(fun)(params, examples).gram()


def draw(gram, m, num_draws, seed):
    """Returns ‖ĝ − ∇C‖²/‖∇C‖² and the cosine of mini-batches of m."""
    rng = np.random.default_rng(seed)
    towards = gram.mean(axis=0)  # G ∇C
    squared_norm = towards.mean()  # ‖∇C‖²
    errors, cosines = [], []
    for _ in range(num_draws):
        rows = rng.choice(n, m, replace=False)
        length = gram[np.ix_(rows, rows)].mean()  # ‖ĝ‖²
        product = towards[rows].mean()  # ⟨ĝ, ∇C⟩
        errors.append((length - 2 * product + squared_norm) / squared_norm)
        cosines.append(product / np.sqrt(length * squared_norm))
    return np.array(errors), np.array(cosines)


sizes = [1, 3, 10, 30, 100, 300]


def measure(params):
    gram = np.asarray(gram_at(params), np.float64)
    return [draw(gram, m, num_draws=300, seed=m) for m in sizes]


# %% [markdown]
# ## Before training, and after twenty epochs

# %%
optimizer = sj.sgd(learning_rate=3.0)
epoch = sj.make_epoch(fun, optimizer)
state = sj.init_state(params, optimizer)
for number in range(20):
    state, _ = epoch(state, examples, sj.sampling.epoch(jax.random.key(number), n, 10))
points = {"untrained": params, "after 20 epochs": state.params}
measured = {name: measure(at) for name, at in points.items()}
moments = {name: sj.gradient_moments(fun, at, examples) for name, at in points.items()}

for name, m in moments.items():
    print(f"{name}: noise scale {m.trace / m.squared_norm:.1f} examples")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
fine = np.unique(np.geomspace(1, n - 1, 60).astype(int))
for color, (name, m) in zip(("#4477aa", "#cc3355"), moments.items(), strict=True):
    law = [float(sj.expected_squared_error(m, int(k)) / m.squared_norm) for k in fine]
    left.plot(fine, law, color=color, label=f"{name}: exact")
    means = [errors.mean() for errors, _ in measured[name]]
    left.plot(sizes, means, "o", color=color, label=f"{name}: mean of 300 mini-batches")
    cosines_of_means = [float(sj.expected_cosine(m, int(k))) for k in fine]
    right.plot(fine, cosines_of_means, color=color, label=name)
    spread = [np.quantile(cosines, (0.05, 0.95)) for _, cosines in measured[name]]
    low, high = np.transpose(spread)
    right.fill_between(sizes, low, high, color=color, alpha=0.2, lw=0, label="5 % to 95 % of 300")
left.set(xscale="log", yscale="log", xlabel="mini-batch size m", title="‖ĝ − ∇C‖²/‖∇C‖²")
right.set(xscale="log", xlabel="mini-batch size m", title="cosine between ĝ and ∇C")
for axes in (left, right):
    axes.grid(alpha=0.3)
    axes.legend()
plt.show()

# %% [markdown]
# The points lie on the lines: the law E‖ĝ − ∇C‖² = (n − m)/(n − 1) · tr Σ/m is exact, and goes to
# zero where the mini-batch is everything. Where the left curve crosses 1 the mini-batch is one
# noise scale long. Training moves that crossing to the right.

# %%
for name, m in moments.items():
    for (errors, _), size in zip(measured[name], sizes, strict=True):
        law = sj.expected_squared_error(m, size) / m.squared_norm
        off = errors.mean() / law - 1
        error = errors.std() / np.sqrt(len(errors)) / law
        print(f"{name:15} m = {size:4}: measured/exact = {1 + off:.3f} ± {error:.3f}")
        assert abs(off) < 5 * error

# %% [markdown]
# **To try:** momentum, another learning rate, or samples drawn by `sj.sampling.stratified`, one
# digit a stratum: what does it gain before training, and what after?
