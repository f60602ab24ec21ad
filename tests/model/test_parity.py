"""Our detectors against those of transformers, which were checked against the original: with the same weights, taken
through files in both directions, the same outputs, losses and gradients; and the same training as a plain loop.

Weights are perturbed away from their initial values, at which offsets do not depend on the query, attention is even and
boxes stand still, so that errors there would not show.

What transformers does otherwise than the original is set right here: its class cost; the position code of proposals,
which it computes in fp32 at every precision; and DETR with `auxiliary_loss`, which feeds each decoder layer the norm of
the one before. Its total loss is not used (it weighs classes by 1).
"""

import copy
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from transformers import DeformableDetrForObjectDetection, DetrForObjectDetection, RTDetrConfig
from transformers.loss.loss_rt_detr import RTDetrLoss

from model.batch import ImageBatch
from model.build import build_model
from model.config import CriterionConfig, DetrConfig
from model.losses.criterion import Criterion
from model.losses.groups import groups_of
from model.weights.files import export_weights, load_weights
from model.weights.names import to_own
from pipeline.config.sections import InitSection, TrainSection
from pipeline.data.loader import TrainLoader
from pipeline.data.manifest import Manifest
from pipeline.data.order import SampleOrder
from pipeline.distributed import World
from pipeline.run_folder import RunFolder
from pipeline.train.loop import train
from pipeline.train.run import TrainJob
from tests.builders import make_batch, make_target, make_varied_manifest

VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "refine": {"with_box_refine": True},
    "two-stage": {"with_box_refine": True, "two_stage": True},
    "single-scale": {"feature_levels": 1},
    "detr": {
        "arch": "detr", "feature_levels": 1, "num_queries": 100, "ffn_dim": 2048, "class_loss": "softmax",
    },
}  # fmt: skip
TARGETS = [make_target(3, 91), make_target(5, 91, seed=1)]
NUM_BOXES = 8.0


class Pair(NamedTuple):
    """The same detector twice, in fp64."""

    ours: Any
    theirs: Any
    folder: Path


def perturb(model: nn.Module, seed: int) -> None:
    """Move every tensor to where a trained one may be, so that nothing is even, zero or equal to another."""
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator)

    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("running_var") or (name.startswith("backbone.") and tensor.ndim == 1):
                tensor.add_(0.1 * noise(tensor)).abs_()
                if name.endswith("bn3.weight"):
                    tensor.mul_(0.1)  # 16 blocks add up
            elif name == "input_proj.weight":
                tensor.mul_(0.2)  # DETR has no norm there
            elif name.endswith("sampling_offsets.weight"):
                tensor.add_(0.05 * noise(tensor))
            elif tensor.ndim == 1:
                tensor.add_(0.1 * noise(tensor))
            else:
                tensor.add_(0.5 * noise(tensor) / math.sqrt(tensor[0].numel()))


def position_code_in_full(model: Any) -> None:
    """Replace transformers' position code of proposals, which is fp32, by one in the precision of the proposals."""

    def code(proposals: Tensor) -> Tensor:
        count = model.config.d_model // 2
        wavelength = 10000.0 ** (2 * torch.arange(count).div(2, rounding_mode="floor").to(proposals) / count)
        phase = (proposals.sigmoid() * 2 * math.pi)[..., None] / wavelength
        return torch.stack((phase[..., 0::2].sin(), phase[..., 1::2].cos()), dim=-1).flatten(2)

    model.model.get_proposal_pos_embed = code


