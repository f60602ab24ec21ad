"""What others call the weights of a detector: tables of names that are read both ways, and nothing that touches a file.

| format     | whose                                                             | backbone                           |
|------------|-------------------------------------------------------------------|------------------------------------|
| `raydetr`  | ours                                                              | `backbone.`, torchvision's names   |
| `original` | fundamentalvision/Deformable-DETR, facebookresearch/detr: `.pth`  | `backbone.0.body.`, likewise       |
| `hf`       | transformers, as `save_pretrained` writes: `model.safetensors`    | names of its own                   |

In the transformer ours are the original's names. HF splits the stacked projections of attention in three, `q_proj`,
`k_proj`, `v_proj`; that is done to the tensors first, so that the tables are one name to one name.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

FORMATS = ("raydetr", "original", "hf")

Rows = list[tuple[str, str]]
"""Our name and theirs; `{placeholders}` stand for the same text in both, see `_PLACEHOLDERS`."""

_PLACEHOLDERS = {
    "i": r"\d+",
    "j": r"\d+",
    "stack": "encoder|decoder",
    "tensor": "[a-z_]+",
    "letter": "[qkv]",
    "rest": ".+",
    "not_backbone": r"(?!backbone\.).+",
}

_ORIGINAL: Rows = [("backbone.{rest}", "backbone.0.body.{rest}"), ("{not_backbone}", "{not_backbone}")]

_HF_BACKBONE = "model.backbone.conv_encoder.model."


def _hf_resnet() -> Rows:
    """HF counts stages and the convolutions of a block from 0, torchvision's names from 1."""
    rows = [
        ("backbone.conv1.weight", f"{_HF_BACKBONE}embedder.embedder.convolution.weight"),
        ("backbone.bn1.{tensor}", f"{_HF_BACKBONE}embedder.embedder.normalization.{{tensor}}"),
    ]
    for stage in range(4):
        ours, theirs = f"backbone.layer{stage + 1}.{{i}}.", f"{_HF_BACKBONE}encoder.stages.{stage}.layers.{{i}}."
        rows.append((f"{ours}downsample.0.weight", f"{theirs}shortcut.convolution.weight"))
        rows.append((f"{ours}downsample.1.{{tensor}}", f"{theirs}shortcut.normalization.{{tensor}}"))
        for conv in range(3):
            rows.append((f"{ours}conv{conv + 1}.weight", f"{theirs}layer.{conv}.convolution.weight"))
            rows.append((f"{ours}bn{conv + 1}.{{tensor}}", f"{theirs}layer.{conv}.normalization.{{tensor}}"))
    return rows


def _hf_layers(norms: Mapping[str, Mapping[str, str]]) -> Rows:
    """What both architectures have; `norms` are HF's names of the norms of a layer, by stack and our name."""
    ours, theirs = "transformer.{stack}.layers.{i}.", "model.{stack}.layers.{i}."
    rows = [
        (f"{ours}self_attn.{{rest}}", f"{theirs}self_attn.{{rest}}"),
        (f"{ours}linear1.{{tensor}}", f"{theirs}fc1.{{tensor}}"),
        (f"{ours}linear2.{{tensor}}", f"{theirs}fc2.{{tensor}}"),
        ("query_embed.weight", "model.query_position_embeddings.weight"),
    ]
    for stack, names in norms.items():
        for own, other in names.items():
            rows.append(
                (f"transformer.{stack}.layers.{{i}}.{own}.{{tensor}}", f"model.{stack}.layers.{{i}}.{other}.{{tensor}}")
            )
    return rows


