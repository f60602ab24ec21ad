"""What stands on a decoder's hidden states, in both detectors."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.boxes import at_least_float32, without_autocast

Outputs = dict[str, Any]
"""`pred_logits`, `pred_boxes` and, where the config has them, `aux_outputs` and `enc_outputs`."""


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


def in_full_precision(head: nn.Module, x: Tensor) -> Tensor:
    """`head(x)` in fp32, whatever the type of its weights: coordinates and logits are few and want their digits."""
    weights = dict(head.named_parameters())
    exact = {name: at_least_float32(weight) for name, weight in weights.items()}
    with without_autocast(x.device.type):
        if all(exact[name] is weight for name, weight in weights.items()):
            output: Tensor = head(at_least_float32(x))
        else:
            output = torch.func.functional_call(head, exact, at_least_float32(x))
    return output


def collect_outputs(layers: list[Outputs], auxiliary_losses: bool) -> Outputs:
    """The last layer's outputs with those of the layers before it as `aux_outputs`, if they are wanted."""
    return layers[-1] | ({"aux_outputs": layers[:-1]} if auxiliary_losses else {})
