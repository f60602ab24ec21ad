"""What stands behind a score: how sure it is, what goes wrong and what that costs, and which images it goes wrong in.

hotcoco computes all of it. Unless it says otherwise, a detection is right when it overlaps an object of its category by
half (IoU 0.5), and images, categories, annotations and detections go by their numbers in `Truth` and `Found`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from hotcoco import COCOeval, compare
from numpy.typing import NDArray

from pipeline.config.sections import METRICS
from pipeline.errors import UserError
from pipeline.evaluate.documents import Found, Truth, detections_of
from pipeline.evaluate.score import evaluation_of

MOST_DRAWS, FEWEST_DRAWS = 1000, 200
"""Draws of the bootstrap: as many as take about five seconds. The fewest take 45 s of COCO's 5,000 images."""
SEED = 0
CURVES = (0.5, 0.6, 0.7, 0.8, 0.9)
"""IoUs whose precision is told at each recall."""
ERRORS = ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss")
"""TIDE's types of errors (arXiv 2008.08115, section 2.2)."""


class Difference(NamedTuple):
    """A number, or by how much one is greater than another, and how far that is chance."""

    value: float
    lower: float
    upper: float
    """The 95 % interval, from the bootstrap over images."""
    share: float
    """Part of the draws in which it is above 0."""

    @property
    def is_sure(self) -> bool:
        """Whether it is more than chance: the interval holds no 0."""
        return self.lower > 0 or self.upper < 0


@dataclass(frozen=True)
class ErrorCost:
    """How often a type of error is made, and by how much AP50 would be higher without it, all else as it is."""

    count: int
    cost: float


@dataclass(frozen=True)
class Bin:
    """The detections of a range of scores: their mean score, and the part of them that is right."""

    lower: float
    upper: float
    score: float
    right: float
    count: int


class ImageScore(NamedTuple):
    """One image: AP50 over its categories, objects found, detections that are wrong, objects missed."""

    ap: float
    right: int
    wrong: int
    missed: int


class LabelError(NamedTuple):
    """A sure detection that says that an annotation is of another category, or missing (no `annotation`)."""

    image: int
    detection: int
    annotation: int | None
    found: int
    annotated: int | None
    """Numbers of the categories."""
    score: float


@dataclass(frozen=True)
class Diagnosis:
    """Of one set of detections."""

    recall: NDArray[np.float64]
    """[101] where precision is told."""
    precision: NDArray[np.float64]
    """[IoU of CURVES, recall, category]; -1 where a category has no object."""
    errors: dict[str, ErrorCost]
    confusion: NDArray[np.int64]
    """[true, found] by category, of detections of the least score; the last of each is "none"."""
    bins: list[Bin]
    """None where a score is no probability: below 0 or above 1."""
    calibration_error: float
    """Mean distance of score and part that is right, weighted by detections."""
    label_errors: list[LabelError]
    """The surest first."""
    images: dict[int, ImageScore]
    """Those with an object or a detection."""
    states: dict[int, str]
    """Of detections: "tp" and "fp"; none of those in crowds, and beyond the best 100 of an image and category."""
    matches: dict[int, int]
    """The detection that finds an annotation."""


@dataclass(frozen=True)
class Comparison:
    """Of two sets of detections on the same images: the second against the first."""

    differences: dict[str, Difference]
    """In COCO's twelve numbers."""
    categories: dict[int, Difference]
    """In AP, of categories with objects."""
    draws: int


def diagnose(truth: Truth, found: Found, least_score: float) -> Diagnosis:
    """Look behind the score of boxes.

    Args:
        truth: the ground truth.
        found: the detections.
        least_score: of a detection that counts as one in the confusion matrix.

    Raises:
        UserError: there are no images.
    """
    evaluation = _evaluation(truth, found)
    errors, images = evaluation.tide_errors(), evaluation.image_diagnostics()
    is_probability = all(0 <= score <= 1 for score in found.scores)
    calibration: dict[str, Any] = evaluation.calibration() if is_probability else {"bins": [], "ece": 0.0}
    return Diagnosis(
        recall=np.asarray(evaluation.params.rec_thrs),
        precision=_precision(evaluation),
        errors={name: ErrorCost(errors["counts"][name], errors["delta_ap"][name]) for name in ERRORS},
        confusion=evaluation.confusion_matrix(min_score=least_score)["matrix"].astype(np.int64),
        bins=[
            Bin(entry["bin_lower"], entry["bin_upper"], entry["avg_confidence"], entry["avg_accuracy"], entry["count"])
            for entry in calibration["bins"]
        ],
        calibration_error=calibration["ece"],
        label_errors=_label_errors(images["label_errors"]),
        images=_image_scores(images["img_summary"]),
        states=images["dt_status"],
        matches=images["gt_match"],
    )


