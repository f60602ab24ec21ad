"""The score of detections: pycocotools' numbers, to the last digit, computed by hotcoco in a hundredth of the time."""

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
from hotcoco import COCO, COCOeval
from numpy.typing import NDArray

from pipeline.config.sections import METRICS
from pipeline.errors import UserError
from pipeline.evaluate.detect import Detection
from pipeline.evaluate.documents import Found, IouType, Truth, detections_of, ground_truth_of

NUMBERS: dict[IouType, tuple[str, ...]] = {
    "bbox": METRICS,
    "segm": METRICS,
    "keypoints": ("AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl"),
}
"""COCO's numbers, those that pycocotools prints."""

_AREAS = {"s": "small", "m": "medium", "l": "large"}


def score(
    truth: dict[str, Any] | Path,
    detections: list[Detection] | Path,
    iou_type: IouType = "bbox",
    *,
    verify: bool = False,
) -> dict[str, Any]:
    """Score detections as pycocotools does.

    Args:
        truth: a COCO document, or its file. An annotation without `iscrowd` is no crowd, one without `area` has
            that of its box. Ids are whole numbers, or all of them text.
        detections: entries of COCO's result format, or their file. Masks are compressed run lengths.
        iou_type: what overlaps.
        verify: have pycocotools compute all numbers as well; they must be the same.

    Returns:
        COCO's numbers over all categories by name (for boxes AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl), and
        under "per_category" the same for each category by name; -1 where there is no object to find.

    Raises:
        UserError: naming the file and the entry that cannot be used, or the number on which the two do not agree.
    """
    expected = ground_truth_of(truth, iou_type)
    found = detections_of(detections, expected, iou_type)
    if any(annotation["id"] == 0 for annotation in expected.document["annotations"]):
        return _metrics(_pycocotools(expected, found, iou_type), expected, iou_type)
    metrics = _metrics(evaluation_of(expected, found, iou_type), expected, iou_type)
    if verify:
        _check_same(metrics, _metrics(_pycocotools(expected, found, iou_type), expected, iou_type))
    return metrics


def evaluation_of(truth: Truth, found: Found, iou_type: IouType = "bbox") -> COCOeval | None:
    """The evaluation by hotcoco, accumulated; None where there are no images.

    It numbers the detections from 1, in their order.
    """
    if not truth.images:
        return None
    expected = COCO(truth.document)
    entries = found.boxes() if iou_type == "bbox" else found.results(iou_type)
    evaluation = COCOeval(expected, expected.load_res(entries), iou_type)
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation


def _pycocotools(truth: Truth, found: Found, iou_type: IouType) -> Any | None:
    """The same by pycocotools, which reads the detections in its own way."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    if not truth.images:
        return None
    with contextlib.redirect_stdout(io.StringIO()):
        expected, empty = COCO(), COCO()
        expected.dataset, empty.dataset = truth.document, {**truth.document, "annotations": []}
        expected.createIndex()
        empty.createIndex()
        evaluation = COCOeval(expected, expected.loadRes(found.results(iou_type)) if found.images else empty, iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def _metrics(evaluation: Any | None, truth: Truth, iou_type: IouType) -> dict[str, Any]:
    """The numbers over all categories and of each, from the tables of either engine."""
    tables, params = (evaluation.eval, evaluation.params) if evaluation is not None else (None, None)

    def numbers(categories: slice) -> dict[str, Any]:
        if tables is None:
            return dict.fromkeys(NUMBERS[iou_type], -1.0)
        return {name: _metric(tables, params, categories, name, iou_type) for name in NUMBERS[iou_type]}

    by_category = {name: numbers(slice(index, index + 1)) for index, name in enumerate(truth.names)}
    return {**numbers(slice(None)), "per_category": by_category}


def _metric(tables: dict[str, Any], params: Any, categories: slice, name: str, iou_type: IouType) -> float:
    """Return a number by its name, of some categories (indices in the order of the ids), as `summarize` does.

    The name is precision (AP) or recall (AR), then an IoU in percent, a number of detections or the size of object;
    without, it is over IoU 0.50 to 0.95, the most detections and all sizes.
    """
    kind, suffix = name[:2], name[2:]
    # precision [iou, recall, category, area, most], recall [iou, category, area, most]
    values: NDArray[np.float64] = tables["precision" if kind == "AP" else "recall"]
    most = params.maxDets[-1]
    if suffix.isdigit() and (kind == "AP" or iou_type == "keypoints"):
        values = values[np.asarray(params.iouThrs) == int(suffix) / 100]
    elif suffix.isdigit():
        most = int(suffix)
    area = params.areaRngLbl.index(_AREAS.get(suffix, "all"))
    values = values[..., categories, [area], [params.maxDets.index(most)]]
    known = values[values > -1]
    return float(np.mean(known)) if known.size else -1.0


def _check_same(fast: dict[str, Any], arbiter: dict[str, Any]) -> None:
    """Raise a UserError that names the first number on which the two engines do not agree."""
    pairs = [(name, fast[name], arbiter[name]) for name in arbiter if name != "per_category"]
    for category, numbers in arbiter["per_category"].items():
        pairs += [(f"{name} of {category}", fast["per_category"][category][name], numbers[name]) for name in numbers]
    for name, ours, theirs in pairs:
        if ours != theirs:
            raise UserError(
                f"{name} is {ours!r} by hotcoco and {theirs!r} by pycocotools, which is right: keep the detections and "
                "report this; without evaluate.verify (or --verify) the first is taken"
            )
