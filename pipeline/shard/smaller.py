"""Smaller copies of images that are larger than they are trained at, and annotations that follow them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import simplejpeg
from pycocotools import mask

from pipeline.config.sections import ShardsSection
from pipeline.data.images import Pixels
from pipeline.data.truth import scaled_box
from pipeline.shard.coco import CocoImage, to_json
from pipeline.shard.document import is_finite

HEADER_BYTES = 1024
FINE_QUALITY = 90
"""Up to this quality noise, which no JPEG makes small, takes less than a byte a pixel, above it less than two."""


@dataclass(frozen=True)
class Smaller:
    """Which images are copied, and how.

    Args:
        max_side: pixels of the longer side of a copy; images without a longer one are left as they are.
        quality: of its JPEG.
    """

    max_side: int
    quality: int

    def takes(self, image: CocoImage) -> bool:
        """Whether an image is larger."""
        return max(image.width, image.height) > self.max_side

    def size(self, image: CocoImage) -> tuple[int, int]:
        """(width, height) of an image's copy."""
        longer = max(image.width, image.height)
        width, height = (max(1, round(side * self.max_side / longer)) for side in (image.width, image.height))
        return width, height

    def planned_bytes(self, image: CocoImage) -> int:
        """Bytes of an image's member, which a copy may not reach: no image is read for a plan."""
        if not self.takes(image):
            return image.size
        return math.prod(self.size(image)) * (1 if self.quality <= FINE_QUALITY else 2) + HEADER_BYTES

    def copy(self, image: CocoImage, pixels: Pixels, report: Callable[[str], None]) -> tuple[CocoImage, bytes]:
        """The copy of an image, with annotations in its pixels, and its JPEG, which has no EXIF.

        Args:
            image: one that is taken.
            pixels: uint8 [height, width, 3] RGB, turned as EXIF has it.
            report: is told of a segmentation that cannot follow and is left out.
        """
        width, height = self.size(image)
        smaller = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
        content = simplejpeg.encode_jpeg(smaller, self.quality, "RGB", "420")
        entries = [_scaled(entry, image, (width, height), report) for entry in image.annotations]
        text = b"[%b]" % b",".join(map(to_json, entries))
        original = (image.width, image.height)
        copy = image._replace(width=width, height=height, annotations_json=text, original=original)
        return copy, content


def smaller_of(shards: ShardsSection) -> Smaller | None:
    """What the configuration wants; None where all images stay as they are."""
    return None if shards.max_side is None else Smaller(shards.max_side, shards.jpeg_quality)


def _scaled(
    entry: dict[str, Any], image: CocoImage, size: tuple[int, int], report: Callable[[str], None]
) -> dict[str, Any]:
    x, y = size[0] / image.width, size[1] / image.height
    scaled = {**entry, "bbox": scaled_box(entry["bbox"], x, y), "area": entry["area"] * x * y}
    if "segmentation" in entry:
        try:
            scaled["segmentation"] = _scaled_segmentation(entry["segmentation"], image, size)
        except (TypeError, ValueError, KeyError, OverflowError) as error:
            del scaled["segmentation"]
            report(f"the segmentation of its annotation {entry['id']} is none of COCO's ({error})")
    return scaled


def _scaled_segmentation(segmentation: Any, image: CocoImage, size: tuple[int, int]) -> Any:
    """Polygons, or a mask as COCO's run lengths, which come packed.

    Raises:
        TypeError, ValueError, KeyError, OverflowError: it is neither.
    """
    if isinstance(segmentation, dict):
        return _scaled_mask(segmentation, image, size)
    if not isinstance(segmentation, list) or not all(map(_is_polygon, segmentation)):
        raise ValueError("neither polygons nor run lengths")
    factors = size[0] / image.width, size[1] / image.height
    return [[value * factors[place % 2] for place, value in enumerate(polygon)] for polygon in segmentation]


def _is_polygon(polygon: Any) -> bool:
    return isinstance(polygon, list) and len(polygon) % 2 == 0 and all(map(is_finite, polygon))


def _scaled_mask(runs: dict[str, Any], image: CocoImage, size: tuple[int, int]) -> dict[str, Any]:
    if runs["size"] != [image.height, image.width]:
        raise ValueError("run lengths of another size")
    packed = mask.frPyObjects(runs, image.height, image.width) if isinstance(runs["counts"], list) else runs
    covered = mask.decode(packed).astype(np.float32)
    smaller = cv2.resize(covered, size, interpolation=cv2.INTER_AREA) >= 0.5  # most of the pixel
    encoded = mask.encode(np.asfortranarray(smaller.astype(np.uint8)))
    return {"size": encoded["size"], "counts": encoded["counts"].decode("ascii")}