def intervals_of(truth: Truth, found: Found) -> tuple[dict[str, Difference], int]:
    """COCO's twelve numbers with their intervals, and how many draws these are from.

    A draw without an object of a size counts as 0 of it.

    Raises:
        UserError: there are no images.
    """
    nothing = _evaluation(truth, detections_of([], truth, "bbox"))  # all 0: the difference to it is the number
    draws = _draws(truth, found)
    return _differences(nothing, _evaluation(truth, found), draws), draws


def compare_found(truth: Truth, first: Found, second: Found) -> Comparison:
    """Compare two sets of detections of boxes, image by image drawn together.

    Raises:
        UserError: there are no images.
    """
    evaluations = [_evaluation(truth, found) for found in (first, second)]
    draws = _draws(truth, first, second)
    objects = {entry["category_id"] for entry in truth.document["annotations"] if not entry["iscrowd"]}
    categories = {}
    for number in sorted(objects):
        own = [_of_category(evaluation, number) for evaluation in evaluations]
        categories[number] = _differences(own[0], own[1], draws)["AP"]
    return Comparison(_differences(evaluations[0], evaluations[1], draws), categories, draws)


def _evaluation(truth: Truth, found: Found) -> COCOeval:
    evaluation = evaluation_of(truth, found)
    if evaluation is None:
        raise UserError("there are no images in the ground truth: nothing to report")
    return evaluation


def _of_category(evaluation: COCOeval, number: int) -> COCOeval:
    own = COCOeval(evaluation.coco_gt, evaluation.coco_dt, "bbox")
    own.params.cat_ids = [number]
    own.evaluate()
    return own


def _draws(truth: Truth, *found: Found) -> int:
    """A draw sorts all detections, and fills in a table for each category, which takes as long as 300 of them."""
    work = 300 * len(truth.names) + max(len(each.scores) for each in found)
    return max(FEWEST_DRAWS, min(MOST_DRAWS, 10_000_000 // work))


def _differences(first: COCOeval, second: COCOeval, draws: int) -> dict[str, Difference]:
    """In the twelve numbers, the second against the first."""
    answer = compare(first, second, n_bootstrap=draws, seed=SEED)
    intervals, values = answer["ci"], answer["deltas"]
    return {
        name: Difference(values[name], *(intervals[name][key] for key in ("lower", "upper", "prob_positive")))
        for name in METRICS
    }


def _precision(evaluation: COCOeval) -> NDArray[np.float64]:
    tables, params = evaluation.eval, evaluation.params
    assert tables is not None
    rows = [int(np.argmin(np.abs(np.asarray(params.iou_thrs) - iou))) for iou in CURVES]
    table: NDArray[np.float64] = np.asarray(tables["precision"])  # [IoU, recall, category, area, most]
    return table[rows][..., params.area_rng_lbl.index("all"), -1]


def _label_errors(entries: list[dict[str, Any]]) -> list[LabelError]:
    ranked = sorted(entries, key=lambda entry: (-entry["dt_score"], entry["dt_id"]))
    keys = ("image_id", "dt_id", "gt_id", "dt_category_id", "gt_category_id", "dt_score")
    return [LabelError(*(entry[key] for key in keys)) for entry in ranked]


def _image_scores(entries: Mapping[int, Mapping[str, Any]]) -> dict[int, ImageScore]:
    return {
        number: ImageScore(*(entries[number][key] for key in ("ap", "tp", "fp", "fn"))) for number in sorted(entries)
    }