_HF_ENCODER_NORMS = {"norm1": "self_attn_layer_norm", "norm2": "final_layer_norm"}
_HF: dict[str, Rows] = {
    "deformable_detr": [
        *_hf_resnet(),
        *_hf_layers(
            {
                "encoder": _HF_ENCODER_NORMS,
                "decoder": {
                    "norm1": "encoder_attn_layer_norm",
                    "norm2": "self_attn_layer_norm",
                    "norm3": "final_layer_norm",
                },
            }
        ),
        ("transformer.decoder.layers.{i}.cross_attn.{rest}", "model.decoder.layers.{i}.encoder_attn.{rest}"),
        ("transformer.level_embed", "model.level_embed"),
        *(
            (f"transformer.{name}.{{tensor}}", f"model.{name}.{{tensor}}")
            for name in ("reference_points", "enc_output", "enc_output_norm", "pos_trans", "pos_trans_norm")
        ),
        ("input_proj.{i}.{j}.{tensor}", "model.input_proj.{i}.{j}.{tensor}"),
        ("class_embed.{i}.{tensor}", "class_embed.{i}.{tensor}"),
        ("bbox_embed.{i}.layers.{j}.{tensor}", "bbox_embed.{i}.layers.{j}.{tensor}"),
        ("transformer.decoder.class_embed.{rest}", "model.decoder.class_embed.{rest}"),
        ("transformer.decoder.bbox_embed.{rest}", "model.decoder.bbox_embed.{rest}"),
    ],
    "detr": [
        *_hf_resnet(),
        *_hf_layers(
            {
                "encoder": _HF_ENCODER_NORMS,
                "decoder": {
                    "norm1": "self_attn_layer_norm",
                    "norm2": "encoder_attn_layer_norm",
                    "norm3": "final_layer_norm",
                },
            }
        ),
        ("transformer.decoder.layers.{i}.multihead_attn.{rest}", "model.decoder.layers.{i}.encoder_attn.{rest}"),
        ("transformer.decoder.norm.{tensor}", "model.decoder.layernorm.{tensor}"),
        ("input_proj.{tensor}", "model.input_projection.{tensor}"),
        ("class_embed.{tensor}", "class_labels_classifier.{tensor}"),
        ("bbox_embed.layers.{j}.{tensor}", "bbox_predictor.layers.{j}.{tensor}"),
    ],
}


class Table:
    """Rows compiled in both directions."""

    def __init__(self, rows: Rows) -> None:
        self.outward = [(_pattern(ours), theirs) for ours, theirs in rows]
        self.inward = [(_pattern(theirs), ours) for ours, theirs in rows]

    @staticmethod
    def translate(name: str, rows: list[tuple[re.Pattern[str], str]]) -> str | None:
        for pattern, template in rows:
            if match := pattern.fullmatch(name):
                return template.format(**match.groupdict())
        return None


def _pattern(template: str) -> re.Pattern[str]:
    """`layers.{i}.weight` as an expression with a group for each placeholder."""
    parts = re.split(r"\{(\w+)\}", template)
    return re.compile(
        "".join(
            f"(?P<{part}>{_PLACEHOLDERS[part]})" if index % 2 else re.escape(part) for index, part in enumerate(parts)
        )
    )


_TABLES: dict[tuple[str, str], Table] = {
    **{("original", arch): Table(_ORIGINAL) for arch in _HF},
    **{("hf", arch): Table(rows) for arch, rows in _HF.items()},
}


def foreign_name(name: str, format: str, arch: str) -> str | None:
    """Another format's name of our tensor, or None where it has none (attention projections: the split ones)."""
    if format == "raydetr":
        return name
    table = _TABLES[format, arch]
    return table.translate(name, table.outward)


def own_name(name: str, format: str, arch: str) -> str | None:
    """Our name of another format's tensor, or None where it is nothing of that architecture."""
    if format == "raydetr":
        return name
    table = _TABLES[format, arch]
    return table.translate(name, table.inward)


def to_foreign(tensors: Mapping[str, Tensor], format: str, arch: str) -> dict[str, Tensor]:
    """Our tensors under another format's names.

    Raises:
        ValueError: the format has no name for a tensor.
    """
    if format == "hf":
        tensors = _split_projections(tensors)
    renamed = {foreign_name(name, format, arch): tensor for name, tensor in tensors.items()}
    if None in renamed:
        lost = [name for name in tensors if foreign_name(name, format, arch) is None]
        raise ValueError(f"the format {format} has no name for {', '.join(lost[:4])}")
    return {str(name): tensor for name, tensor in renamed.items()}


