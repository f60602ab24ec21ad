"""jobs/cli.py: exit codes, one clear line for wrong input, help with examples."""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jobs.cli import predict
from pipeline.predict.answers import THRESHOLD
from tests.builders import make_annotation, make_manifest
from tests.pipeline.shard.test_foreign import yolo_ultralytics

PROJECT = Path(__file__).resolve().parents[2]
COMMANDS = [
    *("run", "runs", "sweep", "shard", "train", "evaluate", "register", "predict"),
    *("synth", "import", "convert", "export", "config", "inspect", "doctor", "plan", "track sync", "report", "replay"),
    *(f"models {word}" for word in ("list", "show", "compare", "promote", "rollback", "pin", "unpin", "download")),
    *("submit", "jobs list", "jobs status", "jobs logs", "jobs stop", "jobs resume"),
]


SECONDS = {"ray", "torch", "deepspeed", "mlflow", "matplotlib", "scipy"}
"""Packages of which each takes a good part of a second to import, or more."""


def raydetr(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jobs", *arguments]
    return subprocess.run(command, cwd=folder or PROJECT, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command: str) -> None:
    result = raydetr(*command.split(), "--help")
    assert result.returncode == 0
    assert f"raydetr {command}" in result.stdout.split("Example:")[1]


@pytest.mark.parametrize(
    ("module", "needed"),
    [("jobs.cli", set()), ("jobs.submit", {"ray"}), ("jobs.shard", {"ray"}), ("jobs.worker_group", {"ray"}),
     ("jobs.run", {"ray", "torch"})],
)  # fmt: skip
def test_nothing_that_takes_seconds_is_imported_before_it_is_needed(module: str, needed: set[str]) -> None:
    code = f"import sys, {module}; print(*{SECONDS} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, check=True, capture_output=True, text=True)
    assert set(result.stdout.split()) <= needed


def test_wrong_key_is_one_line_and_exit_code_2() -> None:
    result = raydetr("run", "-c", "jobs/configs/demo.yaml", "--set", "train.epoch=3")
    assert result.returncode == 2
    assert result.stderr == "error: jobs/configs/demo.yaml: unknown key `train.epoch`; did you mean `train.epochs`?\n"


def test_debug_shows_the_traceback() -> None:
    result = raydetr("--debug", "config", "-c", "nowhere.yaml")
    assert result.returncode == 2
    assert "Traceback" in result.stderr


def test_config_prints_what_can_be_read_again(tmp_path: Path) -> None:
    result = raydetr("config", "-c", "jobs/configs/demo.yaml", "--set", "train.epochs=3")
    assert yaml.safe_load(result.stdout)["train"]["epochs"] == 3
    (tmp_path / "again.yaml").write_text(result.stdout)
    assert raydetr("config", "-c", str(tmp_path / "again.yaml")).stdout == result.stdout


def test_config_prints_what_deepspeed_gets() -> None:
    own = "train.deepspeed={zero_optimization: {overlap_comm: true}}"
    result = raydetr(
        "config", "-c", "jobs/configs/demo.yaml", "--deepspeed", "--set", "train.zero_stage=2", "--set", own
    )
    settings = json.loads(result.stdout)
    assert settings["zero_optimization"]["stage"] == 2
    assert settings["zero_optimization"]["overlap_comm"] is True
    assert settings["train_micro_batch_size_per_gpu"] == 4


def test_an_address_where_no_ray_answers(tmp_path: Path) -> None:
    arguments = ["--set", f"runs={tmp_path}", "--set", "cluster.address=127.0.0.1:1"]
    result = raydetr("run", "-c", "jobs/configs/demo.yaml", *arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("error: cluster.address 127.0.0.1:1: no Ray answers")
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_doctor_reports_packages_and_the_operator() -> None:
    result = raydetr("doctor", "--json")
    found = {finding["what"]: finding["state"] for finding in json.loads(result.stdout)}
    assert result.returncode == 0
    assert found["torch"] == found["ray"] == "ok"
    assert "attention operator" in found


def test_doctor_fails_where_no_ray_answers() -> None:
    result = raydetr("doctor", "--address", "127.0.0.1:1")
    assert result.returncode == 1
    assert "no Ray answers" in result.stdout


def test_synth_draws_a_dataset(tmp_path: Path) -> None:
    result = raydetr("synth", str(tmp_path / "shapes"), "--train-images", "3", "--val-images", "2")
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "shapes").rglob("*.jpg")) + list((tmp_path / "shapes").rglob("*.png"))) == 5


