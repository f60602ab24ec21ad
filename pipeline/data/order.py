"""The order in which training sees samples: a pure function of (manifest digest, seed, epoch, window).

Shards are permuted, taken in windows of `window` shards, and the samples of each window are permuted. The stream is all
epochs end to end; step s takes positions [s * batch, (s + 1) * batch). No rank and no state: a position is one integer,
and only the windows that a step reaches into are ever drawn.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

KEPT_EPOCHS = 2
"""Epochs whose order of shards is kept: a step seldom spans more."""
KEPT_WINDOWS = 4

Key = TypeVar("Key")
Value = TypeVar("Value")


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
    _epochs: OrderedDict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = field(
        default_factory=OrderedDict, repr=False, compare=False
    )
    _windows: OrderedDict[tuple[int, int], NDArray[np.int64]] = field(
        default_factory=OrderedDict, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        assert self.window >= 1
        assert self.samples >= 1, "an order needs at least one sample"

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_epochs": OrderedDict(), "_windows": OrderedDict()}

    @cached_property
    def samples(self) -> int:
        """Samples of an epoch."""
        return sum(self.shard_sizes)

    @cached_property
    def _sizes(self) -> NDArray[np.int64]:
        return np.asarray(self.shard_sizes, dtype=np.int64)

    @cached_property
    def _first(self) -> NDArray[np.int64]:
        """Index of each shard's first sample."""
        return np.cumsum(self._sizes) - self._sizes

    def step_samples(self, step: int, global_batch: int, steps: int = 1) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The epochs and the sample indices (in shard order) of some steps, as the stream has them.

        Args:
            step: the first.
            global_batch: samples of a step.
            steps: how many.

        Returns:
            [steps * global_batch] each.
        """
        begin, end = step * global_batch, (step + steps) * global_batch
        epochs, indices = [], []
        while begin < end:
            epoch, offset = divmod(begin, self.samples)
            taken = self._from(epoch, offset, end - begin)
            epochs.append(np.full(len(taken), epoch, dtype=np.int64))
            indices.append(taken)
            begin += len(taken)
        return np.concatenate(epochs), np.concatenate(indices)

    def shards_ahead(self, step: int, global_batch: int) -> list[int]:
        """The shards of the window in which a step begins and of the window after it, in their order."""
        epoch, offset = divmod(step * global_batch, self.samples)
        shards, ends = _kept(self._epochs, epoch, KEPT_EPOCHS, lambda: self._draw_epoch(epoch))
        first = int(np.searchsorted(ends, offset, side="right")) * self.window
        ahead = shards[first : first + 2 * self.window]
        if first + self.window >= len(shards):
            later, _ = _kept(self._epochs, epoch + 1, KEPT_EPOCHS, lambda: self._draw_epoch(epoch + 1))
            ahead = np.concatenate([ahead, later[: self.window]])
        return [int(shard) for shard in ahead]

    def epoch_of(self, step: int, global_batch: int) -> int:
        """The epoch a step belongs to.

        It is that of its first sample, since an epoch ends with the first step that reaches its last sample.
        """
        return step * global_batch // self.samples

    def _from(self, epoch: int, offset: int, most: int) -> NDArray[np.int64]:
        """Sample indices of an epoch from a position on: `most`, or fewer where a window ends."""
        shards, ends = _kept(self._epochs, epoch, KEPT_EPOCHS, lambda: self._draw_epoch(epoch))
        number = int(np.searchsorted(ends, offset, side="right"))
        window = shards[number * self.window : (number + 1) * self.window]
        order = _kept(self._windows, (epoch, number), KEPT_WINDOWS, lambda: self._draw_window(epoch, number, window))
        begin = offset - int(ends[number]) + len(order)
        return order[begin : begin + most]

    def _draw_epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The shards of an epoch in their order, and the position at which each window ends."""
        shards = permutation(len(self._sizes), seed_sequence(self.digest, self.seed, epoch, 0))
        starts = range(0, len(shards), self.window)
        return shards, np.cumsum(np.add.reduceat(self._sizes[shards], starts))

    def _draw_window(self, epoch: int, number: int, shards: NDArray[np.int64]) -> NDArray[np.int64]:
        indices = np.concatenate([self._first[s] + np.arange(self._sizes[s], dtype=np.int64) for s in shards])
        return indices[permutation(len(indices), seed_sequence(self.digest, self.seed, epoch, 1, number))]


def _kept(cache: OrderedDict[Key, Value], key: Key, most: int, make: Callable[[], Value]) -> Value:
    """The value of a key, made where it is not kept; the oldest of more than `most` is dropped."""
    if key not in cache:
        cache[key] = make()
        while len(cache) > most:
            cache.popitem(last=False)
    return cache[key]
