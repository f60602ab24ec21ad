"""The main job as a user runs it: every step on real components, then again, then with other settings."""

import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
SMALL = {
    "dataset.synthetic": "{train_images: 24, val_images: 8, image_size: 64}",
    "shards.max_samples": 5,
    "model.hidden_dim": 32,
    "model.heads": 4,
    "model.encoder_layers": 1,
    "model.decoder_layers": 2,
    "train.epochs": 2,
    "train.global_batch": 8,
    "train.micro_batch": 4,
    "train.lr_drop_epochs": "[1.5]",
    "train.log_steps": 1,
    "train.checkpoint_epochs": 1,
    "register.gate.baseline": "false",  # two epochs teach it nothing
}


def raydetr_run(folder: Path, *options: str, **extra: object) -> subprocess.CompletedProcess[str]:
    settings = {**SMALL, "runs": folder / "runs", "dataset.root": folder / "shapes", **extra}
    arguments = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "jobs", "run", "-c", "jobs/configs/demo.yaml", *options, *arguments]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("pipeline")
    result = raydetr_run(folder)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder, result


def test_the_run_ends_with_a_table(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, result = finished
    for word in ("AP", "AP50", "raydetr-demo", "mlflow ui", str(folder / "runs" / "demo")):
        assert word in result.stdout


def test_everything_of_the_run_is_where_it_belongs(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = finished
    run = folder / "runs" / "demo"
    assert (folder / "runs" / "shards" / "shapes" / "train" / "manifest.json").is_file()
    assert json.loads((run / "checkpoints" / "checkpoint-6" / "state.json").read_text())["step"] == 6
    assert {"AP", "AP50", "per_category"} <= json.loads((run / "evaluate" / "metrics.json").read_text()).keys()


def test_one_mlflow_run_has_the_curves(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = finished
    with sqlite3.connect(folder / "runs" / "mlflow.db") as database:
        assert database.execute("select count(*), max(status) from runs").fetchone() == (1, "FINISHED")
        keys = {key for (key,) in database.execute("select distinct key from metrics")}
        points = database.execute("select count(*) from metrics where key = 'train/loss'").fetchone()[0]
        curve = database.execute("select step from metrics where key = 'val/AP50' order by step").fetchall()
        versions = database.execute("select count(*) from model_versions").fetchone()[0]
    assert {"train/loss", "train/lr_main", "val/AP"} <= keys
    assert points == 6
    assert [step for (step,) in curve] == [3, 6]
    assert versions == 1


def test_a_second_run_does_nothing_again(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = finished
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs" / "demo" / "checkpoints").rglob("*")}
    result = raydetr_run(folder)
    assert result.returncode == 0, result.stdout + result.stderr
    for step in ("shard", "train", "evaluate", "register"):
        assert f"{step}: already done" in result.stdout + result.stderr
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "runs" / "demo" / "checkpoints").rglob("*")}


def test_other_settings_under_the_same_name_are_refused(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = finished
    result = raydetr_run(folder, **{"train.lr": 1e-3})
    assert result.returncode == 2
    assert "lr: 0.0005 -> 0.001" in result.stderr


def test_more_epochs_continue_by_some_steps_alone(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = finished
    result = raydetr_run(folder, "--from", "train", "--until", "evaluate", **{"train.epochs": 3})
    assert result.returncode == 0, result.stdout + result.stderr
    assert "AP50 " in result.stdout
    for step in ("shard", "register"):
        assert f"{step}: " not in result.stdout + result.stderr
    state = folder / "runs" / "demo" / "checkpoints" / "checkpoint-9" / "state.json"
    assert json.loads(state.read_text())["step"] == 9
    with sqlite3.connect(folder / "runs" / "mlflow.db") as database:
        assert database.execute("select count(*) from runs").fetchone() == (1,)
        steps = [s for (s,) in database.execute("select step from metrics where key = 'train/loss' order by step")]
    assert steps == list(range(1, 10))
