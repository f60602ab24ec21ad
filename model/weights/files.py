"""Weights in and out of files: the only module of `model` that touches a disk or the network.

Read and written are our safetensors files (and checkpoint folders that hold one), the original's checkpoints and HF's
folders (see `names`); for the backbone, torchvision's ResNets and Swins of the official release and of transformers. A
file is checked whole before the first tensor of the model changes, so a refused file leaves the model as it was.
Nothing is unpickled but plain values.
"""

import argparse
import hashlib
import json
import os
import pickle
import re
import shutil
import stat
import urllib.error
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from model.backbones.backbone import Backbone
from model.backbones.swin import Swin
from model.backbones.vit import ViT
from model.config import DetrConfig
from model.weights.architecture import check_original, hf_config, notes_of_args, notes_of_hf
from model.weights.backbones import BACKBONE_FORMATS, recognise_backbone
from model.weights.fit import (
    IGNORED,
    TRAINING_ONLY,
    LoadReport,
    Weights,
    fit,
    fit_backbone,
    some,
    unique_tensors,
)
from model.weights.names import FORMATS, recognise, to_foreign, to_own

FOLDER_FILE = "model.safetensors"
FOLDER_FILES = (FOLDER_FILE, f"{FOLDER_FILE}.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""What a folder of weights is looked through for, in this order: whole or in parts, safe or pickled."""
CONFIG_FILE = "config.json"
IMAGENET_URL = "https://download.pytorch.org/models/"
IMAGENET_FILES = {
    "resnet18": "resnet18-f37072fd.pth",
    "resnet34": "resnet34-b627a593.pth",
    "resnet50": "resnet50-0676ba61.pth",
    "resnet101": "resnet101-63fe2227.pth",
    "resnext101_64x4d": "resnext101_64x4d-173b62eb.pth",
}
"""torchvision's IMAGENET1K_V1, which the original trained from; a name ends in the first digits of its sha256."""

_RELEASES: dict[type[nn.Module], str] = {
    Swin: "https://github.com/microsoft/Swin-Transformer",
    ViT: "https://github.com/facebookresearch/dinov2",
}
"""Where published files are that no digest is known of."""
_HASHED_NAME = re.compile(r"-([0-9a-f]{8,64})\.[a-z]+$")


class BackboneOnlyError(ValueError):
    """What should be a detector's weights is a backbone's, which `load_backbone` takes."""


def export_weights(
    model: nn.Module, path: str | Path, format: str = "raydetr", class_names: Sequence[str] | None = None
) -> None:
    """Write a model's weights; file or folder appears whole or not at all.

    Args:
        model: the detector; what training alone has is left out.
        path: the file, or for `hf` the folder, which must not be there or be empty; what it lies in must exist.
        format: `raydetr`, a safetensors file with the model's names, each tensor once, and the architecture in its
            metadata; `original`, a `.pth` file that the original's `--resume` takes, every head under all its names;
            `hf`, a folder for `from_pretrained` of `DeformableDetrForObjectDetection` or `DetrForObjectDetection`.
        class_names: for `hf`, names of the classes by logit.

    Raises:
        ValueError: the format is unknown, or its reader would compute something else.
    """
    if format not in FORMATS:
        raise ValueError(f'cannot write the weights format "{format}": choose {", ".join(FORMATS)}')
    path, trained = Path(path), model.config
    assert isinstance(trained, DetrConfig)
    config = trained.at_inference()
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        if format == "raydetr":
            metadata = {"config": json.dumps(asdict(config))}  # one entry: safetensors writes several in any order
            save_tensors(_written(unique_tensors(model)), partial, metadata)
        elif format == "original":
            _write_original(model, config, partial)
        else:
            _write_hf(model, config, partial, class_names)
        os.replace(partial, path)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        partial.unlink(missing_ok=True)


def _write_original(model: nn.Module, config: DetrConfig, path: Path) -> None:
    check_original(config)
    tensors = to_foreign(_written(model.state_dict()), "original", config.arch)
    torch.save({"model": tensors, "raydetr": asdict(config)}, path)


def _write_hf(model: nn.Module, config: DetrConfig, folder: Path, class_names: Sequence[str] | None) -> None:
    settings = hf_config(config, class_names)
    tensors = to_foreign(_written(model.state_dict()), "hf", config.arch)
    folder.mkdir()
    # transformers finds equal heads and ties them; a safetensors file cannot share memory.
    save_tensors({name: tensor.clone() for name, tensor in tensors.items()}, folder / FOLDER_FILE, {"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n")


def _written(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a file has of a model, on the host."""
    return {
        name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items() if not TRAINING_ONLY.match(name)
    }


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file that whoever may read the user's other new files may read: safetensors itself makes one
    for the owner alone.
    """
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    save_file(tensors, path, metadata)
    path.chmod(mode)


def load_weights(
    model: nn.Module, source: str | Path | Mapping[str, Tensor] | Weights, *, reset_heads: bool = False
) -> LoadReport:
    """Set a detector's weights; a file of a backbone alone sets those of its backbone.

    Args:
        model: the detector.
        source: a file or a folder of any format (see `read_weights`), or tensors by name.
        reset_heads: where the file has another number of classes, leave the class heads as they are, do not refuse.

    Raises:
        ValueError: the file cannot be read, is not of a known format, or does not fit the model; it names the tensors
            and, where the file tells, the settings of the model that it does fit.
    """
    if not isinstance(source, Weights):
        name, tensors, notes = _read(source)
        if recognise_backbone(tensors):
            return fit_backbone(model.get_submodule("backbone"), tensors, name)
        source = _weights(name, tensors, notes)
    return fit(model, source, reset_heads)


def load_backbone(model: nn.Module, source: str | Path) -> LoadReport:
    """Set the weights of a detector's backbone from torchvision's state dict, or a Swin's or ViT's (DINOv2) of the
    official release or of transformers.

    Args:
        model: the detector.
        source: a path, a URL, or `imagenet` for the published file of a ResNet; torch.hub's cache keeps downloads.
            Where the file's name ends in digits of its sha256, as the published ones do, they are checked.

    Raises:
        ValueError: the file cannot be had or read, is another one than its name says, or does not fit the backbone.
    """
    backbone = model.get_submodule("backbone")
    assert isinstance(backbone, Backbone)
    source = str(source)
    if source == "imagenet":
        if type(backbone) in _RELEASES and not backbone.name.endswith("_nano"):
            raise ValueError(
                f"imagenet: the sha256 of {backbone.name}'s published weights is not known here: get its .pth file "
                f"from {_RELEASES[type(backbone)]} and give the path"
            )
        if backbone.name not in IMAGENET_FILES:
            raise ValueError(f"there are no published ImageNet weights of {backbone.name}: train it from scratch")
        source = IMAGENET_URL + IMAGENET_FILES[backbone.name]
    path = _download(source) if re.match(r"[a-z]+://", source) else Path(source)
    if not path.exists():
        raise ValueError(f"{source}: there is no such file of backbone weights")
    if path.is_file():
        _check_digest(path)
    tensors = read_tensors(path)
    if recognise_backbone(tensors) is None:
        raise ValueError(
            f"{source}: not a state dict of a torchvision ResNet, a Swin or a ViT of DINOv2; its tensors are "
            f"{some(tensors) or 'none'}"
        )
    return fit_backbone(backbone, tensors, source)


def read_weights(source: str | Path | Mapping[str, Tensor]) -> Weights:
    """A detector's weights under our names, with what the file says of their architecture.

    Args:
        source: ours (`.safetensors`, or a folder with `model.safetensors`), the original's checkpoint, HF's file or
            folder (`model.safetensors` or `pytorch_model.bin`, whole or in parts, with `config.json` beside it), or
            tensors by the names of any of these.

    Raises:
        BackboneOnlyError: it is a backbone's.
        ValueError: it cannot be read, or is not of a known format.
    """
    name, tensors, notes = _read(source)
    if format := recognise_backbone(tensors):
        raise BackboneOnlyError(f"{name}: {BACKBONE_FORMATS[format].whose}, not a detector")
    return _weights(name, tensors, notes)


def _read(source: str | Path | Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    if isinstance(source, Mapping):
        return "state dict", dict(source), {}
    return str(source), *_read_file(Path(source))


def _weights(source: str, tensors: Mapping[str, Tensor], notes: dict[str, Any]) -> Weights:
    recognised = recognise(tensors)
    if recognised is None:
        raise ValueError(
            f"{source}: not weights of DETR or Deformable DETR (ours, the original's or transformers'), nor of a "
            f"torchvision ResNet; its tensors are {some(tensors) or 'none'}"
        )
    format, arch = recognised
    ignored = tuple(name for name in tensors if IGNORED.search(name))
    own, unknown = to_own({name: t for name, t in tensors.items() if name not in ignored}, format, arch)
    return Weights(source, format, arch, own, notes, tuple(unknown), ignored)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Tensors by name of a weights file of any format, or of a folder that holds one of `FOLDER_FILES`.

    Raises:
        ValueError: there is no such file, it is damaged, or it holds something else than tensors.
    """
    return _read_file(Path(path))[0]


def _read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, and what is said of their architecture beside them."""
    if path.is_dir():
        path = next((path / name for name in FOLDER_FILES if (path / name).is_file()), path / FOLDER_FILE)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such weights file")
    notes = _hf_notes(path.parent / CONFIG_FILE) if path.name in FOLDER_FILES else {}
    if path.name in FOLDER_FILES and path.suffix == ".json":
        parts = _parts(path)
        tensors = {name: tensor for part in parts for name, tensor in _read_file(path.parent / part)[0].items()}
        return tensors, notes
    content, config = _unpacked(path)
    notes |= config
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        notes |= _original_notes(content)
        content = content["model"]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path}: holds something else than tensors by name, so it is not a weights file")
    return dict(content), notes


def _unpacked(path: Path) -> tuple[Any, dict[str, Any]]:
    """What a file holds, and the architecture that ours states."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return tensors, json.loads((file.metadata() or {}).get("config", "{}"))
        with torch.serialization.safe_globals([argparse.Namespace]):  # the original keeps its arguments in one
            return torch.load(path, map_location="cpu", weights_only=True), {}
    except Exception as error:  # the readers do not tell what they raise for bytes of any other kind
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, pickle.UnpicklingError):  # torch's advice would be to let the file run code
            reason = "it holds something else than tensors and plain values, and nothing else is unpickled"
        raise ValueError(f"{path}: damaged, or not a weights file ({reason}); get it again") from error


def _original_notes(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint in the original's form says: its arguments, and ours where we wrote it."""
    args = checkpoint.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    notes = notes_of_args(args) if isinstance(args, Mapping) else {}
    ours: dict[str, Any] = checkpoint.get("raydetr", {})
    return notes | ours


def _parts(index: Path) -> list[str]:
    """Names of the files that an index of transformers spreads the tensors over."""
    table = _read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(part, str) for part in table.values()):
        raise ValueError(f"{index}: has no weight_map from tensors to files; get it again")
    return sorted(set(table.values()))


def _hf_notes(path: Path) -> dict[str, Any]:
    """What a config.json of transformers says; empty where there is none."""
    if not path.is_file():
        return {}
    config = _read_json(path)
    kind = config.get("model_type")
    if kind in ("swin", "dinov2", "dinov2_with_registers"):
        return {}
    if kind not in ("detr", "deformable_detr"):
        raise ValueError(f"{path}: is of a model of the type {kind}, and only detr and deformable_detr are read")
    return notes_of_hf(config)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: damaged, or not JSON ({error}); get it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: is not a JSON object; get it again")
    return content


def _download(url: str) -> Path:
    """The file of a URL in torch.hub's cache, fetched when it is not there."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / url.rsplit("/", 1)[-1]
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    match = _HASHED_NAME.search(path.name)
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix=match and match[1], progress=False)
    except (urllib.error.URLError, OSError) as e:
        raise ValueError(f"{url}: cannot be downloaded ({e}); fetch it elsewhere and give its path") from e
    except RuntimeError as e:  # the digest of what came is another one
        raise ValueError(f"{url}: {e}") from e
    return path


def _check_digest(path: Path) -> None:
    """Refuse a file whose name ends in digits of another sha256 than its own."""
    match = _HASHED_NAME.search(path.name)
    if match is None:
        return
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(match[1]):
        raise ValueError(
            f"{path}: its sha256 begins with {digest[: len(match[1])]}, its name says {match[1]}: "
            "it is damaged or another file; delete it and get it again"
        )
