"""The sample order of an epoch: a keyed bijection of 0 .. N - 1, without a list of ids for large datasets.

It is a generalised Feistel network (Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002). With
radices a, b of about sqrt(N) and a b >= N an index is x = b l + r, and the rounds are

    l <- (l + h(k + g r)) mod a,    r <- (r + h(k' + g l)) mod b

where h is the finaliser of SplitMix64 and g its increment (Steele, Lea and Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014), and the keys are derived from (seed, epoch). Indices that land outside N go through the
rounds again until they are inside, which preserves the bijection; this affects fewer than one index in sqrt(N). The
inverse applies the rounds backwards. Up to `LISTED` ids are shuffled directly instead, which is faster and can produce
every order.
"""

import functools
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

LISTED = 2**16

_ROUNDS = 8
_INCREMENT = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIERS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_SHIFTS = np.uint64(30), np.uint64(27)
_HALF = np.uint64(32)
_REPLACING = 2**64  # an epoch number that no run reaches, for the order of replacements


def shuffled(seed: int, epoch: int, positions: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Return the ids at given positions of an epoch's order.

    Args:
        seed: seed of the order, at least 0.
        epoch: epoch number, at least 0.
        positions: int64, values in [0, size).
        size: N, from 1 to 2**62.

    Returns:
        int64 of the same shape, values in [0, size); all positions together give every id once.
    """
    if size <= LISTED:
        return _permutation(seed, epoch, size)[positions]
    return _until_inside(_rounds, positions, _keys(seed, epoch), size)


def following(seed: int, item: int, size: int) -> int:
    """Return the id after ``item`` in a cyclic order that only this function uses.

    From any id, ``size`` calls visit every id once, so no id is tried twice before all others.

    Args:
        seed: seed of the order, at least 0.
        item: an id in [0, size).
        size: N, from 1 to 2**62.
    """
    if size <= LISTED:
        order = _permutation(seed, _REPLACING, size)
        position = np.flatnonzero(order == item)
    else:
        position = _until_inside(_inverse_rounds, np.array([item]), _keys(seed, _REPLACING), size)
    return int(shuffled(seed, _REPLACING, (position + 1) % size, size)[0])


def _until_inside(
    rounds: Callable[..., NDArray[np.uint64]], start: NDArray[np.int64], keys: NDArray[np.uint64], size: int
) -> NDArray[np.int64]:
    """Apply the rounds, and repeat them for indices that are not below the size (cycle walking)."""
    rows = math.isqrt(size - 1) + 1  # a
    columns = -(-size // rows)  # b
    ids = start.astype(np.uint64)
    outside = np.ones(ids.shape, bool)
    while outside.any():
        ids[outside] = rounds(ids[outside], keys, np.uint64(rows), np.uint64(columns))
        outside = ids >= size
    return ids.astype(np.int64)


@functools.lru_cache(maxsize=3)  # two epochs, and the order of `following`
def _permutation(seed: int, epoch: int, size: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(size)


@functools.lru_cache(maxsize=3)
def _keys(seed: int, epoch: int) -> NDArray[np.uint64]:
    return np.random.SeedSequence([seed, epoch]).generate_state(_ROUNDS, np.uint64).astype(np.uint64)


def _rounds(x: NDArray[np.uint64], keys: NDArray[np.uint64], rows: np.uint64, columns: np.uint64) -> NDArray[np.uint64]:
    left, right = x // columns, x % columns
    for row_key, column_key in zip(keys[::2], keys[1::2], strict=True):
        left = left + _below(rows, right, row_key)
        left = np.minimum(left, left - rows)  # modulo the radix: a negative difference wraps to a larger number
        right = right + _below(columns, left, column_key)
        right = np.minimum(right, right - columns)
    return left * columns + right


def _inverse_rounds(
    x: NDArray[np.uint64], keys: NDArray[np.uint64], rows: np.uint64, columns: np.uint64
) -> NDArray[np.uint64]:
    left, right = x // columns, x % columns
    for row_key, column_key in zip(keys[-2::-2], keys[::-2], strict=True):
        right = right - _below(columns, left, column_key)
        right = np.minimum(right, right + columns)  # a negative difference has wrapped
        left = left - _below(rows, right, row_key)
        left = np.minimum(left, left + rows)
    return left * columns + right


def _below(radix: np.uint64, x: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """Return hashes of x in [0, radix); the radix must be below 2**32."""
    z: NDArray[np.uint64] = x * _INCREMENT + key  # all arithmetic is modulo 2**64
    z = (z ^ (z >> _SHIFTS[0])) * _MULTIPLIERS[0]
    z = (z ^ (z >> _SHIFTS[1])) * _MULTIPLIERS[1]
    z = ((z >> _HALF) * radix) >> _HALF
    return z