def to_own(tensors: Mapping[str, Tensor], format: str, arch: str) -> tuple[dict[str, Tensor], list[str]]:
    """Another format's tensors under our names, and the names among them that are none of the architecture's."""
    own: dict[str, Tensor] = {}
    unknown: list[str] = []
    for name, tensor in tensors.items():
        known = own_name(_as_on_disk(name) if format == "hf" else name, format, arch)
        if known is None:
            unknown.append(name)
        else:
            own[known] = tensor
    return (_with_tied_heads(join_projections(own)) if format == "hf" else own), unknown


def recognise(names: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """Format and architecture of a detector's tensors, by their names; None where they are no detector's."""
    prefixes = {
        "backbone.0.body.": "original",
        "model.backbone.": "hf",
        "backbone.": "raydetr",
        "transformer.": "raydetr",
    }
    format = next(
        (format for prefix, format in prefixes.items() if any(name.startswith(prefix) for name in names)), None
    )
    if format is None or not any("decoder.layers." in name for name in names):
        return None
    deformable = any(".sampling_offsets." in name or name.endswith("level_embed") for name in names)
    return format, "deformable_detr" if deformable else "detr"


_PROJECTION = re.compile(r"(.*)\.in_proj_(weight|bias)")
_SPLIT_PROJECTION = re.compile(r"(.*)\.([qkv])_proj\.(weight|bias)")


def _split_projections(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`x.in_proj_weight` as `x.q_proj.weight`, `x.k_proj.weight` and `x.v_proj.weight`."""
    split: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if match := _PROJECTION.fullmatch(name):
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                split[f"{match[1]}.{part}_proj.{match[2]}"] = piece
        else:
            split[name] = tensor
    return split


def join_projections(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `_split_projections` split; a part that lacks the others stays as it is, and is then called unexpected."""
    joined: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = _SPLIT_PROJECTION.fullmatch(name)
        parts = [f"{match[1]}.{part}_proj.{match[3]}" for part in "qkv"] if match else []
        if (
            not match
            or len({tensors[part].shape for part in parts if part in tensors}) != 1
            or not all(part in tensors for part in parts)
        ):
            joined[name] = tensor
        elif match[2] == "q":
            joined[f"{match[1]}.in_proj_{match[3]}"] = torch.cat([tensors[part] for part in parts])
    return joined


def _as_on_disk(name: str) -> str:
    """HF's name on disk of a tensor that may carry its name in the memory of transformers 5.x, or timm's backbone."""
    name = re.sub(r"^model\.backbone\.(conv_encoder\.)?model\.(_backbone\.)?", _HF_BACKBONE, name)
    name = re.sub(r"(layers\.\d+)\.mlp\.(fc[12])\.", r"\1.\2.", name)
    name = name.replace("_attn.o_proj.", "_attn.out_proj.")
    if match := re.fullmatch(re.escape(_HF_BACKBONE) + r"((conv1|bn1|layer\d)\..+)", name):
        table = _TABLES["hf", "deformable_detr"]
        return table.translate(f"backbone.{match[1]}", table.outward) or name
    return name


def _with_tied_heads(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the heads that HF writes once: where only head 0 is there, every decoder layer has that one."""
    layers = {match[1] for name in tensors if (match := re.match(r"transformer\.decoder\.layers\.(\d+)\.", name))}
    for kind in ("class_embed", "bbox_embed"):
        if not any(name.startswith((f"{kind}.1.", f"transformer.decoder.{kind}.")) for name in tensors):
            first = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{kind}.0.")}
            for layer in layers:
                tensors |= {name.replace(".0.", f".{layer}.", 1): tensor for name, tensor in first.items()}
    return tensors
