"""How a global batch is cut into micro-batches."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.config.sections import AugmentSection
from pipeline.data.augment import DRAWS, plan_train
from pipeline.data.batching import CANVAS_MULTIPLE, cut_batch

SHAPES = np.array([(640, 480)] * 4 + [(640, 427)] * 3 + [(480, 640), (427, 640), (500, 375), (640, 360), (612, 612)])


def batch(count: int, seed: int = 0) -> NDArray[np.int64]:
    """Augmented sizes of images of common shapes."""
    choose = np.random.default_rng(seed)
    draws = choose.integers(0, 2**32, (count, DRAWS), dtype=np.uint64)
    return plan_train(SHAPES[choose.integers(0, len(SHAPES), count)], draws, AugmentSection()).size


def canvases(sizes: NDArray[np.int64], micro_batch: int) -> NDArray[np.int64]:
    """Pixels of each canvas."""
    greatest = sizes.reshape(-1, micro_batch, 2).max(axis=1)
    return (-(-greatest // CANVAS_MULTIPLE) * CANVAS_MULTIPLE).prod(axis=1)


@given(
    st.integers(1, 5).flatmap(
        lambda size: st.tuples(
            st.just(size), st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), min_size=size, max_size=40)
        )
    )
)
@settings(max_examples=200, deadline=None)
def test_holds_each_image_once_largest_canvas_first(drawn: tuple[int, list[tuple[int, int]]]) -> None:
    micro_batch, shapes = drawn
    sizes = np.array(shapes[: len(shapes) // micro_batch * micro_batch])
    cut = cut_batch(sizes, micro_batch)
    assert sorted(cut.tolist()) == list(range(len(sizes)))
    assert np.all(np.diff(canvases(sizes[cut], micro_batch)) <= 0)


@pytest.mark.parametrize(("global_batch", "micro_batch", "most"), [(32, 2, 0.09), (32, 4, 0.17), (512, 2, 0.06)])
def test_wastes_less_than_sorting_by_aspect(global_batch: int, micro_batch: int, most: float) -> None:
    wasted, wasted_by_aspect = [], []
    for seed in range(20):
        sizes = batch(global_batch, seed)
        used = sizes.prod(axis=1).sum()
        by_aspect = sizes[np.argsort(sizes[:, 0] / sizes[:, 1], kind="stable")]
        cut = sizes[cut_batch(sizes, micro_batch)]
        wasted.append(1 - used / (canvases(cut, micro_batch).sum() * micro_batch))
        wasted_by_aspect.append(1 - used / (canvases(by_aspect, micro_batch).sum() * micro_batch))
    assert np.mean(wasted) < most
    assert np.mean(wasted) < 0.7 * np.mean(wasted_by_aspect)
