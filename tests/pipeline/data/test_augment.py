import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from pipeline.config.sections import AugmentSection
from pipeline.data.augment import DRAWS, FILL, Plan, Plans, plan_eval, plan_train, resized
from tests.builders import write_image

SMALL = AugmentSection(
    short_sides=(96, 112, 128), max_side=200, crop_short_sides=(80, 100, 120), crop_min=64, crop_max=110
)

JITTER = SMALL.model_copy(update={"jitter": (0.1, 2.0), "jitter_side": 128})


def plan_one(width: int, height: int, seed: int, augment: AugmentSection) -> Plan:
    draws = np.random.default_rng(seed).integers(0, 2**32, (1, DRAWS), dtype=np.uint64)
    return plan_train(np.array([[width, height]]), draws, augment)[0]


def original_size(size: tuple[int, int], short_side: int, max_size: int) -> tuple[int, int]:
    """`get_size_with_aspect_ratio` of facebookresearch/detr, datasets/transforms.py, as (width, height)."""
    w, h = size
    min_original_size, max_original_size = float(min(size)), float(max(size))
    if max_original_size / min_original_size * short_side > max_size:
        short_side = int(round(max_size * min_original_size / max_original_size))  # noqa: RUF046
    if (w <= h and w == short_side) or (h <= w and h == short_side):
        return w, h
    if w < h:
        return short_side, int(short_side * h / w)
    return int(short_side * w / h), short_side


class TestResizedSize:
    @given(st.integers(16, 3000), st.integers(16, 3000), st.sampled_from([*range(480, 801, 32)]))
    @settings(max_examples=300, deadline=None)
    def test_is_the_original_s(self, width: int, height: int, short_side: int) -> None:
        (size,) = resized(np.array([[width, height]]), np.array([short_side]), 1333)
        assert tuple(size) == original_size((width, height), short_side, 1333)

    @pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1), (3, 2000)])
    def test_one_pixel_and_strips(self, size: tuple[int, int]) -> None:
        ((width, height),) = resized(np.array([size]), np.array([800]), 1333)
        assert min(width, height) >= 1
        assert max(width, height) <= 1334


