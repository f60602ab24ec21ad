"""Detections of a checkpoint, their score, what stands behind it, and the reports that people look at."""

from pipeline.evaluate.baseline import constant_boxes
from pipeline.evaluate.charts import (
    Axis,
    Line,
    chart,
    sparkline,
    whisker,
)
from pipeline.evaluate.claims import (
    Claims,
    following,
)
from pipeline.evaluate.comparison import (
    write_comparison,
)
from pipeline.evaluate.detect import (
    DetectAll,
    Detection,
    detect,
    sort_detections,
)
from pipeline.evaluate.diagnose import (
    Comparison,
    Diagnosis,
    compare_found,
    diagnose,
    intervals_of,
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
from pipeline.evaluate.evaluated import (
    RECORD_FILE,
    Evaluated,
    evaluated_of,
    evaluation_folder,
    read_curve,
    read_evaluated,
    read_files,
)
from pipeline.evaluate.overlay import (
    Picture,
    Pictures,
    worst_and_best,
)
from pipeline.evaluate.page import (
    REPORT_FILE,
    write_report,
)
from pipeline.evaluate.parallel import (
    axis_places,
    plot_parallel,
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
    settings_of,
    weights_digest,
)
from pipeline.evaluate.score import (
    NUMBERS,
    evaluation_of,
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
    "RECORD_FILE",
    "REPORT_FILE",
    "SCORE_SETTINGS",
    "SHAPES",
    "Axis",
    "Claims",
    "Comparison",
    "DetectAll",
    "Detection",
    "Diagnosis",
    "Evaluated",
    "Found",
    "IouType",
    "Line",
    "Picture",
    "Pictures",
    "Truth",
    "axis_places",
    "chart",
    "choose_samples",
    "compare_found",
    "constant_boxes",
    "detect",
    "detections_of",
    "diagnose",
    "evaluate_checkpoint",
    "evaluate_files",
    "evaluated_of",
    "evaluation_folder",
    "evaluation_of",
    "following",
    "ground_truth_of",
    "intervals_of",
    "metrics_table",
    "plot_categories",
    "plot_parallel",
    "read_curve",
    "read_evaluated",
    "read_files",
    "score",
    "settings_of",
    "sort_detections",
    "sparkline",
    "weights_digest",
    "whisker",
    "worst_and_best",
    "write_category_table",
    "write_comparison",
    "write_pictures",
    "write_report",
]
