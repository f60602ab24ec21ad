"""How large a detector is and how much it computes, without memory for its weights or its images."""

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Size
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.backbones.resnet import Frozen
from model.batch import ImageBatch
from model.build import build_model
from model.config import DetrConfig

MEAN_SIZE = (800, 1101)
"""Height and width with the mean area of COCO's validation images once their short side is 800 and the long one at most
1333: 880,694 pixels over the first 100 images of COCO's own example file (val2014)."""


@dataclass(frozen=True)
class Complexity:
    """What a detector costs."""

    parameters: int
    """All parameters, shared ones once."""
    trainable: int
    """Those that are trained."""
    tensors: int
    """Entries of the state dict, shared ones under each of their names."""
    multiply_adds: int
    """Multiply-adds of the forward pass of one image."""


def measure(config: DetrConfig, frozen: Frozen = "stem_and_layer1", size: tuple[int, int] = MEAN_SIZE) -> Complexity:
    """Count parameters, and multiply-adds as the papers do (their "FLOPs").

    Counted are convolutions, linear layers, the two products of attention, and the sampling of deformable attention
    with 5 multiply-adds a sampled channel: 4 to interpolate, 1 to weigh (arXiv 2010.04159, appendix A.1). Norms,
    activations, softmax and position codes are not.

    Args:
        config: the architecture.
        frozen: the part of the backbone that is not trained.
        size: height and width of the image.
    """
    with torch.device("meta"):
        model = build_model(config)
    model.backbone.freeze(frozen)
    parameters = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    # Fake tensors say that they are on the CPU: there is no autocast for the meta device, which the heads turn off.
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        fakes = {name: torch.empty(tensor.shape) for name, tensor in tensors.items()}
        batch = ImageBatch(torch.empty(1, 3, *size), torch.zeros(1, *size, dtype=torch.bool))
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.grid_sampler_2d: _sampled}) as counter:
            torch.func.functional_call(model.eval(), fakes, batch)
    return Complexity(
        parameters=sum(count for count, _ in parameters),
        trainable=sum(count for count, trained in parameters if trained),
        tensors=len(model.state_dict()),
        multiply_adds=counter.get_total_flops() // 2,
    )


def _sampled(*_: Any, out_shape: Size, **__: Any) -> int:
    """Flops of deformable attention where plain torch samples for it, as the operator's own formula has them."""
    return 2 * 5 * prod(out_shape)
