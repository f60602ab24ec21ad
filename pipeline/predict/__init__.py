"""A detector that answers, pictures of its answers, and the detector as a file that runs elsewhere."""

from pipeline.predict.answers import (
    answer,
)
from pipeline.predict.detector import (
    Detection,
    Detector,
    detector_in,
    read_picture,
)
from pipeline.predict.draw import (
    Drawn,
    category_color,
    draw_boxes,
    draw_pictures,
)
from pipeline.predict.export import (
    Exported,
    check_export,
    export_detector,
)
from pipeline.predict.pictures import (
    Picture,
    find_pictures,
)

__all__ = [
    "Detection",
    "Detector",
    "Drawn",
    "Exported",
    "Picture",
    "answer",
    "category_color",
    "check_export",
    "detector_in",
    "draw_boxes",
    "draw_pictures",
    "export_detector",
    "find_pictures",
    "read_picture",
]
