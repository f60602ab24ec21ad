"""Cuts a global batch into micro-batches of like shapes, so that little of their canvases is padding."""

import numpy as np
from numpy.typing import NDArray

CANVAS_MULTIPLE = 32
"""Of so many pixels are the sides of a training canvas: compiled graphs and cuDNN's choices repeat."""
ASPECT_BOUNDS = np.array([1.22**power for power in range(-8, 9)])
"""Aspect ratios (width / height) between which shapes count as alike."""
MOST_EXCHANGED = 64
"""Greatest number of micro-batches among which images are exchanged; among more, sorting leaves little to gain."""
ROUNDS = 30


def cut_batch(sizes: NDArray[np.int64], micro_batch: int) -> NDArray[np.int64]:
    """The order of a global batch in which every `micro_batch` images make a micro-batch.

    By buckets of aspect ratio, then by area, up in one bucket and down in the next; then micro-batches exchange images
    in pairs wherever both canvases together get smaller. The micro-batches with the greatest canvases come first, so
    that those of like cost run at the same time on all ranks. Integers decide: every machine cuts alike.

    Args:
        sizes: [n, 2] (width, height) in pixels.
        micro_batch: images of a micro-batch; divides n.

    Returns:
        [n].
    """
    buckets = np.searchsorted(ASPECT_BOUNDS, sizes[:, 0] / sizes[:, 1])
    areas = sizes[:, 0] * sizes[:, 1]
    groups = np.lexsort((np.where(buckets % 2, areas, -areas), buckets)).reshape(-1, micro_batch)
    canvases = -(-sizes // CANVAS_MULTIPLE) * CANVAS_MULTIPLE
    if micro_batch > 1 and 1 < len(groups) <= MOST_EXCHANGED:
        for number in range(ROUNDS):
            _exchange(groups, canvases, number)
    greatest = canvases[groups].max(axis=1).prod(axis=1)
    return groups[np.argsort(-greatest, kind="stable")].reshape(-1)


def _exchange(groups: NDArray[np.int64], sizes: NDArray[np.int64], number: int) -> None:
    """Exchange one image each, in place, of groups that lie a distance apart which depends on the round's number."""
    distance = 1 + number // 2 % (len(groups) - 1)
    places = np.arange(len(groups) - distance)
    one = places[places // distance % 2 == number % 2]
    if not len(one):
        return
    other = one + distance
    own, others = sizes[groups], _greatest_other(sizes[groups])  # [groups, images, 2]
    before = own[one].max(axis=1).prod(axis=1) + own[other].max(axis=1).prod(axis=1)
    # [pairs, image of one, image of the other]: both canvases after these two have changed places.
    after = np.maximum(others[one][:, :, None], own[other][:, None]).prod(axis=-1)
    after += np.maximum(others[other][:, None], own[one][:, :, None]).prod(axis=-1)
    after = after.reshape(len(one), -1)
    best = after.argmin(axis=1)
    gains = after[np.arange(len(one)), best] < before
    one, other, best = one[gains], other[gains], best[gains]
    leaving, coming = np.divmod(best, groups.shape[1])
    groups[one, leaving], groups[other, coming] = groups[other, coming], groups[one, leaving]


def _greatest_other(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each of [groups, images, 2] the greatest of the others in its group."""
    ranked = np.sort(values, axis=1)
    is_greatest = values == ranked[:, -1:]
    is_only = is_greatest.sum(axis=1, keepdims=True) == 1
    return np.where(is_greatest & is_only, ranked[:, -2:-1], ranked[:, -1:])
