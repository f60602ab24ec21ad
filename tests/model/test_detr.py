import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.batch import ImageBatch
from model.build import build_model
from model.config import CriterionConfig, DetrConfig
from model.detr import DetrDecoder, DetrDecoderLayer, DetrEncoderLayer
from model.losses.criterion import Criterion
from model.losses.groups import groups_of
from model.position import encode_cells
from model.weights.files import load_weights
from tests.builders import make_batch, make_detector, make_target

LOSSES = ("softmax", "focal")
PUBLISHED: dict[str, Any] = {"arch": "detr", "feature_levels": 1, "ffn_dim": 2048}
SMALL = DetrConfig(arch="detr", feature_levels=1, hidden_dim=32, heads=4, ffn_dim=48, decoder_layers=2)


def moved(module: nn.Module) -> nn.Module:
    """A module in fp64 and evaluation mode whose parameters are random, biases and norms too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module.double().eval()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("settings", "everything", "trainable"),
    [
        pytest.param({"num_queries": 100, "class_loss": "softmax"}, 41_524_768, 41_302_368, id="detr"),
        pytest.param({"dilation": True, "num_queries": 100, "class_loss": "softmax"}, 41_524_768, 41_302_368, id="dc5"),
        # 200 queries more and a logit less
        pytest.param({"dilation": True}, 41_524_768 + 200 * 256 - 257, 41_302_368 + 200 * 256 - 257, id="dc5-plus"),
    ],
)
def test_sizes_are_the_originals(settings: dict[str, Any], everything: int, trainable: int) -> None:
    with torch.device("meta"):
        model = build_model(DetrConfig(**PUBLISHED, **settings))
    model.backbone.freeze("stem_and_layer1")
    assert sum(p.numel() for p in model.parameters()) == everything
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable


def test_names_are_the_originals() -> None:
    names = {name for name in make_detector(arch="detr").state_dict() if not name.startswith("backbone.")}
    both = ("weight", "bias")
    attention = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    expected = {
        f"{layer}.{part}" for layer in ("input_proj", "class_embed", "transformer.decoder.norm") for part in both
    }
    expected |= {"query_embed.weight"} | {f"bbox_embed.layers.{i}.{part}" for i in range(3) for part in both}
    for stack, layers, attentions, norms in (
        ("encoder", 1, ("self_attn",), 2),
        ("decoder", 3, ("self_attn", "multihead_attn"), 3),
    ):
        for prefix in (f"transformer.{stack}.layers.{i}." for i in range(layers)):
            expected |= {f"{prefix}{name}.{part}" for name in attentions for part in attention}
            expected |= {f"{prefix}linear{i}.{part}" for i in (1, 2) for part in both}
            expected |= {f"{prefix}norm{i}.{part}" for i in range(1, norms + 1) for part in both}
    assert names == expected


@pytest.mark.parametrize("class_loss", LOSSES)
@pytest.mark.parametrize("dilation", [False, True], ids=["c5", "dc5"])
def test_outputs(class_loss: str, dilation: bool) -> None:
    model = make_detector(arch="detr", class_loss=class_loss, dilation=dilation)
    outputs: dict[str, Any] = model(make_batch([(64, 96), (80, 64)]))
    layers = [outputs, *outputs["aux_outputs"]]
    assert len(layers) == 3
    assert "enc_outputs" not in outputs
    for layer in layers:
        assert layer["pred_logits"].shape == (2, 12, 5 + (class_loss == "softmax"))
        assert layer["pred_boxes"].shape == (2, 12, 4)
        assert ((layer["pred_boxes"] > 0) & (layer["pred_boxes"] < 1)).all()


@pytest.mark.parametrize("class_loss", LOSSES)
@pytest.mark.parametrize("counts", [(3, 2), (0, 0), (400, 1)], ids=["some", "no object", "400 objects"])
def test_training(class_loss: str, counts: tuple[int, int]) -> None:
    model = make_detector(arch="detr", class_loss=class_loss)
    criterion = Criterion(CriterionConfig(class_weight=1.0), class_loss)
    targets = [make_target(n, seed=n) for n in counts]
    found = criterion(groups_of(model(make_batch()), targets), float(sum(counts)))
    found.total().backward()
    losses = found.values
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert all((losses[name] > 0) == (sum(counts) > 0) for name in losses if "ce" not in name)


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (33, 7), (16, 300)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_small_images(size: tuple[int, int]) -> None:
    outputs: dict[str, Any] = make_detector(arch="detr")(make_batch([size]))
    assert torch.isfinite(outputs["pred_boxes"]).all()


def test_without_auxiliary_losses_only_the_last_layer_is_given() -> None:
    assert "aux_outputs" not in make_detector(arch="detr", auxiliary_losses=False)(make_batch())


def test_coordinates_are_fp32_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        outputs: dict[str, Any] = make_detector(arch="detr")(make_batch())
    for layer in (outputs, *outputs["aux_outputs"]):
        assert layer["pred_boxes"].dtype == layer["pred_logits"].dtype == torch.float32


def test_batch_of_one_is_the_same_as_within_a_batch() -> None:
    model = moved(make_detector(arch="detr"))
    batch = make_batch([(64, 64), (96, 80)])
    pixels = batch.pixels.double()
    together: Any = model(ImageBatch(pixels, batch.mask))["pred_boxes"]
    alone: Any = model(ImageBatch(pixels[:1], batch.mask[:1]))["pred_boxes"]
    torch.testing.assert_close(alone, together[:1])


def test_padded_cells_do_not_matter() -> None:
    model: Any = moved(make_detector(arch="detr"))
    mask = torch.zeros(2, 3, 4, dtype=torch.bool)
    mask[1, 2:], mask[1, :, 3:] = True, True
    features, position = draw(2, 32, 3, 4), model.query_embed.weight
    expected = torch.stack(model.transformer(features, mask, position))
    changed = torch.stack(model.transformer(features.masked_fill(mask[:, None], 9.0), mask, position))
    torch.testing.assert_close(changed, expected)
    unmasked = torch.stack(model.transformer(features, torch.zeros_like(mask), position))
    torch.testing.assert_close(unmasked[:, 0], expected[:, 0])
    assert not torch.allclose(unmasked[:, 1], expected[:, 1])


def test_positions_are_detrs() -> None:
    """Without the half of Deformable DETR; the same for the encoder and for the keys of the decoder."""
    model = make_detector(arch="detr").double()
    seen: list[tuple[Tensor, ...]] = []
    model.transformer.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    model.transformer.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    mask = torch.zeros(1, 3, 4, dtype=torch.bool)
    mask[:, :, 3:] = True
    model.transformer(draw(1, 32, 3, 4), mask, model.query_embed.weight)
    expected = encode_cells(mask, 32, torch.float64, from_centres=False)
    (_, position, _), (_, memory, key, _) = seen
    torch.testing.assert_close(position, expected)
    torch.testing.assert_close(key - memory, expected)


def test_a_file_of_another_number_of_classes_resets_the_head() -> None:
    other, model = make_detector(1, arch="detr", num_classes=3), make_detector(arch="detr")
    before = model.class_embed.weight.clone()
    with pytest.raises(ValueError, match="has 4 class logits and the model has 6"):
        load_weights(model, other.state_dict())
    report = load_weights(model, other.state_dict(), reset_heads=True)
    assert report.reset == ("class_embed.weight", "class_embed.bias")
    assert torch.equal(model.class_embed.weight, before)
    assert torch.equal(model.bbox_embed.layers[0].weight, other.bbox_embed.layers[0].weight)


class TestLayersAgainstTheirDefinition:
    """Each layer written out with softmax and matrix products."""

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None) -> Tensor:
        heads, width = 4, 8
        weights, biases = module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3)
        q, k, v = (
            (x @ weight.T + bias).unflatten(-1, (heads, width)).transpose(1, 2)
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        scores = q @ k.transpose(2, 3) / math.sqrt(width)
        if padding is not None:
            scores = scores.masked_fill(padding[:, None, None], -math.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return mixed @ module.out_proj.weight.T + module.out_proj.bias

    def feed(self, layer: Any, x: Tensor) -> Tensor:
        hidden = (x @ layer.linear1.weight.T + layer.linear1.bias).clamp(min=0)
        return hidden @ layer.linear2.weight.T + layer.linear2.bias

    def padding(self) -> Tensor:
        padding = torch.zeros(2, 6, dtype=torch.bool)
        padding[1, 4:] = True
        return padding

    def test_encoder(self) -> None:
        layer: Any = moved(DetrEncoderLayer(SMALL))
        source, position, padding = draw(2, 6, 32), draw(2, 6, 32, seed=1), self.padding()
        place = source + position
        x = layer.norm1(source + self.attend(layer.self_attn, place, place, source, padding))
        torch.testing.assert_close(layer(source, position, padding), layer.norm2(x + self.feed(layer, x)))

    def test_decoder(self) -> None:
        layer: Any = moved(DetrDecoderLayer(SMALL))
        target, position = draw(2, 5, 32), draw(2, 5, 32, seed=1)
        memory, where, padding = draw(2, 6, 32, seed=2), draw(2, 6, 32, seed=3), self.padding()
        place = target + position
        x = layer.norm1(target + self.attend(layer.self_attn, place, place, target, None))
        attended = self.attend(layer.multihead_attn, x + position, memory + where, memory, padding)
        x = layer.norm2(x + attended)
        expected = layer.norm3(x + self.feed(layer, x))
        torch.testing.assert_close(layer(target, position, memory, memory + where, padding), expected)

    def test_the_norm_is_seen_by_the_heads_alone(self) -> None:
        """A layer goes on from the one before it, not from what its heads see; the first content is 0."""
        decoder: Any = moved(DetrDecoder(SMALL))
        position, memory, padding = draw(2, 5, 32), draw(2, 6, 32, seed=1), self.padding()
        first, second = decoder(position, memory, memory, padding)
        x = decoder.layers[0](torch.zeros_like(position), position, memory, memory, padding)
        torch.testing.assert_close(first, decoder.norm(x))
        x = decoder.layers[1](x, position, memory, memory, padding)
        torch.testing.assert_close(second, decoder.norm(x))
