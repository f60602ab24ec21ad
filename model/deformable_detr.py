"""Deformable DETR (arXiv 2010.04159): a ResNet, feature levels, a deformable transformer and a head for each layer.

Module names follow the original, so that its weights fit by name; the backbone's are torchvision's.
Shapes: B batch, Q queries, C hidden channels, S cells of all levels.
"""

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import MSDeformAttn
from model.backbone import Backbone
from model.batch import ImageBatch
from model.config import DetrConfig
from model.transformer import Transformer, in_full_precision

Outputs = dict[str, Any]


class BoxHead(nn.Module):
    """A perceptron of three layers from a hidden state to four logits."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 4)])

    def forward(self, x: Tensor) -> Tensor:
        """`[..., width]` to `[..., 4]`."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        output: Tensor = self.layers[-1](x)
        return output


class DeformableDetr(nn.Module):
    """The detector.

    Feature levels are C3, C4, C5 by 1x1 convolutions and, beyond those, 3x3 convolutions of stride 2, the first of them
    on C5 itself; one level alone is C5. Each is followed by group norm.

    Without refinement all decoder layers share one class head and one box head; with it each has its own, all beginning
    equal. Two-stage has one more of each, for the proposals. The original registers shared and reused heads under each
    of their names and so does this: a state dict lists them more than once (see `weights.unique_tensors`).
    """

    def __init__(self, config: DetrConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_dim
        self.backbone = Backbone(
            config.backbone, config.backbone_norm, config.dilation, only_last=config.feature_levels == 1
        )
        self.input_proj = self._input_projections(width, config.feature_levels)
        if not config.two_stage:
            self.query_embed = nn.Embedding(config.num_queries, width * 2)
        heads = config.decoder_layers + int(config.two_stage)
        class_head, box_head = nn.Linear(width, config.num_logits), BoxHead(width)
        if config.with_box_refine:
            self.class_embed = nn.ModuleList(copy.deepcopy(class_head) for _ in range(heads))
            self.bbox_embed = nn.ModuleList(copy.deepcopy(box_head) for _ in range(heads))
        else:
            self.class_embed = nn.ModuleList([class_head] * heads)
            self.bbox_embed = nn.ModuleList([box_head] * heads)
        # After the heads, so that a walk over the parameters names them by class_embed and bbox_embed.
        self.transformer = Transformer(config)
        if config.with_box_refine:
            self.transformer.decoder.bbox_embed = self.bbox_embed
        if config.two_stage:
            self.transformer.decoder.class_embed = self.class_embed

    def _input_projections(self, width: int, levels: int) -> nn.ModuleList:
        groups = min(32, width // 2)  # at least two channels a group: a map of one cell has no variance of its own
        convs = [nn.Conv2d(channels, width, 1) for channels in self.backbone.channels]
        inputs = self.backbone.channels[-1]
        for _ in range(levels - len(convs)):
            convs.append(nn.Conv2d(inputs, width, 3, stride=2, padding=1))
            inputs = width
        return nn.ModuleList(nn.Sequential(conv, nn.GroupNorm(groups, width)) for conv in convs)

    def forward(self, batch: ImageBatch) -> Outputs:
        """Detect.

        Args:
            batch: normalised images and their padding mask.

        Returns:
            `pred_logits` [B, Q, logits] and `pred_boxes` [B, Q, 4] cxcywh in 0..1 of the image without its padding, of
            the last decoder layer; `aux_outputs`, a list of the same for the layers before, if the config wants them;
            `enc_outputs`, the same for every cell [B, S, ...], with two stages. All fp32. Two-stage gives fewer than
            `num_queries` when the image has fewer cells.
        """
        features, masks = self._levels(batch)
        query_embed = None if self.config.two_stage else self.query_embed.weight
        out = self.transformer(features, masks, query_embed, self.class_embed, self.bbox_embed)
        layers = [
            {"pred_logits": in_full_precision(head, hidden), "pred_boxes": boxes}
            for head, hidden, boxes in zip(self.class_embed, out.hidden, out.boxes, strict=False)
        ]
        outputs: Outputs = dict(layers[-1])
        if self.config.auxiliary_losses:
            outputs["aux_outputs"] = layers[:-1]
        if out.proposal_logits is not None and out.proposal_boxes is not None:
            outputs["enc_outputs"] = {"pred_logits": out.proposal_logits, "pred_boxes": out.proposal_boxes}
        return outputs

    def _levels(self, batch: ImageBatch) -> tuple[list[Tensor], list[Tensor]]:
        """Features [B, C, H, W] and masks [B, H, W] of each level; masks are resized from the full resolution."""
        maps = self.backbone(batch.pixels)
        features = [projection(x) for projection, x in zip(self.input_proj, maps, strict=False)]
        x = maps[-1]
        for projection in self.input_proj[len(maps) :]:
            x = projection(x)
            features.append(x)
        mask = batch.mask[:, None].float()
        masks = [F.interpolate(mask, size=feature.shape[-2:]).to(torch.bool)[:, 0] for feature in features]
        return features, masks


def init_weights(model: DeformableDetr, generator: torch.Generator | None = None) -> None:
    """Draw all initial weights; published ones may be loaded over them.

    | what                                           | weight                         | bias                       |
    |------------------------------------------------|--------------------------------|----------------------------|
    | backbone convolutions                          | Kaiming normal, fan out, ReLU  | none                       |
    | frozen batch norm                              | 1 (mean 0, variance 1)         | 0                          |
    | group norm, layer norm                         | 1                              | 0                          |
    | input_proj convolutions                        | Xavier uniform                 | 0                          |
    | query_embed, level_embed                       | N(0, 1)                        |                            |
    | attention: value_proj, output_proj             | Xavier uniform                 | 0                          |
    | attention: attention_weights                   | 0                              | 0                          |
    | attention: sampling_offsets                    | 0                              | see `offset_directions`    |
    | self_attn of the decoder: in_proj, out_proj    | Xavier uniform                 | 0                          |
    | linear1, linear2, enc_output, pos_trans        | Xavier uniform                 | U(+-1 / sqrt(inputs))      |
    | reference_points                               | Xavier uniform                 | 0                          |
    | class_embed                                    | U(+-1 / sqrt(inputs))          | -log(99) focal, 0 softmax  |
    | bbox_embed, first two layers                   | U(+-1 / sqrt(inputs))          | U(+-1 / sqrt(inputs))      |
    | bbox_embed, last layer                         | 0                              | 0, 0, -2, -2               |
    | ... with refinement, heads after the first     | as the first head              | 0, 0, 0, 0                 |
    | ... with two stages, all heads                 | as the first head              | 0, 0, 0, 0                 |

    Offsets and attention start out the same for every query, so that all of them look around evenly; -log(99) starts
    every class at a probability of 0.01, since nearly all of them are absent; the size bias of -2 starts boxes at 0.12
    of the image where no reference gives a size.

    Args:
        model: the detector.
        generator: source of the draws, on the CPU; torch's global one when None.
    """
    with torch.no_grad():
        for module in model.backbone.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
        for module in model.modules():
            if isinstance(module, nn.GroupNorm | nn.LayerNorm):
                module.reset_parameters()
        for module in model.input_proj.modules():
            if isinstance(module, nn.Conv2d):
                _init_xavier(module, generator)
        if not model.config.two_stage:
            model.query_embed.weight.normal_(generator=generator)
        _init_transformer(model.transformer, generator)
        _init_heads(model, generator)


_UNIFORM_BIAS = ("linear1", "linear2", "enc_output", "pos_trans")


def _init_transformer(transformer: Transformer, generator: torch.Generator | None) -> None:
    for name, module in transformer.named_modules():
        if isinstance(module, MSDeformAttn):
            _init_xavier(module.value_proj, generator)
            _init_xavier(module.output_proj, generator)
            nn.init.zeros_(module.attention_weights.weight)
            nn.init.zeros_(module.attention_weights.bias)
            nn.init.zeros_(module.sampling_offsets.weight)
            module.sampling_offsets.bias.copy_(offset_directions(module.heads, module.levels, module.points).flatten())
        elif isinstance(module, nn.MultiheadAttention):
            nn.init.xavier_uniform_(module.in_proj_weight, generator=generator)
            nn.init.zeros_(module.in_proj_bias)
            _init_xavier(module.out_proj, generator)
        elif isinstance(module, nn.Linear) and name.split(".")[-1] in _UNIFORM_BIAS:
            _init_xavier(module, generator)
            _init_uniform(module.bias, module.in_features, generator)
        elif isinstance(module, nn.Linear) and name == "reference_points":
            _init_xavier(module, generator)
    transformer.level_embed.normal_(generator=generator)


def _init_heads(model: DeformableDetr, generator: torch.Generator | None) -> None:
    class_head, box_head = model.class_embed[0], model.bbox_embed[0]
    assert isinstance(class_head, nn.Linear)
    assert isinstance(box_head, BoxHead)
    _init_uniform(class_head.weight, class_head.in_features, generator)
    nn.init.constant_(class_head.bias, -math.log(99) if model.config.class_loss == "focal" else 0.0)
    *hidden, last = (layer for layer in box_head.layers if isinstance(layer, nn.Linear))
    for layer in hidden:
        _init_uniform(layer.weight, layer.in_features, generator)
        _init_uniform(layer.bias, layer.in_features, generator)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    if model.config.with_box_refine:
        for head in model.class_embed[1:]:
            head.load_state_dict(class_head.state_dict())
        for head in model.bbox_embed[1:]:
            head.load_state_dict(box_head.state_dict())
    if not model.config.two_stage:
        last.bias[2:] = -2.0


def _init_xavier(module: nn.Linear | nn.Conv2d, generator: torch.Generator | None) -> None:
    nn.init.xavier_uniform_(module.weight, generator=generator)
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def _init_uniform(tensor: Tensor, inputs: int, generator: torch.Generator | None) -> None:
    bound = 1 / math.sqrt(inputs)
    nn.init.uniform_(tensor, -bound, bound, generator=generator)


def offset_directions(heads: int, levels: int, points: int) -> Tensor:
    """Initial offsets `[heads, levels, points, 2]` (x, y) in cells: head k looks into the direction 2 pi k / heads, its
    point p at a distance of p + 1 along the larger axis, alike on all levels (appendix A.4).
    """
    angles = torch.arange(heads, dtype=torch.float32) * (2 * math.pi / heads)
    directions = torch.stack((angles.cos(), angles.sin()), dim=-1)
    directions /= directions.abs().amax(-1, keepdim=True)
    distances = torch.arange(1, points + 1, dtype=torch.float32)
    return (directions[:, None, None] * distances[:, None]).expand(heads, levels, points, 2)