def into_transformers(folder: Path, arch: str) -> Any:
    family = DetrForObjectDetection if arch == "detr" else DeformableDetrForObjectDetection
    model, loading = family.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    return model


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A detector of the published size and what transformers makes of its export."""
    folder = tmp_path_factory.mktemp("parity")
    ours = build_model(DetrConfig(**VARIANTS[request.param]), torch.Generator().manual_seed(0)).eval()
    perturb(ours, seed=5 if request.param == "refine" else 2)  # see `test_fp32_is_near_fp64`
    ours.backbone.freeze("stem_and_layer1")
    export_weights(ours, folder / "theirs", "hf")
    theirs = into_transformers(folder / "theirs", ours.config.arch).eval()
    theirs.save_pretrained(folder / "again")
    if ours.config.two_stage:
        position_code_in_full(theirs)
    return Pair(ours.double(), theirs.double(), folder)


def batch_of(dtype: torch.dtype, seed: int = 0) -> ImageBatch:
    batch = make_batch([(96, 128), (128, 104)], seed)  # 340 cells of four levels: two stages need 300
    return ImageBatch(batch.pixels.to(dtype), batch.mask)


def run_theirs(model: Any, batch: ImageBatch, targets: list[dict[str, Tensor]] | None = None) -> Any:
    """Their forward pass; with targets it has `loss_dict`. Their mask is 1 where a pixel is one of the image."""
    labels = targets and [{"class_labels": target["labels"], "boxes": target["boxes"]} for target in targets]
    torch.set_default_dtype(batch.pixels.dtype)  # DETR's weights of the classes have the default one
    try:
        if labels and model.config.model_type == "detr":
            return run_detr_with_losses(model, batch, labels)
        return model(pixel_values=batch.pixels, pixel_mask=(~batch.mask).long(), labels=labels)
    finally:
        torch.set_default_dtype(torch.float32)


def run_detr_with_losses(model: Any, batch: ImageBatch, labels: Any) -> Any:
    """Their DETR with the losses of all layers, whose hidden states are taken from outside."""
    hidden: list[Tensor] = []
    layers = model.model.decoder.layers
    handles = [layer.register_forward_hook(lambda *call: hidden.append(call[-1])) for layer in layers]
    outputs = model(pixel_values=batch.pixels, pixel_mask=(~batch.mask).long())
    for handle in handles:
        handle.remove()
    normed = torch.stack([model.model.decoder.layernorm(states) for states in hidden])
    logits, boxes = model.class_labels_classifier(normed), model.bbox_predictor(normed).sigmoid()
    assert torch.equal(logits[-1], outputs.logits)
    config = copy.deepcopy(model.config)
    config.auxiliary_loss = True
    outputs.loss_dict = model.loss_function(logits[-1], labels, logits.device, boxes[-1], config, logits, boxes)[1]
    return outputs


def rows_matched(ours: Tensor, theirs: Tensor, boxes: Tensor, their_boxes: Tensor) -> Tensor:
    """Their row for each of our rows, by the nearest predictions: in fp32 proposals of nearly equal scores may swap."""
    rows = []
    for index in range(len(ours)):
        first = torch.cat((ours[index], boxes[index]), 1)
        second = torch.cat((theirs[index], their_boxes[index]), 1)
        distance = (first[:, None] - second).abs().amax(-1)
        rows.append(torch.from_numpy(linear_sum_assignment(distance.numpy())[1]))
    return torch.stack(rows)


class TestForward:
    def test_fp64(self, pair: Pair) -> None:
        batch = batch_of(torch.float64)
        with torch.no_grad():
            ours, theirs = pair.ours(batch), run_theirs(pair.theirs, batch)
        layers = [*ours["aux_outputs"], ours]
        assert ours["pred_logits"].shape == (2, pair.ours.config.num_queries, pair.ours.config.num_logits)
        assert ours["pred_boxes"].std() > 0.02, "boxes that are all alike show nothing"
        torch.testing.assert_close(ours["pred_logits"], theirs.logits, atol=1e-6, rtol=0)
        torch.testing.assert_close(ours["pred_boxes"], theirs.pred_boxes, atol=1e-6, rtol=0)
        assert len(layers) == 6

    def test_fp32(self, pair: Pair) -> None:
        batch = batch_of(torch.float32)
        try:
            with torch.no_grad():
                ours, theirs = pair.ours.float()(batch), run_theirs(pair.theirs.float(), batch)
        finally:
            pair.ours.double(), pair.theirs.double()
        rows = rows_matched(ours["pred_logits"], theirs.logits, ours["pred_boxes"], theirs.pred_boxes)[..., None]
        logits, boxes = (x.gather(1, rows.expand(-1, -1, x.shape[-1])) for x in (theirs.logits, theirs.pred_boxes))
        torch.testing.assert_close(ours["pred_logits"], logits, atol=1e-4, rtol=0)
        torch.testing.assert_close(ours["pred_boxes"], boxes, atol=1e-5, rtol=0)


def test_what_transformers_writes_is_read(pair: Pair) -> None:
    again = build_model(pair.ours.config)
    report = load_weights(again, pair.folder / "again")
    assert report.format == "hf"
    state = pair.ours.state_dict()
    assert not [name for name, tensor in again.state_dict().items() if not torch.equal(tensor.double(), state[name])]


def our_losses(model: Any, dtype: torch.dtype, seed: int = 0) -> tuple[Any, dict[str, Tensor]]:
    """Outputs, and the weighted losses by name."""
    config = model.config
    costs = CriterionConfig(class_weight=1.0) if config.arch == "detr" else CriterionConfig()
    outputs = model(batch_of(dtype, seed))
    criterion = Criterion(costs, config.class_loss)
    exact = [{"labels": target["labels"], "boxes": target["boxes"].to(dtype)} for target in TARGETS]
    losses = criterion(groups_of(outputs, exact), NUM_BOXES)
    return outputs, {name: loss * losses.weights[name] for name, loss in losses.values.items()}


def test_varifocal_loss_of_rt_detr() -> None:
    """With its matching, in fp64: the same value and the same gradients."""
    theirs = RTDetrLoss(RTDetrConfig(num_labels=91, focal_loss_alpha=0.75))
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 30, 91, generator=generator, dtype=torch.float64).requires_grad_()
    boxes = 0.1 + 0.5 * torch.rand(2, 30, 4, generator=generator, dtype=torch.float64)
    targets = [{"labels": target["labels"], "boxes": target["boxes"].double()} for target in TARGETS]
    wanted = [{"class_labels": target["labels"], "boxes": target["boxes"]} for target in targets]
    outputs = {"logits": logits, "pred_boxes": boxes}
    expected = theirs.loss_labels_vfl(outputs, wanted, theirs.matcher(outputs, wanted), NUM_BOXES)["loss_vfl"]
    criterion = Criterion(CriterionConfig(class_weight=1.0, class_cost=2.0), "vfl")
    found = criterion(groups_of({"pred_logits": logits, "pred_boxes": boxes}, targets), NUM_BOXES).values["loss_ce"]
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


class TestLossesAndGradients:
    def test_fp64(self, pair: Pair) -> None:
        config = pair.ours.config
        outputs, losses = our_losses(pair.ours, torch.float64)
        exact = [{"labels": target["labels"], "boxes": target["boxes"].double()} for target in TARGETS]
        for name, parameter in pair.theirs.named_parameters():  # transformers freezes all of the backbone
            parameter.requires_grad_("embedder" not in name and "backbone.model.encoder.stages.0" not in name)
        theirs = run_theirs(pair.theirs, batch_of(torch.float64), exact).loss_dict
        weights = {"loss_ce": 1.0 if config.arch == "detr" else 2.0, "loss_bbox": 5.0, "loss_giou": 2.0}
        suffixes = ["", *(f"_{layer}" for layer in range(5))]
        names = [(kind, f"{kind}{suffix}") for kind in weights for suffix in suffixes]
        wanted = {name: weights[kind] * theirs[name] for kind, name in names}
        of_decoder = {name: loss for name, loss in losses.items() if not name.endswith("_enc")}
        assert of_decoder.keys() == wanted.keys()
        for name, loss in wanted.items():
            assert of_decoder[name].item() == pytest.approx(loss.item(), rel=1e-5), name
        if config.two_stage:
            check_encoder_losses(outputs["enc_outputs"], exact, losses)

        pair.ours.zero_grad()
        torch.stack(list(of_decoder.values())).sum().backward()
        pair.theirs.zero_grad()
        torch.stack(list(wanted.values())).sum().backward()
        named = pair.theirs.named_parameters(remove_duplicate=False)
        gradients, unknown = to_own({name: p.grad for name, p in named if p.grad is not None}, "hf", config.arch)
        assert not unknown
        norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
        differences = []
        for name, parameter in pair.ours.named_parameters():
            if name not in gradients:  # transformers does not train what only the proposals' losses reach
                assert parameter.grad is None or not parameter.grad.any(), name
                assert config.two_stage or not parameter.requires_grad, name
                continue
            assert parameter.requires_grad, name
            differences.append((parameter.grad - gradients[name]).norm())
            # Each on its own, too: a part of little weight would hide an error in the whole.
            assert differences[-1] <= 1e-6 * gradients[name].norm() + 1e-12 * norm, name
        assert torch.stack(differences).norm() <= 1e-8 * norm

    def test_fp32_is_near_fp64(self, pair: Pair) -> None:
        """The gradient jumps where a sample crosses into another cell and where a rectifier opens. At one of the
        millions of these fp32 may take the other side: then it is looked at with other images.
        """
        errors = []
        while not errors or (errors[-1] > 5e-5 and len(errors) < 5):
            gradients = []
            for dtype in (torch.float64, torch.float32):
                pair.ours.to(dtype).zero_grad()
                torch.stack(list(our_losses(pair.ours, dtype, seed=10 * len(errors))[1].values())).sum().backward()
                trained = [p.grad for p in pair.ours.parameters() if p.grad is not None]
                gradients.append(torch.cat([gradient.double().flatten() for gradient in trained]))
            exact, rounded = gradients
            errors.append(float((rounded - exact).norm() / exact.norm()))
        pair.ours.double()
        assert errors[-1] <= 5e-5
        assert max(errors) <= 5e-3


def check_encoder_losses(outputs: dict[str, Tensor], targets: list[dict[str, Tensor]], losses: Any) -> None:
    """The proposals' losses, which transformers has not: every object is of class 0, and all else is background."""
    objects = [{"labels": torch.zeros_like(target["labels"]), "boxes": target["boxes"]} for target in targets]
    expected = plain_losses(outputs["pred_logits"], outputs["pred_boxes"], objects, NUM_BOXES)
    for name, loss in expected.items():
        assert losses[f"{name}_enc"].item() == pytest.approx(loss.item(), rel=1e-5), name


