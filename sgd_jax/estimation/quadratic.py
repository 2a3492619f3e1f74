"""How far SGD with a constant learning rate stays from the minimum of a quadratic, exactly.

C_i(x) = ½λ(x − a_i)², i = 1 … n: the mean cost is least at x* = ā, s² = 1/n Σ_i (a_i − ā)². A step
on a mini-batch whose a_i have the mean ã is x ← x − ηλ(x − ã), so that K = n/m steps of an epoch
are linear in x and in the a_i, and the order of the examples alone decides what remains.
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from sgd_jax import _validate

__all__ = [
    "Order",
    "epoch_fixed_point",
    "expected_squared_distance",
]

Order = Literal["with_replacement", "reshuffling", "fixed_order"]


def expected_squared_distance(
    order: Order,
    learning_rate: float,
    num_examples: int,
    batch_size: int = 1,
    *,
    num_epochs: float = math.inf,
    step: int = 0,
    start: float = 0.0,
) -> float:
    """Returns E(x − x*)²/s² after some epochs of SGD on a one-dimensional quadratic, exactly.

    With α = ηλ, r = 1 − α, and t = T K + k steps taken, k of them in the epoch under way::

        with_replacement   r^(2t) x₀² + (1 − r^(2t)) α/(2 − α)/m
        reshuffling        r^(2k) [r^(2KT) x₀² + (1 − r^(2KT)) D(w)/(1 − r^(2K))] + D(v)
        fixed_order        r^(2t) x₀² + D((1 − r^(KT))/(1 − r^K) r^k w + v)

    where w_j = r^(K−1−j) are the weights with which the K mini-batches of an epoch enter x, those
    of the epoch under way are v_j = r^(k−1−j) for j < k, otherwise 0, and

        D(u) = α²/m · n/(n − 1) · Σ_j (u_j − ū)²

    is the variance of α Σ_j u_j ã_j along a random permutation. Where T is infinite these are the
    stationary errors: fluctuations about x* with replacement and reshuffled; in a fixed order x
    settles into a cycle that does not fluctuate, and the expectation is over the order, drawn
    once. At the end of an epoch its square is (1 + r^K)/(1 − r^K) times the error of reshuffling.

    In p dimensions with one Hessian it holds along each eigenvector, with the eigenvalue as λ and
    the variance of the a_i along it as s²; the excess of the mean cost is the sum of ½λ_j s_j²
    times these.

    Args:
      order: ``"with_replacement"``, m independent draws a step; ``"reshuffling"``, a new
        permutation every epoch; ``"fixed_order"``, one permutation, drawn once, for all epochs.
      learning_rate: α = ηλ in (0, 2), the learning rate in units of 1/λ.
      num_examples: n ≥ 2; with one there is no noise and s² = 0.
      batch_size: m, a divisor of n.
      num_epochs: T, a whole number of at least 0, or infinity.
      step: k, 0 ≤ k < K = n/m.
      start: (x₀ − x*)²/s² ≥ 0, where the first step began.

    Returns:
      A number of at least 0: multiply by s².

    Raises:
      ValueError: an unknown order, or a number out of range.
      TypeError: a size that is not a whole number.

    >>> both = [expected_squared_distance(o, 0.05, 64) for o in ("reshuffling", "with_replacement")]
    >>> round(both[0] / both[1], 6)
    0.441604

    Source: derived here from Var(Σ_j u_j a_π(j)) = s² n/(n − 1) Σ_j (u_j − ū)²; that reshuffling
    beats replacement: Gürbüzbalaban, Ozdaglar and Parrilo 2015 (arXiv 1510.08560).
    """
    n = _validate.positive_int("num_examples", num_examples)
    m = _validate.positive_int("batch_size", batch_size)
    _check(order, learning_rate, n, m, num_epochs, step, start)
    alpha, r, steps = learning_rate, 1 - learning_rate, n // m
    taken = steps * num_epochs + step
    if order == "with_replacement":
        return r ** (2 * taken) * start + (1 - r ** (2 * taken)) * alpha / (2 - alpha) / m
    whole = _weights(r, steps, steps)
    partial = _weights(r, step, steps)

    def variance(weights: np.ndarray) -> float:
        spread = np.sum((weights - weights.mean()) ** 2)
        return float(alpha**2 / m * n / (n - 1) * spread)

    if order == "fixed_order":
        rounds = (1 - r ** (steps * num_epochs)) / (1 - r**steps)
        return r ** (2 * taken) * start + variance(rounds * r**step * whole + partial)
    forgotten = r ** (2 * steps * num_epochs)
    at_epoch = forgotten * start + (1 - forgotten) * variance(whole) / (1 - r ** (2 * steps))
    return r ** (2 * step) * at_epoch + variance(partial)


def epoch_fixed_point(targets: Sequence[float] | np.ndarray, learning_rate: float) -> float:
    """Returns the x that an epoch in a given order ends at if it begins there.

    x = α/(1 − r^K) Σ_j r^(K−1−j) ã_j, with r = 1 − α: a mean of the targets in which the last
    count most. From anywhere, x − x_fixed shrinks by r^K an epoch.

    Args:
      targets: ã_j, the mean of the a_i of each mini-batch in the order of the epoch, (K,).
      learning_rate: α = ηλ in (0, 2).

    Raises:
      ValueError: no targets, or a learning rate out of range.

    >>> epoch_fixed_point([0.0, 3.0], learning_rate=0.5)  # ½/(1 − ¼) · (½ · 0 + 3)
    2.0
    """
    values = np.asarray(targets, np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"targets must be a vector of K ≥ 1 numbers, got shape {values.shape}")
    _check_rate(learning_rate)
    r = 1 - learning_rate
    weights = _weights(r, values.size, values.size)
    return float(learning_rate / (1 - r**values.size) * weights @ values)


def _weights(r: float, taken: int, steps: int) -> np.ndarray:
    """r^(taken − 1 − j) for j < taken, then zeros: (steps,)."""
    weights = np.zeros(steps)
    weights[:taken] = r ** np.arange(taken - 1, -1, -1.0)
    return weights


def _check_rate(learning_rate: float) -> None:
    if not 0 < learning_rate < 2:
        raise ValueError(
            f"learning_rate is {learning_rate} in units of 1/λ; expected one in (0, 2), for beyond "
            "it SGD diverges"
        )


def _check(
    order: str, learning_rate: float, n: int, m: int, num_epochs: float, step: int, start: float
) -> None:
    if order not in get_args(Order):
        raise ValueError(f"order is {order!r}; expected one of {', '.join(get_args(Order))}")
    _check_rate(learning_rate)
    if n < 2:
        raise ValueError(
            f"num_examples is {n}; expected at least 2. Of one example s² = 0, and an error in "
            "units of s² is undefined: x − x* shrinks by 1 − ηλ a step"
        )
    if n % m:
        raise ValueError(f"batch_size is {m}; expected a divisor of num_examples, {n}")
    if not (num_epochs >= 0 and (num_epochs == math.inf or num_epochs == int(num_epochs))):
        raise ValueError(
            f"num_epochs is {num_epochs}; expected a whole number of at least 0, or infinity"
        )
    if not 0 <= step < n // m:
        raise ValueError(f"step is {step}; expected 0 to {n // m - 1}, within an epoch of {n // m}")
    if not 0 <= start < math.inf:
        raise ValueError(f"start is {start}; expected a finite number of at least 0")
