"""The network, in pure torch: it knows no ranks, writes no logs and reads no files but weights.

Use: `build_model(DetrConfig(num_classes=80)).to("cuda")(PixelBatch.collate(images).to("cuda"))`.
"""

import torch

from model.batch import ImageBatch, PixelBatch
from model.config import CriterionConfig, DetrConfig
from model.deformable_detr import DeformableDetr
from model.detr import Detr
from model.init import init_weights
from model.losses.criterion import Criterion
from model.postprocess import postprocess
from model.recompute import recompute_activations

__all__ = [
    "Criterion",
    "CriterionConfig",
    "DetrConfig",
    "ImageBatch",
    "PixelBatch",
    "build_model",
    "postprocess",
    "recompute_activations",
]


def build_model(config: DetrConfig, generator: torch.Generator | None = None) -> DeformableDetr | Detr:
    """A detector of the architecture `config.arch` with initial weights.

    Args:
        config: the architecture.
        generator: source of the draws, on the CPU; torch's global one when None.
    """
    model = Detr(config) if config.arch == "detr" else DeformableDetr(config)
    init_weights(model, generator)
    return model
