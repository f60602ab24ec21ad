"""jobs/plan.py: what the command shows and measures."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from jobs.cli import app
from jobs.plan import make_plan
from pipeline.config.load import load_config
from pipeline.errors import UserError

CONFIGS = Path(__file__).resolve().parents[2] / "jobs" / "configs"
COCO = ("-c", str(CONFIGS / "coco_r50.yaml"), "--images", "118287")


def plan(*words: str) -> Result:
    return CliRunner().invoke(app, ["plan", *words])


def planned(*words: str) -> dict[str, Any]:
    result = plan(*words, "--json")
    assert result.exit_code == 0, result.output
    content: dict[str, Any] = json.loads(result.stdout)
    return content


def test_the_published_schedule() -> None:
    told = planned(*COCO, "--gpu", "V100", "--price", "2")
    assert (told["steps"], told["parameters"], told["trained"]) == (184_824, 40_069_665, 39_847_265)
    one, eight, *others = told["rows"]
    assert one["gpu_hours"] == pytest.approx(325, rel=0.1), "arXiv 2010.04159, table 1"
    assert one["cost"] == pytest.approx(2 * one["gpu_hours"])
    assert eight["hours"] == pytest.approx(one["hours"] / 8, rel=0.05)
    assert [row["gpus"] for row in told["rows"]] == [1, 8, 64, 256]
    assert all("16 micro-batches of 2 do not divide" in row["problem"] for row in others)
    assert not any("hours" in row for row in others)
    assert eight["memory"][3]["moments"] < eight["memory"][0]["moments"] / 7
    assert told["checkpoints"]["written"] == 50


def test_a_table_for_people() -> None:
    result = plan(*COCO, "--set", "train.global_batch=512", "--nodes", "8", "--set", "train.zero_stage=1")
    assert result.exit_code == 0, result.output
    assert "512 images at every number of GPUs (256 micro-batches of 2), learning rate 0.0002" in result.stdout
    assert "Assumed: 0.3 of what a H100 computes (fp32) and then moves at most by its data sheet" in result.stdout
    (row,) = [line.split() for line in result.stdout.splitlines() if line.startswith("64 ")]
    assert row[:5] == ["64", "8", "4", "x", "2"]
    assert "\n1 (set)  " in result.stdout


def test_a_card_that_is_too_small() -> None:
    result = plan(*COCO, "--gpu", "V100", "--gpus", "2", "--set", "train.micro_batch=16", "--set", "cluster.workers=2")
    assert result.stdout.count(", too much") == 5, "in the row, and at every stage"


def test_measured_times_take_the_place_of_assumed_ones(tmp_path: Path) -> None:
    demo = ("-c", str(CONFIGS / "demo.yaml"), "--set", f"runs={tmp_path / 'runs'}", "--set", "model.decoder_layers=1")
    profile = tmp_path / "made" / "profile.json"
    result = plan(*demo, "--measure", str(profile))
    assert result.exit_code == 0, result.output
    assert "on CPU, 1 thread" in result.stdout
    assert not (tmp_path / "runs").exists()
    told = planned(*demo, "--profile", str(profile), "--gpus", "2")
    assert (told["gpu"], told["profile"]) == (None, "CPU, 1 thread")
    points = json.loads(profile.read_text())["points"]
    assert told["rows"][0]["compute"] == pytest.approx(points[-1]["seconds"], rel=0.5)
    memory = told["rows"][0]["memory"][0]
    assert memory["activations"] == pytest.approx(points[-1]["activations"], rel=0.1), "counted, and of real tensors"
    config = load_config(CONFIGS / "demo.yaml", ["model.decoder_layers=1"])
    with pytest.raises(UserError, match="--gpu H100: the profile was measured on CPU, 1 thread"):
        make_plan(config, profile=profile, gpu="H100")
    with pytest.raises(UserError, match=r"model\.decoder_layers: 1 -> 3"):
        make_plan(load_config(CONFIGS / "demo.yaml"), profile=profile)


def test_measuring_asks_for_a_gpu_that_is_configured(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one here")
    result = plan(*COCO, "--measure", str(tmp_path / "profile.json"))
    assert isinstance(result.exception, UserError)
    assert "cluster.device is cuda, but torch finds no GPU here" in str(result.exception)


def test_a_profile_is_made_or_read() -> None:
    result = plan(*COCO, "--measure", "a.json", "--profile", "b.json")
    assert isinstance(result.exception, UserError)
    assert "give one of them" in str(result.exception)


def test_classes_are_asked_for_where_nothing_tells_them() -> None:
    config = load_config(CONFIGS / "coco_r50.yaml", ["dataset.labels=contiguous"])
    with pytest.raises(UserError, match="say it with --classes"):
        make_plan(config, images=100)
    assert make_plan(config, images=100, classes=4).model.num_classes == 4
