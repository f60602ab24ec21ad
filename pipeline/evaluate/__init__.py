"""Detections of a checkpoint, their score, and the report that people look at."""

from pipeline.evaluate.baseline import constant_boxes
from pipeline.evaluate.detect import (
    DetectAll,
    Detection,
    detect,
    sort_detections,
)
from pipeline.evaluate.documents import (
    KEYPOINT_NUMBERS,
    NEEDS,
    SHAPES,
    Found,
    IouType,
    Truth,
    detections_of,
    ground_truth_of,
)
from pipeline.evaluate.report import (
    COLUMNS,
    LEAST_SIDE,
    PLOTTED,
    choose_samples,
    metrics_table,
    plot_categories,
    write_category_table,
    write_pictures,
)
from pipeline.evaluate.results import (
    DETECTIONS_FILE,
    SCORE_SETTINGS,
    evaluate_checkpoint,
    evaluate_files,
    weights_digest,
)
from pipeline.evaluate.score import (
    NUMBERS,
    score,
)

__all__ = [
    "COLUMNS",
    "DETECTIONS_FILE",
    "KEYPOINT_NUMBERS",
    "LEAST_SIDE",
    "NEEDS",
    "NUMBERS",
    "PLOTTED",
    "SCORE_SETTINGS",
    "SHAPES",
    "DetectAll",
    "Detection",
    "Found",
    "IouType",
    "Truth",
    "choose_samples",
    "constant_boxes",
    "detect",
    "detections_of",
    "evaluate_checkpoint",
    "evaluate_files",
    "ground_truth_of",
    "metrics_table",
    "plot_categories",
    "score",
    "sort_detections",
    "weights_digest",
    "write_category_table",
    "write_pictures",
]
