"""Small training runs, and what they leave."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from model import DetrConfig
from pipeline import checkpoint
from pipeline.config.sections import TrainSection
from pipeline.data.manifest import Manifest
from pipeline.distributed import World
from pipeline.run_folder import RunFolder
from pipeline.train.loop import train
from pipeline.train.run import TrainJob

MODEL = {
    "backbone": "resnet_tiny",
    "backbone_norm": "group_norm",
    "hidden_dim": 32,
    "heads": 4,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "ffn_dim": 32,
    "num_queries": 10,
    "dropout": 0.1,
}
SETTINGS: dict[str, Any] = {
    "epochs": 100,
    "global_batch": 8,
    "micro_batch": 4,
    "lr": 5e-4,
    "lr_backbone": 5e-4,
    "freeze_backbone": "none",
    "loader_workers": 0,
    "log_steps": 1,
    "max_steps": 8,
    "lr_drop_epochs": (2.0,),
    "checkpoint_epochs": 1.0,
    "augment": {
        "short_sides": (56, 64), "max_side": 80, "crop_short_sides": (64,), "crop_min": 40, "crop_max": 64,
    },
}  # fmt: skip
SAMPLES = 20


def make_job(manifest: Manifest, out: Path, on_error: Any = "fail", **settings: Any) -> TrainJob:
    model = DetrConfig(num_classes=manifest.labels.num_classes, **MODEL)
    return TrainJob(
        model, TrainSection.model_validate({**SETTINGS, **settings}), manifest.folder, RunFolder(out), on_error
    )


def train_on(world: World, job: TrainJob) -> Path:
    return train(job, world)


def points(run: RunFolder) -> dict[int, dict[str, float]]:
    """The points of the curves by step."""
    records = [json.loads(line) for line in run.train_spool.read_text().splitlines()]
    assert len({record["step"] for record in records}) == len(records), "a point was written twice"
    return {record["step"]: record["metrics"] for record in records}


def losses(run: RunFolder) -> dict[int, float]:
    """The losses by step."""
    return {step: point["train/loss"] for step, point in points(run).items()}


def assert_same_weights(left: Path, right: Path) -> None:
    for name in (checkpoint.MODEL, checkpoint.OPTIMIZER):
        ours, theirs = load_file(left / name), load_file(right / name)
        assert ours.keys() == theirs.keys()
        assert not [key for key, tensor in ours.items() if not torch.equal(tensor, theirs[key])]
