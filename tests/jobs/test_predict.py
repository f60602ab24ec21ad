"""Predicting with a model that is named."""

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.predict import predict
from pipeline.data.labels import Category, LabelMap
from pipeline.errors import UserError
from pipeline.predict.detector import Detector
from tests.builders import write_checkpoint, write_image

LABELS = LabelMap("contiguous", (Category(1, "cat"),))


def test_pictures_are_found_drawn_and_counted(tmp_path: Path) -> None:
    checkpoint, out = write_checkpoint(tmp_path, LABELS), tmp_path / "out"
    for name in ("a.jpg", "b.png"):
        write_image(tmp_path / "in" / name, 40, 30)
    options: dict[str, Any] = {"score_threshold": 0.0, "show_attention": 1, "queries": [5]}
    assert predict(str(checkpoint), [tmp_path / "in"], out, tracking_uri="", **options).pictures == 2
    drawn = {"a.png", "b.png", "a_query5.png", "b_query5.png", "detections.json"}
    assert {path.name for path in out.iterdir()} == drawn
    found = json.loads((out / "detections.json").read_text())
    detector = Detector.from_checkpoint(checkpoint)
    assert [entry["detections"] for entry in found] == [
        detector((tmp_path / "in" / name).read_bytes()) for name in ("a.jpg", "b.png")
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param("none.jpg", "none.jpg: no such picture", id="missing"),
        pytest.param("text.jpg", "text.jpg: these bytes are not a picture", id="not a picture"),
    ],
)
def test_bad_pictures(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("text")
    with pytest.raises(UserError, match=message):
        predict(str(write_checkpoint(tmp_path, LABELS)), [tmp_path / name], tmp_path / "out", tracking_uri="")


def test_a_table_without_a_folder(tmp_path: Path) -> None:
    image = write_image(tmp_path / "a.jpg")
    with pytest.raises(UserError, match=r"none/a\.csv: its folder does not exist; make it first"):
        predict(str(tmp_path), [image], tmp_path / "out", tracking_uri="", table=tmp_path / "none" / "a.csv")


def test_no_model(mlflow_uri: str, tmp_path: Path) -> None:
    image = write_image(tmp_path / "a.jpg")
    with pytest.raises(UserError, match="neither a checkpoint"):
        predict(str(tmp_path), [image], tmp_path / "out", tracking_uri="")
    with pytest.raises(UserError, match=r"there is no registered model `none`"):
        predict("models:/none@champion", [image], tmp_path / "out", tracking_uri=mlflow_uri)
    assert not (tmp_path / "out").exists()
