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
        drawn = SampleOrder(DIGEST, tuple(sizes), 3, window).epoch(epoch)
        assert sorted(drawn) == list(range(sum(sizes)))

    def test_differs_by_epoch_seed_and_digest(self) -> None:
        variants = [
            order().epoch(0),
            order().epoch(1),
            order(seed=1).epoch(0),
            order(digest="cd" * 32).epoch(0),
            order(window=1).epoch(0),
        ]
        assert len({tuple(variant) for variant in variants}) == len(variants)

    def test_shards_are_permuted_anew_each_epoch(self) -> None:
        one = order(*(1,) * 12, window=1)
        assert len({tuple(one.epoch(epoch)) for epoch in range(4)}) == 4

    def test_windows_hold_whole_shards(self) -> None:
        sizes = (10,) * 6
        drawn = order(*sizes, window=2).epoch(4)
        for start in range(0, 60, 20):
            shards = Counter(int(index) // 10 for index in drawn[start : start + 20])
            assert sorted(shards.values()) == [10, 10]

    def test_samples_of_a_window_are_mixed(self) -> None:
        drawn = order(50, 50, window=2).epoch(0)
        assert 10 < np.count_nonzero(drawn[:50] < 50) < 40

    def test_going_back_gives_the_same(self) -> None:
        one = order()
        epochs = [one.epoch(epoch).tolist() for epoch in (0, 1, 2, 3)]
        assert [one.epoch(epoch).tolist() for epoch in (3, 0, 2, 1)] == [epochs[3], epochs[0], epochs[2], epochs[1]]


class TestStream:
    @pytest.mark.parametrize("batch", [1, 4, 26, 40])
    def test_steps_are_the_epochs_end_to_end(self, batch: int) -> None:
        one = order()
        epochs = [(epoch, int(index)) for epoch in range(5) for index in one.epoch(epoch)]
        steps = [pair for step in range(5 * 26 // batch) for pair in one.step_samples(step, batch)]
        assert steps == epochs[: len(steps)]

    def test_every_sample_exactly_once_an_epoch(self) -> None:
        one = order(1000, 1000, 1001, window=2)
        seen = Counter(pair for step in range(-(-2 * 3001 // 16)) for pair in one.step_samples(step, 16))
        assert set(seen.values()) == {1}
        for epoch in (0, 1):
            assert sum(seen_epoch == epoch for seen_epoch, _ in seen) == 3001

    def test_any_step_alone_equals_the_straight_run(self) -> None:
        straight = [order().step_samples(step, 8) for step in range(40)]
        assert [order().step_samples(step, 8) for step in reversed(range(40))] == straight[::-1]

    def test_an_epoch_ends_with_the_step_that_reaches_its_last_sample(self) -> None:
        one = order(10)  # batches of 4: the third step reaches sample 10 and goes on into the next epoch
        assert [one.epoch_of(step, 4) for step in range(6)] == [0, 0, 0, 1, 1, 2]

    def test_batch_of_several_epochs(self) -> None:
        one = order(3)
        assert [epoch for epoch, _ in one.step_samples(0, 8)] == [0, 0, 0, 1, 1, 1, 2, 2]


def test_travels_without_what_it_keeps() -> None:
    one = order()
    drawn = one.epoch(2).tolist()
    copy = pickle.loads(pickle.dumps(one))
    assert copy == one
    assert copy.epoch(2).tolist() == drawn


def test_keeps_two_epochs_at_most() -> None:
    one = order()
    for epoch in range(6):
        one.epoch(epoch)
    assert len(one._epochs) == 2
