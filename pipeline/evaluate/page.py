"""The report that people open: one HTML file that needs nothing beside it.

Its bytes follow from what was evaluated. The templates escape all text, and a policy in the page keeps scripts that are
not its own from running, and the browser from fetching anything.
"""

import base64
import hashlib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline.config.sections import METRICS, Metric
from pipeline.errors import shown
from pipeline.evaluate.charts import Axis, Line, chart, sparkline, whisker
from pipeline.evaluate.diagnose import CURVES, Diagnosis, ErrorCost, diagnose, intervals_of
from pipeline.evaluate.documents import Truth
from pipeline.evaluate.evaluated import Evaluated
from pipeline.evaluate.overlay import Picture, Pictures, worst_and_best
from pipeline.files import write_whole

REPORT_FILE = "report.html"

WORST, BEST, LABEL_ERRORS = 12, 6, 12
"""Most pictures of each kind."""
MATRIX, PAIRS = 20, 10
"""Most categories of the confusion matrix, those that are confused most, and pairs of them that are told."""

MEANINGS: dict[Metric, str] = {
    "AP": "mean over IoU 0.50 to 0.95",
    "AP50": "IoU 0.50",
    "AP75": "IoU 0.75",
    "APs": "small objects, below 32² pixels",
    "APm": "medium objects",
    "APl": "large objects, above 96² pixels",
    "AR1": "recall with 1 detection an image",
    "AR10": "recall with 10 detections",
    "AR100": "recall with 100 detections",
    "ARs": "recall of small objects",
    "ARm": "recall of medium objects",
    "ARl": "recall of large objects",
}
ERROR_NAMES = {
    "Cls": ("Wrong category", "placed well, called something else"),
    "Loc": ("Placed badly", "the right category, IoU 0.1 to 0.5"),
    "Both": ("Both of them", "another category, IoU 0.1 to 0.5"),
    "Dupe": ("Duplicate", "the object was found already"),
    "Bkg": ("Background", "nothing is there"),
    "Miss": ("Missed", "no detection came near the object"),
}
SIZES = {"small": ("s", 0.0, 32.0**2), "medium": ("m", 32.0**2, 96.0**2), "large": ("l", 96.0**2, np.inf)}

_TEMPLATES = Path(__file__).parent / "templates"


class ErrorRow(NamedTuple):
    """A type of error, and of each evaluation how often it is made and what it costs."""

    name: str
    meaning: str
    costs: list[ErrorCost]


def write_report(path: Path, evaluated: Evaluated) -> None:
    """Write the page of an evaluation.

    Raises:
        UserError: there are no images.
    """
    truth = evaluated.truth
    diagnosis = diagnose(truth, evaluated.found, evaluated.least_score)
    intervals, draws = intervals_of(truth, evaluated.found)
    worst, best = worst_and_best(diagnosis, WORST, BEST)
    errors = diagnosis.label_errors[:LABEL_ERRORS]
    pictures = Pictures(evaluated, diagnosis, [*worst, *best, *(error.image for error in errors)])
    content = {
        "title": evaluated.name,
        "evaluated": evaluated,
        "subject": subject(evaluated),
        "facts": facts(truth),
        "names": names_of(truth),
        "diagnosis": diagnosis,
        "numbers": [(name, MEANINGS[name], evaluated.metrics[name], intervals[name]) for name in METRICS],
        "draws": draws,
        "unit": Axis("", 0.0, 1.0),
        "training": _training(evaluated),
        "precision": _precision(diagnosis),
        "sizes": _sizes(evaluated),
        "categories": _categories(evaluated, diagnosis),
        "errors": error_rows(diagnosis),
        "confusion": _confusion(truth, diagnosis),
        "calibration": _calibration(diagnosis),
        "label_errors": [(error, pictures.title(error.image), pictures.part(error)) for error in errors],
        "worst": present(map(pictures.whole, worst)),
        "best": present(map(pictures.whole, best)),
        "least_score": evaluated.least_score,
        "origin": origin(evaluated),
        "config": yaml.safe_dump(evaluated.config, sort_keys=False) if evaluated.config else "",
    }
    write_page(path, "report.html", content)


