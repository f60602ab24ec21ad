"""DETR (arXiv 2005.12872): a backbone's last feature map, a transformer with full attention, and two heads.

Module names follow facebookresearch/detr, so that its weights fit by name; the backbone's are torchvision's, or Swin's
own.
Shapes: B batch, Q queries, C hidden channels, S cells of the feature map.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.backbones.make import make_backbone
from model.batch import ImageBatch
from model.boxes import at_least_float32
from model.config import DetrConfig
from model.dropout import Dropout
from model.heads import BoxHead, Outputs, collect_outputs, in_full_precision
from model.position import encode_cells
from model.recompute import Recomputing


def _attention(config: DetrConfig) -> nn.MultiheadAttention:
    return nn.MultiheadAttention(config.hidden_dim, config.heads, dropout=config.dropout, batch_first=True)


class DetrEncoderLayer(nn.Module):
    """Every cell attends to every other, then a feed-forward block; norms come after the sums."""

    def __init__(self, config: DetrConfig) -> None:
        super().__init__()
        width = config.hidden_dim
        self.self_attn = _attention(config)
        self.dropout1 = Dropout(config.dropout)
        self.norm1 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, config.ffn_dim)
        self.dropout = Dropout(config.dropout)
        self.linear2 = nn.Linear(config.ffn_dim, width)
        self.dropout2 = Dropout(config.dropout)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, source: Tensor, position: Tensor, padding: Tensor) -> Tensor:
        """`source` with `position` [B, S, C] and `padding` [B, S] to [B, S, C]."""
        query = (source + position).to(source.dtype)
        attended = self.self_attn(query, query, source, key_padding_mask=padding, need_weights=False)[0]
        source = self.norm1(source + self.dropout1(attended))
        fed = self.linear2(self.dropout(F.relu(self.linear1(source))))
        output: Tensor = self.norm2(source + self.dropout2(fed))
        return output


class DetrDecoderLayer(nn.Module):
    """Queries attend to each other, then to all cells (`multihead_attn`), then a feed-forward block."""

    def __init__(self, config: DetrConfig) -> None:
        super().__init__()
        width = config.hidden_dim
        self.self_attn = _attention(config)
        self.dropout1 = Dropout(config.dropout)
        self.norm1 = nn.LayerNorm(width)
        self.multihead_attn = _attention(config)
        self.dropout2 = Dropout(config.dropout)
        self.norm2 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, config.ffn_dim)
        self.dropout = Dropout(config.dropout)
        self.linear2 = nn.Linear(config.ffn_dim, width)
        self.dropout3 = Dropout(config.dropout)
        self.norm3 = nn.LayerNorm(width)

    def forward(self, target: Tensor, position: Tensor, memory: Tensor, key: Tensor, padding: Tensor) -> Tensor:
        """`target`, `position` [B, Q, C]; `memory` and `key`, the memory with its position, [B, S, C]; to [B, Q, C]."""
        query = target + position
        attended = self.self_attn(query, query, target, need_weights=False)[0]
        target = self.norm1(target + self.dropout1(attended))
        query = target + position
        attended = self.multihead_attn(query, key, memory, key_padding_mask=padding, need_weights=False)[0]
        target = self.norm2(target + self.dropout2(attended))
        fed = self.linear2(self.dropout(F.relu(self.linear1(target))))
        output: Tensor = self.norm3(target + self.dropout3(fed))
        return output


class DetrEncoder(Recomputing):
    """The encoder's layers."""

    def __init__(self, config: DetrConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DetrEncoderLayer(config) for _ in range(config.encoder_layers))

    def forward(self, source: Tensor, position: Tensor, padding: Tensor) -> Tensor:
        """`source` [B, S, C] to the memory [B, S, C]."""
        for layer in self.layers:
            source = self.run_block(layer, source, position, padding)
        return source


class DetrDecoder(Recomputing):
    """The decoder's layers and the norm that the heads see every layer's result through."""

    def __init__(self, config: DetrConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DetrDecoderLayer(config) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(config.hidden_dim)

    def forward(self, position: Tensor, memory: Tensor, key: Tensor, padding: Tensor) -> list[Tensor]:
        """Normalised hidden state [B, Q, C] of each layer; the first begins with a content of 0."""
        target = torch.zeros_like(position)
        hidden = []
        for layer in self.layers:
            target = self.run_block(layer, target, position, memory, key, padding)
            hidden.append(self.norm(target))
        return hidden


class DetrTransformer(nn.Module):
    """Encoder and decoder. Positions are added to the queries and keys of every layer, never to the values."""

    def __init__(self, config: DetrConfig) -> None:
        super().__init__()
        self.encoder = DetrEncoder(config)
        self.decoder = DetrDecoder(config)

    def forward(self, features: Tensor, mask: Tensor, query_embed: Tensor) -> list[Tensor]:
        """Hidden states [B, Q, C] of the decoder's layers.

        Args:
            features: `[B, C, H, W]`.
            mask: `[B, H, W]`, True on padding; no image is all padding.
            query_embed: `[Q, C]`, the queries' positions.
        """
        source = features.flatten(2).transpose(1, 2)
        padding = mask.flatten(1)
        position = encode_cells(mask, source.shape[-1], at_least_float32(source).dtype, from_centres=False)
        memory = self.encoder(source, position, padding)
        key = (memory + position).to(memory.dtype)
        hidden: list[Tensor] = self.decoder(query_embed.expand(source.shape[0], -1, -1), memory, key, padding)
        return hidden


class Detr(nn.Module):
    """The detector.

    A query has no place of its own: its box is read off its hidden state alone. So attention has to find the object
    among all cells of one coarse map, which is what takes hundreds of epochs, and what Deformable DETR's reference
    points replace.
    """

    def __init__(self, config: DetrConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_dim
        self.backbone = make_backbone(
            config.backbone, config.backbone_norm, config.dilation, only_last=True, drop_path=config.drop_path
        )
        self.input_proj = nn.Conv2d(self.backbone.channels[-1], width, 1)
        self.query_embed = nn.Embedding(config.num_queries, width)
        self.transformer = DetrTransformer(config)
        self.class_embed = nn.Linear(width, config.num_logits)
        self.bbox_embed = BoxHead(width)

    def forward(self, batch: ImageBatch) -> Outputs:
        """Detect.

        Args:
            batch: normalised images and their padding mask.

        Returns:
            `pred_logits` [B, Q, logits] and `pred_boxes` [B, Q, 4] cxcywh in 0..1 of the image without its padding, of
            the last decoder layer; `aux_outputs`, a list of the same for the layers before, if the config wants them.
            All fp32.
        """
        (features,) = self.backbone(batch.pixels)
        mask = batch.mask_at(features.shape[2], features.shape[3])
        layers = [
            {
                "pred_logits": in_full_precision(self.class_embed, hidden),
                "pred_boxes": in_full_precision(self.bbox_embed, hidden).sigmoid(),
            }
            for hidden in self.transformer(self.input_proj(features), mask, self.query_embed.weight)
        ]
        return collect_outputs(layers, self.config.auxiliary_losses)
