"""An encoded image: what its header says, whether it is whole, and its pixels as RGB."""

import io
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

Pixels = NDArray[np.uint8]
"""[height, width, 3] RGB."""

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
