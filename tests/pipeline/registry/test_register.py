"""Versions of a registered model, with a real MLflow on SQLite, loaded where they will be loaded."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from jobs.predict import predict
from pipeline.config.sections import METRICS, EvaluateSection, RegisterSection
from pipeline.data.labels import Category, LabelMap
from pipeline.errors import UserError
from pipeline.predict.detector import Detector
from pipeline.registry.package import REQUIREMENTS, requirements
from pipeline.registry.register import Registration, register
from pipeline.tracking.tracker import Tracker
from tests.builders import write_checkpoint, write_image

LABELS = LabelMap("contiguous", (Category(3, "cat"), Category(90, "dog")))
SECTION = EvaluateSection(short_side=40, max_side=60, max_detections=5)

LOAD = """
import json, sys
from pathlib import Path
import model, pipeline
import mlflow, pandas
mine = model
mlflow.set_tracking_uri(sys.argv[1])
picture = pandas.DataFrame({"image": [Path(sys.argv[3]).read_bytes()] * 2})
answers = []
for _ in range(2):
    loaded = mlflow.pyfunc.load_model(sys.argv[2])
    answers.append(loaded.predict(picture, params={"score_threshold": 0.001}))
    assert loaded.predict(picture, params={"score_threshold": 1.0}) == ["[]", "[]"]
