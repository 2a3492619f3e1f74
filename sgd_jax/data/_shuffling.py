"""A random order of n examples, of which any part is computed without the rest."""

import math
from collections.abc import Sequence

import numpy as np

_NUM_ROUNDS = 16  # with 8 the orders of five examples are not equally likely
_BLOCK = 1 << 13  # positions that are worked on together: in cache
_MULTIPLIER = np.uint64(0xD6E8FEB86659FD93)
_HALF = np.uint64(32)
MAX_EXAMPLES = 1 << 62


def index_shuffle(positions: np.ndarray, n: int, seed: int | Sequence[int]) -> np.ndarray:
    """Returns which examples stand at the positions given of a random order of all n.

    A permutation of 0 … n − 1, drawn from ``seed`` alone, of which nothing is stored: a billion
    examples need no more memory than ten, and position p can be asked for before any other. It is
    a Feistel network. With b = ⌈n/a⌉, a = ⌈√n⌉, a number below a·b is a pair (u, v), v < b, and

        u ← (u + h₁(v)) mod a,   v ← (v + h₂(u)) mod b,   u ← (u + h₃(v)) mod a,   …

    is undone step by step whatever the hash functions h are, so it permutes the pairs. What lands
    on n or above is sent through again until it lands below, which leaves a permutation of the
    numbers below n. The hash functions are keyed by NumPy's `SeedSequence`, whose values NumPy
    promises to keep: the order is the same on every machine and in every version.

    Args:
      positions: Integers in [0, n), of any shape.
      n: Number of examples, at least 1 and at most 2⁶².
      seed: One or more whole numbers of at least 0, such as (seed, epoch).

    Returns:
      int64, of the shape of ``positions``.

    Raises:
      ValueError: n or a position is out of range.

    Example:
      >>> index_shuffle(np.arange(5), n=5, seed=(0, 1)).tolist()
      [4, 0, 1, 2, 3]

    Sources: M. Luby, C. Rackoff, "How to construct pseudorandom permutations from pseudorandom
    functions", 1988. J. Black, P. Rogaway, "Ciphers with arbitrary finite domains", 2002.
    """
    if not 1 <= n <= MAX_EXAMPLES:
        raise ValueError(f"n is {n}; expected a number of examples from 1 to 2⁶²")
    if positions.size and not 0 <= positions.min() <= positions.max() < n:
        raise ValueError(
            f"positions lie in [{positions.min()}, {positions.max()}]; expected them in [0, {n})"
        )
    keys = np.random.SeedSequence(seed).generate_state(_NUM_ROUNDS, np.uint64)
    shuffled = np.empty(positions.size, np.int64)
    for start in range(0, positions.size, _BLOCK):
        numbers = positions.ravel()[start : start + _BLOCK].astype(np.uint64)
        above = np.arange(len(numbers))
        while len(above):
            numbers[above] = _permute_pairs(numbers[above], n, keys)
            above = above[numbers[above] >= n]
        shuffled[start : start + _BLOCK] = numbers
    return shuffled.reshape(positions.shape)


def _permute_pairs(numbers: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    a = math.isqrt(n - 1) + 1
    sizes = np.uint64(a), np.uint64(-(-n // a))
    halves = list(np.divmod(numbers, sizes[1]))
    for number, key in enumerate(keys):
        moved, other = number % 2, 1 - number % 2
        total = halves[moved] + _hash_below(halves[other], key, sizes[moved])
        halves[moved] = np.minimum(total, total - sizes[moved])  # below 0 it wraps to the largest
    return halves[0] * sizes[1] + halves[1]


def _hash_below(values: np.ndarray, key: np.uint64, size: np.uint64) -> np.ndarray:
    """Returns a number below ``size`` ≤ 2³² for each of the values; see `index_shuffle`."""
    mixed = (values + key) * _MULTIPLIER
    mixed ^= mixed >> _HALF
    mixed *= _MULTIPLIER
    return ((mixed >> _HALF) * size) >> _HALF