def test_import_ends_with_a_configuration(tmp_path: Path) -> None:
    yolo_ultralytics(tmp_path / "yolo")
    result = raydetr("import", "yolo", str(tmp_path / "yolo"), "--out", str(tmp_path / "cells"))
    assert result.returncode == 0, result.stderr
    counts, config = result.stdout.split("\n\nA configuration for it:\n\n")
    assert counts == f"{tmp_path}/cells: 3 classes\ntrain: 3 images, 3 objects\nval: 1 images, 1 objects"
    (tmp_path / "cells.yaml").write_text(config)
    assert raydetr("config", "-c", str(tmp_path / "cells.yaml")).returncode == 0
    again = raydetr("import", "yolo", str(tmp_path / "yolo"), "--out", str(tmp_path / "cells"))
    assert again.returncode == 2
    assert again.stderr == f"error: {tmp_path}/cells: is there already; delete it, or choose another --out\n"


def test_tars_are_imported_with_the_names_of_their_categories(tmp_path: Path) -> None:
    for split, first in (("train", 1), ("val", 4)):
        make_manifest(tmp_path, range(first, first + 3), [make_annotation(1, first)], split=split)
    names = (tmp_path / "annotations" / "train.json").rename(tmp_path / "names.json")
    for path in (tmp_path / "shards").glob("*/[im]*"):
        path.unlink()
    out = ("--out", str(tmp_path / "cells"), "--categories", str(names))
    result = raydetr("import", "webdataset", str(tmp_path / "shards"), *out)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(
        f"{tmp_path}/cells: 3 classes\ntrain: 3 images, 1 objects\nval: 3 images, 1 objects"
    )


def test_files_are_scored_without_a_config(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "cocoapi_val2014_100"
    result = raydetr(
        "evaluate",
        "--annotations", str(folder / "instances_val2014_100.json"),
        "--detections", str(folder / "instances_val2014_fakebbox100_results.json"),
        "--out", str(tmp_path), "--verify",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "metrics.json").read_text())["AP"] == 0.5045806987249628


def test_masks_are_scored(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "cocoapi_val2014_100"
    result = raydetr(
        "evaluate",
        "--annotations", str(folder / "instances_val2014_100.json"),
        "--detections", str(folder / "instances_val2014_fakesegm100_results.json"),
        "--out", str(tmp_path), "--iou-type", "segm",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "metrics.json").read_text())["AP"] == 0.3195452758576433


def test_the_score_of_a_run_is_verified_by_a_key() -> None:
    result = raydetr("evaluate", "-c", "jobs/configs/demo.yaml", "--verify")
    assert result.returncode == 2
    assert "evaluate.verify" in result.stderr


def test_a_file_where_a_folder_is_wanted(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "cocoapi_val2014_100"
    (tmp_path / "file").touch()
    result = raydetr(
        "evaluate", "--annotations", str(folder / "instances_val2014_100.json"),
        "--detections", str(folder / "instances_val2014_fakebbox100_results.json"),
        "--out", str(tmp_path / "file"),
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr == f"error: {tmp_path / 'file'}: cannot be made a folder (File exists); choose another name\n"


def test_evaluate_wants_all_three_files(tmp_path: Path) -> None:
    result = raydetr("evaluate", "--annotations", "x.json", "--out", str(tmp_path))
    assert result.returncode == 2
    assert "--detections" in result.stderr


@pytest.mark.parametrize(
    "more",
    [("-c", "jobs/configs/demo.yaml", "--annotations", "a.json"), ("-c", "jobs/configs/demo.yaml", "--verify"), ()],
    ids=["a file", "a check", "no run"],
)
def test_a_run_alone_is_followed(more: tuple[str, ...]) -> None:
    result = raydetr("evaluate", "--follow", *more)
    assert result.returncode == 2
    assert (
        result.stderr
        == "error: --follow is for the checkpoints of a run: give -c, and --set, with it and nothing else\n"
    )


def test_weights_are_scored_with_a_config_into_a_folder() -> None:
    result = raydetr("evaluate", "-c", "jobs/configs/demo.yaml", "--weights", "w.pth")
    assert result.returncode == 2
    assert "takes -c, --weights and --out together" in result.stderr


def test_a_query_is_for_the_attention(tmp_path: Path) -> None:
    result = raydetr("predict", "-m", str(tmp_path), "--out", str(tmp_path / "out"), "--query", "3", "a.jpg")
    assert result.returncode == 2
    assert "--show-attention" in result.stderr


def test_predict_takes_the_threshold_of_a_served_model() -> None:
    assert inspect.signature(predict).parameters["score_threshold"].default == THRESHOLD
