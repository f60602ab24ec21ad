"""Against transformers' ViTDet (windows) and DINOv2 (all else, without its class token), and first principles."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Dinov2Config, Dinov2Model, VitDetBackbone, VitDetConfig

from model.backbones.vit import GRID, PATCH, ViT, patches_of, resizing
from model.build import build_model
from model.config import DetrConfig
from model.dropout import DropPath
from model.weights.backbones import backbone_to_own
from model.weights.files import load_backbone

CPU = torch.device("cpu")


def last_map(vit: ViT, pixels: Tensor) -> Tensor:
    """What the pyramid is made of `[B, C, H, W]`."""
    maps: list[Tensor] = []
    hook = vit.norm.register_forward_hook(lambda *called: maps.append(called[2].permute(0, 3, 1, 2)))
    vit(pixels)
    hook.remove()
    return maps[0]


def draw_all(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.5 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5))


# Maps that windows fill; that they do not; smaller than a window; larger than the grid of positions.
@pytest.mark.parametrize("size", [(448, 224), (256, 480), (64, 32), (32, 624)], ids=str)
def test_windows_are_those_of_vitdet(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    ours = ViT("vit_nano").double()
    theirs: Any = VitDetBackbone(
        VitDetConfig(
            hidden_size=32, num_hidden_layers=8, num_attention_heads=2, image_size=list(size),
            pretrain_image_size=GRID * PATCH, patch_size=PATCH, window_size=14, window_block_indices=[0, 2, 4, 6],
            residual_block_indices=[], use_absolute_position_embeddings=True, use_relative_position_embeddings=False,
        )
    ).double()  # fmt: skip
    draw_all(theirs)
    renamed = {
        name.replace("encoder.layer.", "blocks.").replace("attention.", "attn."): tensor
        for name, tensor in theirs.named_parameters()
        if "embeddings" not in name
    }
    renamed["pos_embed"] = theirs.embeddings.position_embeddings[:, 1:]
    renamed["patch_embed.proj.weight"] = theirs.embeddings.projection.weight
    renamed["patch_embed.proj.bias"] = theirs.embeddings.projection.bias
    own = ours.state_dict()
    assert all("ls" in name or name.startswith(("pyramid.", "norm.")) for name in own.keys() - renamed.keys())
    ours.load_state_dict(own | renamed)
    pixels = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = theirs.eval()(pixels).feature_maps[0].permute(0, 2, 3, 1)
    torch.testing.assert_close(
        last_map(ours.eval(), pixels), F.layer_norm(expected, (32,), eps=1e-6).permute(0, 3, 1, 2), rtol=0, atol=1e-10
    )


def test_features_and_gradients_are_those_of_dinov2(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs: Any = Dinov2Model(
        Dinov2Config(hidden_size=32, num_hidden_layers=8, num_attention_heads=2, image_size=518, patch_size=14)
    ).double()
    draw_all(theirs)
    theirs.save_pretrained(tmp_path)
    detector = build_model(DetrConfig(backbone="vit_nano", feature_levels=3)).double()
    report = load_backbone(detector, tmp_path)
    ours: Any = detector.backbone
    assert report.format == "transformers_dinov2"
    assert {name.split(".")[1] for name in report.initial} == {"pyramid"}
    assert len(report.loaded) + len(report.initial) == len(list(ours.parameters()))

    patches = torch.randn(2, 3, 14, 14, 14, 14, dtype=torch.float64)  # rows and columns of patches, and of pixels
    enlarge = resizing(14, PATCH, CPU)
    pixels, larger = (x.transpose(3, 4).flatten(2, 3).flatten(3) for x in (patches, enlarge @ patches @ enlarge.T))
    x = theirs.embeddings.patch_embeddings(pixels)
    grid = theirs.embeddings.position_embeddings[:, 1:].view(1, GRID, GRID, 32).permute(0, 3, 1, 2)
    x = x + F.interpolate(grid, size=(14, 14), mode="bicubic").flatten(2).transpose(1, 2)
    for layer in theirs.encoder.layer:
        x = layer(x)
    expected = theirs.layernorm(x).transpose(1, 2).unflatten(2, (14, 14))
    found = last_map(ours, larger)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)

    towards = torch.randn_like(found)
    names = [name for name, _ in ours.named_parameters() if not name.startswith(("pyramid.", "patch_embed."))]
    gradients = torch.autograd.grad(found, [ours.get_parameter(name) for name in names], towards)
    expected.backward(towards)
    given = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    renamed, unknown = backbone_to_own(given, "transformers_dinov2")
    assert not unknown
    for name, gradient in zip(names, gradients, strict=True):
        torch.testing.assert_close(gradient, renamed[name], rtol=1e-8, atol=1e-9 * float(gradient.abs().max()))


@pytest.mark.parametrize(
    ("name", "millions", "gigaflops"),
    [  # of DINOv2's model card; of a ViT with patches of 16 at 224 x 224 (arXiv 2012.12877, 2106.10270)
        pytest.param("vit_small", 22, 4.6, id="small"),
        pytest.param("vit_base", 86.6, 17.6, id="base"),
        pytest.param("vit_large", 304.5, 61.6, id="large"),
    ],
)
def test_sizes_are_the_published_ones(name: str, millions: float, gigaflops: float) -> None:
    with FakeTensorMode():
        backbone = ViT(name)
        backbone.pyramid = torch.nn.ModuleDict()
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            backbone(torch.empty(1, 3, 224, 224))
    assert sum(p.numel() for p in backbone.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)
    assert counter.get_total_flops() / 2e9 == pytest.approx(gigaflops, rel=0.03)


def test_names_are_the_official_release_s() -> None:
    with torch.device("meta"):
        names = {name for name in ViT("vit_small").state_dict() if not name.startswith("pyramid.")}
    linear = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    block = {f"{module}.{tensor}" for module in linear for tensor in ("weight", "bias")} | {"ls1.gamma", "ls2.gamma"}
    others = {f"{module}.{tensor}" for module in ("patch_embed.proj", "norm") for tensor in ("weight", "bias")}
    assert names == {f"blocks.{b}.{n}" for b in range(12) for n in block} | others | {"pos_embed"}


def test_the_last_block_of_each_quarter_sees_the_whole_map() -> None:
    with torch.device("meta"):
        blocks = ViT("vit_large").blocks
    assert [number for number, block in enumerate(blocks) if not block.windowed] == [5, 11, 17, 23]


def test_maps_are_rounded_up() -> None:
    vit = ViT("vit_nano")
    assert [tuple(m.shape) for m in vit(torch.randn(1, 3, 150, 200))] == [
        (1, 64, 19, 25), (1, 64, 10, 13), (1, 64, 5, 7)
    ]  # fmt: skip
    assert vit.channels == (64, 64, 64)
    last = ViT("vit_nano", only_last=True)
    assert last.channels == (64,)
    assert [tuple(m.shape) for m in last(torch.randn(1, 3, 1, 70))] == [(1, 64, 1, 3)]


@pytest.mark.parametrize("side", [14, 16])
def test_a_resized_patch_gives_the_same_under_its_kernel(side: int) -> None:
    enlarge = resizing(side, PATCH, CPU)
    kernel, patch = torch.randn(5, 3, side, side).double(), torch.randn(3, side, side).double()
    found = ((enlarge @ patch @ enlarge.T) * patches_of(kernel)).sum((1, 2, 3))
    torch.testing.assert_close(found, (patch * kernel).sum((1, 2, 3)))


def test_resizing_is_interpolation() -> None:
    grid = torch.randn(1, 2, 5, 5, dtype=torch.float64)
    found = resizing(5, 3, CPU) @ grid @ resizing(5, 9, CPU).T
    torch.testing.assert_close(found, F.interpolate(grid, size=(3, 9), mode="bicubic"))


def test_drop_path_rises_evenly_from_0_and_is_of_training_alone() -> None:
    torch.manual_seed(0)
    backbone, plain = (ViT("vit_nano", p).double() for p in (0.7, 0.0))
    assert [m.p for m in backbone.modules() if isinstance(m, DropPath)] == pytest.approx([0.1 * b for b in range(8)])
    plain.load_state_dict(backbone.state_dict())
    image = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected = plain.train()(image)[-1]
    assert torch.equal(backbone.eval()(image)[-1], expected)
    assert not torch.equal(backbone.train()(image)[-1], expected)


def test_features_do_not_depend_on_the_rest_of_the_batch() -> None:
    backbone = ViT("vit_nano").double()
    images = torch.randn(3, 3, 64, 80, dtype=torch.float64)
    for together, alone in zip(backbone(images), backbone(images[1:2]), strict=True):
        torch.testing.assert_close(together[1:2], alone)
