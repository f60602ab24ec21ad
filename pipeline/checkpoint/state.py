"""A checkpoint as it lies on the disk: its files, its state, and finding the newest one.

    <run>/checkpoints/checkpoint-<step>/
        model.safetensors      every parameter and buffer, frozen ones included, by state-dict name
        optimizer.safetensors  <parameter name>/exp_avg, /exp_avg_sq, /step of AdamW, whole, never sharded
        state.json             where training stands and what it was made with; without it there is no checkpoint

Parameters are kept in fp32 at every precision, so the weights are their own master copy.
"""

import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from model.config import DetrConfig
from pipeline.errors import UserError

FORMAT = 1

MODEL = "model.safetensors"

OPTIMIZER = "optimizer.safetensors"

STATE = "state.json"

NAME = re.compile(r"checkpoint-(\d+)")
"""Name of a checkpoint's folder."""


@dataclass(frozen=True)
class State:
    """Where a training run stands, and what it was made with: the content of state.json."""

    step: int
    """Optimizer steps done."""
    epoch: int
    """Epochs done."""
    samples: int
    """Samples of the stream that were taken, those left out as unreadable included."""
    skipped: int
    """Samples that were left out because they could not be read."""
    seeds: dict[str, int]
    """Seeds of the run by what they seed."""
    world_size: int
    """Processes that wrote it; another number may go on."""
    zero_stage: int
    """ZeRO stage that wrote it; another may go on."""
    config: dict[str, Any]
    """Sections `model` (with num_classes) and `train`, as plain values."""
    labels: dict[str, Any]
    """Label map of the data, as JSON."""
    data_digest: str
    """Digest of the manifest of the training split."""
    groups: tuple[dict[str, Any], ...]
    """Settings of the optimizer's groups at the last step: name, lr, weight_decay, betas, eps."""
    format: int = FORMAT
    """Version of the layout."""

    def detr_config(self) -> DetrConfig:
        """The architecture whose weights these are.

        Raises:
            UserError: this version does not know one of its settings.
        """
        try:
            return DetrConfig(**self.config["model"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{STATE}: its model is not one that this version knows ({error}); use the version that wrote it"
            ) from error


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints below a `checkpoints` folder, oldest first."""
    found = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found) if (path / STATE).is_file()]


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint below a `checkpoints` folder, or None."""
    return next(reversed(checkpoints(folder)), None)


def read_state(path: Path) -> State:
    """What state.json of a checkpoint says.

    Raises:
        UserError: `path` is no checkpoint, or one of another format.
    """
    file = path / STATE
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); a checkpoint folder has one") from error
    except ValueError as error:
        raise UserError(f"{file}: is not JSON ({error}); delete {path}, and the checkpoint before it is used") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise UserError(f"{file}: is not of format {FORMAT}, the one this version reads; use the version that wrote it")
    missing = {field.name for field in fields(State)} - values.keys()
    if missing:
        raise UserError(f"{file}: lacks {', '.join(sorted(missing))}; delete {path}, and the one before it is used")
    known = {field.name: values[field.name] for field in fields(State)}
    return State(**{**known, "groups": tuple(known["groups"])})


def load_model_weights(path: Path) -> dict[str, torch.Tensor]:
    """The model's state dict of a checkpoint, on the host.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        return load_file(path / MODEL)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path / MODEL}: cannot be read ({error}); delete {path} and go on from another") from error
