"""The augmentation of DETR (facebookresearch/detr, datasets/coco.py) as plans.

A plan is drawn from an image's size alone, before decoding, so that a batch can be cut by the sizes its images will
have, and those of a whole batch in array operations. Boxes are float xyxy pixels throughout and follow the pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model.config import IMAGENET_MEAN
from pipeline.config.sections import AugmentSection
from pipeline.data.images import Pixels
from pipeline.data.philox import pick

FILL = tuple(round(255 * mean) for mean in IMAGENET_MEAN)
"""Colour where a canvas has no picture: nearly 0 when it is normalised."""

Boxes = NDArray[np.float64]
"""[n, 4] xyxy pixels."""
Sizes = NDArray[np.int64]
"""[n, 2] (width, height) in pixels."""

DRAWS = 8
"""32-bit numbers that the training augmentation of an image takes."""


@dataclass(frozen=True)
class Plan:
    """What happens to one image: a crop, a flip, and one resize.

    Sizes are (width, height) in pixels. `crop` is (left, top, width, height) in the source, None for all of it.
    `picture` is the size of what is resized, at the left and the top of a result that is filled where there is more
    of it; None for all of that, too.
    """

    source: tuple[int, int]
    size: tuple[int, int]
    flip: bool = False
    crop: tuple[int, int, int, int] | None = None
    antialias: bool = False
    picture: tuple[int, int] | None = None

    def apply_image(self, image: Pixels, out: Pixels | None = None) -> Pixels:
        """The transformed pixels.

        Args:
            image: uint8 [height, width, 3] of the source's size.
            out: where they are to be written, uint8 [size[1], size[0], 3]; None for memory of their own.

        Returns:
            uint8 [size[1], size[0], 3], which is `out` where it is given.
        """
        assert image.shape[1::-1] == self.source, f"{image.shape} is not {self.source}"
        left, top, width, height = self._region
        image = image[top : top + height, left : left + width]
        if self.flip:
            image = np.asarray(cv2.flip(image, 1), dtype=np.uint8)
        if self.picture is not None:
            return _onto_canvas(image, self.picture, self.size, out)
        if self.antialias or image.shape[1::-1] == self.size:
            image = _resize_antialiased(image, self.size)
            if out is None:
                return image
            out[:] = image
            return out
        return _resize(image, self.size, out)

    def apply_boxes(self, boxes: Boxes) -> tuple[Boxes, NDArray[np.bool_]]:
        """The boxes where the pixels went, clipped to the result, and which of them still have an area.

        Args:
            boxes: float [n, 4] xyxy pixels of the source.

        Returns:
            float [n, 4] xyxy pixels of the result, and bool [n].
        """
        left, top, width, height = self._region
        boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4) - np.array([left, top, left, top])
        boxes = _clip(boxes, width, height)
        if self.flip:
            boxes = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)
        picture = self.picture or self.size
        boxes = _clip(boxes * np.array([picture[0] / width, picture[1] / height] * 2), *picture)
        keep = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        return boxes, keep

    @property
    def _region(self) -> tuple[int, int, int, int]:
        return self.crop or (0, 0, *self.source)


@dataclass(frozen=True)
class Plans:
    """The plans of many images, as arrays."""

    source: Sizes
    size: Sizes
    flip: NDArray[np.bool_]
    """[n]."""
    crop: NDArray[np.int64]
    """[n, 4] (left, top, width, height) in the source."""
    picture: Sizes
    """Of what is resized; the result's where that is all of it."""

    def take(self, numbers: NDArray[np.int64]) -> "Plans":
        """Some of them, in that order."""
        sizes = self.source[numbers], self.size[numbers]
        return Plans(*sizes, self.flip[numbers], self.crop[numbers], self.picture[numbers])

    def __getitem__(self, number: int) -> Plan:
        (width, height), size, picture = (array[number].tolist() for array in (self.source, self.size, self.picture))
        left, top, crop_width, crop_height = self.crop[number].tolist()
        return Plan(
            (width, height),
            (size[0], size[1]),
            bool(self.flip[number]),
            (left, top, crop_width, crop_height),
            picture=None if picture == size else (picture[0], picture[1]),
        )


def plan_train(
    sources: Sizes, draws: NDArray[np.uint64], augment: AugmentSection, epochs: NDArray[np.int64] | int = 0
) -> Plans:
    """The published training augmentation of images of the given sizes, or large-scale jitter.

    Args:
        sources: [n, 2].
        draws: [n, DRAWS] uniform 32-bit numbers.
        augment: the probabilities and sizes.
        epochs: [n] or one for all, in which the images are seen.
    """
    is_plain = np.broadcast_to(augment.plain_after is not None and epochs >= augment.plain_after, len(sources))
    crop, size = _published(sources, draws, augment, is_plain)
    picture = size
    if augment.jitter is not None:
        region, resized_to = _jittered(sources, draws, augment.jitter, augment.jitter_side)
        crop, picture = (
            np.where(is_plain[:, None], plain, jittered) for plain, jittered in ((crop, region), (size, resized_to))
        )
        size = np.where(is_plain[:, None], size, augment.jitter_side)
    return Plans(sources, size, draws[:, 0] < _threshold(augment.flip), crop, picture)


