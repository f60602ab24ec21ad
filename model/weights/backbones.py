"""Whose a state dict of a backbone alone is, and our names of its tensors; nothing touches a file.

ResNets and official Swins and ViTs have our names; transformers' classes have names of their own.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

from model.backbones.backbone import Backbone
from model.backbones.resnet import ResNet
from model.backbones.swin import Swin
from model.backbones.vit import ViT, patches_of
from model.weights.names import Rows, Table, join_projections


class BackboneFormat(NamedTuple):
    """A way in which others write a backbone."""

    whose: str
    """What a message calls it."""
    kind: type[Backbone]
    """The backbone here that takes it."""
    told_by: re.Pattern[str]
    """A name that no other has."""
    unused: re.Pattern[str]
    """Names of what a detector has no use for: the classifier and what it alone sees, the token of masked training."""


_AFFINE = r"\.(weight|bias)"
BACKBONE_FORMATS = {
    "torchvision": BackboneFormat(
        "a torchvision ResNet",
        ResNet,
        re.compile(r"layer1\.0\.conv1\.weight"),
        re.compile(r"fc" + _AFFINE),
    ),
    "swin": BackboneFormat(
        "an official Swin",
        Swin,
        re.compile(r"layers\.0\.blocks\.0\.attn\.qkv\.weight"),
        re.compile(r"(head|norm)" + _AFFINE),
    ),
    "transformers": BackboneFormat(
        "a Swin of transformers",
        Swin,
        re.compile(r"(swin\.)?encoder\.layers\.0\.blocks\.0\.layernorm_before\.weight"),
        re.compile(rf"(classifier|(swin\.)?layernorm){_AFFINE}|(swin\.)?embeddings\.mask_token"),
    ),
    "dinov2": BackboneFormat(
        "a ViT of DINOv2",
        ViT,
        re.compile(r"blocks\.0\.ls1\.gamma"),
        re.compile(r"(cls|mask)_token|register_tokens"),
    ),
    "transformers_dinov2": BackboneFormat(
        "a ViT of DINOv2 of transformers",
        ViT,
        re.compile(r"(dinov2\w*\.)?encoder\.layer\.0\.layer_scale1\.lambda1"),
        re.compile(rf"classifier{_AFFINE}|(dinov2\w*\.)?embeddings\.(cls_token|mask_token|register_tokens)"),
    ),
}
"""By their names in a `LoadReport`."""

_ATTENTION_AND_MLP = {
    "attn.{letter}_proj.{tensor}": "attention.{letter}_proj.{tensor}",
    "attn.proj.{tensor}": "attention.o_proj.{tensor}",
    "mlp.{rest}": "mlp.{rest}",
}
"""What is called alike in both of transformers' models."""


def _block(ours: str, theirs: str, names: Mapping[str, str]) -> Rows:
    """Rows of what a block holds, by our names and theirs."""
    return [(f"{ours}.{own}", f"{theirs}.{other}") for own, other in names.items()]


_HF_SWIN: Rows = [
    ("patch_embed.proj.{tensor}", "embeddings.patch_embeddings.projection.{tensor}"),
    ("patch_embed.norm.{tensor}", "embeddings.norm.{tensor}"),
    *_block(
        "layers.{i}.blocks.{j}",
        "encoder.layers.{i}.blocks.{j}",
        {
            "norm1.{tensor}": "layernorm_before.{tensor}",
            "norm2.{tensor}": "layernorm_after.{tensor}",
            "attn.relative_position_bias_table": "attention.relative_position_bias.relative_position_bias_table",
            **_ATTENTION_AND_MLP,
        },
    ),
    ("layers.{i}.downsample.{rest}", "encoder.layers.{i}.downsample.{rest}"),
    *((f"norm{stage}.{{tensor}}", f"hidden_states_norms.stage{stage + 1}.{{tensor}}") for stage in range(4)),
]
"""The names in the memory of transformers 5.x."""
_HF_SWIN_ON_DISK = {
    "attention.self.query.": "attention.q_proj.",
    "attention.self.key.": "attention.k_proj.",
    "attention.self.value.": "attention.v_proj.",
    "attention.self.relative": "attention.relative_position_bias.relative",
    "attention.output.dense.": "attention.o_proj.",
    ".intermediate.dense.": ".mlp.fc1.",
    ".output.dense.": ".mlp.fc2.",
}
"""What stands in their place on the disk."""
_HF_DINOV2: Rows = [
    ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj.{tensor}", "embeddings.patch_embeddings.projection.{tensor}"),
    *_block(
        "blocks.{i}",
        "encoder.layer.{i}",
        {
            "norm1.{tensor}": "norm1.{tensor}",
            "norm2.{tensor}": "norm2.{tensor}",
            "ls1.gamma": "layer_scale1.lambda1",
            "ls2.gamma": "layer_scale2.lambda1",
            **_ATTENTION_AND_MLP,
        },
    ),
    ("norm.{tensor}", "layernorm.{tensor}"),
]
_HF_DINOV2_ON_DISK = {
    "attention.attention.query.": "attention.q_proj.",
    "attention.attention.key.": "attention.k_proj.",
    "attention.attention.value.": "attention.v_proj.",
    "attention.output.dense.": "attention.o_proj.",
}

_TABLES = {
    "transformers": (re.compile(r"^swin\."), Table(_HF_SWIN), _HF_SWIN_ON_DISK),
    "transformers_dinov2": (re.compile(r"^dinov2\w*\."), Table(_HF_DINOV2), _HF_DINOV2_ON_DISK),
}
"""Of transformers' formats: the prefix of a model with a head, the names in memory, and what differs on the disk."""


def recognise_backbone(names: Iterable[str]) -> str | None:
    """Which of `BACKBONE_FORMATS` a backbone's tensors have, by their names; None where they are no backbone's."""
    names = list(names)
    return next(
        (format for format, about in BACKBONE_FORMATS.items() if any(map(about.told_by.fullmatch, names))), None
    )


def backbone_to_own(tensors: Mapping[str, Tensor], format: str) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors of a backbone alone as ours are, and the names among them that are none of its own."""
    own, unknown = _renamed(tensors, format)
    return (_without_class_token(own) if BACKBONE_FORMATS[format].kind is ViT else own), unknown


def _renamed(tensors: Mapping[str, Tensor], format: str) -> tuple[dict[str, Tensor], list[str]]:
    if format not in _TABLES:
        return dict(tensors), []
    prefix, table, on_disk = _TABLES[format]
    own: dict[str, Tensor] = {}
    unknown: list[str] = []
    for name, tensor in tensors.items():
        theirs = prefix.sub("", name)
        for written, in_memory in on_disk.items():
            theirs = theirs.replace(written, in_memory)
        known = table.translate(theirs, table.inward)
        if known is None:
            unknown.append(name)
        else:
            own[known] = tensor
    joined = join_projections(own).items()
    return {name.replace("attn.in_proj_", "attn.qkv."): tensor for name, tensor in joined}, unknown


def _without_class_token(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the position of the class token, which is the first, and with patches of our size."""
    positions, kernel = tensors.get("pos_embed"), tensors.get("patch_embed.proj.weight")
    if positions is not None and positions.ndim == 3:
        tensors["pos_embed"] = positions[:, 1:]
    if kernel is not None and kernel.ndim == 4 and kernel.shape[2] == kernel.shape[3]:
        tensors["patch_embed.proj.weight"] = patches_of(kernel)
    return tensors
