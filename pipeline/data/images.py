"""An encoded image: what its header says, whether it is whole, and its pixels as RGB.

One decoder and one rule for EXIF serve training, evaluation and prediction. A picture is turned as its EXIF says, as a
viewer shows it, unless the annotation file's size is that of the stored picture alone. JPEGs are decoded strictly: what
libjpeg warns of is damage.
"""

import base64
import io
import os
import stat
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
"""[height, width, 3] RGB."""

EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "TIFF": "tif"}
"""The formats that are taken, by Pillow's names, with the extension that their members have in a shard."""

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
"""Suffixes of the files in a folder that are taken for images."""

TRANSPOSING_ORIENTATIONS = (5, 6, 7, 8)
"""EXIF orientations that swap width and height."""

EXIF_ORIENTATION = 0x0112

MOST_BYTES = 2**30
"""Greatest file that is read as an image."""

EXIF_ASSUMED = "exif_rotation_assumed"
EXIF_IGNORED = "exif_rotation_ignored"


class BadImageError(Exception):
    """Bytes that are no usable image. `rule` is the one of `pipeline.shard.findings.RULES` that they break."""

    def __init__(self, rule: str, message: str) -> None:
        super().__init__(message)
        self.rule = rule


@dataclass(frozen=True)
class ImageHeader:
    """What an image says about itself.

    `orientation` is the EXIF orientation that is to be applied, 1 for none. `note` is what is to be counted of it: EXIF
    turns the picture and its size cannot tell whether it was turned when it was annotated (`EXIF_ASSUMED`: it was), or
    tells that it was not (`EXIF_IGNORED`).
    """

    kind: str
    mode: str
    orientation: int
    note: str | None = None

    @property
    def extension(self) -> str:
        """Extension of the image's member in a shard."""
        return EXTENSIONS[self.kind]


def read_image_file(path: Path) -> bytes:
    """The content of an image's file.

    Raises:
        BadImageError: it is no regular file (a device or a pipe may never end), or larger than `MOST_BYTES`.
        OSError: it cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        refuse_odd_file(os.fstat(descriptor))
        with open(descriptor, "rb", buffering=0, closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def refuse_odd_file(status: os.stat_result) -> None:
    """Raise `BadImageError` for what is no regular file, or one larger than `MOST_BYTES`."""
    if not stat.S_ISREG(status.st_mode):
        raise BadImageError("image_unreadable", "it is not a regular file")
    if status.st_size > MOST_BYTES:
        raise BadImageError(
            "image_unreadable", f"it has {status.st_size} bytes, more than the {MOST_BYTES} of an image"
        )


def inspect_image(content: bytes, width: int, height: int) -> ImageHeader:
    """Checks an image's header and end marker against the size that the annotation file gives.

    Raises:
        BadImageError: not of a format that is taken, cut off, or of another size.
    """
    kind, mode, size, orientation = _header(content)
    if not _is_whole(kind, content):
        raise BadImageError("image_truncated", f"the {kind} file is cut off: it has no end marker")
    note = None
    if _turned(size, orientation) == (width, height):
        note = EXIF_ASSUMED if orientation != 1 and size == (width, height) else None
    elif size == (width, height):
        orientation, note = 1, EXIF_IGNORED
    else:
        raise BadImageError(
            "image_size_mismatch",
            f"it is {size[0]}x{size[1]} pixels, the annotation file says {width}x{height}",
        )
    return ImageHeader(kind, mode, orientation, note)


def shown_size(content: bytes) -> tuple[int, int]:
    """Width and height of a picture as a viewer shows it: turned as its EXIF says.

    Raises:
        BadImageError: not of a format that is taken.
    """
    _, _, size, orientation = _header(content)
    return _turned(size, orientation)


def decode_image(content: bytes, width: int, height: int) -> Pixels:
    """Decodes an image of any mode to RGB, turned as the rule for EXIF says.

    Returns:
        uint8 [height, width, 3].

    Raises:
        BadImageError: as `inspect_image`, or the pixels cannot be decoded, or the decoder met damage.
    """
    header = inspect_image(content, width, height)
    try:
        pixels = _upright(_stored_pixels(content, header), header.orientation)
    except BadImageError:
        raise
    except Exception as error:  # Pillow's plugins and OpenCV raise many kinds for damaged files
        raise BadImageError("image_unreadable", f"it cannot be decoded ({_reason(error)})") from None
    if pixels.shape != (height, width, 3):
        raise BadImageError("image_unreadable", f"decoding gave {pixels.shape} instead of {height}x{width}")
    return np.ascontiguousarray(pixels)


def jpeg_address(pixels: Pixels, most_side: int, quality: int = 85) -> str:
    """A picture as a `data:` address, which a page holds in itself: a JPEG of at most `most_side` pixels a side."""
    scale = min(1.0, most_side / max(pixels.shape[:2]))
    size = [max(1, round(side * scale)) for side in pixels.shape[1::-1]]
    small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    _, content = cv2.imencode(".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    return "data:image/jpeg;base64," + base64.b64encode(content.tobytes()).decode()


def _header(content: bytes) -> tuple[str, str, tuple[int, int], int]:
    """Pillow's format and mode, (width, height) as stored, and the EXIF orientation."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            kind, mode, size = str(image.format), image.mode, image.size
            orientation = _exif_orientation(image, content) if kind in EXTENSIONS else 1
    except Exception as error:  # Pillow's plugins raise many kinds for damaged headers
        told = f"not a JPEG or PNG, nor a WebP, BMP or TIFF picture that can be read ({_reason(error)})"
        raise BadImageError("image_unreadable", told) from None
    if kind not in EXTENSIONS:
        raise BadImageError("image_unreadable", f"it is a {kind} file; convert it to JPEG or PNG")
    if mode == "F" or (mode == "I" and kind == "TIFF"):
        raise BadImageError("image_unreadable", "its samples have 32 bits; convert it to 8 or 16")
    return kind, mode, size, orientation


