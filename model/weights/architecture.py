"""The architecture that weights are of: told from their shapes and from what others write beside them, and HF's
config.json for an architecture of ours.

Shapes tell nearly everything. What they cannot tell is `UNSEEN`: it comes from the file's own notes (`args` of the
original's checkpoint, HF's config.json, ours in the metadata), or is the published models' value.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from model.backbones.make import BACKBONES, make_backbone
from model.config import DetrConfig

UNSEEN = ("heads", "points", "dropout", "drop_path", "dilation", "class_loss", "auxiliary_losses", "look_forward_twice")
"""Settings that no shape tells; `num_queries` is another one where two stages learn nothing of a query."""
_TRAINING = ("dropout", "drop_path", "auxiliary_losses", "look_forward_twice", "one_to_many", "denoising")
"""Settings of which what a trained network computes does not depend."""

_RESNETS: dict[str, tuple[str, list[int], list[int]]] = {
    "resnet18": ("basic", [2, 2, 2, 2], [64, 128, 256, 512]),
    "resnet34": ("basic", [3, 4, 6, 3], [64, 128, 256, 512]),
    "resnet50": ("bottleneck", [3, 4, 6, 3], [256, 512, 1024, 2048]),
    "resnet101": ("bottleneck", [3, 4, 23, 3], [256, 512, 1024, 2048]),
}
"""HF's `layer_type`, `depths` and `hidden_sizes`; the others it has not."""


def infer_config(tensors: Mapping[str, Tensor], arch: str, notes: Mapping[str, Any]) -> DetrConfig:
    """The architecture of a detector's weights.

    Args:
        tensors: by our names; a shared head under one or all of its names.
        arch: as `names.recognise` gives it.
        notes: settings that the file states, by the names of `DetrConfig`; those that shapes tell are not believed.

    Raises:
        ValueError: a tensor that would tell is missing, or the shapes are of no architecture that this project has.
    """
    try:
        seen = _deformable(tensors, notes) if arch == "deformable_detr" else _detr(tensors)
        seen |= {name: notes[name] for name in UNSEEN if name in notes}
        class_loss = seen.setdefault("class_loss", "focal" if arch == "deformable_detr" else "softmax")
        logits, width = _first(
            tensors, "class_embed.weight", "class_embed.0.weight", f"{_DECODER}class_embed.0.weight"
        ).shape
        seen |= {"arch": arch, "num_classes": logits - (class_loss == "softmax"), "hidden_dim": width}
        seen |= {f"{stack}_layers": _count(tensors, rf"transformer\.{stack}\.layers\.(\d+)\.") for stack in _STACKS}
        seen["ffn_dim"] = len(tensors[f"{_DECODER}layers.0.linear1.weight"])
        seen |= _backbone(tensors, seen["feature_levels"] == 1)
    except KeyError as error:
        raise ValueError(f"the architecture cannot be told without {error.args[0]}") from None
    return DetrConfig(**seen)


_DECODER = "transformer.decoder."
_STACKS = ("encoder", "decoder")


