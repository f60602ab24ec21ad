"""Whether weights fit a model, and putting them into it: all that is wrong is found before the first tensor changes."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from model.backbones.backbone import Backbone
from model.backbones.resnet import FrozenBatchNorm2d
from model.config import DetrConfig
from model.weights.architecture import differences, infer_config
from model.weights.backbones import BACKBONE_FORMATS, backbone_to_own, recognise_backbone
from model.weights.names import foreign_name

# Counters that batch norm keeps while training, leftovers of a FLOP counter in published files, and what follows from
# the size of a window.
IGNORED = re.compile(r"(^|\.)(num_batches_tracked|total_ops|total_params|relative_position_index|attn_mask)$")
# What makes a Swin's and a ViT's maps, which published files of the backbone alone lack.
_OF_MAPS = re.compile(r"norm\d\.(weight|bias)|pyramid\..+")
TRAINING_ONLY = re.compile(r"(one_to_many_embed|transformer\.label_embed)\.")
"""Tensors of queries that training alone has: files are written without them."""
_CLASS_HEAD = re.compile(r"(^|\.)class_embed\.(\d+\.)?(weight|bias)$")  # DETR has one without a number
_ATTENTION = ("heads", "points")
"""Settings that change what the same tensors compute, without a shape that tells."""


@dataclass(frozen=True)
class LoadReport:
    """What loading did."""

    source: str
    """File, URL, or "state dict"."""
    format: str
    """`raydetr`, `original` or `hf`; of a backbone one of `backbones.BACKBONE_FORMATS`."""
    loaded: tuple[str, ...]
    """Tensors of the model that were set."""
    reset: tuple[str, ...] = ()
    """Tensors of the class heads that keep their initial weights, as the file has another number of classes."""
    ignored: tuple[str, ...] = ()
    """Tensors of the file that the model has no use for."""
    unlike: tuple[str, ...] = ()
    """Settings that the file says it was made with and the model does not have, as `name: value`."""
    initial: tuple[str, ...] = ()
    """Tensors of a Swin's or ViT's maps, which published files lack, that keep their initial weights."""

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors from {self.source} ({self.format})"]
        if self.reset:
            parts.append(f"class heads start anew: {', '.join(self.reset)}")
        if self.initial:
            parts.append(f"not in the file, so they start anew: {', '.join(self.initial)}")
        if self.ignored:
            parts.append(f"{len(self.ignored)} tensors not used: {some(self.ignored)}")
        if self.unlike:
            parts.append(f"they were made with {', '.join(self.unlike)}, unlike this model")
        return "; ".join(parts)


@dataclass(frozen=True)
class Weights:
    """The weights of a detector as a file has them, under our names."""

    source: str
    """File, or "state dict"."""
    format: str
    """One of `names.FORMATS`."""
    arch: str
    """`deformable_detr` or `detr`."""
    tensors: dict[str, Tensor]
    """By our names; a head shared by the layers stands under one or all of its names."""
    notes: dict[str, Any]
    """What the file says of its architecture, by the names of `DetrConfig`."""
    unknown: tuple[str, ...] = ()
    """Names that are none of the architecture's, as the file has them."""
    ignored: tuple[str, ...] = ()
    """Counters and the like, as the file has them."""

    def config(self) -> DetrConfig:
        """The architecture, told from shapes and notes; ValueError if a tensor that would tell is missing."""
        try:
            return infer_config(self.tensors, self.arch, self.notes)
        except ValueError as error:
            raise ValueError(f"{self.source}: {error}") from None

    def with_classes_of(self, settings: DetrConfig) -> DetrConfig:
        """`settings` with the number of classes of these weights: in a pipeline that one comes from the data."""
        logits = next((len(tensor) for name, tensor in self.tensors.items() if _CLASS_HEAD.search(name)), None)
        if logits is None:
            return settings
        return replace(settings, num_classes=logits - (settings.class_loss == "softmax"))

    def assumed(self) -> list[str]:
        """Settings of `config` that neither shapes nor notes tell, so that the published models' values stand."""
        names = ["heads", "dilation"] if self.arch == "detr" else ["heads", "points", "dilation"]
        names += ["num_queries"] if "query_embed.weight" not in self.tensors else []
        return [name for name in names if name not in self.notes]


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a model, each under one name only, also where heads are shared."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def fit(model: nn.Module, weights: Weights, reset_heads: bool) -> LoadReport:
    """Set a detector's weights; `weights.load_weights` says how and when it refuses."""
    config = model.config
    assert isinstance(config, DetrConfig)
    if weights.arch != config.arch:
        raise ValueError(f"{weights.source}: weights of {weights.arch}, not of {config.arch}{_mend(weights, config)}")
    wrong = [f"{name}: {weights.notes[name]}" for name in _ATTENTION if _unlike(weights, config, name)]
    if wrong:
        raise ValueError(f"{weights.source}: its attention was made with other settings; set {', '.join(wrong)}")
    reset = _class_heads_to_reset(model, weights, reset_heads)
    extra = {name for name in weights.tensors if TRAINING_ONLY.match(name)}
    own = {name for name in unique_tensors(model) if TRAINING_ONLY.match(name)}
    tensors = {name: tensor for name, tensor in weights.tensors.items() if name not in extra - own}
    anew = {name for name in own if name not in extra or (reset and "label_embed" in name)}
    copies, problems = _match(model, tensors, weights, set(reset) | anew)
    if problems:
        raise ValueError(_does_not_fit(weights.source, problems) + _mend(weights, config))
    _copy(model, copies)
    reset_once = tuple(name for name in reset if name in unique_tensors(model))
    unlike = [name for name in ("dilation", "class_loss") if _unlike(weights, config, name)]
    described = tuple(f"{name}: {str(weights.notes[name]).lower()}" for name in unlike)
    ignored = (*weights.ignored, *sorted(extra - own))
    return LoadReport(weights.source, weights.format, tuple(copies), reset_once, ignored, described)