assert answers[0] == answers[1]
assert sys.modules["model"] is mine
from model import MINE
assert (MINE, pipeline.MINE) == ("the user's", "the user's")
assert not {"ray", "deepspeed", "webdataset", "pycocotools"} & set(sys.modules)
print(json.dumps(answers[0]))
"""


def make_metrics(value: float) -> dict[str, Any]:
    return {name: value for name in METRICS} | {"per_category": {}}


@pytest.fixture(scope="module")
def tracker(mlflow_uri: str, tmp_path_factory: pytest.TempPathFactory) -> Tracker:
    return Tracker(mlflow_uri, "registry", "run", tmp_path_factory.mktemp("run") / "mlflow.json")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints"), LABELS)


def make_version(
    tracker: Tracker, checkpoint: Path, name: str, value: float = 0.5, val_digest: str = "val", **section: str
) -> Registration:
    config = {"name": "run", "train": {"lr": 0.1}}
    wanted = RegisterSection(model_name=name, **section)
    return register(tracker, checkpoint, make_metrics(value), val_digest, wanted, SECTION, config)


@pytest.fixture(scope="module")
def version(tracker: Tracker, checkpoint: Path) -> Registration:
    return make_version(tracker, checkpoint, "shown")


def files_of(tracker: Tracker, version: Registration, folder: Path) -> Path:
    from mlflow.artifacts import download_artifacts

    return Path(download_artifacts(artifact_uri=version.uri, dst_path=str(folder), tracking_uri=tracker.uri))


class TestVersion:
    def test_first_is_champion(self, version: Registration) -> None:
        assert (version.version, version.is_champion, version.is_new) == (1, True, True)

    def test_what_it_carries(self, tracker: Tracker, version: Registration, tmp_path: Path) -> None:
        from mlflow.models import Model

        folder = files_of(tracker, version, tmp_path)
        suffixes = {path.suffix for path in folder.rglob("*") if path.is_file()}
        assert suffixes <= {"", ".py", ".json", ".txt", ".yaml", ".safetensors"}
        assert {path.name for path in (folder / "code" / "raydetr").iterdir()} == {"model", "pipeline"}
        card = Model.load(folder)
        assert card.metadata["label_map"] == LABELS.to_json()
        assert card.metadata["config"]["train"] == {"lr": 0.1}
        assert (card.metadata["data_digest"], card.metadata["val_digest"]) == ("0123456789abcdef", "val")
        assert (card.metadata["metrics"]["AP"], card.metadata["source_run"]) == (0.5, tracker.run_id)
        assert str(card.signature.inputs) == "['image': binary (required)]"
        assert card.saved_input_example_info is not None
        assert (folder / "requirements.txt").read_text().split() == requirements()

    def test_tags_and_links(self, tracker: Tracker, version: Registration) -> None:
        made = tracker.client.get_model_version("shown", "1")
        assert made.run_id == tracker.run_id
        assert made.tags["raydetr.val_digest"] == "val"
        assert float(made.tags["raydetr.metric.AP"]) == 0.5
        logged = tracker.client.get_logged_model(made.source.removeprefix("models:/"))
        assert json.loads(logged.tags["mlflow.modelVersions"]) == [{"name": "shown", "version": "1"}]
        assert {metric.key: metric.value for metric in logged.metrics}["AP"] == 0.5
        assert tracker.client.get_run(tracker.run_id).data.tags["raydetr.registered"] == "models:/shown/1"

    def test_loads_beside_a_users_own_modules(
        self, tracker: Tracker, version: Registration, checkpoint: Path, tmp_path: Path
    ) -> None:
        for name in ("model.py", "pipeline.py"):
            (tmp_path / name).write_text('MINE = "the user\'s"\n')
        (tmp_path / "load.py").write_text(LOAD)
        picture = write_image(tmp_path / "picture.png", 50, 40)
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        result = subprocess.run(
            [sys.executable, "load.py", tracker.uri, "models:/shown@champion", picture.name],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        expected = Detector.from_checkpoint(checkpoint, SECTION)(picture.read_bytes(), 0.001)
        assert [json.loads(text) for text in json.loads(result.stdout)] == [expected, expected]
        assert len(expected) == 5

    def test_predict_by_name(self, tracker: Tracker, version: Registration, tmp_path: Path) -> None:
        write_image(tmp_path / "in" / "a.jpg")
        arguments = {"tracking_uri": tracker.uri, "score_threshold": 0.0}
        assert predict("models:/shown@champion", [tmp_path / "in"], tmp_path / "out", **arguments) == 1
        assert Image.open(tmp_path / "out" / "a.png").size == (32, 24)
        with pytest.raises(UserError, match=r"models:/none@champion: not found in the registry"):
            predict("models:/none@champion", [tmp_path / "in"], tmp_path / "out", **arguments)

    def test_requirements_are_pinned(self) -> None:
        assert [line.split("==")[0] for line in requirements()] == list(REQUIREMENTS)
        assert not any("+" in line for line in requirements())


class TestChampion:
    def test_the_same_again_is_skipped(self, tracker: Tracker, checkpoint: Path) -> None:
        first = make_version(tracker, checkpoint, "again")
        second = make_version(tracker, checkpoint, "again")
        assert (second.version, second.is_new, second.is_champion) == (first.version, False, True)

    def test_moves_only_when_better_on_the_same_split(self, tracker: Tracker, checkpoint: Path) -> None:
        def champion() -> int:
            return int(tracker.client.get_model_version_by_alias("rivals", "champion").version)

        make_version(tracker, checkpoint, "rivals", 0.5)
        worse = make_version(tracker, checkpoint, "rivals", 0.4)
        assert (worse.is_champion, champion()) == (False, 1)
        assert "AP 0.4000 is not better than its 0.5000" in worse.note
        other = make_version(tracker, checkpoint, "rivals", 0.9, val_digest="another")
        assert (other.is_champion, champion()) == (False, 1)
        assert "another validation split" in other.note
        better = make_version(tracker, checkpoint, "rivals", 0.6, metric="AP50")
        assert (better.is_champion, champion()) == (True, 4)
        assert "AP50 0.6000 is better than 0.5000 of version 1" in better.note

    def test_a_split_without_objects_makes_no_champion(self, tracker: Tracker, checkpoint: Path) -> None:
        made = make_version(tracker, checkpoint, "blind", -1.0)
        assert (made.version, made.is_champion) == (1, False)
        assert "no object on the validation split" in made.note