def _detr(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {"feature_levels": 1, "num_queries": len(tensors["query_embed.weight"])}


def _deformable(tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> dict[str, Any]:
    levels = len(tensors["transformer.level_embed"])
    two_stage = any(name.startswith(("transformer.enc_output", "transformer.pos_trans")) for name in tensors)
    learned = "query_embed.weight" in tensors
    seen: dict[str, Any] = {"feature_levels": levels, "with_box_refine": two_stage or _refines(tensors)}
    seen["two_stage"] = "mixed" if two_stage and learned else two_stage
    if two_stage and not learned:
        seen |= {"num_queries": notes["num_queries"]} if "num_queries" in notes else {}
    else:
        seen["num_queries"] = len(tensors["query_embed.weight"])
    samples = len(tensors[f"{_DECODER}layers.0.cross_attn.attention_weights.bias"]) // levels  # heads * points
    heads = notes.get("heads", samples // notes["points"] if "points" in notes else DetrConfig.heads)
    return seen | {"heads": heads, "points": notes.get("points", samples // heads)}


def _refines(tensors: Mapping[str, Tensor]) -> bool:
    """Whether each decoder layer has a box head of its own: written as the decoder's, or not all equal."""
    if any(name.startswith(f"{_DECODER}bbox_embed.") for name in tensors):
        return True
    others = [name for name in tensors if re.match(r"bbox_embed\.[1-9]", name)]
    return any(not torch.equal(tensors[name], tensors[re.sub(r"\.\d+\.", ".0.", name, count=1)]) for name in others)


def _backbone(tensors: Mapping[str, Tensor], only_last: bool) -> dict[str, Any]:
    own = {name.removeprefix("backbone."): t.shape for name, t in tensors.items() if name.startswith("backbone.")}
    frozen = "bn1.running_mean" in own or "patch_embed.proj.weight" in own  # that of a Swin or ViT has the default
    norm: Any = "frozen_batch_norm" if frozen else "group_norm"
    for name in BACKBONES:
        with torch.device("meta"):
            state = make_backbone(name, norm, only_last=only_last).state_dict()
        if {key: tensor.shape for key, tensor in state.items()} == own:
            return {"backbone": name, "backbone_norm": norm}
    raise ValueError("its backbone is none that this project has, or lacks tensors")


def _first(tensors: Mapping[str, Tensor], *names: str) -> Tensor:
    for name in names:
        if name in tensors:
            return tensors[name]
    raise KeyError(names[0])


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    """Layers of a stack, by the highest number in a name."""
    return 1 + max((int(match[1]) for name in tensors if (match := re.match(pattern, name))), default=-1)


def differences(wanted: DetrConfig, found: DetrConfig) -> list[str]:
    """The settings to change in `wanted` so that it is `found`, as `name: value`."""
    names = [field.name for field in fields(DetrConfig) if field.name not in (*_TRAINING, "num_classes")]
    changed = [name for name in names if getattr(wanted, name) != getattr(found, name)]
    return [f"{name}: {str(getattr(found, name)).lower()}" for name in changed]


def notes_of_args(args: Mapping[str, Any]) -> dict[str, Any]:
    """What the `args` of the original's checkpoint say, by the names of `DetrConfig`."""
    names = {"nheads": "heads", "dec_n_points": "points", "dropout": "dropout", "dilation": "dilation"}
    return {ours: args[theirs] for theirs, ours in (names | {"num_queries": "num_queries"}).items() if theirs in args}


def notes_of_hf(config: Mapping[str, Any]) -> dict[str, Any]:
    """What HF's config.json says, by the names of `DetrConfig`."""
    queries = "two_stage_num_proposals" if config.get("two_stage") else "num_queries"
    names = {"decoder_attention_heads": "heads", "dropout": "dropout", "dilation": "dilation", queries: "num_queries"}
    if config.get("model_type") == "deformable_detr":
        names["decoder_n_points"] = "points"
    return {ours: config[theirs] for theirs, ours in names.items() if theirs in config}


def hf_config(config: DetrConfig, class_names: Sequence[str] | None = None) -> dict[str, Any]:
    """HF's config.json of an architecture.

    Args:
        config: the architecture.
        class_names: names of the classes by logit; `LABEL_0`, ... when None.

    Raises:
        ValueError: transformers has nothing that computes the same.
    """
    lacks = _hf_lacks(config)
    if lacks:
        raise ValueError(f"transformers has not {', nor '.join(lacks)}: these weights cannot be written for it")
    deformable = config.arch == "deformable_detr"
    names = class_names or [f"LABEL_{index}" for index in range(config.num_classes)]
    return {
        "model_type": config.arch,
        "architectures": ["DeformableDetrForObjectDetection" if deformable else "DetrForObjectDetection"],
        "use_timm_backbone": False,
        "backbone_config": _hf_backbone(config),
        "dtype": "float32",
        "d_model": config.hidden_dim,
        "dropout": config.dropout,
        "num_queries": config.num_queries,
        # With it, transformers feeds each layer of DETR's decoder the norm of the one before: other detections.
        "auxiliary_loss": config.auxiliary_losses and deformable,
        "id2label": {str(index): name for index, name in enumerate(names)},
        "label2id": {name: index for index, name in enumerate(names)},
        **_hf_stacks(config),
        **(_hf_deformable(config) if deformable else {}),
    }


def _hf_lacks(config: DetrConfig) -> list[str]:
    """What of an architecture transformers has not."""
    lacks = []
    if config.backbone not in _RESNETS:
        lacks.append(f"the backbone {config.backbone}")
    if config.backbone_norm != "frozen_batch_norm":
        lacks.append(f"a backbone with {config.backbone_norm}")
    if config.dilation:
        lacks.append("a dilated ResNet but timm's")
    return lacks + _unknown(config)


def _hf_backbone(config: DetrConfig) -> dict[str, Any]:
    layer_type, depths, sizes = _RESNETS[config.backbone]
    return {
        "model_type": "resnet",
        "layer_type": layer_type,
        "depths": depths,
        "hidden_sizes": sizes,
        "embedding_size": 64,
        "out_features": ["stage4"] if config.feature_levels == 1 else ["stage2", "stage3", "stage4"],
    }


def _hf_stacks(config: DetrConfig) -> dict[str, Any]:
    """Encoder and decoder."""
    settings = {}
    for stack, layers in zip(_STACKS, (config.encoder_layers, config.decoder_layers), strict=True):
        settings[f"{stack}_layers"] = layers
        settings[f"{stack}_attention_heads"] = config.heads
        settings[f"{stack}_ffn_dim"] = config.ffn_dim
    return settings


def _hf_deformable(config: DetrConfig) -> dict[str, Any]:
    return {
        "num_feature_levels": config.feature_levels,
        "encoder_n_points": config.points,
        "decoder_n_points": config.points,
        "with_box_refine": config.with_box_refine,
        "two_stage": config.two_stage,
        "two_stage_num_proposals": config.num_queries,
        "class_cost": 2,
    }


def check_original(config: DetrConfig) -> None:
    """Raise a ValueError where the original (or facebookresearch/detr) would compute something else."""
    lacks = _unknown(config)
    if config.has_vision_transformer:
        lacks.append(f"the backbone {config.backbone}")
    elif config.backbone == "resnet_tiny" or config.backbone_norm != "frozen_batch_norm":
        lacks.append(f"the backbone {config.backbone} with {config.backbone_norm}")
    if lacks:
        raise ValueError(f"the original has not {', nor '.join(lacks)}: these weights cannot be written for it")


def _unknown(config: DetrConfig) -> list[str]:
    """What of an architecture nobody else's networks have, or have otherwise."""
    mixed = ["two_stage mixed"] if config.two_stage == "mixed" else []
    return mixed + _other_losses(config) + _odd_norms(config)


def _other_losses(config: DetrConfig) -> list[str]:
    """The class loss, where logits become scores in another way than in others' networks of the architecture."""
    usual = (config.class_loss == "softmax") == (config.arch == "detr")
    return [] if usual else [f"{config.arch} with the class loss {config.class_loss}"]


def _odd_norms(config: DetrConfig) -> list[str]:
    """What others would compute otherwise, in silence: their group norms have 32 groups, ours fewer when narrow."""
    narrow = config.arch == "deformable_detr" and config.hidden_dim < 64
    return [f"group norms of a width of {config.hidden_dim}, which is under 64"] if narrow else []