class TestTrainingPlan:
    def test_is_a_function_of_the_draws(self) -> None:
        first = [plan_one(640, 480, seed, AugmentSection()) for seed in range(20)]
        assert first == [plan_one(640, 480, seed, AugmentSection()) for seed in range(20)]
        assert len(set(first)) > 15

    def test_many_are_planned_as_each_alone(self) -> None:
        sizes = np.array([[640, 480], [480, 640], [30, 2000], [1, 1], [500, 500]])
        draws = np.random.default_rng(0).integers(0, 2**32, (5, DRAWS), dtype=np.uint64)
        plans = plan_train(sizes, draws, AugmentSection())
        for number in range(5):
            assert (
                plans[number] == plan_train(sizes[number : number + 1], draws[number : number + 1], AugmentSection())[0]
            )

    def test_draws_as_published(self) -> None:
        augment = AugmentSection()
        plans = [plan_one(640, 480, seed, augment) for seed in range(1200)]
        assert 0.46 < np.mean([plan.flip for plan in plans]) < 0.54
        whole = [plan for plan in plans if plan.crop == (0, 0, 640, 480)]
        assert 0.46 < len(whole) / len(plans) < 0.54
        assert {min(plan.size) for plan in whole} == set(range(480, 801, 32))

    @pytest.mark.parametrize("short_side", [400, 500, 600])
    def test_crops_as_published(self, short_side: int) -> None:
        """384 to 600 pixels of the image that was resized to a short side, anywhere in it."""
        augment = AugmentSection(crop=1.0, crop_short_sides=(short_side,))
        crops = np.array([plan_one(640, 480, seed, augment).crop for seed in range(800)])
        scale = short_side / 480
        widths, heights = crops[:, 2] * scale, crops[:, 3] * scale
        for sides, most in ((widths, min(600, 640 * scale)), (heights, min(600, short_side))):
            assert sides.min() >= 384 - scale - 1e-9
            assert sides.max() <= most + scale + 1e-9
            assert np.abs(sides.mean() - (384 + most) / 2) < 8
        for starts, room in ((crops[:, 0], 640 - crops[:, 2]), (crops[:, 1], 480 - crops[:, 3])):
            places = starts[room > 4] / room[room > 4]
            assert starts.min() >= 0
            assert (starts <= room).all()
            assert 0.46 < places.mean() < 0.54

    def test_is_fixed_for_all_time(self) -> None:
        """Runs that were begun with an older release must go on with the same augmentation."""
        sizes = np.array([[640, 480], [480, 640], [37, 46], [1, 1], [500, 333], [1, 4000], [3000, 2000]] * 1000)
        draws = np.random.Philox(7).random_raw(7000 * DRAWS).reshape(-1, DRAWS) >> np.uint64(32)
        plans = plan_train(sizes, draws, AugmentSection())
        arrays = np.concatenate([plans.source, plans.size, plans.flip[:, None], plans.crop], axis=1)
        digest = hashlib.sha256(arrays.astype("<i8").tobytes()).hexdigest()
        assert digest == "37c4898a8e567861d076d71bcf1723c2e79b6f687e6028e815a1fa9b4c2efe10"
        assert (plans.picture == plans.size).all()

    def test_small_image_is_cropped_to_what_is_there(self) -> None:
        augment = AugmentSection(crop=1.0, crop_short_sides=(40,), crop_min=384, crop_max=600)
        assert plan_one(40, 60, 0, augment).crop == (0, 0, 40, 60)

    @pytest.mark.parametrize("augment", [SMALL, JITTER], ids=["published", "jitter"])
    @given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 10**6))
    @settings(max_examples=100, deadline=None)
    def test_any_size_gives_the_planned_pixels(
        self, augment: AugmentSection, width: int, height: int, seed: int
    ) -> None:
        plan = plan_one(width, height, seed, augment)
        result = plan.apply_image(np.zeros((height, width, 3), dtype=np.uint8))
        assert result.shape == (plan.size[1], plan.size[0], 3)

    def test_a_crop_of_an_image_of_one_pixel_is_that(self) -> None:
        augment = AugmentSection(crop=1.0, crop_short_sides=(100,), crop_min=10, crop_max=20)
        assert {plan_one(1, 1, seed, augment).crop for seed in range(50)} == {(0, 0, 1, 1)}


def planned(size: tuple[int, int], augment: AugmentSection, epochs: NDArray[np.int64], seed: int = 0) -> Plans:
    """The plans of an image in some epochs."""
    draws = np.random.default_rng(seed).integers(0, 2**32, (len(epochs), DRAWS), dtype=np.uint64)
    return plan_train(np.array([size] * len(epochs)), draws, augment, epochs)


