"""Weights in and out of files: the only module of `model` that touches a disk or the network.

Read are our safetensors files (and checkpoint folders that hold one), and torchvision's ResNet files for the backbone.
A file is checked whole before the first tensor of the model changes, so a refused file leaves the model as it was.
Nothing is unpickled but plain tensors.
"""

import hashlib
import os
import pickle
import re
import urllib.error
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.backbone import Backbone, FrozenBatchNorm2d

FOLDER_FILE = "model.safetensors"
IMAGENET_URL = "https://download.pytorch.org/models/"
IMAGENET_FILES = {
    "resnet18": "resnet18-f37072fd.pth",
    "resnet34": "resnet34-b627a593.pth",
    "resnet50": "resnet50-0676ba61.pth",
    "resnet101": "resnet101-63fe2227.pth",
    "resnext101_64x4d": "resnext101_64x4d-173b62eb.pth",
}
"""torchvision's IMAGENET1K_V1, which the original trained from; a name ends in the first digits of its sha256."""

_DAMAGED = (SafetensorError, RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile)
_HASHED_NAME = re.compile(r"-([0-9a-f]{8,64})\.[a-z]+$")
# Counters that batch norm keeps while training, leftovers of a FLOP counter in published files, and the classifier.
_IGNORED = re.compile(r"(^|\.)(num_batches_tracked|total_ops|total_params)$")
_CLASSIFIER = re.compile(r"^fc\.(weight|bias)$")
_CLASS_HEAD = re.compile(r"(^|\.)class_embed\.(\d+\.)?(weight|bias)$")  # DETR has one without a number


@dataclass(frozen=True)
class LoadReport:
    """What loading did."""

    source: str
    """File, URL, or "state dict"."""
    format: str
    """`raydetr` or `torchvision`."""
    loaded: tuple[str, ...]
    """Tensors of the model that were set."""
    reset: tuple[str, ...] = ()
    """Tensors of the class heads that keep their initial weights, as the file has another number of classes."""
    ignored: tuple[str, ...] = ()
    """Tensors of the file that the model has no use for."""

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors from {self.source} ({self.format})"]
        if self.reset:
            parts.append(f"class heads start anew: {', '.join(self.reset)}")
        if self.ignored:
            parts.append(f"{len(self.ignored)} tensors not used: {_some(self.ignored)}")
        return "; ".join(parts)


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a model, each under one name only, also where heads are shared."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def export_weights(model: nn.Module, path: str | Path, format: str = "raydetr") -> None:
    """Write a model's weights to a safetensors file; it appears whole or not at all.

    Args:
        model: the detector.
        path: the file; its folder must exist.
        format: `raydetr`, the only one yet: the model's names, each tensor once.
    """
    if format != "raydetr":
        raise ValueError(f'cannot write the weights format "{format}": choose raydetr')
    path = Path(path)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in unique_tensors(model).items()}
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file(tensors, partial, metadata={"format": "raydetr"})
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_weights(
    model: nn.Module, path_or_state_dict: str | Path | Mapping[str, Tensor], *, reset_heads: bool = False
) -> LoadReport:
    """Set a detector's weights; a torchvision ResNet file sets those of its backbone.

    Args:
        model: the detector.
        path_or_state_dict: a `.safetensors` file, a folder with `model.safetensors`, a `.pth` file of tensors, or
            tensors by name. A head shared by the layers may stand under one or all of its names.
        reset_heads: where the file has another number of classes, leave the class heads as they are, do not refuse.

    Raises:
        ValueError: the file cannot be read, is not of a known format, or does not fit the model; it names the tensors.
    """
    if isinstance(path_or_state_dict, Mapping):
        source, tensors = "state dict", dict(path_or_state_dict)
    else:
        source, tensors = str(path_or_state_dict), read_tensors(path_or_state_dict)
    if _is_torchvision(tensors):
        return _load_torchvision(model.get_submodule("backbone"), tensors, source)
    if not any(name.startswith("transformer.") for name in tensors):
        raise ValueError(
            f"{source}: not weights of a detector of this project nor of a torchvision ResNet; its tensors are "
            f"{_some(tensors) or 'none'}"
        )
    ignored = tuple(name for name in tensors if _IGNORED.search(name))
    tensors = {name: tensor for name, tensor in tensors.items() if name not in ignored}
    reset = _class_heads_to_reset(model, tensors, source, reset_heads)
    loaded = _fill(model, {name: tensor for name, tensor in tensors.items() if name not in reset}, source, set(reset))
    reset_once = tuple(name for name in reset if name in unique_tensors(model))
    return LoadReport(source, "raydetr", loaded, reset_once, ignored)


