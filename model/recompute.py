"""Memory for time: forget a block's activations after the forward pass and compute them again in the backward pass
(arXiv 1604.06174).
"""

from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


class Recomputing(nn.Module):
    """A module whose blocks may be computed again; off until `recompute_activations` turns it on."""

    recompute = False

    def run_block(self, block: nn.Module, *inputs: Any) -> Any:
        """`block(*inputs)`. If it is computed again, then with the same random draws, so the gradients are equal."""
        if self.recompute and self.training:
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


def recompute_activations(model: nn.Module, on: bool = True) -> None:
    """Keep only what goes into the layers of encoder and decoder and into the stages of a ResNet or the blocks of a
    Swin or ViT, or everything.

    The results are the same; a training step computes the forward pass of these blocks twice.
    """
    for module in model.modules():
        if isinstance(module, Recomputing):
            module.recompute = on
