"""Against transformers' own, whose weights go through its file, and first principles."""

from typing import Any, NamedTuple

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import SwinBackbone, SwinConfig

from model.backbones.swin import Swin, bias_rows, cells_apart
from model.build import build_model
from model.config import DetrConfig
from model.dropout import DropPath
from model.weights.backbones import backbone_to_own
from model.weights.files import load_backbone


class Pair(NamedTuple):
    """The same backbone twice, in fp64, with random weights."""

    ours: Swin
    theirs: Any


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("theirs")
    settings = SwinConfig(
        embed_dim=16, depths=[2, 2, 2, 2], num_heads=[1, 2, 4, 8], window_size=7, drop_path_rate=0.0,
        out_features=["stage2", "stage3", "stage4"], attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = SwinBackbone(settings).double()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.5 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5))
    theirs.save_pretrained(folder)
    detector = build_model(DetrConfig(backbone="swin_nano", feature_levels=3)).double()
    report = load_backbone(detector, folder)
    assert report.format == "transformers"
    assert len(report.loaded) == len(list(detector.backbone.parameters()))
    assert not report.initial
    return Pair(detector.backbone, theirs)  # type: ignore[arg-type]


# Maps that windows fill; that they do not; with odd sides; smaller than a window.
@pytest.mark.parametrize("size", [(224, 112), (150, 203), (64, 33)], ids=str)
def test_features_and_gradients_are_transformers(pair: Pair, size: tuple[int, int]) -> None:
    pixels = torch.randn(2, 3, *size, dtype=torch.float64)
    ours, theirs = pair.ours.eval()(pixels), pair.theirs.eval()(pixels).feature_maps
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-10)
    towards = [torch.randn_like(feature) for feature in ours]
    pair.theirs.zero_grad()
    torch.autograd.backward(theirs, towards)
    expected, _ = backbone_to_own(
        {n: p.grad for n, p in pair.theirs.named_parameters() if p.grad is not None}, "transformers"
    )
    gradients = torch.autograd.grad(ours, list(pair.ours.parameters()), towards)
    for (name, _), gradient in zip(pair.ours.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-10 * float(gradient.abs().max()))


@pytest.mark.parametrize(
    ("name", "millions", "gigaflops", "width"),
    [  # of the official release, at 224 x 224 or 384 x 384, with a classifier of 1000 classes
        pytest.param("swin_tiny", 28, 4.5, 96, id="tiny"),
        pytest.param("swin_small", 50, 8.7, 96, id="small"),
        pytest.param("swin_base", 88, 15.4, 128, id="base"),
        pytest.param("swin_large", 197, 34.5, 192, id="large"),
        pytest.param("swin_base_384", 88, 47.0, 128, id="base at 384"),
        pytest.param("swin_large_384", 197, 103.9, 192, id="large at 384"),
    ],
)
def test_sizes_are_the_published_ones(name: str, millions: int, gigaflops: float, width: int) -> None:
    side = 384 if name.endswith("_384") else 224
    with torch.device("meta"):
        backbone = Swin(name)
        with FlopCounterMode(display=False) as counter:
            features = backbone(torch.empty(1, 3, side, side))
    classifier = 8 * width * 1001
    assert round((sum(p.numel() for p in backbone.parameters()) + classifier) / 1e6) == millions
    assert (counter.get_total_flops() / 2 + classifier) / 1e9 == pytest.approx(gigaflops, rel=0.015)
    assert backbone.channels == (2 * width, 4 * width, 8 * width)
    assert [tuple(feature.shape) for feature in features] == [
        (1, channels, side, side)
        for channels, side in zip(backbone.channels, (side // 8, side // 16, side // 32), strict=True)
    ]


def test_names_are_the_official_release_s() -> None:
    with torch.device("meta"):
        names = Swin("swin_tiny").state_dict().keys()
    block = {
        *("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "attn.relative_position_bias_table"),
        *("attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias"),
        *("mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"),
    }
    blocks = {f"layers.{s}.blocks.{b}.{n}" for s, depth in enumerate((2, 2, 6, 2)) for b in range(depth) for n in block}
    merging = {f"layers.{s}.downsample.{n}" for s in range(3) for n in ("norm.weight", "norm.bias", "reduction.weight")}
    stem = {f"patch_embed.{module}.{tensor}" for module in ("proj", "norm") for tensor in ("weight", "bias")}
    norms = {f"norm{stage}.{tensor}" for stage in (1, 2, 3) for tensor in ("weight", "bias")}
    assert names == blocks | merging | stem | norms


def test_bias_rows_by_hand() -> None:
    rows = bias_rows(7, torch.device("cpu"))
    assert rows[0, 0] == rows[48, 48] == 6 * 13 + 6  # the same cell
    assert rows[8, 0] == 7 * 13 + 7  # one below and one to the right
    assert rows[0, 1] == 6 * 13 + 5  # one to the left
    assert (rows[48, 0], rows[0, 48]) == (168, 0)


def test_cells_apart_by_hand() -> None:
    apart = cells_apart(10, 7, 7, torch.device("cpu"))
    assert apart.shape == (2, 1, 1, 49, 49)
    seen = ~apart[:, 0, 0].view(2, 7, 7, 7, 7)  # window, row, column, row, column
    in_a_corner = seen[1, 0, 0]  # of the last window, whose last 3 rows and columns came from the other side
    assert in_a_corner[:4, :4].all()
    assert in_a_corner.sum() == 16
    assert seen[1, 6, 6].sum() == 9
    assert seen[0, 0, 0, :, :4].all()
    assert seen[0, 0, 0].sum() == 7 * 4


def test_drop_path_rises_evenly_from_0() -> None:
    with torch.device("meta"):
        backbone = Swin("swin_large", drop_path=0.46)
    rates = [module.p for module in backbone.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.02 * block for block in range(24)])


def test_drop_path_skips_branches_in_training_alone() -> None:
    torch.manual_seed(0)
    backbone, plain = (Swin("swin_nano", p).double() for p in (0.9, 0.0))
    plain.load_state_dict(backbone.state_dict())
    image = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected = plain.train()(image)[-1]
    assert torch.equal(backbone.eval()(image)[-1], expected)
    assert not torch.equal(backbone.train()(image)[-1], expected)


def test_only_last() -> None:
    backbone = Swin("swin_nano", only_last=True)
    assert backbone.channels == (128,)
    assert 500_000 < sum(p.numel() for p in backbone.parameters()) < 600_000
    assert [tuple(feature.shape) for feature in backbone(torch.randn(2, 3, 1, 70))] == [(2, 128, 1, 3)]


def test_features_do_not_depend_on_the_rest_of_the_batch() -> None:
    backbone = Swin("swin_nano").double()
    images = torch.randn(3, 3, 64, 80, dtype=torch.float64)
    for together, alone in zip(backbone(images), backbone(images[1:2]), strict=True):
        torch.testing.assert_close(together[1:2], alone)
