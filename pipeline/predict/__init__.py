"""A detector that answers, and pictures of its answers."""

from pipeline.predict.detector import (
    Detection,
    Detector,
    answer,
    detector_in,
    read_picture,
)
from pipeline.predict.draw import (
    Drawn,
    category_color,
    draw_boxes,
    draw_pictures,
    find_pictures,
)

__all__ = [
    "Detection",
    "Detector",
    "Drawn",
    "answer",
    "category_color",
    "detector_in",
    "draw_boxes",
    "draw_pictures",
    "find_pictures",
    "read_picture",
]
