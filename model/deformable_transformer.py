"""Encoder and decoder of Deformable DETR (arXiv 2010.04159, sections 4.1 and 4.2, appendix A.4).

Shapes: B batch, L levels, S cells of all levels, C hidden channels, Q queries. Boxes are cxcywh in 0..1 of the image.

Coordinates (reference points, valid ratios, position codes, boxes) are fp32 with 16-bit weights and under autocast,
too: 16 bits cannot name a pixel of a large image. A position code is rounded once it is added to a feature.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.boxes import at_least_float32, inverse_sigmoid
from model.config import DetrConfig
from model.deformable_attention import Levels, MSDeformAttn, make_levels
from model.denoising import Noised
from model.dropout import Dropout
from model.heads import in_full_precision
from model.position import encode_boxes, encode_cells
from model.recompute import Recomputing


class EncoderLayer(nn.Module):
    """Every cell attends to a few points of every level, then a feed-forward block; norms come after the sums."""

    def __init__(self, config: DetrConfig) -> None:
        super().__init__()
        width = config.hidden_dim
        self.self_attn = MSDeformAttn(width, config.heads, config.feature_levels, config.points)
        self.dropout1 = Dropout(config.dropout)
        self.norm1 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, config.ffn_dim)
        self.dropout2 = Dropout(config.dropout)
        self.linear2 = nn.Linear(config.ffn_dim, width)
        self.dropout3 = Dropout(config.dropout)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, source: Tensor, position: Tensor, reference: Tensor, levels: Levels, padding: Tensor) -> Tensor:
        """`source` [B, S, C] with `position` [B, S, C] and `reference` [B, S, L, 2] to [B, S, C]."""
        attended = self.self_attn((source + position).to(source.dtype), reference, source, levels, padding)
        source = self.norm1(source + self.dropout1(attended))
        fed = self.linear2(self.dropout2(F.relu(self.linear1(source))))
        output: Tensor = self.norm2(source + self.dropout3(fed))
        return output


class DecoderLayer(nn.Module):
    """Queries attend to each other, then to points of the feature maps, then a feed-forward block.

    The numbers of the norms are the original's: norm2 follows the self-attention, norm1 the cross-attention.
    """

    def __init__(self, config: DetrConfig) -> None:
        super().__init__()
        width = config.hidden_dim
        self.cross_attn = MSDeformAttn(width, config.heads, config.feature_levels, config.points)
        self.dropout1 = Dropout(config.dropout)
        self.norm1 = nn.LayerNorm(width)
        self.self_attn = nn.MultiheadAttention(width, config.heads, dropout=config.dropout, batch_first=True)
        self.dropout2 = Dropout(config.dropout)
        self.norm2 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, config.ffn_dim)
        self.dropout3 = Dropout(config.dropout)
        self.linear2 = nn.Linear(config.ffn_dim, width)
        self.dropout4 = Dropout(config.dropout)
        self.norm3 = nn.LayerNorm(width)

    def forward(
        self,
        target: Tensor,
        position: Tensor,
        reference: Tensor,
        memory: Tensor,
        levels: Levels,
        padding: Tensor,
        groups: Sequence[int] = (),
        unseen: Tensor | None = None,
    ) -> Tensor:
        """`target`, `position` [B, Q, C], `reference` [B, Q, L, 2 or 4] and `memory` [B, S, C] to [B, Q, C].

        Queries attend to those of their own group; `groups` are the sizes, of all queries where there are none. With
        `unseen` [B * heads, last, first + last] the last group is of noised objects, as in `Decoder`.
        """
        target = self.norm2(target + self.dropout2(self._attended(target + position, target, groups, unseen)))
        attended = self.cross_attn(target + position, reference, memory, levels, padding)
        target = self.norm1(target + self.dropout1(attended))
        fed = self.linear2(self.dropout3(F.relu(self.linear1(target))))
        output: Tensor = self.norm3(target + self.dropout4(fed))
        return output

    def _attended(self, query: Tensor, target: Tensor, groups: Sequence[int], unseen: Tensor | None) -> Tensor:
        """The self-attention of each group [B, Q, C]."""
        sizes = groups or (query.shape[1],)
        queries, targets = (list(torch.split_with_sizes(x, sizes, 1)) for x in (query, target))
        masks: list[Tensor | None] = [None] * len(sizes)
        keys, values = queries.copy(), targets.copy()
        if unseen is not None:
            masks[-1] = unseen
            keys[-1], values[-1] = (torch.cat((parts[0], parts[-1]), dim=1) for parts in (queries, targets))
        parts = zip(queries, keys, values, masks, strict=True)
        attended = [self.self_attn(q, k, v, attn_mask=mask, need_weights=False)[0] for q, k, v, mask in parts]
        return attended[0] if len(attended) == 1 else torch.cat(attended, dim=1)


class Encoder(Recomputing):
    """The encoder's layers."""

    def __init__(self, config: DetrConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))

    def forward(
        self,
        source: Tensor,
        position: Tensor,
        levels: Levels,
        valid_ratios: Tensor,
        padding: Tensor,
    ) -> Tensor:
        """`source` [B, S, C] of all levels to the memory [B, S, C]."""
        reference = encoder_reference_points(levels.shapes, valid_ratios)
        for layer in self.layers:
            source = self.run_block(layer, source, position, reference, levels, padding)
        return source


