"""A checkpoint as it lies on the disk: its files and its state, and whether they are as they were written.

    <run>/checkpoints/checkpoint-<step>/
        model.safetensors      every parameter and buffer, frozen ones included, by state-dict name
        optimizer.safetensors  <parameter name>/exp_avg, /exp_avg_sq, /step of AdamW, whole, never sharded
        ema.safetensors        with train.ema: model.safetensors with the averages in place of the trained parameters
        state.json             where training stands and what it was made with; without it there is no checkpoint

Parameters are kept in fp32 at every precision, so the weights are their own master copy. state.json has the sha256 of
the other files, and a digest of its own content.
"""

import json
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from model.config import DetrConfig
from pipeline.config.sections import LabelKind, Section, TrainSection
from pipeline.config.values import digest
from pipeline.errors import UserError
from pipeline.files import sha256_of
from pipeline.log import get_logger

FORMAT = 1

MODEL = "model.safetensors"

OPTIMIZER = "optimizer.safetensors"

EMA = "ema.safetensors"

STATE = "state.json"

DIGEST = "digest"
"""Key of state.json: the digest of all its other keys."""

NAME = re.compile(r"checkpoint-(\d+)")
"""Name of a checkpoint's folder."""

Count = Annotated[int, Field(ge=0)]
Parsed = TypeVar("Parsed", bound=BaseModel)

logger = get_logger(__name__)


class DamagedError(UserError):
    """A checkpoint that is not as it was written, or not all there."""


@dataclass(frozen=True)
class Scaling:
    """Where the scale of the loss of fp16 training stands."""

    factor: Annotated[float, Field(ge=1)] = 2.0**16
    """What the loss is multiplied by."""
    steady: Count = 0
    """Steps since it changed."""
    overflows: Count = 0
    """Steps that were left out since the gradient overflowed; the optimizer has not counted them."""


@dataclass(frozen=True)
class State:
    """Where a training run stands, and what it was made with: the content of state.json."""

    step: Count
    """Optimizer steps done."""
    epoch: Count
    """Epochs done."""
    samples: Count
    """Samples of the stream that were taken, those left out as unreadable included."""
    skipped: Count
    """Samples that were left out because they could not be read."""
    seeds: dict[str, int]
    """Seeds of the run by what they seed."""
    world_size: Annotated[int, Field(ge=1)]
    """Processes that wrote it; another number may go on."""
    zero_stage: Annotated[int, Field(ge=0, le=3)]
    """ZeRO stage that wrote it; another may go on."""
    config: dict[str, Any]
    """Sections `model` (with num_classes) and `train`, as plain values."""
    labels: dict[str, Any]
    """Label map of the data, as JSON."""
    data_digest: str
    """Digest of the manifest of the training split."""
    groups: tuple[dict[str, Any], ...]
    """Settings of the optimizer's groups at the last step: name, lr, weight_decay, betas, eps."""
    scaling: Scaling | None = None
    """Of the loss; None but in fp16."""
    files: dict[str, str] = field(default_factory=dict)
    """sha256 of the other files by name; empty in a checkpoint from before they were kept."""
    format: int = FORMAT
    """Version of the layout."""

    @property
    def updates(self) -> int:
        """Steps that the optimizer has done."""
        return self.step - (self.scaling.overflows if self.scaling else 0)

    @property
    def weights(self) -> str:
        """Name of the file of the weights that are evaluated and served: the averages, where the run keeps them."""
        return MODEL if self.config["train"].get("ema") is None else EMA

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the files beside state.json."""
        return tuple(dict.fromkeys((MODEL, OPTIMIZER, self.weights)))

    def detr_config(self, source: Path | str = STATE) -> DetrConfig:
        """The architecture whose weights these are; `source` names the file in errors.

        Raises:
            UserError: this version does not know one of its settings, or its value.
        """
        return _parsed(_Model, {"model": self.config["model"]}, source, "config").model

    def train_section(self, source: Path | str = STATE) -> TrainSection:
        """How it was trained; a setting that is newer than the checkpoint has its default, whose effect it had.

        Raises:
            UserError: this version does not know one of its settings, or its value.
        """
        return _parsed(TrainSection, self.config["train"], source, "config.train")

    def sizes(self, source: Path | str = STATE) -> tuple[int, int]:
        """The greatest short side that it was trained at, and the most pixels of a long side.

        Raises:
            UserError: they are missing, or are none.
        """
        augment = _parsed(_Sizes, self.config["train"], source, "config.train").augment
        return max(augment.short_sides), augment.max_side


_STATE = TypeAdapter(State)


class _Model(Section):
    model: DetrConfig


class _SizesOfAugment(BaseModel):
    short_sides: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]
    max_side: Annotated[int, Field(ge=1)]


class _Sizes(BaseModel):
    augment: _SizesOfAugment


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class _Category(_Strict):
    id: int
    name: str


class _Labels(_Strict):
    kind: LabelKind
    categories: list[_Category]


class _Sections(_Strict):
    model: dict[str, Any]
    train: dict[str, Any]


class _Nested(_Strict):
    """What must lie within the fields of a state that are plain dictionaries."""

    config: _Sections
    labels: _Labels


def _parsed(kind: type[Parsed], values: dict[str, Any], source: Path | str, prefix: str) -> Parsed:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{source}: {_problems(error, prefix)}; use the version that wrote it") from None


def _problems(error: ValidationError, prefix: str = "") -> str:
    """Every field that is wrong, and what is wrong with it; the missing ones together."""
    missing, lines = [], []
    for problem in error.errors(include_url=False):
        name = ".".join(str(part) for part in (prefix, *problem["loc"]) if part != "")
        if problem["type"] == "missing":
            missing.append(name)
        elif problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            lines.append(f"{name} is a setting that this version does not know")
        else:
            lines.append(f"{name}: {problem['msg']}")
    lacks = [f"lacks {', '.join(sorted(missing))}"] if missing else []
    return "; ".join([*lacks, *lines])


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints below a `checkpoints` folder, oldest first; what is in their files is not looked at."""
    found = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found) if (path / STATE).is_file()]


