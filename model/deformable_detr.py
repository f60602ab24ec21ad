"""Deformable DETR (arXiv 2010.04159): a backbone, feature levels, a deformable transformer and a head for each layer.

Module names follow the original, so that its weights fit by name; the backbone's are torchvision's, or Swin's own.
Shapes: B batch, Q queries, C hidden channels, S cells of all levels.
"""

import copy

import torch
from torch import Tensor, nn

from model.backbones.make import make_backbone
from model.batch import ImageBatch
from model.config import DetrConfig
from model.deformable_transformer import Transformer
from model.denoising import Noised
from model.heads import BoxHead, Outputs, collect_outputs, in_full_precision


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
        self.backbone = make_backbone(
            config.backbone, config.backbone_norm, config.dilation, config.feature_levels == 1, config.drop_path
        )
        self.input_proj = self._input_projections(width, config.feature_levels)
        if config.query_width:
            self.query_embed = nn.Embedding(config.num_queries, config.query_width)
        if config.query_width and config.one_to_many:
            self.one_to_many_embed = nn.Embedding(config.one_to_many.queries, config.query_width)
        heads = config.decoder_layers + bool(config.two_stage)
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

    def forward(self, batch: ImageBatch, noised: Noised | None = None) -> Outputs:
        """Detect.

        Args:
            batch: normalised images and their padding mask.
            noised: in training with `config.denoising`, objects that are queries, too.

        Returns:
            `pred_logits` [B, Q, logits] and `pred_boxes` [B, Q, 4] cxcywh in 0..1 of the image without its padding, of
            the last decoder layer; `aux_outputs`, a list of the same for the layers before, if the config wants them;
            `enc_outputs`, the same for every cell [B, S, ...], with two stages; in training `one_to_many`, the first
            three of the queries that `config.one_to_many` adds, and `denoising`, those of `noised`. All fp32.
            Two-stage gives fewer than `num_queries` when the image has fewer cells.
        """
        features, masks = self._levels(batch)
        many = self.config.one_to_many if self.training else None
        more = many.queries if many else 0
        out = self.transformer(
            features, masks, self._learned(more > 0), self.class_embed, self.bbox_embed, more, noised
        )
        layers = [
            {"pred_logits": in_full_precision(head, hidden), "pred_boxes": boxes}
            for head, hidden, boxes in zip(self.class_embed, out.hidden, out.boxes, strict=False)
        ]
        own, *others = _of_groups(layers, out.groups)
        outputs = collect_outputs(own, self.config.auxiliary_losses)
        names = [*(["one_to_many"] if many else []), *(["denoising"] if noised is not None else [])]
        for name, group in zip(names, others, strict=True):
            outputs[name] = collect_outputs(group, self.config.auxiliary_losses)
        if out.proposal_logits is not None and out.proposal_boxes is not None:
            outputs["enc_outputs"] = {"pred_logits": out.proposal_logits, "pred_boxes": out.proposal_boxes}
        return outputs

    def _learned(self, with_more: bool) -> Tensor | None:
        """What is learned of the queries [queries, ...], if anything is."""
        if not self.config.query_width:
            return None
        own: Tensor = self.query_embed.weight
        return torch.cat((own, self.one_to_many_embed.weight)) if with_more else own

    def _levels(self, batch: ImageBatch) -> tuple[list[Tensor], list[Tensor]]:
        """Features [B, C, H, W] and masks [B, H, W] of each level; masks are resized from the full resolution."""
        maps = self.backbone(batch.pixels)
        features = [projection(x) for projection, x in zip(self.input_proj, maps, strict=False)]
        x = maps[-1]
        for projection in self.input_proj[len(maps) :]:
            x = projection(x)
            features.append(x)
        return features, [batch.mask_at(feature.shape[2], feature.shape[3]) for feature in features]


def _of_groups(layers: list[Outputs], sizes: list[int]) -> list[list[Outputs]]:
    """The layers of each group of queries."""
    if len(sizes) == 1:
        return [layers]
    split = [{name: torch.split_with_sizes(output, sizes, 1) for name, output in layer.items()} for layer in layers]
    return [[{name: parts[g] for name, parts in layer.items()} for layer in split] for g in range(len(sizes))]
