"""Predicting with a model that is named."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from jobs.cli import app
from jobs.predict import predict
from pipeline.data.labels import Category, LabelMap
from pipeline.errors import UserError
from pipeline.files import write_json
from pipeline.predict.detector import Detector
from pipeline.store import StorePath
from tests.builders import write_checkpoint, write_image
from tests.stores import web_server

LABELS = LabelMap("contiguous", (Category(1, "cat"),))


def test_pictures_are_found_drawn_and_counted(tmp_path: Path) -> None:
    checkpoint, out = write_checkpoint(tmp_path, LABELS), tmp_path / "out"
    for name in ("a.jpg", "b.png"):
        write_image(tmp_path / "in" / name, 40, 30)
    options: dict[str, Any] = {"score_threshold": 0.0, "show_attention": 1, "queries": [5]}
    assert predict(str(checkpoint), [str(tmp_path / "in")], out, tracking_uri="", **options).pictures == 2
    drawn = {"a.png", "b.png", "a_query5.png", "b_query5.png", "images.json", "detections.json"}
    assert {path.name for path in out.iterdir()} == drawn
    found = json.loads((out / "detections.json").read_text())
    detector = Detector.from_checkpoint(checkpoint)
    wanted = [entry for name in ("a.jpg", "b.png") for entry in detector((tmp_path / "in" / name).read_bytes())]
    assert [entry["score"] for entry in found] == [entry["score"] for entry in wanted]


def test_pictures_of_a_store(s3_folder: StorePath, tmp_path: Path) -> None:
    """By the command, with those of a web server, drawn as those of the disk."""
    checkpoint = write_checkpoint(tmp_path, LABELS)
    paths = [write_image(tmp_path / "in" / name, 40, 30) for name in ("a.jpg", "b.png")]
    for path in paths:
        (s3_folder / path.name).upload(path)
    outs = tmp_path / "stored", tmp_path / "local"
    with web_server(tmp_path / "in") as address:
        given = [f"{s3_folder}/", f"{address}/a.jpg"], [str(path) for path in (*paths, paths[0])]
        for images, out in zip(given, outs, strict=True):
            command = ["predict", "-m", str(checkpoint), "--out", str(out), "--score-threshold", "0", *images]
            result = CliRunner().invoke(app, [*command, "--batch-size", "2", "--device", "cpu"])
            assert result.exit_code == 0, result.output
    stored, local = ((out / "detections.json").read_bytes() for out in outs)
    assert stored == local
    assert [image["file_name"] for image in json.loads((outs[0] / "images.json").read_text())["images"]] == [
        f"{s3_folder}/a.jpg", f"{s3_folder}/b.png", f"{address}/a.jpg"
    ]  # fmt: skip
    for name in ("a.png", "b.png", "a_.png"):
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes()


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
        predict(str(write_checkpoint(tmp_path, LABELS)), [str(tmp_path / name)], tmp_path / "out", tracking_uri="")


def test_a_table_without_a_folder(tmp_path: Path) -> None:
    image = write_image(tmp_path / "a.jpg")
    with pytest.raises(UserError, match=r"none/a\.csv: its folder does not exist; make it first"):
        predict(str(tmp_path), [str(image)], tmp_path / "out", tracking_uri="", table=tmp_path / "none" / "a.csv")


@pytest.mark.parametrize(
    ("given", "out", "table"),
    [
        pytest.param("images.json", "in", None, id="images"),
        pytest.param("detections.json", "in", None, id="detections"),
        pytest.param("listed.json", "out", "listed.json", id="table over the COCO file"),
        pytest.param("listed.json", "out", "a.jpg", id="table over its picture"),
        pytest.param("", "out", "a.jpg", id="table over a folder's picture"),
    ],
)
def test_nothing_given_is_written_over(given: str, out: str, table: str | None, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write_image(folder / "a.jpg")
    if given:
        write_json(folder / given, {"images": [{"id": 1, "file_name": "a.jpg"}]})
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match=r"was given, and would be written over; give another --(out|csv)"):
        predict(
            str(write_checkpoint(tmp_path, LABELS)), [str(folder / given)], tmp_path / out, tracking_uri="",
            table=folder / table if table else None,
        )  # fmt: skip
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_an_address_of_images_that_is_none(tmp_path: Path) -> None:
    command = ["predict", "-m", "none", "--out", str(tmp_path), "--images-in", "ftp://host/x", "a.json"]
    error = CliRunner().invoke(app, command).exception
    assert isinstance(error, UserError)
    assert str(error).startswith("--images-in ftp://host/x: must be a path or an address")


def test_no_model(mlflow_uri: str, tmp_path: Path) -> None:
    image = write_image(tmp_path / "a.jpg")
    with pytest.raises(UserError, match="neither a checkpoint"):
        predict(str(tmp_path), [str(image)], tmp_path / "out", tracking_uri="")
    with pytest.raises(UserError, match=r"there is no registered model `none`"):
        predict("models:/none@champion", [str(image)], tmp_path / "out", tracking_uri=mlflow_uri)
    assert not (tmp_path / "out").exists()


def test_no_gpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    image = write_image(tmp_path / "a.jpg")
    with pytest.raises(UserError, match="no GPU here; give --device cpu"):
        predict(str(tmp_path), [str(image)], tmp_path / "out", tracking_uri="", device="cuda")