class TestJitter:
    def test_every_image_is_on_the_same_canvas(self) -> None:
        plans = planned((640, 480), JITTER, np.zeros(500, dtype=np.int64))
        assert (plans.size == 128).all()
        assert 0.4 < plans.flip.mean() < 0.6

    @pytest.mark.parametrize("size", [(640, 480), (48, 64), (300, 300)], ids=str)
    def test_the_long_side_is_drawn_evenly(self, size: tuple[int, int]) -> None:
        augment = JITTER.model_copy(update={"jitter": (0.25, 0.75)})
        plans = planned(size, augment, np.zeros(2000, dtype=np.int64))
        long = plans.picture.max(axis=1)
        assert (long.min(), long.max()) == (32, 96)
        assert np.abs(long.mean() - 64) < 2
        assert np.abs(plans.picture - long[:, None] * np.array(size) / max(size)).max() <= 0.5
        assert (plans.crop == (0, 0, *size)).all()

    def test_what_does_not_fit_is_cropped_anywhere(self) -> None:
        augment = JITTER.model_copy(update={"jitter": (2.0, 2.0)})
        plans = planned((640, 480), augment, np.zeros(2000, dtype=np.int64))
        # 256 x 192 pixels, of which 128 x 128 are kept: half of the width and two thirds of the height.
        assert (plans.picture == 128).all()
        assert set(plans.crop[:, 2].tolist()) <= {319, 320, 321}
        assert set(plans.crop[:, 3].tolist()) <= {319, 320, 321}
        for starts, room in ((plans.crop[:, 0], 320), (plans.crop[:, 1], 160)):
            assert starts.min() < 0.02 * room
            assert 0.98 * room < starts.max() <= room
            assert np.abs(starts.mean() / room - 0.5) < 0.03

    def test_the_rest_is_filled_with_the_mean(self) -> None:
        plan = Plan((40, 20), (64, 64), picture=(32, 16))
        pixels = plan.apply_image(np.full((20, 40, 3), 255, dtype=np.uint8))
        assert (pixels[:16, :32] == 255).all()
        assert (pixels[16:] == FILL).all()
        assert (pixels[:16, 32:] == FILL).all()
        boxes, keep = plan.apply_boxes(np.array([[10, 5, 50, 30]]))
        assert (boxes.tolist(), keep.tolist()) == ([[8, 4, 32, 16]], [True])

    def test_plain_epochs_are_resized_alone(self) -> None:
        """After so many epochs images are neither jittered nor cropped, whatever else is planned with them."""
        epochs = np.array([0, 5, 1, 2, 3, 1, 2, 0] * 20)
        mixed = planned((150, 100), JITTER.model_copy(update={"plain_after": 2}), epochs)
        strong, plain = (
            planned((150, 100), augment, epochs) for augment in (JITTER, SMALL.model_copy(update={"crop": 0.0}))
        )
        for number, epoch in enumerate(epochs):
            assert mixed[number] == (plain if epoch >= 2 else strong)[number]

    def test_plain_epochs_are_not_cropped(self) -> None:
        epochs = np.arange(400) % 4
        plans = planned((150, 100), SMALL.model_copy(update={"plain_after": 3}), epochs)
        is_cropped = (plans.crop != (0, 0, 150, 100)).any(axis=1)
        assert 0.4 < is_cropped[epochs < 3].mean() < 0.6
        assert not is_cropped[epochs == 3].any()


def with_rectangle(width: int, height: int, box: tuple[int, int, int, int]) -> NDArray[np.uint8]:
    pixels = np.full((height, width, 3), (0, 0, 255), dtype=np.uint8)
    left, top, right, bottom = box
    pixels[top:bottom, left:right] = (255, 0, 0)
    return pixels


def found_rectangle(pixels: NDArray[np.uint8]) -> NDArray[np.float64] | None:
    red = pixels[..., 0] > 127
    if not red.any():
        return None
    columns, rows = np.flatnonzero(red.any(axis=0)), np.flatnonzero(red.any(axis=1))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=np.float64)


