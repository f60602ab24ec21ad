"""`raydetr export`, as it is typed."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from jobs.cli import app
from jobs.export import read_size
from pipeline.data.labels import Category, LabelMap
from pipeline.errors import UserError
from pipeline.registry.catalogue import show_model
from pipeline.registry.versions import download, open_detector, open_registry, resolve
from pipeline.store import StorePath
from pipeline.tracking.tracker import Tracker
from tests.builders import write_checkpoint
from tests.pipeline.registry.registered import register_some

LABELS = LabelMap("contiguous", (Category(1, "cat"),))
CONFIG = """
name: small
runs: {runs}
dataset: {{root: ., train: {{annotations: a.json, images: .}}, val: {{annotations: a.json, images: .}}}}
evaluate: {{short_side: 70, max_side: 90, max_detections: 3}}
"""


def export(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["export", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def write_config(folder: Path) -> Path:
    (folder / "small.yaml").write_text(CONFIG.format(runs=folder))
    return folder / "small.yaml"


def test_the_newest_checkpoint_of_a_run(tmp_path: Path) -> None:
    for step in (5, 7):
        newest = write_checkpoint(tmp_path / "small" / "checkpoints", LABELS, step)
    out = tmp_path / "small.pt2"
    told = export("-c", write_config(tmp_path), "--to", "torch", "--out", out, "--size", "70x90")
    assert told.startswith(f"{newest} to {out}: torch, ")
    assert "takes one image of 70x90; finds what the detector finds, boxes within " in told
    boxes, _, labels = torch.export.load(out).module()(torch.zeros(1, 3, 70, 90, dtype=torch.uint8))
    assert boxes.shape == (1, 3, 4)  # evaluate.max_detections
    assert labels.tolist() == [[1, 1, 1]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--dynamic"], "give a detector with --checkpoint, or a run with -c", id="no detector"),
        pytest.param(["--checkpoint", "."], "give one of --size HxW.*and --dynamic", id="no size"),
        pytest.param(
            ["--checkpoint", ".", "--dynamic", "--size", "80x80"], "give one of --size HxW.*and --dynamic", id="both"
        ),
        pytest.param(["--checkpoint", ".", "--dynamic", "--set", "a=b"], "--set changes a configuration", id="set"),
        pytest.param(["--checkpoint", ".", "--dynamic"], "neither a checkpoint", id="not a checkpoint"),
        pytest.param(["--checkpoint", ".", "--dynamic", "--attach"], "--attach adds.*models:/NAME@ALIAS", id="attach"),
    ],
)
def test_wrong_input(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        export("--to", "torch", "--out", tmp_path / "a.pt2", *arguments)


def test_the_newest_checkpoint_of_a_run_in_a_store(s3_folder: StorePath, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, LABELS, 7)
    stored = s3_folder / "small" / "checkpoints" / checkpoint.name
    for file in checkpoint.iterdir():
        (stored / file.name).upload(file)
    config = write_config(tmp_path)
    in_store = f"runs: {s3_folder}\ntracking: {{uri: 'http://127.0.0.1:1'}}"
    config.write_text(config.read_text().replace(f"runs: {tmp_path}", in_store))
    out = tmp_path / "small.pt2"
    assert export("-c", config, "--to", "torch", "--out", out, "--size", "70x90").startswith(f"{stored} to {out}: ")


def test_a_run_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"checkpoints: no checkpoint yet; train first, or give a --checkpoint"):
        export("-c", write_config(tmp_path), "--to", "torch", "--out", tmp_path / "a.pt2", "--dynamic")


@pytest.mark.parametrize("size", ["800", "800x", "800x1066x3", "axb", "-800x600", "8OOx600", "800X600"])
def test_what_is_no_size(size: str) -> None:
    with pytest.raises(UserError, match=r"must be HEIGHTxWIDTH in pixels, such as 800x1344"):
        read_size(size)


def test_height_stands_before_width() -> None:
    assert read_size("800x1066") == (800, 1066)


def test_a_file_is_added_to_a_registered_version(mlflow_uri: str, tmp_path: Path) -> None:
    tracker = Tracker(mlflow_uri, "exports", "run", tmp_path / "mlflow.json")
    register_some(tracker, write_checkpoint(tmp_path, LABELS), "exported")
    words = ["--checkpoint", "models:/exported@champion", "--to", "torch", "--size", "70x90", "--attach"]
    words += ["--tracking-uri", mlflow_uri]
    told = export(*words, "--out", tmp_path / "small.pt2")
    with open_registry(mlflow_uri) as client:
        version = resolve(client, "exported/1")
        download(client, version, mlflow_uri, tmp_path / "all")
        (shown,) = show_model(client, "exported")["versions"]
    assert (tmp_path / "all" / "exports" / "small.pt2").read_bytes() == (tmp_path / "small.pt2").read_bytes()
    assert told == f"models:/exported/1 to {tmp_path}/small.pt2: {shown['exports']['small.pt2']}\n"
    assert open_detector("models:/exported/1", mlflow_uri).labels == LABELS
    (tmp_path / "small.pt2").unlink()
    with pytest.raises(UserError, match=r"exported version 1 has a small\.pt2 already; choose another name for --out"):
        export(*words, "--out", tmp_path / "small.pt2")
    with pytest.raises(UserError, match=r"a b\.pt2: the name of a version's file has letters"):
        export(*words, "--out", tmp_path / "a b.pt2")
    assert not (tmp_path / "small.pt2").exists()
