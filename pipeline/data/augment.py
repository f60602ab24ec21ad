"""Pixels: decoding to RGB, and the augmentation of DETR (facebookresearch/detr, datasets/coco.py) as plans.

A `Plan` is drawn from an image's size alone, before decoding, so that a batch can be sorted by the size its images will
have. Boxes are float xyxy pixels throughout and follow the pixels.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pipeline.config.sections import AugmentSection

Pixels = NDArray[np.uint8]
"""[height, width, 3] RGB."""
Boxes = NDArray[np.float64]
"""[n, 4] xyxy pixels."""

TRANSPOSING_ORIENTATIONS = (5, 6, 7, 8)
"""EXIF orientations that swap width and height."""

EXIF_ORIENTATION = 0x0112


class BadImageError(Exception):
    """Bytes that are no usable image. `rule` is the one of `pipeline.shard.coco.RULES` that they break."""

    def __init__(self, rule: str, message: str) -> None:
        super().__init__(message)
        self.rule = rule


@dataclass(frozen=True)
class ImageHeader:
    """What an image says about itself; `rotated` when its EXIF rotation is to be applied."""

    extension: Literal["jpg", "png"]
    mode: str
    rotated: bool


def inspect_image(content: bytes, width: int, height: int) -> ImageHeader:
    """Checks an image's header and end marker against the size that the annotation file gives.

    EXIF rotation counts only if the given size is the rotated image's; an image whose stored size is the given one is
    taken as stored.

    Raises:
        BadImageError: not a JPEG or PNG, cut off, or of another size.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            kind, mode, size = image.format, image.mode, image.size
            orientation = 1 if size == (width, height) else image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception as error:  # Pillow's plugins raise many kinds for damaged headers
        raise BadImageError("image_unreadable", f"not a JPEG or PNG that can be read ({error})") from None
    if kind not in ("JPEG", "MPO", "PNG"):
        raise BadImageError("image_unreadable", f"it is a {kind} file; convert it to JPEG or PNG")
    if not (_png_is_whole(content) if kind == "PNG" else _jpeg_is_whole(content)):
        raise BadImageError("image_truncated", f"the {kind} file is cut off: it has no end marker")
    rotated = orientation in TRANSPOSING_ORIENTATIONS and size == (height, width)
    if size != (width, height) and not rotated:
        raise BadImageError(
            "image_size_mismatch",
            f"it is {size[0]}x{size[1]} pixels, the annotation file says {width}x{height}",
        )
    return ImageHeader("png" if kind == "PNG" else "jpg", mode, rotated)


def _jpeg_is_whole(content: bytes) -> bool:
    """Whether the end marker follows the first scan; one in an embedded thumbnail lies before it."""
    position = 2
    while position + 4 <= len(content) and content[position] == 0xFF:
        marker = content[position + 1]
        if marker == 0xDA:
            return content.find(b"\xff\xd9", position) >= 0
        # 0xFF is fill; markers without a length: TEM and RST0..RST7.
        if marker == 0xFF:
            position += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD7:
            position += 2
        else:
            position += 2 + int.from_bytes(content[position + 2 : position + 4], "big")
    return False


def _png_is_whole(content: bytes) -> bool:
    return content.rfind(b"IEND\xaeB`\x82") >= 0


def decode_image(content: bytes, width: int, height: int) -> Pixels:
    """Decodes a JPEG or PNG of any mode to RGB, turned as the annotation file's size says.

    Returns:
        uint8 [height, width, 3].

    Raises:
        BadImageError: as `inspect_image`, or the pixels cannot be decoded.
    """
    header = inspect_image(content, width, height)
    pixels = None
    if header.mode in ("RGB", "L", "RGBA", "P", "I;16", "I") and not header.rotated:
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        pixels = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    if pixels is None:
        pixels = _decode_with_pillow(content, header.rotated)
    if pixels.shape != (height, width, 3):
        raise BadImageError("image_unreadable", f"decoding gave {pixels.shape} instead of {height}x{width}")
    return np.asarray(pixels, dtype=np.uint8)


def _decode_with_pillow(content: bytes, rotated: bool) -> Pixels:
    try:
        with Image.open(io.BytesIO(content)) as image:
            turned = ImageOps.exif_transpose(image) if rotated else image
            return np.array(turned.convert("RGB"))
    except Exception as error:
        raise BadImageError("image_unreadable", f"it cannot be decoded ({error})") from None


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