class TestBoxesFollowPixels:
    @pytest.mark.parametrize("augment", [SMALL, JITTER], ids=["published", "jitter"])
    @pytest.mark.parametrize("seed", range(60))
    def test_in_training(self, seed: int, augment: AugmentSection) -> None:
        choose = np.random.default_rng(seed)
        width, height = (int(side) for side in choose.integers(90, 260, 2))
        left, top = int(choose.integers(0, width - 30)), int(choose.integers(0, height - 30))
        right, bottom = int(choose.integers(left + 12, width + 1)), int(choose.integers(top + 12, height + 1))
        plan = plan_one(width, height, seed, augment)
        found = found_rectangle(plan.apply_image(with_rectangle(width, height, (left, top, right, bottom))))
        boxes, keep = plan.apply_boxes(np.array([[left, top, right, bottom]]))
        if found is None:
            assert not keep[0] or min(boxes[0, 2] - boxes[0, 0], boxes[0, 3] - boxes[0, 1]) < 2
        else:
            assert keep[0]
            np.testing.assert_allclose(boxes[0], found, atol=1.5)

    @pytest.mark.parametrize("size", [(200, 100), (90, 160), (64, 64)])
    def test_in_evaluation(self, size: tuple[int, int]) -> None:
        plan = plan_eval(*size, short_side=80, max_side=150)
        found = found_rectangle(plan.apply_image(with_rectangle(*size, (10, 20, 50, 60))))
        boxes, keep = plan.apply_boxes(np.array([[10, 20, 50, 60]]))
        assert found is not None
        assert keep.tolist() == [True]
        np.testing.assert_allclose(boxes[0], found, atol=1)

    def test_flip_is_exact(self) -> None:
        plan = Plan((32, 24), (32, 24), flip=True)
        pixels = plan.apply_image(with_rectangle(32, 24, (3, 5, 11, 9)))
        boxes, _ = plan.apply_boxes(np.array([[3, 5, 11, 9]]))
        np.testing.assert_array_equal(found_rectangle(pixels), boxes[0])
        np.testing.assert_array_equal(boxes[0], [21, 5, 29, 9])

    def test_boxes_are_clipped_to_the_image(self) -> None:
        boxes, keep = Plan((32, 24), (64, 48)).apply_boxes(np.array([[-0.5, -1, 33, 24.6]]))
        np.testing.assert_array_equal(boxes, [[0, 0, 64, 48]])
        assert keep.all()

    def test_what_a_crop_cuts_away_is_dropped(self) -> None:
        plan = Plan((100, 100), (50, 50), crop=(50, 0, 50, 50))
        boxes, keep = plan.apply_boxes(np.array([[0, 0, 50, 50], [40, 10, 60, 20], [60, 60, 80, 80], [60, 0, 99, 9]]))
        assert keep.tolist() == [False, True, False, True]
        np.testing.assert_array_equal(boxes[keep], [[0, 10, 10, 20], [10, 0, 49, 9]])

    def test_no_boxes(self) -> None:
        boxes, keep = Plan((100, 100), (50, 50)).apply_boxes(np.zeros((0, 4)))
        assert boxes.shape == (0, 4)
        assert keep.shape == (0,)


class TestPixels:
    def test_evaluation_is_pillow_s_bilinear(self) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8)
        plan = plan_eval(130, 90, short_side=40, max_side=50)
        expected = np.array(Image.fromarray(pixels).resize(plan.size, Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(plan.apply_image(pixels), expected)

    def test_training_does_not_alias_when_it_shrinks(self) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
        shrunk = Plan((96, 96), (24, 24)).apply_image(noise)
        means = noise.reshape(24, 4, 24, 4, 3).mean(axis=(1, 3))
        assert np.abs(shrunk - means).max() <= 1

    def test_source_is_not_changed(self, tmp_path: Path) -> None:
        path = write_image(tmp_path / "a.png")
        pixels = np.array(Image.open(path))
        before = pixels.copy()
        Plan((32, 24), (16, 12), flip=True).apply_image(pixels)
        np.testing.assert_array_equal(pixels, before)

    @pytest.mark.parametrize(
        "plan",
        [
            Plan((32, 24), (40, 30)),
            Plan((32, 24), (16, 12), flip=True),
            Plan((32, 24), (32, 24), flip=True),
            Plan((32, 24), (20, 31), crop=(3, 5, 17, 11)),
            Plan((32, 24), (20, 31), antialias=True),
            Plan((32, 24), (40, 40), crop=(3, 5, 17, 11), picture=(34, 22)),
            Plan((32, 24), (40, 40), flip=True, picture=(32, 24)),
        ],
        ids=str,
    )
    def test_are_the_same_where_they_are_written_into_a_canvas(self, plan: Plan) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
        canvas = np.zeros((2, 64, 96, 3), dtype=np.uint8)
        place = canvas[1, : plan.size[1], : plan.size[0]]
        assert plan.apply_image(pixels, place) is place or np.shares_memory(plan.apply_image(pixels, place), canvas)
        np.testing.assert_array_equal(place, plan.apply_image(pixels))
        assert np.count_nonzero(canvas) == np.count_nonzero(place)