class Decoder(Recomputing):
    """The decoder's layers, and the boxes that they lead to.

    Args:
        config: the architecture.

    With `with_box_refine` a layer's boxes, detached, are the next layer's references, so each layer corrects the one
    before it and its gradient does not run through the corrections before. With `look_forward_twice` it runs through
    the last of these: what the layer before said of the boxes, about references that are detached again (DINO,
    arXiv 2203.03605, section 3.5).
    """

    def __init__(self, config: DetrConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.refine = config.with_box_refine
        self.look_twice = config.look_forward_twice

    def forward(
        self,
        target: Tensor,
        position: Tensor,
        reference: Tensor,
        memory: Tensor,
        levels: Levels,
        valid_ratios: Tensor,
        padding: Tensor,
        bbox_embed: nn.ModuleList,
        groups: Sequence[int] = (),
        unseen: Tensor | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Decode.

        Args:
            target: `[B, Q, C]`, the queries' content.
            position: `[B, Q, C]`, the queries' position.
            reference: `[B, Q, 2]` points or `[B, Q, 4]` boxes.
            memory: `[B, S, C]`, the encoder's output.
            levels: those of `memory`.
            valid_ratios: `[B, L, 2]` of (width, height).
            padding: `[B, S]`, True on padding.
            bbox_embed: box head of every layer.
            groups: sizes of the groups of queries that do not see each other; all do where there are none.
            unseen: `[B * heads, last, first + last]`, that the last group is of noised objects, which see the first
                group and each other but where this is True.

        Returns:
            Of each layer the hidden state `[B, Q, C]` and the boxes `[B, Q, 4]`.
        """
        hidden, boxes = [], []
        corrected = reference
        for layer, head in zip(self.layers, bbox_embed, strict=False):  # two-stage has a head more, for the proposals
            ratios = valid_ratios.repeat(1, 1, reference.shape[-1] // 2)[:, None]  # [B, 1, L, 2 or 4]
            of_levels = reference[:, :, None] * ratios
            target = self.run_block(layer, target, position, of_levels, memory, levels, padding, groups, unseen)
            hidden.append(target)
            deltas = in_full_precision(head, target)
            boxes.append(relative_boxes(deltas, corrected))
            if self.refine:
                following = relative_boxes(deltas, reference) if self.look_twice else boxes[-1].detach()
                reference, corrected = following.detach(), following
        return hidden, boxes


class TransformerOutput(NamedTuple):
    """What the heads of the detector build on; a tuple, so that hooks on modules (ZeRO stage 3) find its tensors."""

    hidden: list[Tensor]
    """Hidden state [B, Q, C] of each decoder layer."""
    boxes: list[Tensor]
    """Boxes [B, Q, 4] of each decoder layer."""
    proposal_logits: Tensor | None
    """Two-stage: class logits [B, S, classes] of every cell."""
    proposal_boxes: Tensor | None
    """Two-stage: boxes [B, S, 4] of every cell."""
    groups: list[int]
    """Sizes of the groups of queries: the detector's own, then those of training alone, as far as they are there."""


class Transformer(nn.Module):
    """Encoder, queries and decoder.

    Where references come from. In the encoder a cell's reference point is its own centre. In the decoder it is learned:
    a linear layer and a sigmoid on the query's position embedding, the same for all images; with `two_stage` it is the
    box of a proposal. A box is predicted relative to its reference: the head's first two numbers (all four, where the
    reference is a box) are added to the reference's logits before the sigmoid. The sampled points lie around the
    reference too, so a head that looks there has only to say how far off it is, and what attention learns of a place
    agrees with what the box head is asked.

    The level embedding: two cells of different levels at the same place of the image have the same position code, and
    attention could not tell them apart. One learned vector a level, added to the position code (not to the features),
    says which level a cell is of.
    """

    def __init__(self, config: DetrConfig) -> None:
        super().__init__()
        width = config.hidden_dim
        self.num_queries = config.num_queries
        self.heads = config.heads
        self.two_stage = bool(config.two_stage)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.level_embed = nn.Parameter(torch.empty(config.feature_levels, width))
        if config.two_stage:
            self.enc_output = nn.Linear(width, width)
            self.enc_output_norm = nn.LayerNorm(width)
            made = width * 2 - config.query_width  # what is not learned of a query
            self.pos_trans = nn.Linear(width * 2, made)
            self.pos_trans_norm = nn.LayerNorm(made)
            if config.denoising:
                self.label_embed = nn.Embedding(config.num_classes, width)
        else:
            self.reference_points = nn.Linear(width, 2)

    def forward(
        self,
        features: list[Tensor],
        masks: list[Tensor],
        query_embed: Tensor | None,
        class_embed: nn.ModuleList,
        bbox_embed: nn.ModuleList,
        more_queries: int = 0,
        noised: Noised | None = None,
    ) -> TransformerOutput:
        """Encode the levels and decode the queries.

        Args:
            features: `[B, C, H, W]` of each level.
            masks: `[B, H, W]` of each level, True on padding.
            query_embed: `[queries, 2 * C]`, position and content in that order; with two stages None, or `[queries, C]`
                where the contents are learned.
            class_embed: class heads; two-stage uses the last one for the proposals.
            bbox_embed: box heads; two-stage uses the last one for the proposals.
            more_queries: queries beyond `num_queries`, after them, which those do not see, nor they those.
            noised: objects that are queries, too, after all others, and see the first `num_queries`; with two stages.
        """
        shapes = [(feature.shape[2], feature.shape[3]) for feature in features]
        exact = torch.promote_types(features[0].dtype, torch.float32)
        source = torch.cat([feature.flatten(2).transpose(1, 2) for feature in features], dim=1)
        codes = [encode_cells(mask, source.shape[-1], exact) for mask in masks]
        position = torch.cat([code + level for code, level in zip(codes, self.level_embed, strict=True)], dim=1)
        padding = torch.cat([mask.flatten(1) for mask in masks], dim=1)
        valid_ratios = torch.stack([valid_ratio(mask, exact) for mask in masks], dim=1)
        levels = make_levels(shapes, valid_ratios)
        memory = self.encoder(source, position, levels, valid_ratios, padding)

        proposal_logits = proposal_boxes = None
        if self.two_stage:
            proposal_logits, proposal_boxes, picked = self._propose(
                memory, masks, class_embed[-1], bbox_embed[-1], self.num_queries + more_queries
            )
            reference, query_position, target = self._begun(picked.sigmoid(), query_embed, noised, memory.dtype)
        else:
            assert query_embed is not None
            query_position, target = query_embed.expand(source.shape[0], -1, -1).chunk(2, dim=-1)
            reference = in_full_precision(self.reference_points, query_position).sigmoid()
        groups, unseen = self._groups(target.shape[1], more_queries, noised)
        hidden, boxes = self.decoder(
            target, query_position, reference, memory, levels, valid_ratios, padding, bbox_embed, groups, unseen
        )
        return TransformerOutput(hidden, boxes, proposal_logits, proposal_boxes, groups)

    def _begun(
        self, picked: Tensor, query_embed: Tensor | None, noised: Noised | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """References [B, Q, 4], positions and contents [B, Q, C] of queries that begin with boxes, `picked` [B, Q, 4]
        and then the noised ones.
        """
        reference = picked if noised is None else torch.cat((picked, noised.boxes), dim=1)
        code = encode_boxes(reference, self.level_embed.shape[-1] // 2)
        made = self.pos_trans_norm(self.pos_trans(code.to(dtype)))
        if query_embed is None:
            position, target = made.chunk(2, dim=-1)
        else:
            position, target = made, query_embed[: picked.shape[1]].expand(picked.shape[0], -1, -1)
        if noised is not None:
            target = torch.cat((target[:, : picked.shape[1]], self.label_embed(noised.labels)), dim=1)
        return reference, position, target

    def _groups(self, queries: int, more_queries: int, noised: Noised | None) -> tuple[list[int], Tensor | None]:
        """Sizes of the groups of so many queries, and what noised ones do not see: those of another group of theirs."""
        denoising = 0 if noised is None else noised.boxes.shape[1]
        own = min(self.num_queries, queries - denoising)
        sizes = [own, *([queries - denoising - own] if more_queries else []), *([denoising] if denoising else [])]
        if noised is None:
            return sizes, None
        others = noised.group[:, :, None] != noised.group[:, None, :]
        return sizes, F.pad(others, (own, 0)).repeat_interleave(self.heads, 0)

    def _propose(
        self, memory: Tensor, masks: list[Tensor], class_head: nn.Module, bbox_head: nn.Module, queries: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Class logits [B, S, classes] and boxes [B, S, 4] of every cell, and the logits [B, Q, 4] of the best boxes.

        Why every cell can be a query here: the encoder has made it one already, at a cost that is linear in the cells,
        since each looks at a fixed number of points. What a query costs beyond that is a decoder, whose queries attend
        to each other at a cost that is their number squared; 17,000 cells could not pay it. So the first stage has no
        decoder: two heads look at each cell alone, like a region proposal network, and only the best become queries.

        The best are those with the highest first class logit, which the encoder's loss trains as "an object". A small
        image may have fewer cells than there are queries: then every cell becomes one. A proposal that is not usable
        has the infinite logit, the box (1, 1, 1, 1); it can still be picked, with a content that the norm makes of 0.
        """
        anchors, usable = proposal_anchors(masks, at_least_float32(memory).dtype)
        anchors = anchors.masked_fill(~usable, float("inf"))
        content = self.enc_output_norm(self.enc_output(memory.masked_fill(~usable, 0.0)))
        logits = in_full_precision(class_head, content)
        coordinates = in_full_precision(bbox_head, content) + anchors
        best = logits[..., 0].topk(min(queries, logits.shape[1]), dim=1).indices  # [B, Q]
        picked = coordinates.gather(1, best[..., None].expand(-1, -1, 4)).detach()
        return logits, coordinates.sigmoid(), picked


def valid_ratio(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Part of the (width, height) of a canvas `[B, H, W]` that the image fills: `[B, 2]`."""
    height = (~mask[:, :, 0]).sum(1).to(dtype) / mask.shape[1]
    width = (~mask[:, 0, :]).sum(1).to(dtype) / mask.shape[2]
    return torch.stack((width, height), dim=-1)


def encoder_reference_points(shapes: Sequence[tuple[int, int]], valid_ratios: Tensor) -> Tensor:
    """Centre of every cell as a fraction of every level's canvas: `[B, S, L, 2]`.

    A centre is first taken relative to the valid part of its own level, then scaled to each level's valid part.
    """
    points = []
    for level, (height, width) in enumerate(shapes):
        y, x = cell_centres(height, width, valid_ratios)
        centres = torch.stack((x / width, y / height), dim=-1)  # [H * W, 2]
        points.append(centres / valid_ratios[:, None, level])
    return torch.cat(points, dim=1)[:, :, None] * valid_ratios[:, None]


def cell_centres(height: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """The y and x `[height * width]` of the centres of a map's cells, in cells, row by row, on the device of `like`."""
    y = torch.arange(height, dtype=like.dtype, device=like.device) + 0.5
    x = torch.arange(width, dtype=like.dtype, device=like.device) + 0.5
    grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
    return grid_y.flatten(), grid_x.flatten()


def proposal_anchors(masks: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The box that each cell proposes before it is refined (appendix A.4).

    It is centred on the cell, with a side of 0.05 * 2^level. One that touches the border of the image to within 1%, and
    every one on padding, is not usable.

    Returns:
        Logits of cxcywh `[B, S, 4]`, and which are usable `[B, S, 1]`.
    """
    proposals = []
    for level, mask in enumerate(masks):
        height, width = mask.shape[1:]
        ratio = valid_ratio(mask, dtype)
        y, x = cell_centres(height, width, ratio)
        centres = torch.stack((x / width, y / height), dim=-1) / ratio[:, None]
        sizes = torch.full_like(centres, 0.05 * 2.0**level)
        proposals.append(torch.cat((centres, sizes), dim=-1))
    boxes = torch.cat(proposals, dim=1)
    usable = ((boxes > 0.01) & (boxes < 0.99)).all(-1, keepdim=True)
    usable &= ~torch.cat([mask.flatten(1) for mask in masks], dim=1)[..., None]
    return torch.log(boxes / (1 - boxes)), usable


def relative_boxes(deltas: Tensor, reference: Tensor) -> Tensor:
    """Boxes `[B, Q, 4]` of a head's `deltas` `[B, Q, 4]` about references `[B, Q, 2 or 4]`, added as logits."""
    logits = inverse_sigmoid(reference)
    return (deltas + F.pad(logits, (0, 4 - logits.shape[-1]))).sigmoid()