def latest(folder: Path) -> Path | None:
    """The newest of `checkpoints`, or None."""
    return next(reversed(checkpoints(folder)), None)


def read_state(path: Path) -> State:
    """What state.json of a checkpoint says.

    Raises:
        DamagedError: its content is not as it was written, or a field is missing or of another type.
        UserError: `path` is no checkpoint, or one of another format.
    """
    file = path / STATE
    try:
        text = file.read_text(encoding="utf-8")
        values = json.loads(text)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); a checkpoint folder has one") from error
    except ValueError as error:
        raise DamagedError(f"{file}: is not JSON ({error}); use another checkpoint") from None
    _check_content(file, values)
    try:
        state = _STATE.validate_json(text, strict=True)
        _Nested.model_validate_json(text)
    except ValidationError as error:
        raise DamagedError(f"{file}: {_problems(error)}; use another checkpoint") from None
    name = NAME.fullmatch(path.name)
    if name is not None and int(name[1]) != state.step:
        raise DamagedError(f"{file}: step {state.step} is not that of the folder's name; use another checkpoint")
    return state


def _check_content(file: Path, values: Any) -> None:
    """Refuse a state that is not as it was written, or of another format."""
    other_format = f"{file}: is not of format {FORMAT}, the one this version reads; use the version that wrote it"
    if not isinstance(values, dict):
        raise DamagedError(other_format)
    content = {key: value for key, value in values.items() if key != DIGEST}
    if (DIGEST in values or values.get("files")) and values.get(DIGEST) != digest(content):
        raise DamagedError(f"{file}: is not as it was written, its {DIGEST} is another; use another checkpoint")
    if values.get("format") != FORMAT:
        raise UserError(other_format)


def checked_sum(path: Path, state: State, name: str) -> str:
    """The sha256 of one of a checkpoint's files, which must be as it was written.

    Args:
        path: folder of the checkpoint.
        state: its state; where it has no sums, the file must only be whole.
        name: of the file, one of `State.names`.

    Raises:
        DamagedError: the file is missing, or not as it was written.
        UserError: it cannot be read.
    """
    file = path / name
    try:
        found = sha256_of(file)
        if not state.files:
            _tell_unchecked(path)
            safe_open(file, framework="pt")
    except (FileNotFoundError, IsADirectoryError):
        raise DamagedError(f"{file}: is missing; use another checkpoint") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from error
    except SafetensorError as error:
        raise DamagedError(f"{file}: is not whole ({error}); use another checkpoint") from None
    if state.files and found != state.files.get(name):
        raise DamagedError(f"{file}: is not as it was written, {STATE} has another sha256; use another checkpoint")
    return found


@cache
def _tell_unchecked(path: Path) -> None:
    logger.info("%s is from before sums were kept: its files are not checked", path)


def weights_in(source: Path) -> Path:
    """What to read weights from: the file of a checkpoint, which must be as it was written; anything else as it is.

    Raises:
        UserError: as `read_state` and `checked_sum`.
    """
    if not (source / STATE).is_file():
        return source
    state = read_state(source)
    checked_sum(source, state, state.weights)
    return source / state.weights


def load_model_weights(path: Path, name: str = MODEL) -> dict[str, torch.Tensor]:
    """The model's state dict of a checkpoint, on the host; `name` is `MODEL` or `EMA`.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        return load_file(path / name)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path / name}: cannot be read ({error}); delete {path} and go on from another") from error