def plain_losses(
    logits: Tensor, boxes: Tensor, targets: list[dict[str, Tensor]], num_boxes: float
) -> dict[str, Tensor]:
    """Weighted losses of one layer, image by image and object by object, as the paper has them."""
    sums = {"loss_ce": logits.new_zeros(()), "loss_bbox": logits.new_zeros(()), "loss_giou": logits.new_zeros(())}
    for scores, found, target in zip(logits, boxes, targets, strict=True):
        probability = scores.sigmoid()
        as_object = -0.25 * (1 - probability) ** 2 * F.logsigmoid(scores)
        as_background = -0.75 * probability**2 * F.logsigmoid(-scores)
        cost = np.zeros((len(scores), len(target["labels"])))
        for column, (label, box) in enumerate(zip(target["labels"], target["boxes"], strict=True)):
            class_cost = as_object[:, label] - as_background[:, label]
            total = 2 * class_cost + 5 * (found - box).abs().sum(1) - 2 * overlap(found, box.expand_as(found))
            cost[:, column] = total.detach().numpy()
        queries, columns = linear_sum_assignment(cost)
        sums["loss_ce"] = sums["loss_ce"] + 2 * as_background.sum()
        for query, column in zip(queries, columns, strict=True):
            label, box = target["labels"][column], target["boxes"][column]
            sums["loss_ce"] = sums["loss_ce"] + 2 * (as_object[query, label] - as_background[query, label])
            sums["loss_bbox"] = sums["loss_bbox"] + 5 * (found[query] - box).abs().sum()
            sums["loss_giou"] = sums["loss_giou"] + 2 * (1 - overlap(found[query], box))
    return {name: total / num_boxes for name, total in sums.items()}


