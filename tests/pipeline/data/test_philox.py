"""Philox4x32-10 against the known answers of its authors, and what is made of its numbers."""

import numpy as np
import pytest

from pipeline.data.philox import philox, pick

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ([0] * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ([ONES] * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_known_answers(counter: list[int], key: tuple[int, int], answer: tuple[int, ...]) -> None:
    """kat_vectors of Random123, the library of the generator's authors."""
    assert philox(np.array([counter], dtype=np.uint64), key)[0].tolist() == list(answer)


def test_each_counter_has_its_own_numbers() -> None:
    counters = np.arange(4000, dtype=np.uint64).reshape(-1, 4)
    together = philox(counters, (1, 2))
    alone = np.concatenate([philox(counters[n : n + 1], (1, 2)) for n in range(len(counters))])
    np.testing.assert_array_equal(together, alone)
    assert len(np.unique(together)) > 3990


def test_picks_are_uniform_and_within_their_bounds() -> None:
    draws = philox(np.arange(40_000, dtype=np.uint64).reshape(-1, 4), (3, 4)).reshape(-1)
    picked = pick(draws, 5, 14)
    counts = np.bincount(picked, minlength=15)
    assert counts[:5].sum() == 0
    assert len(counts) == 15
    assert np.abs(counts[5:] / len(picked) - 0.1).max() < 0.01
    assert pick(np.array([0, ONES], dtype=np.uint64), 0, 2**31 - 1).tolist() == [0, 2**31 - 1]
