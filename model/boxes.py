"""Boxes as centre and size or as corners, and the generalised IoU between them (arXiv 1902.09630).

Shapes: `[..., 4]` means any leading dimensions. cxcywh is (centre x, centre y, width, height), xyxy is (left, top,
right, bottom); the unit is whatever the caller uses. Nothing here reads a value back from the device: boxes that are
not finite give results that are not finite, which the training loop reduces over the ranks and then raises on all.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Corners `[..., 4]` of boxes given as centre and size `[..., 4]`."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat((centre - size / 2, centre + size / 2), dim=-1)


def box_area(boxes: Tensor) -> Tensor:
    """Area `[...]` of xyxy boxes `[..., 4]`."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def _intersection_and_union(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Areas `[...]` of xyxy boxes, element by element."""
    overlap = torch.minimum(first[..., 2:], second[..., 2:]) - torch.maximum(first[..., :2], second[..., :2])
    overlap = overlap.clamp(min=0)
    intersection = overlap[..., 0] * overlap[..., 1]
    return intersection, box_area(first) + box_area(second) - intersection


def iou(first: Tensor, second: Tensor) -> Tensor:
    """IoU `[...]` in 0..1 of xyxy boxes `[..., 4]`, element by element; 0 of two boxes without area."""
    intersection, union = _intersection_and_union(first, second)
    return intersection / union.clamp(min=torch.finfo(union.dtype).tiny)


def generalized_iou(first: Tensor, second: Tensor) -> Tensor:
    """Generalised IoU in -1..1 of xyxy boxes, element by element.

    The IoU of two boxes without area counts as 0, so the result stays finite and so does its gradient.

    Args:
        first: xyxy `[..., 4]`.
        second: xyxy `[..., 4]`, broadcastable to `first`.

    Returns:
        `[...]`, 1 for equal boxes, towards -1 for small ones far apart.
    """
    intersection, union = _intersection_and_union(first, second)
    hull = torch.maximum(first[..., 2:], second[..., 2:]) - torch.minimum(first[..., :2], second[..., :2])
    enclosing = hull[..., 0] * hull[..., 1]
    tiny = torch.finfo(union.dtype).tiny
    return intersection / union.clamp(min=tiny) - (enclosing - union) / enclosing.clamp(min=tiny)


def pairwise_generalized_iou(first: Tensor, second: Tensor) -> Tensor:
    """Generalised IoU `[..., n, m]` of every xyxy box `[..., n, 4]` with every box `[..., m, 4]`."""
    return generalized_iou(first[..., :, None, :], second[..., None, :, :])


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Logit of `x` in 0..1, with both x and 1 - x kept at least `eps` from 0."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in fp32, or in fp64 where it is that already: what coordinates and losses are computed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Autocast turned off where it is on: a context that changes nothing would stand in exported graphs."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()