def _exif_orientation(image: Image.Image, content: bytes) -> int:
    if image.format in ("TIFF", "BMP"):
        return 1  # Pillow and libtiff turn a TIFF themselves: its header gives the shown size
    if image.format == "PNG" and b"eXIf" not in content and b"exif" not in content:
        return 1  # asking Pillow would decode the whole picture: EXIF may follow it
    orientation = image.getexif().get(EXIF_ORIENTATION, 1)
    return orientation if orientation in range(1, 9) else 1


def _turned(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    return (size[1], size[0]) if orientation in TRANSPOSING_ORIENTATIONS else size


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """Stored pixels as EXIF orientation 1..8 has them shown."""
    if orientation in TRANSPOSING_ORIENTATIONS:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels[:, ::-1] if orientation in (2, 3, 6, 7) else pixels


def _is_whole(kind: str, content: bytes) -> bool:
    if kind in ("JPEG", "MPO"):
        return _jpeg_is_whole(content)
    if kind == "PNG":
        return content.rfind(b"IEND\xaeB`\x82") >= 0
    if kind == "WEBP":  # RIFF: the bytes that follow the first eight
        return len(content) >= 8 + int.from_bytes(content[4:8], "little")
    return True  # BMP and TIFF have no end: decoding tells


def _jpeg_is_whole(content: bytes) -> bool:
    """Whether the end marker follows the first scan; one in an embedded thumbnail lies before it."""
    position = 2
    while position + 4 <= len(content) and content[position] == 0xFF:
        marker = content[position + 1]
        if marker == 0xDA:
            return content.rfind(b"\xff\xd9", position) >= 0  # from the end, where it mostly is
        # 0xFF is fill; markers without a length: TEM and RST0..RST7.
        if marker == 0xFF:
            position += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD7:
            position += 2
        else:
            position += 2 + int.from_bytes(content[position + 2 : position + 4], "big")
    return False


def _stored_pixels(content: bytes, header: ImageHeader) -> Pixels:
    """RGB as it is stored (of a TIFF as it is shown)."""
    if header.kind in ("JPEG", "MPO"):
        pixels = _strict_jpeg(content, "RGB" if header.mode in ("RGB", "L") else "CMYK")
        if pixels is not None and header.mode in ("RGB", "L"):
            return pixels
    # Pillow finds damage in a TIFF that OpenCV does not, and is quiet about it.
    if header.mode in ("RGB", "L", "RGBA", "P", "I;16", "I") and header.kind != "TIFF":
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        decoded = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
        if decoded is not None:
            return np.asarray(decoded, dtype=np.uint8)
    return _decode_with_pillow(content)


def _strict_jpeg(content: bytes, colours: str) -> Pixels | None:
    """The pixels of a JPEG that libjpeg has nothing to say against; None for a kind that simplejpeg does not take."""
    try:
        return np.asarray(simplejpeg.decode_jpeg(content, colours), dtype=np.uint8)
    except ValueError as error:
        warning = str(error)
    try:
        simplejpeg.decode_jpeg(content, colours, strict=False)
    except ValueError:
        return None
    raise BadImageError("image_unreadable", f"it is damaged ({warning})")


def _decode_with_pillow(content: bytes) -> Pixels:
    with Image.open(io.BytesIO(content)) as image:
        if image.mode.startswith("I;16"):  # Pillow would cut off what is above 255; the upper byte, as of a PNG
            high = (np.asarray(image) >> 8).astype(np.uint8)
            return np.repeat(high[..., None], 3, axis=2)
        return np.array(image.convert("RGB"))


def _reason(error: Exception) -> str:
    """An error's text, without the address of the buffer that stands for a file's name in Pillow's."""
    text = str(error)
    return "unknown format" if "BytesIO" in text else text