def _published(
    sources: Sizes, draws: NDArray[np.uint64], augment: AugmentSection, is_plain: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], Sizes]:
    """Where the published augmentation crops, and what it resizes to; plain images [n] are not cropped.

    The published one resizes, crops and resizes again. Here the same crop is taken from the source, to its nearest
    pixel, and resized once: the same geometry from pixels that were not interpolated twice.
    """
    _, cropping, crop_short, crop_width, crop_height, crop_left, crop_top, short = draws.T
    # The published crop does not bound the long side; this bound is met only by strips that would fill the memory.
    before = resized(sources, _choice(crop_short, augment.crop_short_sides), 4 * augment.max_side)
    most = np.minimum(before, augment.crop_max)
    least = np.minimum(augment.crop_min, most)
    sides = np.stack([pick(crop_width, least[:, 0], most[:, 0]), pick(crop_height, least[:, 1], most[:, 1])], axis=1)
    is_cropped = (~is_plain & (cropping < _threshold(augment.crop)))[:, None]
    region = _region(sources, before, sides, crop_left, crop_top)
    crop = np.where(is_cropped, region, _whole(sources))
    return crop, resized(np.where(is_cropped, sides, sources), _choice(short, augment.short_sides), augment.max_side)


def _jittered(
    sources: Sizes, draws: NDArray[np.uint64], factors: tuple[float, float], side: int
) -> tuple[NDArray[np.int64], Sizes]:
    """Where large-scale jitter (arXiv 2012.07177) crops, and what it resizes to, which fits in a square of a side."""
    left, top, scale = draws.T[5:]
    least, most = (max(1, round(factor * side)) for factor in factors)
    long, long_side = sources.max(axis=1, keepdims=True), pick(scale, least, most)[:, None]
    before = np.maximum((2 * sources * long_side + long) // (2 * long), 1)
    kept = np.minimum(before, side)
    return _region(sources, before, kept, left, top), kept


def _region(
    sources: Sizes, before: Sizes, sides: Sizes, left: NDArray[np.uint64], top: NDArray[np.uint64]
) -> NDArray[np.int64]:
    """The crop [n, 4] in the source, to its nearest pixel, that has `sides` once the source is resized to `before`."""
    room = before - sides
    start = np.stack([pick(left, 0, room[:, 0]), pick(top, 0, room[:, 1])], axis=1)
    begin = np.minimum((2 * start * sources + before) // (2 * before), sources - 1)
    end = np.maximum((2 * (start + sides) * sources + before) // (2 * before), begin + 1)
    return np.concatenate([begin, end - begin], axis=1)


def plan_eval(width: int, height: int, short_side: int, max_side: int) -> Plan:
    """The published validation transform: one antialiased resize."""
    ((new_width, new_height),) = resized(np.array([[width, height]]), np.array([short_side]), max_side).tolist()
    return Plan((width, height), (new_width, new_height), antialias=True)


def resized(sizes: Sizes, short_sides: NDArray[np.int64], max_side: int) -> Sizes:
    """The sizes with the short side at `short_sides` [n] and the long side at most `max_side`.

    Rounded as the original rounds, so that the long side may pass `max_side` by a pixel or two.
    """
    short, long = sizes.min(axis=1), sizes.max(axis=1)
    fits = long / short * short_sides <= max_side
    short_sides = np.where(fits, short_sides, np.rint(max_side * short / long).astype(np.int64))
    is_strip = short_sides < 1
    long_sides = np.where(is_strip, max_side, (short_sides * long / short).astype(np.int64))
    short_sides = np.maximum(short_sides, 1)
    is_upright = sizes[:, 0] < sizes[:, 1]
    return np.stack(
        [np.where(is_upright, short_sides, long_sides), np.where(is_upright, long_sides, short_sides)], axis=1
    )


def _whole(sizes: Sizes) -> NDArray[np.int64]:
    return np.concatenate([np.zeros_like(sizes), sizes], axis=1)


def _choice(draws: NDArray[np.uint64], values: Sequence[int]) -> NDArray[np.int64]:
    return np.asarray(values, dtype=np.int64)[pick(draws, 0, len(values) - 1)]


def _threshold(probability: float) -> int:
    """What a 32-bit number is below with a probability."""
    return round(probability * 2**32)


def _resize(image: Pixels, size: tuple[int, int], out: Pixels | None) -> Pixels:
    """OpenCV: linear when the image grows, area (its antialiased one) when it shrinks."""
    height, width = image.shape[:2]
    shrinks = size[0] * size[1] < width * height
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(image, size, dst=out, interpolation=interpolation), dtype=np.uint8)


def _onto_canvas(image: Pixels, picture: tuple[int, int], size: tuple[int, int], out: Pixels | None) -> Pixels:
    """The image, resized, at the left and the top of a canvas that is filled."""
    canvas = np.empty((size[1], size[0], 3), dtype=np.uint8) if out is None else out
    width, height = picture
    canvas[height:] = canvas[:height, width:] = FILL
    _resize(image, picture, canvas[:height, :width])
    return canvas


def _resize_antialiased(image: Pixels, size: tuple[int, int]) -> Pixels:
    if image.shape[1::-1] == size:
        return image
    return np.array(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))


def _clip(boxes: Boxes, width: int, height: int) -> Boxes:
    return np.clip(boxes, 0, np.array([width, height, width, height]))
