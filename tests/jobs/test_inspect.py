"""jobs/inspect.py: the size and cost of a configured network."""

from pathlib import Path

import pytest

from jobs.inspect import inspect_model
from pipeline.config.load import load_config
from pipeline.errors import UserError
from tests.builders import make_manifest

CONFIGS = Path(__file__).resolve().parents[2] / "jobs" / "configs"


def test_a_published_network() -> None:
    found = inspect_model(load_config(CONFIGS / "coco_r50_two_stage.yaml"))
    assert found["network"] == "deformable_detr, resnet50, 91 logits"
    assert (found["parameters"], found["trained"], found["tensors"]) == ("41,181,529", "40,959,129", "630")
    assert found["GFLOPs"].endswith("(multiply-adds of one image of 800 x 1101)")


def test_classes_come_from_the_shards(tmp_path: Path) -> None:
    make_manifest(tmp_path)
    config = load_config(CONFIGS / "demo.yaml", [f"shards.out={tmp_path / 'shards'}"])
    assert inspect_model(config)["network"] == "deformable_detr, resnet_tiny, 3 logits"
    assert inspect_model(config, classes=7)["network"].endswith("7 logits")


def test_without_shards_the_number_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--classes"):
        inspect_model(load_config(CONFIGS / "demo.yaml", [f"shards.out={tmp_path}"]))
