import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.order import SampleOrder, permutation, seed_sequence

DIGEST = "ab" * 32


def order(*sizes: int, seed: int = 0, window: int = 2, digest: str = DIGEST) -> SampleOrder:
    return SampleOrder(digest, sizes or (7, 5, 9, 1, 0, 4), seed, window)


def epoch_of(one: SampleOrder, epoch: int) -> list[int]:
    """The sample indices of an epoch: the step of that number, of a batch that is an epoch."""
    epochs, indices = one.step_samples(epoch, one.samples)
    assert set(epochs.tolist()) == {epoch}
    return indices.tolist()  # type: ignore[no-any-return]


def pairs_of(one: SampleOrder, step: int, batch: int) -> list[tuple[int, int]]:
    """The (epoch, sample index) pairs of a step."""
    epochs, indices = one.step_samples(step, batch)
    return list(zip(epochs.tolist(), indices.tolist(), strict=True))


class TestPermutation:
    @pytest.mark.parametrize("size", [0, 1, 2, 100])
    def test_holds_each_once(self, size: int) -> None:
        assert sorted(permutation(size, seed_sequence(DIGEST, 1))) == list(range(size))

    def test_is_fixed_for_all_time(self) -> None:
        """Runs that were begun with an older release must go on with the same order."""
        assert permutation(8, seed_sequence(DIGEST, 1, 2)).tolist() == [0, 4, 7, 2, 6, 1, 3, 5]

    def test_positions_are_uniform(self) -> None:
        counts = np.zeros((4, 4))
        for seed in range(2000):
            counts[np.arange(4), permutation(4, seed_sequence(DIGEST, seed))] += 1
        assert np.abs(counts / 2000 - 0.25).max() < 0.05


class TestEpoch:
    @given(st.lists(st.integers(0, 12), min_size=1, max_size=12), st.integers(1, 14), st.integers(0, 5))
    @settings(max_examples=100, deadline=None)
    def test_holds_every_sample_once(self, sizes: list[int], window: int, epoch: int) -> None:
        if sum(sizes) == 0:
            sizes[0] = 1
        drawn = epoch_of(SampleOrder(DIGEST, tuple(sizes), 3, window), epoch)
        assert sorted(drawn) == list(range(sum(sizes)))

    def test_differs_by_epoch_seed_and_digest(self) -> None:
        variants = [
            epoch_of(order(), 0),
            epoch_of(order(), 1),
            epoch_of(order(seed=1), 0),
            epoch_of(order(digest="cd" * 32), 0),
            epoch_of(order(window=1), 0),
        ]
        assert len({tuple(variant) for variant in variants}) == len(variants)

    def test_shards_are_permuted_anew_each_epoch(self) -> None:
        one = order(*(1,) * 12, window=1)
        assert len({tuple(epoch_of(one, epoch)) for epoch in range(4)}) == 4

    def test_windows_hold_whole_shards(self) -> None:
        sizes = (10,) * 6
        drawn = epoch_of(order(*sizes, window=2), 4)
        for start in range(0, 60, 20):
            shards = Counter(index // 10 for index in drawn[start : start + 20])
            assert sorted(shards.values()) == [10, 10]

    def test_samples_of_a_window_are_mixed(self) -> None:
        drawn = epoch_of(order(50, 50, window=2), 0)
        assert 10 < sum(index < 50 for index in drawn[:50]) < 40

    def test_going_back_gives_the_same(self) -> None:
        one = order()
        epochs = [epoch_of(one, epoch) for epoch in (0, 1, 2, 3)]
        assert [epoch_of(one, epoch) for epoch in (3, 0, 2, 1)] == [epochs[3], epochs[0], epochs[2], epochs[1]]


@pytest.mark.parametrize("batch", [1, 3, 8, 40])
def test_the_shards_ahead_are_those_of_two_windows(batch: int) -> None:
    one = order(4, 4, 4, 4, 4, 4)
    stream = [index // 4 for epoch in range(30) for index in epoch_of(one, epoch)]
    for step in range(16):
        first = step * batch // 8 * 8
        ahead = one.shards_ahead(step, batch)
        assert (set(ahead[:2]), set(ahead[2:])) == (set(stream[first : first + 8]), set(stream[first + 8 : first + 16]))


class TestStream:
    @pytest.mark.parametrize("batch", [1, 4, 26, 40])
    def test_steps_are_the_epochs_end_to_end(self, batch: int) -> None:
        one = order()
        epochs = [(epoch, index) for epoch in range(5) for index in epoch_of(one, epoch)]
        steps = [pair for step in range(5 * 26 // batch) for pair in pairs_of(one, step, batch)]
        assert steps == epochs[: len(steps)]

    def test_every_sample_exactly_once_an_epoch(self) -> None:
        one = order(1000, 1000, 1001, window=2)
        seen = Counter(pair for step in range(-(-2 * 3001 // 16)) for pair in pairs_of(one, step, 16))
        assert set(seen.values()) == {1}
        for epoch in (0, 1):
            assert sum(seen_epoch == epoch for seen_epoch, _ in seen) == 3001

    def test_any_step_alone_equals_the_straight_run(self) -> None:
        straight = [pairs_of(order(), step, 8) for step in range(40)]
        assert [pairs_of(order(), step, 8) for step in reversed(range(40))] == straight[::-1]

    def test_an_epoch_ends_with_the_step_that_reaches_its_last_sample(self) -> None:
        one = order(10)  # batches of 4: the third step reaches sample 10 and goes on into the next epoch
        assert [one.epoch_of(step, 4) for step in range(6)] == [0, 0, 0, 1, 1, 2]

    def test_batch_of_several_epochs(self) -> None:
        one = order(3)
        assert [epoch for epoch, _ in pairs_of(one, 0, 8)] == [0, 0, 0, 1, 1, 1, 2, 2]


def test_travels_without_what_it_keeps() -> None:
    one = order()
    drawn = epoch_of(one, 2)
    copy = pickle.loads(pickle.dumps(one))
    assert copy == one
    assert epoch_of(copy, 2) == drawn


def test_draws_the_windows_that_a_step_reaches_and_keeps_few() -> None:
    """A hundred million samples: an epoch's permutation alone would be 800 MB."""
    one = order(*(10_000,) * 10_000, window=2)
    for step in (0, 10**6, 10**9, 7):
        assert len(set(pairs_of(one, step, 64))) == 64
    assert len(one._epochs) == 2
    assert sum(len(window) for window in one._windows.values()) <= 80_000
