"""What stands behind a score, on scenes whose errors are known."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config.sections import METRICS
from pipeline.errors import UserError
from pipeline.evaluate.diagnose import (
    CURVES,
    FEWEST_DRAWS,
    MOST_DRAWS,
    Comparison,
    Diagnosis,
    _draws,
    compare_found,
    diagnose,
    intervals_of,
)
from pipeline.evaluate.documents import Found, Truth, detections_of, ground_truth_of
from pipeline.evaluate.score import score
from pipeline.files import read_json
from tests.builders import CATEGORIES
from tests.pipeline.evaluate.evaluations import DOG, FOUND, OBJECTS, PERFECT, make_detection
from tests.pipeline.evaluate.scenes import make_scene

DOCUMENT: dict[str, Any] = {
    "images": [{"id": number, "width": 32, "height": 24} for number in range(1, 8)],
    "annotations": list(OBJECTS),
    "categories": list(CATEGORIES),
}


def read(document: dict[str, Any], detections: Sequence[dict[str, Any]]) -> tuple[Truth, Found]:
    truth = ground_truth_of(document, "bbox")
    return truth, detections_of(list(detections), truth, "bbox")


def spoilt(truth: dict[str, Any]) -> list[dict[str, Any]]:
    """Detections of a document with errors of each type."""
    rng = np.random.default_rng(0)
    categories = [category["id"] for category in truth["categories"]]
    found = []
    for entry in truth["annotations"]:
        if rng.random() < 0.1:
            continue
        for _ in range(1 + int(rng.random() < 0.15)):
            x, y, width, height = entry["bbox"]
            off = rng.choice([0.03, 0.1, 0.25, 0.5])
            box = [x + rng.normal() * off * width, y + rng.normal() * off * height]
            box += [width * np.exp(rng.normal() * off), height * np.exp(rng.normal() * off)]
            category = entry["category_id"] if rng.random() > 0.1 else int(rng.choice(categories))
            found.append(_found(entry["image_id"], category, box, rng.random()))
    for image in truth["images"]:
        for _ in range(rng.integers(0, 4)):
            category, sides = int(rng.choice(categories)), (image["width"], image["height"])
            box = [*(rng.random() * side * 0.8 for side in sides), *(side * 0.1 for side in sides)]
            found.append(_found(image["id"], category, box, rng.random()))
    return found


def _found(image_id: int, category_id: int, box: list[float], score: float) -> dict[str, Any]:
    return {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}


@pytest.fixture(scope="module")
def diagnosis() -> Diagnosis:
    return diagnose(*read(DOCUMENT, FOUND), 0.4)


class TestDiagnose:
    def test_the_same_every_time(self) -> None:
        first, second = (diagnose(*read(*make_scene(3)), 0.4) for _ in range(2))
        assert (first.label_errors, list(first.images)) == (second.label_errors, list(second.images))

    def test_precision_gives_the_score(self) -> None:
        document, detections = make_scene(3)
        found = diagnose(*read(document, detections), 0.4)
        np.testing.assert_allclose(found.precision[0][:, [0, 1, 2]].mean(), score(document, detections)["AP50"])

    def test_types_of_errors(self, diagnosis: Diagnosis) -> None:
        counts = {name: cost.count for name, cost in diagnosis.errors.items()}
        # What is wrong in both ways misses its object, too.
        assert counts == {"Cls": 1, "Loc": 1, "Both": 1, "Dupe": 1, "Bkg": 1, "Miss": 2}
        assert diagnosis.errors["Cls"].cost > 0

    def test_types_of_errors_are_those_of_tidecv(self, shared_data: Path) -> None:
        """The numbers are what tidecv 1.0.1 says of the same files; it counts AP in percent."""
        truth = read_json(shared_data / "bccd" / "annotations" / "instances_val.json", "annotations")
        found = diagnose(*read(truth, spoilt(truth)), 0.4)
        tidecv = {
            "Cls": (51, 5.439090369689236),
            "Loc": (410, 26.597110291528054),
            "Both": (65, 2.4796470117512186),
            "Dupe": (46, 0.293330046632569),
            "Bkg": (126, 2.630638989788789),
            "Miss": (215, 4.415316277957224),
        }
        assert {name: cost.count for name, cost in found.errors.items()} == {name: n for name, (n, _) in tidecv.items()}
        costs = {name: 100 * cost.cost for name, cost in found.errors.items()}
        assert costs == pytest.approx({name: cost for name, (_, cost) in tidecv.items()}, abs=1e-9)

    def test_confusion(self, diagnosis: Diagnosis) -> None:
        """Rows are cat, dog, toothbrush and nothing; a duplicate and what is placed badly find nothing."""
        assert diagnosis.confusion.tolist() == [[1, 1, 0, 0], [0, 0, 0, 3], [0, 0, 0, 0], [3, 1, 0, 0]]
        surer = diagnose(*read(DOCUMENT, FOUND), 0.82)
        assert surer.confusion.tolist() == [[1, 1, 0, 0], [0, 0, 0, 3], [0, 0, 0, 0], [1, 0, 0, 0]]

    def test_images(self, diagnosis: Diagnosis) -> None:
        assert {number: entry[1:] for number, entry in diagnosis.images.items()} == {
            1: (1, 1, 0), 2: (0, 1, 1), 3: (0, 1, 1), 4: (0, 1, 1), 5: (0, 0, 1), 6: (0, 1, 0),
        }  # fmt: skip
        assert [number for number, entry in diagnosis.images.items() if entry.ap > 0.99] == [1]
        assert diagnosis.states == {1: "tp", 2: "fp", 3: "fp", 4: "fp", 5: "fp", 6: "fp"}
        assert diagnosis.matches == {1: 1}

    def test_label_errors_are_sure_detections_that_no_annotation_agrees_with(self, diagnosis: Diagnosis) -> None:
        wrong, missing = diagnosis.label_errors[:2]
        assert (wrong.image, wrong.annotation, wrong.found, wrong.annotated, wrong.score) == (2, 2, 2, 1, 0.95)
        assert (missing.image, missing.detection, missing.annotation, missing.found) == (6, 6, None, 1)

    def test_calibration(self, diagnosis: Diagnosis) -> None:
        bins = {round(part.lower, 1): (part.count, part.right) for part in diagnosis.bins if part.count}
        assert bins == {0.6: (1, 0.0), 0.7: (1, 0.0), 0.8: (2, 0.0), 0.9: (2, 0.5)}

    def test_no_detections_and_no_images(self) -> None:
        nothing = diagnose(*read(DOCUMENT, []), 0.4)
        assert nothing.errors["Miss"].count == 5
        assert nothing.precision.shape == (len(CURVES), 101, 3)
        with pytest.raises(UserError, match="there are no images"):
            diagnose(*read({**DOCUMENT, "images": [], "annotations": []}, []), 0.4)


class TestIntervals:
    def test_the_numbers_are_those_of_the_score(self) -> None:
        document, detections = make_scene(3)
        intervals, draws = intervals_of(*read(document, detections))
        metrics = score(document, detections)
        assert {name: intervals[name].value for name in METRICS} == {name: metrics[name] for name in METRICS}
        assert all(interval.lower <= interval.value <= interval.upper for interval in intervals.values())
        assert intervals["AP"].upper - intervals["AP"].lower > 0.01
        assert draws == MOST_DRAWS

    def test_the_same_every_time(self) -> None:
        first, second = (intervals_of(*read(*make_scene(3))) for _ in range(2))
        assert first == second

    def test_no_detections(self) -> None:
        assert intervals_of(*read(DOCUMENT, []))[0]["AP"][:3] == (0.0, 0.0, 0.0)


def compare(first: Sequence[dict[str, Any]], second: Sequence[dict[str, Any]]) -> Comparison:
    truth, found = read(DOCUMENT, first)
    return compare_found(truth, found, read(DOCUMENT, second)[1])


class TestCompare:
    def test_what_is_better_for_sure(self) -> None:
        comparison = compare(FOUND, PERFECT)
        ap = comparison.differences["AP"]
        assert ap.value == pytest.approx(1 - score(DOCUMENT, list(FOUND))["AP"])
        assert ap.is_sure
        assert ap.lower > 0
        assert set(comparison.categories) == {1, 2}  # there is no toothbrush to find
        assert compare(PERFECT, FOUND).differences["AP"].value == -ap.value

    def test_what_may_be_chance(self) -> None:
        """One object of five more."""
        comparison = compare(FOUND, [*FOUND, make_detection(5, DOG, 0, 0.9)])
        assert comparison.differences["AP"].value > 0
        assert not comparison.differences["AP"].is_sure
        assert comparison.categories[1] == (0, 0, 0, 0)
        assert comparison.categories[2].value > 0

    def test_nothing_is_different(self) -> None:
        assert set(compare(FOUND, FOUND).differences.values()) == {(0, 0, 0, 0)}


def test_fewer_draws_of_many_detections() -> None:
    truth, found = read(DOCUMENT, FOUND)
    many = read(DOCUMENT, FOUND * 4000)[1]
    assert (_draws(truth, found), _draws(truth, found, many)) == (MOST_DRAWS, 10_000_000 // 24_900)
    assert _draws(truth, read(DOCUMENT, FOUND * 20_000)[1]) == FEWEST_DRAWS
