"""The order in which training sees samples: a pure function of (manifest digest, seed, epoch, window).

Shards are permuted, taken in windows of `window` shards, and the samples of each window are permuted. The stream is all
epochs end to end; step s takes positions [s * batch, (s + 1) * batch). No rank and no state: a position is one integer.
"""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

KEPT_EPOCHS = 2
"""Epochs whose order is kept: a batch seldom spans more."""


def seed_sequence(digest: str, *numbers: int) -> np.random.SeedSequence:
    """The seed that belongs to a data digest (hex) and whole numbers >= 0."""
    words = [int(digest[start : start + 8], 16) for start in range(0, min(len(digest), 64), 8)]
    return np.random.SeedSequence([*words, *numbers])


def permutation(size: int, seed: np.random.SeedSequence) -> NDArray[np.int64]:
    """A permutation of 0..size-1 that depends on nothing but the seed.

    Made from the raw Philox stream, which NumPy keeps the same from release to release; `Generator.permutation` may
    change, and an order must not.
    """
    keys = np.asarray(np.random.Philox(seed).random_raw(size))
    return np.argsort(keys, kind="stable").astype(np.int64)


@dataclass(frozen=True)
class SampleOrder:
    """The endless stream of samples of a split.

    Args:
        digest: digest of the manifest.
        shard_sizes: samples of each shard.
        seed: seed of the run.
        window: shards whose samples are shuffled together.
    """

    digest: str
    shard_sizes: tuple[int, ...]
    seed: int
    window: int
    _epochs: dict[int, NDArray[np.int64]] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        assert self.window >= 1
        assert self.samples >= 1, "an order needs at least one sample"

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_epochs": {}}

    @cached_property
    def samples(self) -> int:
        """Samples of an epoch."""
        return sum(self.shard_sizes)

    def epoch(self, epoch: int) -> NDArray[np.int64]:
        """The sample indices (in shard order) of one epoch, each exactly once."""  # [samples]
        order = self._epochs.get(epoch)
        if order is None:
            order = self._draw(epoch)
            while len(self._epochs) >= KEPT_EPOCHS:
                self._epochs.pop(min(self._epochs, key=lambda kept: (kept > epoch, kept)))
            self._epochs[epoch] = order
        return order

    def _draw(self, epoch: int) -> NDArray[np.int64]:
        sizes = np.asarray(self.shard_sizes, dtype=np.int64)
        first = np.cumsum(sizes) - sizes  # index of each shard's first sample
        shards = permutation(len(sizes), seed_sequence(self.digest, self.seed, epoch, 0))
        windows = []
        for number, start in enumerate(range(0, len(shards), self.window)):
            members = shards[start : start + self.window]
            indices = np.concatenate([np.arange(first[s], first[s] + sizes[s], dtype=np.int64) for s in members])
            seed = seed_sequence(self.digest, self.seed, epoch, 1, number)
            windows.append(indices[permutation(len(indices), seed)])
        return np.concatenate(windows)

    def step_samples(self, step: int, global_batch: int) -> list[tuple[int, int]]:
        """The (epoch, sample index) pairs of a step, in the order of the stream."""
        begin, end = step * global_batch, (step + 1) * global_batch
        pairs: list[tuple[int, int]] = []
        while begin < end:
            epoch, offset = divmod(begin, self.samples)
            taken = self.epoch(epoch)[offset : offset + end - begin]
            pairs.extend((epoch, int(index)) for index in taken)
            begin += len(taken)
        return pairs

    def epoch_of(self, step: int, global_batch: int) -> int:
        """The epoch a step belongs to.

        It is that of its first sample, since an epoch ends with the first step that reaches its last sample.
        """
        return step * global_batch // self.samples