def overlap(first: Tensor, second: Tensor) -> Tensor:
    """Generalised IoU [n] of cxcywh boxes [n, 4], from its definition."""
    (x, y, w, h), (u, v, s, t) = first.unbind(-1), second.unbind(-1)
    across = torch.minimum(x + w / 2, u + s / 2) - torch.maximum(x - w / 2, u - s / 2)
    down = torch.minimum(y + h / 2, v + t / 2) - torch.maximum(y - h / 2, v - t / 2)
    shared = across.clamp(min=0) * down.clamp(min=0)
    union = w * h + s * t - shared
    hull_across = torch.maximum(x + w / 2, u + s / 2) - torch.minimum(x - w / 2, u - s / 2)
    hull_down = torch.maximum(y + h / 2, v + t / 2) - torch.minimum(y - h / 2, v - t / 2)
    hull = hull_across * hull_down
    return shared / union - (hull - union) / hull


SMALL: dict[str, Any] = {
    "backbone": "resnet18", "hidden_dim": 64, "heads": 4, "encoder_layers": 2, "decoder_layers": 2, "ffn_dim": 64,
    "num_queries": 20, "dropout": 0.0,
}  # fmt: skip
RECIPE = TrainSection.model_validate(
    {
        "global_batch": 4, "micro_batch": 2, "max_steps": 10, "loader_workers": 0, "log_steps": 1,
        "lr_drop_epochs": (2.0,),
        "augment": {
            "short_sides": (64, 80), "max_side": 96, "crop_short_sides": (64,), "crop_min": 40, "crop_max": 64,
        },
    }
)  # fmt: skip