def load_backbone(model: nn.Module, source: str | Path) -> LoadReport:
    """Set the weights of a detector's backbone from torchvision's state dict.

    Args:
        model: the detector.
        source: a path, a URL, or `imagenet` for the published file of this backbone; torch.hub's cache keeps downloads.
            Where the file's name ends in digits of its sha256, as the published ones do, they are checked.

    Raises:
        ValueError: the file cannot be had or read, is another one than its name says, or does not fit the backbone.
    """
    backbone = model.get_submodule("backbone")
    assert isinstance(backbone, Backbone)
    source = str(source)
    if source == "imagenet":
        if backbone.name not in IMAGENET_FILES:
            raise ValueError(f"there are no published ImageNet weights of {backbone.name}: train it from scratch")
        source = IMAGENET_URL + IMAGENET_FILES[backbone.name]
    path = _download(source) if re.match(r"[a-z]+://", source) else Path(source)
    if not path.is_file():
        raise ValueError(f"{source}: there is no such file of backbone weights")
    _check_digest(path)
    tensors = read_tensors(path)
    if not _is_torchvision(tensors):
        raise ValueError(f"{source}: not a torchvision ResNet state dict; its tensors are {_some(tensors) or 'none'}")
    return _load_torchvision(backbone, tensors, source)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Tensors by name of a safetensors file, of a folder that holds `model.safetensors`, or of a torch file.

    Raises:
        ValueError: there is no such file, it is damaged, or it holds something else than tensors.
    """
    path = Path(path)
    if path.is_dir():
        path = path / FOLDER_FILE
    if not path.is_file():
        raise ValueError(f"{path}: there is no such weights file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGED as e:
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise ValueError(f"{path}: damaged, or not a weights file ({reason}); get it again") from e
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path}: holds something else than tensors by name, so it is not a weights file")
    return dict(content)


def _is_torchvision(tensors: Mapping[str, Tensor]) -> bool:
    return "layer1.0.conv1.weight" in tensors


def _load_torchvision(backbone: nn.Module, tensors: dict[str, Tensor], source: str) -> LoadReport:
    frozen = any(isinstance(module, FrozenBatchNorm2d) for module in backbone.modules())
    if "bn1.running_mean" in tensors and not frozen:
        raise ValueError(
            f"{source}: has batch norm statistics; to use them, set model.backbone_norm: frozen_batch_norm"
        )
    ignored = tuple(name for name in tensors if _IGNORED.search(name) or _CLASSIFIER.search(name))
    loaded = _fill(backbone, {name: tensor for name, tensor in tensors.items() if name not in ignored}, source, set())
    return LoadReport(source, "torchvision", tuple(f"backbone.{name}" for name in loaded), (), ignored)


def _class_heads_to_reset(
    model: nn.Module, tensors: Mapping[str, Tensor], source: str, reset_heads: bool
) -> tuple[str, ...]:
    """Names of the class heads if the file has another number of logits than the model; else none."""
    own = model.state_dict()
    heads = tuple(name for name in own if _CLASS_HEAD.search(name))
    other = [name for name in heads if name in tensors and len(tensors[name]) != len(own[name])]
    if not other:
        return ()
    if not reset_heads:
        raise ValueError(
            f"{source}: has {len(tensors[other[0]])} class logits and the model has {len(own[other[0]])}; to keep all "
            "other weights and start the class heads anew, set reset_heads (train.init.reset_heads: true)"
        )
    return heads


def _fill(model: nn.Module, tensors: Mapping[str, Tensor], source: str, keep: set[str]) -> tuple[str, ...]:
    """Copy `tensors` into the model, or raise one error about all that does not fit; names in `keep` are left alone."""
    names_of: dict[int, list[str]] = {}  # a shared tensor has several names
    own: dict[str, Tensor] = {}
    everything = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in everything:
        names_of.setdefault(id(tensor), []).append(name)
        own[name] = tensor
    copies: dict[str, Tensor] = {}
    missing, problems = [], []
    for names in names_of.values():
        if names[0] in keep:
            continue
        given = [name for name in names if name in tensors]
        if not given:
            missing.append(names[0])
            continue
        first = tensors[given[0]]
        wrong = next((name for name in given if tensors[name].shape != own[name].shape), None)
        if wrong is not None:
            problems.append(f"{wrong} is {list(tensors[wrong].shape)}, the model's is {list(own[wrong].shape)}")
        elif any(not torch.equal(tensors[name], first) for name in given[1:]):
            problems.append(f"{given[0]} differs from {given[1]}, but the model shares one (with_box_refine is off)")
        elif not first.is_floating_point():
            problems.append(f"{given[0]} is {first.dtype}, not floating point")
        else:
            copies[names[0]] = first
    unexpected = [name for name in tensors if name not in own]
    if missing:
        problems.append(f"{len(missing)} tensors of the model are missing: {_some(missing)}")
    if unexpected:
        problems.append(f"{len(unexpected)} tensors are not the model's: {_some(unexpected)}")
    if problems:
        more = f"; and {len(problems) - 5} problems more" if len(problems) > 5 else ""
        raise ValueError(f"{source}: does not fit the model of this configuration: {'; '.join(problems[:5])}{more}")
    with torch.no_grad():
        for name, tensor in copies.items():
            own[name].copy_(tensor)
    return tuple(copies)


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


def _some(names: Mapping[str, Tensor] | list[str] | tuple[str, ...], most: int = 4) -> str:
    """The first few names."""
    listed = list(names)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")
