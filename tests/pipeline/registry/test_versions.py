"""Versions: counted, found by alias, opened by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.predict.detector import Detector
from pipeline.registry.register import Registration
from pipeline.registry.versions import (
    download,
    find_alias,
    make_version,
    open_detector,
    open_registry,
    resolve,
    split_reference,
)
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
    assert [make_version(tracker, "counted", model_id, {"n": str(n)}, f"the {n}") for n in (1, 2)] == [1, 2]
    second = tracker.client.get_model_version("counted", "2")
    assert (second.tags["n"], second.description) == ("2", "the 2")


def test_the_champion_is_found_where_there_is_one(tracker: Tracker, version: Registration) -> None:
    assert find_alias(tracker.client, "none", "champion") is None
    found = find_alias(tracker.client, "shown", "champion")
    assert found is not None
    assert (found.name, int(found.version)) == ("shown", 1)
    make_version(tracker, "leaderless", logged_model(tracker).model_id, {}, "")
    assert find_alias(tracker.client, "leaderless", "champion") is None


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


class TestReferences:
    @pytest.mark.parametrize(
        ("reference", "expected"),
        [
            ("models:/cells@champion", ("cells", "champion")),
            ("cells/7", ("cells", "7")),
            ("cells@7", ("cells", "7")),
            ("a@b c@previous", ("a@b c", "previous")),
        ],
    )
    def test_name_an_alias_or_a_number(self, reference: str, expected: tuple[str, str]) -> None:
        assert split_reference(reference) == expected

    @pytest.mark.parametrize(
        ("reference", "message"),
        [
            ("none@champion", r"there is no registered model `none`; `raydetr models list` shows them"),
            ("shown", r"shown names no version: it must be NAME@ALIAS, such as cells@champion, or NAME/7"),
            ("shown/9", r"shown has no version 9; its versions are 1, its aliases @champion \(1\)"),
            ("shown@best", r"shown has no alias @best; its versions are 1, its aliases @champion \(1\)"),
        ],
    )
    def test_what_is_not_there_is_told(
        self, reference: str, message: str, tracker: Tracker, version: Registration
    ) -> None:
        with pytest.raises(UserError, match=f"^{message}"):
            resolve(tracker.client, reference)
        with pytest.raises(UserError, match=f"^{message}"):
            open_detector(f"models:/{reference}", tracker.uri)

    def test_no_registry_is_made_by_looking(self, tmp_path: Path) -> None:
        uri = f"sqlite:///{tmp_path}/mlflow.db"
        with pytest.raises(UserError, match="there is no registry at"), open_registry(uri):
            pass
        with (
            pytest.raises(UserError, match=r"the registry at http://127.0.0.1:9 is away"),
            open_registry("http://127.0.0.1:9") as client,
        ):
            client.search_registered_models()
        assert not list(tmp_path.iterdir())


class TestDownload:
    def test_gives_what_a_detector_is_opened_from(
        self, tracker: Tracker, version: Registration, checkpoint: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "deep" / "shown"
        download(tracker.client, resolve(tracker.client, "shown@champion"), tracker.uri, out)
        picture = write_image(tmp_path / "a.jpg").read_bytes()
        assert open_detector(str(out), "")(picture) == Detector.from_checkpoint(checkpoint, SECTION)(picture) != []
        assert [path.name for path in out.parent.iterdir()] == ["shown"]
        with pytest.raises(UserError, match="is there already"):
            download(tracker.client, resolve(tracker.client, "shown/1"), tracker.uri, out)

    def test_leaves_nothing_when_it_fails(self, tracker: Tracker, version: Registration, tmp_path: Path) -> None:
        made = tracker.client.get_model_version("shown", "1")
        gone = type(made)(name="shown", version="77", creation_timestamp=0)
        with pytest.raises(Exception, match="77"):
            download(tracker.client, gone, tracker.uri, tmp_path / "out")
        assert not list(tmp_path.iterdir())
