"""What a registered detector answers to a batch of pictures.

A picture is the bytes of a file, these in base64 as text, RGB of 8 bits as `[height, width, 3]` (an array, or lists in
lists), or a `Path`, which is nothing that can come over a network. The answer to each is

    {"detections": [{"category_id": 3, "category": "car", "score": 0.91, "bbox": [x, y, width, height]}], "error": None}

with no detections and a text as its error where the picture cannot be used; the others are answered all the same.
"""

import base64
import binascii
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.images import BadImageError, read_image_file
from pipeline.errors import UserError
from pipeline.log import get_logger
from pipeline.predict.detector import Detector

logger = get_logger(__name__)

THRESHOLD = 0.4
"""Least score of a detection where none is given; that of `raydetr predict`."""
MOST_PICTURES = 64
"""Of a request to a server."""
MOST_BYTES = 2**28
"""Of the pictures of a request to a server, as they are sent."""

Answer = dict[str, Any]


def answer(detector: Detector, pictures: Sequence[Any], score_threshold: float = THRESHOLD) -> list[Answer]:
    """Detect the objects of each picture.

    Args:
        detector: it may be asked by several threads at once.
        pictures: see the module's docstring.
        score_threshold: least score.

    Raises:
        UserError: the threshold is not between 0 and 1.
    """
    if not 0 <= score_threshold <= 1:
        raise UserError(f"score_threshold {score_threshold} is not between 0 and 1")
    return [_answered(detector, picture, score_threshold) for picture in pictures]


def pictures_in(cell: Any) -> Sequence[Any]:
    """The pictures of an entry of the column: a list of texts is several, of `{"inputs": {"image": [...]}}`."""
    if isinstance(cell, list | np.ndarray) and len(cell) and all(isinstance(entry, str) for entry in cell):
        return [str(entry) for entry in cell]
    return [cell]


def check_request(pictures: Sequence[Any]) -> None:
    """Refuse a request to a server that has no pictures, or too much of them.

    Raises:
        UserError: as described.
    """
    if not pictures:
        raise UserError("there is no picture in the column image")
    if len(pictures) > MOST_PICTURES:
        raise UserError(f"{len(pictures)} pictures in one request, and {MOST_PICTURES} may be; send several requests")
    size = sum(len(picture) for picture in pictures if isinstance(picture, str | bytes))
    if size > MOST_BYTES:
        raise UserError(f"pictures of {size} bytes in one request, and {MOST_BYTES} may be; send several requests")


def _answered(detector: Detector, picture: Any, score_threshold: float) -> Answer:
    try:
        return {"detections": detector(_readable(picture), score_threshold), "error": None}
    except UserError as error:
        return {"detections": [], "error": str(error)}
    except Exception as error:
        logger.exception("a picture could not be answered")
        return {"detections": [], "error": f"the detector failed at this picture ({type(error).__name__})"}


def _readable(picture: Any) -> bytes | NDArray[np.uint8]:
    """A picture as `Detector` takes it."""
    if isinstance(picture, bytes | bytearray | memoryview):
        return bytes(picture)
    if isinstance(picture, str):
        return _decoded(picture)
    if isinstance(picture, Path):
        return _read(picture)
    if isinstance(picture, list | np.ndarray):
        return _pixels(picture)
    raise UserError(f"a picture is bytes, base64 as text, or RGB as an array, not {type(picture).__name__}")


def _decoded(text: str) -> bytes:
    """The bytes of base64, with line breaks or behind `data:image/...;base64,` if they are there."""
    content = text.partition(",")[2] if text.startswith("data:") else text
    try:
        return base64.b64decode("".join(content.split()), validate=True)
    except (binascii.Error, ValueError):  # which is of what is not ASCII
        raise UserError("this text is not the base64 of a picture; a server opens no paths") from None


def _read(path: Path) -> bytes:
    try:
        return read_image_file(path)
    except (BadImageError, OSError) as error:
        raise UserError(f"{path.name}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def _pixels(values: list[Any] | NDArray[Any]) -> NDArray[np.uint8]:
    try:
        pixels = np.asarray(values)
    except ValueError:  # lists of different lengths
        pixels = np.empty(0)
    is_image = pixels.ndim == 3 and pixels.shape[2] == 3 and math.prod(pixels.shape) > 0
    if not is_image or pixels.dtype.kind not in "iu" or pixels.min() < 0 or pixels.max() > 255:
        raise UserError(
            "this array is not a picture: it must be [height, width, 3], RGB, whole numbers from 0 to 255, not "
            f"{pixels.dtype} {list(pixels.shape)}"
        )
    return np.ascontiguousarray(pixels, np.uint8)
