"""The augmentation of DETR (facebookresearch/detr, datasets/coco.py) as plans.

A `Plan` is drawn from an image's size alone, before decoding, so that a batch can be sorted by the size its images will
have. Boxes are float xyxy pixels throughout and follow the pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.config.sections import AugmentSection
from pipeline.data.images import Pixels

Boxes = NDArray[np.float64]
"""[n, 4] xyxy pixels."""


@dataclass(frozen=True)
class Plan:
    """What happens to one image: flip, and either one resize, or a resize, a crop and another resize.

    Sizes are (width, height) in pixels; the crop is (left, top, width, height) in the image resized to `before_crop`.
    """

    source: tuple[int, int]
    size: tuple[int, int]
    flip: bool = False
    before_crop: tuple[int, int] | None = None
    crop: tuple[int, int, int, int] | None = None
    antialias: bool = False

    @property
    def aspect(self) -> float:
        """Width by height of the result."""
        return self.size[0] / self.size[1]

    def apply_image(self, image: Pixels) -> Pixels:
        """The transformed pixels.

        Args:
            image: uint8 [height, width, 3] of the source's size.

        Returns:
            uint8 [size[1], size[0], 3].
        """
        assert image.shape[1::-1] == self.source, f"{image.shape} is not {self.source}"
        if self.flip:
            image = np.asarray(cv2.flip(image, 1), dtype=np.uint8)
        if self.before_crop is not None and self.crop is not None:
            left, top, width, height = self.crop
            image = _resize(image, self.before_crop)[top : top + height, left : left + width]
        return _resize_antialiased(image, self.size) if self.antialias else _resize(image, self.size)

    def apply_boxes(self, boxes: Boxes) -> tuple[Boxes, NDArray[np.bool_]]:
        """The boxes where the pixels went, clipped to the result, and which of them still have an area.

        Args:
            boxes: float [n, 4] xyxy pixels of the source.

        Returns:
            float [n, 4] xyxy pixels of the result, and bool [n].
        """
        width, height = self.source
        boxes = _clip(np.asarray(boxes, dtype=np.float64).reshape(-1, 4), width, height)
        if self.flip:
            boxes = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)
        if self.before_crop is not None and self.crop is not None:
            left, top, crop_width, crop_height = self.crop
            boxes = boxes * _scale((width, height), self.before_crop) - np.array([left, top, left, top])
            boxes = _clip(boxes, crop_width, crop_height)
            width, height = crop_width, crop_height
        boxes = _clip(boxes * _scale((width, height), self.size), *self.size)
        keep = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        return boxes, keep


def plan_train(width: int, height: int, generator: np.random.Generator, augment: AugmentSection) -> Plan:
    """Draws the published training augmentation for an image of a size."""
    flip = generator.random() < augment.flip
    cropping = generator.random() < augment.crop
    before_crop, crop = None, None
    size = (width, height)
    if cropping:
        # The published crop does not bound the long side; this bound is met only by strips that would fill the memory.
        before_crop = resized(size, _choice(generator, augment.crop_short_sides), 4 * augment.max_side)
        crop = _crop(generator, before_crop, augment)
        size = (crop[2], crop[3])
    size = resized(size, _choice(generator, augment.short_sides), augment.max_side)
    return Plan((width, height), size, flip, before_crop, crop)


def plan_eval(width: int, height: int, short_side: int, max_side: int) -> Plan:
    """The published validation transform: one antialiased resize."""
    return Plan((width, height), resized((width, height), short_side, max_side), antialias=True)


def resized(size: tuple[int, int], short_side: int, max_side: int) -> tuple[int, int]:
    """The (width, height) with the short side at `short_side` and the long side at most `max_side`.

    Rounded as the original rounds, so that the long side may pass `max_side` by a pixel or two.
    """
    width, height = size
    short, long = min(size), max(size)
    if long / short * short_side > max_side:
        short_side = round(max_side * short / long)
    if short_side < 1:
        return (1, max_side) if width < height else (max_side, 1)
    if short == short_side:
        return size
    if width < height:
        return short_side, int(short_side * height / width)
    return int(short_side * width / height), short_side


def _crop(generator: np.random.Generator, size: tuple[int, int], augment: AugmentSection) -> tuple[int, int, int, int]:
    """Sides uniform in crop_min..crop_max as far as the image goes, then a uniform position."""
    sides = []
    for length in size:
        most = min(length, augment.crop_max)
        least = min(augment.crop_min, most)
        sides.append(_integer(generator, least, most))
    left = _integer(generator, 0, size[0] - sides[0])
    top = _integer(generator, 0, size[1] - sides[1])
    return left, top, sides[0], sides[1]


def _integer(generator: np.random.Generator, least: int, most: int) -> int:
    return least + int(generator.random() * (most - least + 1))


def _choice(generator: np.random.Generator, values: Sequence[int]) -> int:
    return values[_integer(generator, 0, len(values) - 1)]


def _resize(image: Pixels, size: tuple[int, int]) -> Pixels:
    """OpenCV: linear when the image grows, area (its antialiased one) when it shrinks."""
    height, width = image.shape[:2]
    if (width, height) == size:
        return image
    shrinks = size[0] * size[1] < width * height
    resized_image = cv2.resize(image, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return np.asarray(resized_image, dtype=np.uint8)


def _resize_antialiased(image: Pixels, size: tuple[int, int]) -> Pixels:
    if image.shape[1::-1] == size:
        return image
    return np.array(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))


def _scale(before: tuple[int, int], after: tuple[int, int]) -> NDArray[np.float64]:
    return np.array([after[0] / before[0], after[1] / before[1]] * 2)  # [4]


def _clip(boxes: Boxes, width: int, height: int) -> Boxes:
    return np.clip(boxes, 0, np.array([width, height, width, height]))