def _unlike(weights: Weights, config: DetrConfig, name: str) -> bool:
    return name in weights.notes and weights.notes[name] != getattr(config, name)


def _mend(weights: Weights, config: DetrConfig) -> str:
    """What to set so that the weights fit, as the end of a message; empty when they do not tell."""
    try:
        changes = differences(config, weights.config())
    except ValueError:
        return ""
    return f". For these weights set {', '.join(changes)}" if changes else ""


def fit_backbone(backbone: nn.Module, tensors: Mapping[str, Tensor], source: str) -> LoadReport:
    """Set a backbone's weights from a state dict of `backbones.BACKBONE_FORMATS`."""
    format = recognise_backbone(tensors)
    assert isinstance(backbone, Backbone)
    assert format is not None
    about = BACKBONE_FORMATS[format]
    if not isinstance(backbone, about.kind):
        raise ValueError(f"{source}: is of {about.whose}, and the backbone is {backbone.name}")
    frozen = any(isinstance(module, FrozenBatchNorm2d) for module in backbone.modules())
    if "bn1.running_mean" in tensors and not frozen:
        raise ValueError(f"{source}: has batch norm statistics; to use them, set backbone_norm: frozen_batch_norm")
    ignored = {name for name in tensors if IGNORED.search(name) or about.unused.fullmatch(name)}
    given, unknown = backbone_to_own({name: t for name, t in tensors.items() if name not in ignored}, format)
    of_maps = {name for name in backbone.state_dict() if _OF_MAPS.fullmatch(name)}
    spare = {name for name in given if _OF_MAPS.fullmatch(name)} - of_maps  # of maps that this detector does not use
    initial = of_maps - given.keys()
    copies, problems = _match(backbone, {n: t for n, t in given.items() if n not in spare}, keep=initial)
    if unknown:
        problems.append(f"{len(unknown)} tensors are not the model's: {some(unknown)}")
    if problems:
        raise ValueError(_does_not_fit(source, problems))
    _copy(backbone, copies)
    loaded, anew = (tuple(f"backbone.{name}" for name in names) for names in (copies, sorted(initial)))
    return LoadReport(source, format, loaded, ignored=(*sorted(ignored), *sorted(spare)), initial=anew)


