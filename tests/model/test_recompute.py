"""Activations computed again: the same numbers from less memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from model.recompute import recompute_activations
from tests.builders import make_batch, make_detector

VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "two-stage": {"with_box_refine": True, "two_stage": True},
    "mixed": {"with_box_refine": True, "two_stage": "mixed", "look_forward_twice": True},
    "detr": {"arch": "detr"},
    "swin": {"backbone": "swin_nano", "backbone_norm": "frozen_batch_norm", "drop_path": 0.5},
    "vit": {"backbone": "vit_nano", "backbone_norm": "frozen_batch_norm", "drop_path": 0.5},
}
every_variant = pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS.keys())


def make_model(**settings: Any) -> Any:
    return make_detector(encoder_layers=3, dropout=0.2, **settings).train()


@contextmanager
def bytes_kept(parameters: Iterator[Tensor]) -> Iterator[dict[int, int]]:
    """Bytes that autograd keeps for the backward pass by the address of their storage, weights apart."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)  # so that no other tensor gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def step(model: Any) -> tuple[Tensor, int]:
    """The sum of the outputs of a forward pass with dropout, and the bytes kept for its gradients, which are left."""
    torch.manual_seed(1)
    model.zero_grad()
    with bytes_kept(model.parameters()) as kept:
        outputs = model(make_batch())
    layers = [outputs, *outputs["aux_outputs"]]
    total = sum(layer["pred_logits"].square().sum() + layer["pred_boxes"].sum() for layer in layers)
    torch.rand(3)  # draws between the passes change nothing
    total.backward()
    return total.detach(), sum(kept.values())


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@every_variant
@pytest.mark.parametrize("frozen", ["none", "stem_and_layer1"])
def test_gradients_are_equal_with_dropout(settings: dict[str, Any], frozen: Any) -> None:
    model = make_model(**settings)
    model.backbone.freeze(frozen)
    expected, _ = step(model)
    wanted = gradients(model)
    recompute_activations(model)
    total, _ = step(model)
    assert torch.equal(total, expected)
    assert wanted.keys() == gradients(model).keys()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=0, atol=0)


@every_variant
def test_less_is_kept_for_the_backward_pass(settings: dict[str, Any]) -> None:
    model = make_model(**settings)
    _, everything = step(model)
    recompute_activations(model)
    _, less = step(model)
    assert less < 0.65 * everything
    recompute_activations(model, on=False)
    assert step(model)[1] == everything


@pytest.mark.parametrize("arch", ["deformable_detr", "detr"])
def test_an_encoder_layer_keeps_its_input_alone(arch: str) -> None:
    kept, cells = [], []
    for layers in (2, 5):
        model = make_detector(arch=arch, dropout=0.2, encoder_layers=layers).train()
        model.transformer.encoder.register_forward_hook(lambda *call: cells.append(call[-1].nbytes))
        recompute_activations(model)
        kept.append(step(model)[1])
    assert kept[1] - kept[0] == 3 * cells[0]


@pytest.mark.parametrize(("variant", "block"), [("swin", "layers.2.blocks.1"), ("vit", "blocks.5")])
def test_each_block_of_a_transformer_runs_twice(variant: str, block: str) -> None:
    model = make_model(**VARIANTS[variant])
    recompute_activations(model)
    runs: list[Any] = []
    model.backbone.get_submodule(block).register_forward_pre_hook(lambda module, _: runs.append(module))
    step(model)
    assert len(runs) == 2


@pytest.mark.parametrize("arch", ["deformable_detr", "detr"])
def test_each_block_runs_twice(arch: str) -> None:
    model = make_model(arch=arch)
    recompute_activations(model)
    blocks = [*model.transformer.encoder.layers, *model.transformer.decoder.layers, model.backbone.layer4]
    runs: list[Any] = []
    for block in blocks:
        block.register_forward_pre_hook(lambda module, _: runs.append(module))
    step(model)
    assert all(runs.count(block) == 2 for block in blocks)
    runs.clear()
    with torch.no_grad():
        model.eval()(make_batch())
    assert all(runs.count(block) == 1 for block in blocks)
