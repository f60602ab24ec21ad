import pytest
import torch
import torch.nn.functional as F

from model.backbones.resnet import FrozenBatchNorm2d, ResNet


@pytest.mark.parametrize(
    ("name", "parameters", "channels"),
    [  # torchvision's counts without the classifier and without the affine terms of its batch norms
        pytest.param("resnet18", 11_689_512 - 513_000 - 9_600, (128, 256, 512), id="18"),
        pytest.param("resnet34", 21_797_672 - 513_000 - 17_024, (128, 256, 512), id="34"),
        pytest.param("resnet50", 25_557_032 - 2_049_000 - 53_120, (512, 1024, 2048), id="50"),
        pytest.param("resnet101", 44_549_160 - 2_049_000 - 105_344, (512, 1024, 2048), id="101"),
        pytest.param("resnext101_64x4d", 83_455_272 - 2_049_000 - 202_880, (512, 1024, 2048), id="next101"),
    ],
)
def test_sizes_are_torchvisions(name: str, parameters: int, channels: tuple[int, ...]) -> None:
    with torch.device("meta"):
        backbone = ResNet(name, "frozen_batch_norm")
        features = backbone(torch.empty(1, 3, 65, 96))
    assert sum(p.numel() for p in backbone.parameters()) == parameters
    assert backbone.channels == channels
    assert [tuple(f.shape) for f in features] == [
        (1, c, -(-65 // s), -(-96 // s)) for c, s in zip(channels, (8, 16, 32), strict=True)
    ]


def test_names_are_torchvisions() -> None:
    with torch.device("meta"):
        names = ResNet("resnet50", "frozen_batch_norm").state_dict().keys()
    assert len(names) == 265
    norm = ("weight", "bias", "running_mean", "running_var")
    expected = {"conv1.weight", "layer4.2.conv3.weight", "layer2.0.downsample.0.weight"}
    expected |= {f"{name}.{part}" for name in ("bn1", "layer3.5.bn2", "layer1.0.downsample.1") for part in norm}
    assert expected <= set(names)


def test_tiny() -> None:
    backbone = ResNet("resnet_tiny", "group_norm")
    assert 450_000 < sum(p.numel() for p in backbone.parameters()) < 550_000
    assert [tuple(f.shape) for f in backbone(torch.randn(2, 3, 128, 96))] == [
        (2, 64, 16, 12),
        (2, 96, 8, 6),
        (2, 128, 4, 3),
    ]
    assert backbone(torch.randn(1, 3, 1, 1))[-1].shape == (1, 128, 1, 1)


def test_groups_of_resnext_are_torchvisions() -> None:
    with torch.device("meta"):
        backbone = ResNet("resnext101_64x4d", "frozen_batch_norm")
    for stage, width in enumerate((256, 512, 1024, 2048), start=1):
        convolution = backbone.get_submodule(f"layer{stage}.1.conv2")
        assert isinstance(convolution, torch.nn.Conv2d)
        assert (convolution.in_channels, convolution.groups) == (width, 64)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet_tiny"])
@pytest.mark.parametrize("side", [64, 70], ids=["even", "odd"])
def test_dilation_adds_cells_and_keeps_the_others(name: str, side: int) -> None:
    """Every other cell of a dilated C5 is a cell of the strided one, with the same weights."""
    torch.manual_seed(0)
    strided, dilated = (ResNet(name, "frozen_batch_norm", dilation).double() for dilation in (False, True))
    dilated.load_state_dict(strided.state_dict())
    image = torch.randn(1, 3, side, side, dtype=torch.float64)
    with torch.no_grad():
        (*_, c4, c5), (*_, dilated_c5) = strided(image), dilated(image)
    assert dilated_c5.shape[2:] == c4.shape[2:]
    torch.testing.assert_close(dilated_c5[..., ::2, ::2], c5)


@pytest.mark.parametrize("name", ["resnet50", "resnet101", "resnext101_64x4d"])
def test_dilations_of_bottlenecks_are_torchvisions(name: str) -> None:
    """Those of `replace_stride_with_dilation=[False, False, True]`."""
    with torch.device("meta"):
        backbone = ResNet(name, "frozen_batch_norm", dilation=True)
    of_3x3 = [m for m in backbone.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]
    assert [m.dilation[0] for m in of_3x3] == [1] * (len(of_3x3) - 2) + [2, 2]
    assert {m.stride for m in backbone.get_submodule("layer4").modules() if isinstance(m, torch.nn.Conv2d)} == {(1, 1)}


def test_only_last() -> None:
    backbone = ResNet("resnet_tiny", "group_norm", only_last=True)
    assert backbone.channels == (128,)
    assert [f.shape[-1] for f in backbone(torch.randn(1, 3, 64, 64))] == [2]


def test_frozen_batch_norm() -> None:
    norm = FrozenBatchNorm2d(4)
    generator = torch.Generator().manual_seed(0)
    for buffer in norm.buffers():
        buffer.copy_(torch.rand(4, generator=generator) + 0.1)
    x = torch.randn(2, 4, 3, 3, generator=generator)
    expected = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, 1e-5)
    before = norm.running_mean.clone()
    torch.testing.assert_close(norm.train()(x), expected)
    assert torch.equal(norm.running_mean, before)
    assert not list(norm.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_frozen_batch_norm_keeps_a_scale_and_not_its_input(dtype: torch.dtype) -> None:
    norm = FrozenBatchNorm2d(4)
    for buffer in norm.buffers():
        buffer.copy_(torch.rand(4) + 0.1)
    norm = norm.to(torch.promote_types(dtype, torch.float32))
    x = torch.randn(2, 4, 8, 8, dtype=dtype, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        output = norm(x)
    assert sum(tensor.numel() for tensor in kept) == 4
    same = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, 1e-5)
    assert torch.equal(output, same)
    towards = torch.randn_like(output)
    ours, theirs = (torch.autograd.grad(result, x, towards)[0] for result in (output, same))
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["resnet50", "resnext101_64x4d", "resnet_tiny"])
def test_freeze(name: str) -> None:
    with torch.device("meta"):
        backbone = ResNet(name, "group_norm")
    backbone.freeze("stem_and_layer1")
    frozen = {name.split(".")[0] for name, p in backbone.named_parameters() if not p.requires_grad}
    trained = {name.split(".")[0] for name, p in backbone.named_parameters() if p.requires_grad}
    assert frozen == {"conv1", "bn1", "layer1"}
    assert trained == {"layer2", "layer3", "layer4"}
    backbone.freeze("all")
    assert not any(p.requires_grad for p in backbone.parameters())
    backbone.freeze("none")
    assert all(p.requires_grad for p in backbone.parameters())
    with pytest.raises(ValueError, match="choose none, stem_and_layer1 or all"):
        backbone.freeze("some")  # type: ignore[arg-type]


@pytest.mark.parametrize("norm", ["frozen_batch_norm", "group_norm"])
def test_features_do_not_depend_on_the_rest_of_the_batch(norm: str) -> None:
    backbone = ResNet("resnet_tiny", norm).double()  # type: ignore[arg-type]
    images = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    for together, alone in zip(backbone(images), backbone(images[1:2]), strict=True):
        torch.testing.assert_close(together[1:2], alone)
