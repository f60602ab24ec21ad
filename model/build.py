"""A detector by its settings."""

import torch

from model.config import DetrConfig
from model.deformable_detr import DeformableDetr
from model.detr import Detr
from model.init import init_weights


def build_model(config: DetrConfig, generator: torch.Generator | None = None) -> DeformableDetr | Detr:
    """A detector of the architecture `config.arch` with initial weights.

    Args:
        config: the architecture.
        generator: source of the draws, on the CPU; torch's global one when None.
    """
    model = Detr(config) if config.arch == "detr" else DeformableDetr(config)
    init_weights(model, generator)
    return model
