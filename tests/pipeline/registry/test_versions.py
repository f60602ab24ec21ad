"""Versions: counted, found by alias, opened by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.predict.detector import Detector
from pipeline.registry.register import Registration
from pipeline.registry.versions import find_champion, make_version, open_detector
from pipeline.tracking.tracker import Tracker
from tests.builders import write_image
from tests.pipeline.registry.registered import LABELS, SECTION


def logged_model(tracker: Tracker) -> Any:
    made = tracker.client.get_model_version("shown", "1")
    return tracker.client.get_logged_model(made.source.removeprefix("models:/"))


def test_the_logged_model_names_its_version(tracker: Tracker, version: Registration) -> None:
    assert json.loads(logged_model(tracker).tags["mlflow.modelVersions"]) == [{"name": "shown", "version": "1"}]


def test_versions_of_a_name_are_counted(tracker: Tracker, version: Registration) -> None:
    model_id = logged_model(tracker).model_id
    assert [make_version(tracker, "counted", model_id, {"number": str(number)}) for number in (1, 2)] == [1, 2]
    assert tracker.client.get_model_version("counted", "2").tags["number"] == "2"


def test_the_champion_is_found_where_there_is_one(tracker: Tracker, version: Registration) -> None:
    assert find_champion(tracker, "none") is None
    found = find_champion(tracker, "shown")
    assert found is not None
    assert (found.name, int(found.version)) == ("shown", 1)
    make_version(tracker, "leaderless", logged_model(tracker).model_id, {})
    assert find_champion(tracker, "leaderless") is None


@pytest.mark.parametrize("name", ["models:/shown@champion", "models:/shown/1"])
def test_a_detector_is_opened_by_name(
    name: str, tracker: Tracker, version: Registration, checkpoint: Path, tmp_path: Path
) -> None:
    picture = write_image(tmp_path / "a.jpg").read_bytes()
    detector = open_detector(name, tracker.uri)
    assert detector.evaluate == SECTION
    assert detector(picture) == Detector.from_checkpoint(checkpoint, SECTION)(picture) != []


def test_a_detector_is_opened_from_a_folder(checkpoint: Path, tmp_path: Path) -> None:
    assert open_detector(str(checkpoint), "").labels == LABELS
    with pytest.raises(UserError, match="neither a checkpoint"):
        open_detector(str(tmp_path), "")


def test_a_name_that_is_not_registered(tracker: Tracker) -> None:
    with pytest.raises(UserError, match=r"models:/none@champion: not found in the registry"):
        open_detector("models:/none@champion", tracker.uri)