def write_page(path: Path, template: str, content: dict[str, Any]) -> None:
    """Fill in a template and write the page."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["whisker"] = whisker
    environment.filters["number"] = _number
    style, script = ((_TEMPLATES / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    content |= {
        "style": Markup(style),
        "script": Markup(script),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "scores": _score_range(content),
    }
    write_whole(path, environment.get_template(template).render(content).encode())


def subject(evaluated: Evaluated) -> str:
    """What was evaluated, in a few words."""
    step = evaluated.metrics.get("step")
    return shown(evaluated.name) + (f", step {step}" if step is not None else "")


def facts(truth: Truth) -> str:
    """What it was evaluated on."""
    objects = sum(not entry["iscrowd"] for entry in truth.document["annotations"])
    return f"{len(truth.images):,} images, {objects:,} objects, {len(truth.names):,} categories"


def origin(evaluated: Evaluated) -> list[tuple[str, str]]:
    """What was evaluated by what code, as an evaluation of a run tells it."""
    metrics, code = evaluated.metrics, evaluated.code
    inputs = metrics.get("inputs", {})
    changed = ", with changes that are not in it" if code.get("git_dirty") == "true" else ""
    told = {
        "checkpoint": metrics.get("checkpoint"),
        "step": metrics.get("step"),
        "sha256 of the weights": inputs.get("weights"),
        "digest of the data": inputs.get("val_digest"),
        "raydetr": code.get("version"),
        "git commit": code["git_commit"] + changed if "git_commit" in code else None,
        "pycocotools agrees": "yes" if metrics.get("verified") else None,
    }
    return [(key, shown(value, 400)) for key, value in told.items() if value is not None]


def names_of(truth: Truth) -> list[str]:
    """Names of the categories as they are shown, in the order of their numbers."""
    return [shown(name) for name in truth.names]


def error_rows(*diagnoses: Diagnosis) -> list[ErrorRow]:
    """The types of errors."""
    return [
        ErrorRow(*words, [diagnosis.errors[name] for diagnosis in diagnoses]) for name, words in ERROR_NAMES.items()
    ]


def present(pictures: Iterable[Picture | None]) -> list[Picture]:
    """Those that can be shown."""
    return [picture for picture in pictures if picture is not None]


def _number(value: float | None, digits: int = 3) -> str:
    """As it is read; a dash where there is nothing to measure."""
    return "-" if value is None or value == -1 else f"{value:.{digits}f}"


def _score_range(content: dict[str, Any]) -> tuple[float, float]:
    """What the slider of scores goes from and to: 0 to 1, unless scores are beyond it."""
    found = [content[key].found.scores for key in ("evaluated", "first", "second") if key in content]
    return min([0.0, *map(min, filter(None, found))]), max([1.0, *map(max, filter(None, found))])


def _training(evaluated: Evaluated) -> Markup | None:
    """AP over the steps of the checkpoints that were evaluated; None of fewer than two."""
    curve = evaluated.curve
    if len(curve) < 2:
        return None
    lines = [
        Line(name, [(step, numbers[name]) for step, numbers in curve], f"line-{index}")
        for index, name in enumerate(("AP50", "AP", "AP75"), 1)
    ]
    top = max(value for line in lines for _, value in line.points)
    return chart(Axis("step", 0, curve[-1][0]), Axis("average precision", 0, math.ceil(10 * max(top, 0.1)) / 10), lines)


def _precision(diagnosis: Diagnosis) -> Markup:
    """Precision at each recall, the mean of the categories with objects."""
    known = diagnosis.precision[:, :, (diagnosis.precision > -1).any(axis=(0, 1))]
    curves = known.mean(axis=2) if known.size else np.zeros(known.shape[:2])
    lines = [
        Line(f"IoU {iou:.1f}", list(zip(diagnosis.recall.tolist(), row.tolist(), strict=True)), f"line-{index}")
        for index, (iou, row) in enumerate(zip(CURVES, curves, strict=True), 1)
    ]
    return chart(Axis("recall", 0, 1), Axis("precision", 0, 1), lines)


def _calibration(diagnosis: Diagnosis) -> Markup:
    """The part of the detections that is right by score, and what a calibrated detector would have."""
    bars = [(part.lower, part.upper, part.right) for part in diagnosis.bins if part.count]
    return chart(
        Axis("score", 0, 1), Axis("part that is right", 0, 1), [Line("calibrated", [(0, 0), (1, 1)], "dashed")], bars
    )


def _sizes(evaluated: Evaluated) -> list[tuple[str, int, float, float]]:
    areas = [entry["area"] for entry in evaluated.truth.document["annotations"] if not entry["iscrowd"]]
    return [
        (name, sum(low <= area < high for area in areas), *(evaluated.metrics[kind + key] for kind in ("AP", "AR")))
        for name, (key, low, high) in SIZES.items()
    ]


def _categories(evaluated: Evaluated, diagnosis: Diagnosis) -> list[dict[str, Any]]:
    """Of each category its objects, its numbers and its precision at each recall; the best first."""
    truth = evaluated.truth
    objects = np.bincount(
        [entry["category_id"] for entry in truth.document["annotations"] if not entry["iscrowd"]],
        minlength=len(truth.names) + 1,
    )
    rows = [
        {
            "name": shown(name),
            "objects": int(objects[number]),
            "metrics": evaluated.metrics["per_category"][name],
            "spark": sparkline(diagnosis.precision[0, :, number - 1].tolist()) if objects[number] else "",
        }
        for number, name in enumerate(truth.names, 1)
    ]
    return sorted(rows, key=lambda row: -row["metrics"]["AP"])


def _confusion(truth: Truth, diagnosis: Diagnosis) -> dict[str, Any]:
    """The matrix of the categories that are confused most, and the pairs that are confused most."""
    matrix, names = diagnosis.confusion, names_of(truth)
    mixed = matrix[:-1, :-1] * ~np.eye(len(names), dtype=bool)
    kept = np.sort(np.argsort(-(mixed.sum(axis=0) + mixed.sum(axis=1)), kind="stable")[:MATRIX])
    order = [*kept.tolist(), len(names)]
    totals = np.maximum(1, matrix.sum(axis=1))
    pairs = [divmod(int(place), len(names)) for place in np.argsort(-mixed, axis=None, kind="stable")[:PAIRS]]
    return {
        "names": [[*names, "none"][index] for index in order],
        "rows": [[(int(matrix[row, column]), matrix[row, column] / totals[row]) for column in order] for row in order],
        "is_part": len(kept) < len(names),
        "pairs": [(names[row], names[column], int(mixed[row, column]), int(totals[row]))
                  for row, column in pairs if mixed[row, column]],
    }  # fmt: skip
