"""How large a detector is and how much it computes, without memory for its weights or its images."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Size, Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from model.backbones.backbone import Frozen
from model.batch import ImageBatch
from model.build import build_model
from model.config import CriterionConfig, DetrConfig
from model.denoising import DRAWS, add_noise
from model.losses.criterion import Criterion
from model.losses.groups import Group, Matches, groups_of
from model.memory import LiveBytes, MovedBytes, kept_for_backward
from model.recompute import recompute_activations

MEAN_SIZE = (800, 1101)
"""Height and width with the mean area of COCO's validation images once their short side is 800 and the long one at most
1333: 880,694 pixels over the first 100 images of COCO's own example file (val2014)."""
OBJECTS = 7
"""Objects of an image of COCO on average."""


@dataclass(frozen=True)
class Complexity:
    """What a detector costs."""

    parameters: int
    """All parameters, shared ones once; also of queries that training alone has."""
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
    model = skeleton(config, frozen)
    parameters = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    # Fake tensors say that they are on the CPU: there is no autocast for the meta device, which the heads turn off.
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        batch = ImageBatch(torch.empty(1, 3, *size), torch.zeros(1, *size, dtype=torch.bool))
        with _flop_counter() as counter:
            _with_fakes(model).eval().requires_grad_(False)(batch)
    return Complexity(
        parameters=sum(count for count, _ in parameters),
        trainable=sum(count for count, trained in parameters if trained),
        tensors=len(model.state_dict()),
        multiply_adds=counter.get_total_flops() // 2,
    )


@dataclass(frozen=True)
class Work:
    """What a device does."""

    flops: float
    """Floating-point operations, two for a multiply-add."""
    conv_flops: float
    """Those of convolutions."""
    moved: float
    """Bytes that the other operations read and write: norms, activations, sums, copies."""

    def times(self, factor: float) -> "Work":
        """So many times as much."""
        return Work(self.flops * factor, self.conv_flops * factor, self.moved * factor)


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch of training: its forward pass, its losses and its backward pass.

    Full attention is what fused kernels make of it, which keep no weights of attention.
    """

    model: DetrConfig
    """The architecture."""
    images: int
    """Images of it."""
    size: tuple[int, int]
    """Height and width of its canvas."""
    frozen: Frozen = "stem_and_layer1"
    """The part of the backbone that is not trained."""
    autocast: torch.dtype | None = None
    """Type of autocast; None without."""
    recompute: bool = False
    """Activations are computed again."""

    def work(self) -> "Work":
        """What is computed and moved, counted as in `measure`."""
        counter = _flop_counter()
        with self._fake_batch() as (model, batch), counter, MovedBytes(apart=counter.flop_registry) as moved:
            self._forward(model, batch).backward()  # type: ignore[no-untyped-call]
        counts, aten = counter.get_flop_counts()["Global"], torch.ops.aten
        convolutions = sum(counts.get(op, 0) for op in (aten.convolution, aten.convolution_backward))
        return Work(counter.get_total_flops(), convolutions, moved.total)

    def memory(self) -> tuple[int, int]:
        """Bytes of the activations that the backward pass needs, and the most bytes at a time.

        Neither counts the weights and their gradients, which are there from the micro-batch before.
        """
        with self._fake_batch() as (model, batch), LiveBytes() as live:
            with kept_for_backward([*model.parameters(), *model.buffers()]) as kept:
                loss = self._forward(model, batch)
            activations = sum(kept.values())
            loss.backward()  # type: ignore[no-untyped-call]
        return activations, live.peak

    @contextmanager
    def _fake_batch(self) -> Iterator[tuple[Any, ImageBatch]]:
        model = skeleton(self.model, self.frozen).train()
        recompute_activations(model, self.recompute)
        for module in model.modules():
            if isinstance(module, nn.MultiheadAttention):
                module.dropout = 0.0  # with it a CPU has no fused kernel
        with FakeTensorMode(allow_non_fake_inputs=True):
            for parameter in _with_fakes(model).parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.empty_like(parameter)
            pixels, mask = torch.empty(self.images, 3, *self.size), torch.zeros(self.images, *self.size)
            yield model, ImageBatch(pixels, mask.to(torch.bool))

    def _forward(self, model: nn.Module, batch: ImageBatch) -> Tensor:
        """The loss where every image has a few objects, matched to the first queries."""
        target = {"labels": torch.zeros(OBJECTS, dtype=torch.int64), "boxes": torch.rand(OBJECTS, 4)}
        targets, noised = [target] * self.images, None
        if self.model.denoising:
            draws = np.zeros((self.images, self.model.denoising.queries, DRAWS))
            noised = add_noise(targets, self.model.denoising, self.model.num_classes, draws)
        with torch.autocast("cpu", self.autocast, enabled=self.autocast is not None):
            outputs = model(batch) if noised is None else model(batch, noised)
        groups = groups_of(outputs, targets, self.model.one_to_many, noised)
        groups = [replace(group, matching=_first_pairs(group)) for group in groups]
        criterion = Criterion(CriterionConfig(), self.model.class_loss)
        return criterion(groups, float(OBJECTS * self.images), self.images).total()


def _first_pairs(group: Group) -> Matches:
    """The first queries with the objects, as far as both go, or the matching that it brings."""
    if group.matching is not None:
        return group.matching
    queries = group.outputs["pred_logits"].shape[1]
    counts = [torch.arange(min(queries, len(target["labels"]))) for target in group.targets]
    return [(count, count) for count in counts]


def skeleton(config: DetrConfig, frozen: Frozen) -> Any:
    """A detector whose tensors have shapes and no memory, with the part of its backbone that is not trained frozen."""
    with torch.device("meta"):
        model = build_model(config)
    model.backbone.freeze(frozen)
    return model


def _with_fakes(model: Any) -> Any:
    """A skeleton with fake tensors for its own, shared ones still shared; for a block of `FakeTensorMode`."""
    own = model.state_dict(keep_vars=True)
    fakes: dict[int, Tensor] = {}
    for tensor in own.values():
        fake = torch.empty(tensor.shape, dtype=tensor.dtype)
        is_weight = isinstance(tensor, nn.Parameter)
        fakes.setdefault(id(tensor), nn.Parameter(fake, tensor.requires_grad) if is_weight else fake)
    model.load_state_dict({name: fakes[id(tensor)] for name, tensor in own.items()}, assign=True)
    return model


def _flop_counter() -> FlopCounterMode:
    aten = torch.ops.aten
    formulas = {
        aten.grid_sampler_2d: _sampled,
        aten.grid_sampler_2d_backward: _sampled_backward,
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    return FlopCounterMode(display=False, custom_mapping=formulas)


def _sampled(*_: Any, out_shape: Size, **__: Any) -> int:
    """Flops of deformable attention where plain torch samples for it, as the operator's own formula has them."""
    return 2 * 5 * prod(out_shape)


def _sampled_backward(grad: Size, *_: Any, **__: Any) -> int:
    return 2 * _sampled(out_shape=grad)


def _attention(query: Size, key: Size, value: Size, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _attention_backward(grad: Size, query: Size, key: Size, value: Size, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))  # type: ignore[no-untyped-call]
