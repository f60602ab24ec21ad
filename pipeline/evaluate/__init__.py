"""Detections of a checkpoint, their score, and the report that people look at."""

from pipeline.evaluate.detect import (
    DetectAll,
    Detection,
    detect,
    sort_detections,
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
    METRICS_FILE,
    SCORE_SETTINGS,
    evaluate_checkpoint,
    evaluate_files,
    weights_digest,
)
from pipeline.evaluate.score import (
    NEEDS,
    score,
)

__all__ = [
    "COLUMNS",
    "DETECTIONS_FILE",
    "LEAST_SIDE",
    "METRICS_FILE",
    "NEEDS",
    "PLOTTED",
    "SCORE_SETTINGS",
    "DetectAll",
    "Detection",
    "choose_samples",
    "detect",
    "evaluate_checkpoint",
    "evaluate_files",
    "metrics_table",
    "plot_categories",
    "score",
    "sort_detections",
    "weights_digest",
    "write_category_table",
    "write_pictures",
]