def _class_heads_to_reset(model: nn.Module, weights: Weights, reset_heads: bool) -> tuple[str, ...]:
    """Names of the class heads if the file has another number of logits than the model; else none."""
    own, tensors = model.state_dict(), weights.tensors
    heads = tuple(name for name in own if _CLASS_HEAD.search(name))
    other = [name for name in heads if name in tensors and len(tensors[name]) != len(own[name])]
    if not other:
        return ()
    if not reset_heads:
        raise ValueError(
            f"{weights.source}: has {len(tensors[other[0]])} class logits and the model has {len(own[other[0]])}; to "
            "keep all other weights and start the class heads anew, set reset_heads: true"
            + _mend(weights, model.config)  # type: ignore[arg-type]
        )
    return heads


def _match(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    weights: Weights | None = None,
    keep: AbstractSet[str] = frozenset(),
) -> tuple[dict[str, Tensor], list[str]]:
    """What is to be copied into the model, by its names, and all that does not fit; names in `keep` are left alone.

    `weights` are where the tensors are from: what does not fit goes by their format's names.
    """
    own = dict(_all_tensors(model))
    copies: dict[str, Tensor] = {}
    missing, problems = [], []

    def called(name: str) -> str:
        return name if weights is None else foreign_name(name, weights.format, weights.arch) or name

    for names in _names_of_tensors(own):
        given = [name for name in names if name in tensors]
        if names[0] in keep:
            continue
        if not given:
            missing.append(called(names[0]))
        elif (problem := _problem(given, tensors, own, called)) is not None:
            problems.append(problem)
        else:
            copies[names[0]] = tensors[given[0]]
    unexpected = [called(name) for name in tensors if name not in own] + list(weights.unknown if weights else ())
    if missing:
        problems.append(f"{len(missing)} tensors of the model are missing: {some(missing)}")
    if unexpected:
        problems.append(f"{len(unexpected)} tensors are not the model's: {some(unexpected)}")
    return copies, problems


def _names_of_tensors(own: Mapping[str, Tensor]) -> Iterable[list[str]]:
    """All names of each tensor of a model: a shared one has several."""
    names_of: dict[int, list[str]] = {}
    for name, tensor in own.items():
        names_of.setdefault(id(tensor), []).append(name)
    return names_of.values()


def _problem(
    given: list[str], tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], called: Callable[[str], str]
) -> str | None:
    """Why one tensor of the model cannot be what `tensors` have under the names `given`."""
    first = tensors[given[0]]
    wrong = next((name for name in given if tensors[name].shape != own[name].shape), None)
    if wrong is not None:
        return f"{called(wrong)} is {list(tensors[wrong].shape)}, the model's is {list(own[wrong].shape)}"
    if any(not torch.equal(tensors[name], first) for name in given[1:]):
        return f"{called(given[0])} differs from {called(given[1])}, but the model shares one (with_box_refine is off)"
    if not first.is_floating_point():
        return f"{called(given[0])} is {first.dtype}, not floating point"
    return None


def _does_not_fit(source: str, problems: list[str], most: int = 5) -> str:
    more = f"; and {len(problems) - most} problems more" if len(problems) > most else ""
    return f"{source}: does not fit the model of this configuration: {'; '.join(problems[:most])}{more}"


def _all_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


@torch.no_grad()
def _copy(model: nn.Module, copies: Mapping[str, Tensor]) -> None:
    own = dict(_all_tensors(model))
    for name, tensor in copies.items():
        own[name].copy_(tensor)


def some(names: Mapping[str, Tensor] | list[str] | tuple[str, ...], most: int = 4) -> str:
    """The first few names, for a message."""
    listed = list(names)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")