def test_ten_steps_of_training(tmp_path: Path, world: World) -> None:
    """Our training, with its loader, criterion and engine, against a plain loop over transformers' network."""
    manifest = make_varied_manifest(tmp_path / "data", 12)
    config = DetrConfig(num_classes=manifest.labels.num_classes, with_box_refine=True, **SMALL)
    start = build_model(config, torch.Generator().manual_seed(0))
    perturb(start, seed=0)
    export_weights(start, tmp_path / "start.safetensors")
    export_weights(start, tmp_path / "theirs", "hf")
    recipe = RECIPE.model_copy(update={"init": InitSection(weights=str(tmp_path / "start.safetensors"))})
    train(TrainJob(config, recipe, manifest.folder, RunFolder(tmp_path / "run")), world)
    records = [json.loads(line) for line in (tmp_path / "run" / "spool" / "train.jsonl").read_text().splitlines()]
    ours = [record["metrics"]["train/loss"] for record in records]
    theirs = plain_training(into_transformers(tmp_path / "theirs", "deformable_detr"), recipe, manifest)
    assert len(ours) == len(theirs) == 10
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert abs(theirs[-1] / theirs[0] - 1) > 1e-2, "losses that stand still show nothing"


def plain_training(model: Any, recipe: TrainSection, manifest: Manifest) -> list[float]:
    """The published recipe, step by step: the loss of each step before its update."""
    groups: dict[float, list[nn.Parameter]] = {1.0: [], 0.1: []}
    for name, parameter in model.named_parameters():
        early = name.startswith(("model.backbone.model.embedder", "model.backbone.model.encoder.stages.0"))
        parameter.requires_grad_(not early)
        slow = "backbone" in name or "sampling_offsets" in name or "reference_points" in name
        if not early:
            groups[0.1 if slow else 1.0].append(parameter)
    settings = [{"params": parameters, "lr": 2e-4 * factor} for factor, parameters in groups.items()]
    optimizer = torch.optim.AdamW(settings, weight_decay=1e-4)
    order = SampleOrder(manifest.digest, manifest.shard_sizes, recipe.seed, recipe.window)
    losses = []
    for step in TrainLoader(manifest, order, recipe, 0, 1, 0, 10):
        if step.step == 6:  # 2 epochs of 12 images at 4 a step
            for group in optimizer.param_groups:
                group["lr"] *= 0.1
        num_boxes = max(1.0, sum(len(target["labels"]) for micro in step.micro_batches for target in micro.targets))
        optimizer.zero_grad()
        total = 0.0
        for micro in step.micro_batches:
            outputs = run_theirs(model, micro.batch.to("cpu"), micro.targets)
            layers = [*outputs.auxiliary_outputs, {"logits": outputs.logits, "pred_boxes": outputs.pred_boxes}]
            parts = [plain_losses(layer["logits"], layer["pred_boxes"], micro.targets, num_boxes) for layer in layers]
            loss = sum((part for layer in parts for part in layer.values()), torch.zeros(()))
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        losses.append(total)
    return losses
