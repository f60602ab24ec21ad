"""Contrastive denoising (DINO, arXiv 2203.03605, section 3.3): objects with noise as queries of training alone.

They come in pairs. One begins with a box near its object, and is to put it right; the other with one that is too far
off, and is to say that there is nothing. Which object is whose is known, so nothing is matched.

Shapes: B batch, D queries, D / 2 pairs, n objects of an image.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.boxes import cxcywh_to_xyxy
from model.config import Denoising

DRAWS = 8
"""Numbers of a query: 4 of its box, whether its label is drawn anew, that label, the object to begin with, a spare."""


class Noised(NamedTuple):
    """Objects with noise, as queries; a tuple, so that hooks on modules find its tensors."""

    labels: Tensor
    """int64 [B, D]."""
    boxes: Tensor
    """[B, D, 4] cxcywh in 0..1; the first half near, the second half too far off."""
    group: Tensor
    """int64 [B, D]; a query sees those of its own group, in which no object comes twice."""
    empty: Tensor
    """bool [B], images without objects: their queries play no part."""
    matching: list[tuple[Tensor, Tensor]]
    """Of each image the queries that have an object, and the objects; int64 on the host."""


def add_noise(
    targets: Sequence[Mapping[str, Tensor]], config: Denoising, num_classes: int, draws: NDArray[np.float64]
) -> Noised:
    """Queries that begin as objects with noise.

    The pairs of an image go round its objects, from a drawn one on, so that every image has as many and none depends
    on the others. Nothing is read from the device.

    Args:
        targets: of each image `labels` int64 [n] and `boxes` [n, 4] cxcywh in 0..1, on the device.
        config: how many, and how much noise.
        num_classes: labels that are drawn are below it.
        draws: uniform numbers `[B, D, DRAWS]` in 0..1, below 1, on the host.
    """
    device, counts = targets[0]["labels"].device, [len(target["labels"]) for target in targets]
    rows, groups, matching = _rounds(counts, config.queries // 2, draws[:, 0, 6])
    nothing = targets[0]["boxes"].new_full((1, 4), 0.5)  # what images without objects have
    boxes = torch.cat([*(target["boxes"] for target in targets), nothing])
    labels = torch.cat([*(target["labels"] for target in targets), targets[0]["labels"].new_zeros(1)])
    index, group, uniform = (torch.from_numpy(array).to(device, non_blocking=True) for array in (rows, groups, draws))
    drawn = (uniform[..., 5] * num_classes).long()
    return Noised(
        labels=torch.where(uniform[..., 4] < config.label_noise, drawn, labels[index]),
        boxes=_shifted(boxes[index], uniform[..., :4].to(boxes.dtype), config.box_noise),
        group=group,
        empty=torch.tensor([count == 0 for count in counts]).to(device, non_blocking=True),
        matching=matching,
    )


def _rounds(
    counts: Sequence[int], pairs: int, starts: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], list[tuple[Tensor, Tensor]]]:
    """Of every query the row of its object among those of all images, which one more follows for images without, and
    its group, [B, D] each; and the matching.
    """
    numbers, first = np.arange(pairs, dtype=np.int64), 0
    rows, groups, matching = [], [], []
    for count, start in zip(counts, starts, strict=True):
        objects = (numbers + int(start * count)) % max(count, 1)
        matched = slice(pairs if count else 0)
        matching.append((torch.from_numpy(numbers[matched]), torch.from_numpy(objects[matched])))
        rows.append(np.tile(first + objects if count else np.full_like(objects, sum(counts)), 2))
        groups.append(np.tile(numbers // max(count, 1), 2))
        first += count
    return np.stack(rows), np.stack(groups), matching


def _shifted(boxes: Tensor, uniform: Tensor, scale: float) -> Tensor:
    """Boxes whose edges are moved by less than `scale` times half the side, in the second half by that and more."""
    shift = 2 * uniform - 1
    near, far = shift.chunk(2, dim=1)
    shift = torch.cat((near, torch.where(far < 0, far - 1, far + 1)), dim=1)
    corners = cxcywh_to_xyxy(boxes) + scale * shift * boxes[..., 2:].repeat(1, 1, 2) / 2
    low, high = corners.clamp(0, 1).chunk(2, dim=-1)
    return torch.cat(((low + high) / 2, (high - low).clamp(min=0)), dim=-1)
