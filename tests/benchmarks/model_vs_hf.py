"""How many times faster the detector is than transformers' Deformable DETR: same weights, same images, one run.

    python tests/benchmarks/model_vs_hf.py [--batch 1] [--threads 2] [--repeats 5]

Deformable DETR with a ResNet-50 and 4 levels on images of 480 x 640, fp32: inference, and a training step (forward,
losses with matching, backward, clipping, AdamW) of the same parameters with the same dropout. It ends with what a fused
operator could gain: the share of the softmax of the attention weights and of the arithmetic of the locations.
"""

import argparse
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import seconds
from torch import Tensor, nn
from transformers import DeformableDetrForObjectDetection

from model.batch import ImageBatch
from model.build import build_model
from model.config import CriterionConfig, DetrConfig
from model.deformable_attention import MSDeformAttn, make_levels
from model.losses.criterion import Criterion
from model.losses.groups import groups_of
from model.weights.files import export_weights

HEIGHT, WIDTH, CLASSES, OBJECTS = 480, 640, 91, 7
LEAST = 1.8


def make_peer(model: nn.Module) -> nn.Module:
    """Transformers' model with the weights of ours, and the same parameters to train."""
    with tempfile.TemporaryDirectory() as folder:
        export_weights(model, Path(folder) / "hf", format="hf")
        peer: Any = DeformableDetrForObjectDetection.from_pretrained(
            Path(folder) / "hf", dropout=0.1, attention_dropout=0.1, activation_dropout=0.1, auxiliary_loss=True
        )
    early = ("embedder.", "encoder.stages.0.")
    for name, parameter in peer.named_parameters():
        if ".backbone." in name:
            parameter.requires_grad_(not any(part in name for part in early))
    count = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (model, peer)]
    assert count[0] == count[1], f"trainable parameters differ: {count}"
    return peer  # type: ignore[no-any-return]


def make_step(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """A training step with the published optimizer."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, weight_decay=1e-4, fused=True)

    def step() -> None:
        model.train()
        optimizer.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.1)
        optimizer.step()

    return step


def preparation(attention: MSDeformAttn, batch: int, repeats: int) -> tuple[float, float]:
    """Seconds that 6 + 6 layers take for softmax and locations: forward, and forward and backward."""
    shapes = [(60, 80), (30, 40), (15, 20), (8, 10)]
    levels = make_levels(shapes, torch.zeros(()))

    def forward(logits: Tensor, offsets: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        return logits.softmax(-1), attention._locations(reference, offsets, levels)

    def both(logits: Tensor, offsets: Tensor, reference: Tensor) -> None:
        outputs = forward(logits, offsets, reference)
        torch.autograd.grad(outputs, (logits, offsets), [torch.ones_like(output) for output in outputs])

    totals = [0.0, 0.0]
    for queries in (sum(h * w for h, w in shapes), 300):
        size = (batch, queries, attention.heads, attention.levels, attention.points)
        logits = torch.randn(*size[:3], size[3] * size[4])
        inputs = (logits, torch.randn(*size, 2), torch.rand(batch, queries, attention.levels, 2))
        totals[0] += 6 * seconds([functools.partial(forward, *inputs)], repeats)[0]
        trained = [tensor.requires_grad_() for tensor in inputs[:2]]
        totals[1] += 6 * seconds([functools.partial(both, *trained, inputs[2])], repeats)[0]
    return totals[0], totals[1]


def main() -> int:
    """Print the table; the exit code is 1 if a ratio is below its least."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = build_model(DetrConfig(num_classes=CLASSES))
    model.backbone.freeze("stem_and_layer1")
    peer = make_peer(model)

    pixels = torch.randn(options.batch, 3, HEIGHT, WIDTH)
    mask = torch.zeros(options.batch, HEIGHT, WIDTH, dtype=torch.bool)
    valid = (~mask).long()
    labels = [torch.randint(CLASSES, (OBJECTS,)) for _ in range(options.batch)]
    boxes = [torch.rand(OBJECTS, 4) * 0.3 + 0.3 for _ in range(options.batch)]
    targets = [{"labels": a, "boxes": b} for a, b in zip(labels, boxes, strict=True)]
    peer_targets = [{"class_labels": a, "boxes": b} for a, b in zip(labels, boxes, strict=True)]
    criterion = Criterion(CriterionConfig(), "focal")
    objects = float(OBJECTS * options.batch)

    def infer(network: nn.Module, call: Callable[[], Any]) -> Callable[[], Any]:
        @torch.inference_mode()
        def run() -> Any:
            network.eval()
            return call()

        return run

    calls = {
        "inference": (
            infer(model, lambda: model(ImageBatch(pixels, mask))["pred_logits"]),
            infer(peer, lambda: peer(pixel_values=pixels, pixel_mask=valid).logits),
        ),
        "training step": (
            make_step(model, lambda: criterion(groups_of(model(ImageBatch(pixels, mask)), targets), objects).total()),
            make_step(peer, lambda: peer(pixel_values=pixels, pixel_mask=valid, labels=peer_targets).loss),
        ),
    }
    difference = (calls["inference"][0]() - calls["inference"][1]()).abs().max().item()
    print(f"largest difference of the logits: {difference:.1e}")
    assert difference < 1e-3, "the two networks do not compute the same"
    print(f"{'what':16} {'transformers ms':>16} {'raydetr ms':>11} {'ratio':>6} {'least':>6}")
    missed, ours_of = 0, {}
    for what, (ours, theirs) in calls.items():
        own, other = seconds([ours, theirs], options.repeats)
        ours_of[what] = own
        missed += other / own < LEAST
        print(f"{what:16} {other * 1e3:16.0f} {own * 1e3:11.0f} {other / own:6.2f} {LEAST:6.2f}", flush=True)
    attention = next(module for module in model.modules() if isinstance(module, MSDeformAttn))
    for what, part in zip(calls, preparation(attention, options.batch, options.repeats), strict=True):
        whole = ours_of[what]
        print(
            f"softmax and locations take {part / whole:.1%} of the {what}: fused away, it would be "
            f"{whole / (whole - part):.2f} times as fast"
        )
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
