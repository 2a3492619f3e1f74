"""Which examples make a mini-batch: pure, keyed, on the device."""

import jax
import jax.numpy as jnp

from sgd_jax import _validate
from sgd_jax._typing import Array


def epoch(key: Array, n: int, m: int, *, keep_last: bool = False) -> Array:
    """Returns the mini-batches of one epoch by random reshuffling.

    A uniformly random permutation of the n examples is cut into consecutive mini-batches of m,
    so no example is used twice. The n mod m examples left over are dropped; with
    ``keep_last=True`` they make a last, short mini-batch instead, filled up with −1: "no example
    here". `make_epoch` gives such an entry weight zero and divides by the length of the short
    batch.

    Args:
      key: a JAX random key.
      n: number of examples.
      m: mini-batch size, 1 ≤ m ≤ n; m = n is full-batch gradient descent.
      keep_last: keep the short last mini-batch.

    Returns:
      int32 indices, shape (n // m, m), or (⌈n / m⌉, m) with ``keep_last=True``.

    Raises:
      ValueError: m < 1 or m > n.
      TypeError: n or m is not a whole number.

    >>> import jax
    >>> batches = epoch(jax.random.key(0), n=5, m=2, keep_last=True)
    >>> batches.shape, int(batches[-1, -1])
    ((3, 2), -1)
    >>> sorted(batches.ravel().tolist())
    [-1, 0, 1, 2, 3, 4]

    Source: Nielsen, chapter 1, section "Implementing our network to classify digits".
    """
    n, m = _validate.positive_int("n", n), _validate.positive_int("m", m)
    if m > n:
        raise ValueError(
            f"m must be at most n, the number of examples, got m = {m} > n = {n}; "
            "m = n is full-batch gradient descent"
        )
    order = jax.random.permutation(key, jnp.arange(n, dtype=jnp.int32))
    if keep_last:
        return jnp.pad(order, (0, -n % m), constant_values=-1).reshape(-1, m)
    return order[: n - n % m].reshape(-1, m)
