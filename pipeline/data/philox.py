"""Philox4x32-10, the counter-based generator of Salmon et al. (SC 2011, doi 10.1145/2063384.2063405), over arrays.

The numbers of one image need no others drawn before them, and those of a whole batch are a few array operations.
"""

import numpy as np
from numpy.typing import NDArray

ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox(counters: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """Four independent, uniform 32-bit numbers for each counter.

    Args:
        counters: [n, 4], each below 2**32.
        key: two 32-bit numbers; other keys give independent numbers.

    Returns:
        [n, 4], each below 2**32.
    """
    first, second, third, fourth = counters.T
    for number in range(ROUNDS):
        keys = [np.uint64((key[k] + number * _KEY_STEPS[k]) & 0xFFFFFFFF) for k in (0, 1)]
        one, other = first * _MULTIPLIERS[0], third * _MULTIPLIERS[1]
        first, second = (other >> _HALF) ^ second ^ keys[0], other & _LOW
        third, fourth = (one >> _HALF) ^ fourth ^ keys[1], one & _LOW
    return np.stack([first, second, third, fourth], axis=1)


def pick(draws: NDArray[np.uint64], least: NDArray[np.int64] | int, most: NDArray[np.int64] | int) -> NDArray[np.int64]:
    """Whole numbers uniform in least..most (below 2**31) from 32-bit numbers, as `draw * count / 2**32`."""
    return least + (draws.astype(np.int64) * (most - least + 1) >> 32)
