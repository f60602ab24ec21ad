"""Parameter groups and the schedule."""

import pytest
import torch
from torch import nn

from model import DetrConfig, build_model
from pipeline.config.sections import TrainSection
from pipeline.train.optim import group_of, lr_factor, make_optimizer, parameter_groups, set_learning_rates

SMALL = {"backbone": "resnet_tiny", "hidden_dim": 32, "heads": 4, "ffn_dim": 32, "num_queries": 5, "num_classes": 3}


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("backbone.layer1.0.conv1.weight", "backbone"),
        ("transformer.reference_points.weight", "sampling"),
        ("transformer.encoder.layers.0.self_attn.sampling_offsets.bias", "sampling"),
        ("transformer.encoder.layers.0.self_attn.value_proj.bias", "main"),
        ("transformer.level_embed", "main"),
        ("input_proj.0.0.weight", "main"),
        ("query_embed.weight", "main"),
    ],
)
def test_group_of_a_name(name: str, group: str) -> None:
    assert group_of(name) == group


@pytest.mark.parametrize("freeze", ["none", "stem_and_layer1", "all"])
def test_groups_partition_the_trainable_parameters(freeze: str) -> None:
    model = build_model(DetrConfig(encoder_layers=2, decoder_layers=2, **SMALL))
    model.backbone.freeze(freeze)
    groups = parameter_groups(model, TrainSection())
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    names = [name for group in groups for name in group["names"]]
    assert len(names) == len(set(names)) == len(trainable)
    assert set(names) == trainable
    assert [group["name"] for group in groups] == ["main", "sampling", "backbone"][: 2 if freeze == "all" else 3]
    for group in groups:
        assert [id(model.get_parameter(name)) for name in group["names"]] == [id(p) for p in group["params"]]


def test_rates_and_decay_follow_the_recipe() -> None:
    groups = parameter_groups(build_model(DetrConfig(**SMALL)), TrainSection())
    assert {group["name"]: group["lr"] for group in groups} == pytest.approx(
        {"main": 2e-4, "sampling": 2e-5, "backbone": 2e-5}
    )
    assert {group["weight_decay"] for group in groups} == {1e-4}


@pytest.mark.parametrize(("rule", "factor"), [("none", 1.0), ("sqrt", 2.0), ("linear", 4.0)])
def test_rates_follow_the_batch_by_the_rule(rule: str, factor: float) -> None:
    train = TrainSection.model_validate({"scale_lr": rule, "lr_batch": 32, "global_batch": 128})
    groups = parameter_groups(build_model(DetrConfig(**SMALL)), train)
    expected = {"main": 2e-4 * factor, "sampling": 2e-5 * factor, "backbone": 2e-5 * factor}
    assert {group["name"]: group["lr"] for group in groups} == pytest.approx(expected)
    assert [group["base_lr"] for group in groups] == [group["lr"] for group in groups]
    at_its_batch = train.model_copy(update={"global_batch": 32})
    assert at_its_batch.lr_scale == 1.0


@pytest.mark.parametrize("freeze", ["none", "stem_and_layer1"])
@pytest.mark.parametrize("backbone", ["resnet_tiny", "swin_nano", "vit_nano"])
def test_rates_decay_from_block_to_block(backbone: str, freeze: str) -> None:
    model = build_model(DetrConfig(**(SMALL | {"backbone": backbone})))
    model.backbone.freeze(freeze)
    groups = parameter_groups(model, TrainSection(layer_decay=0.5, lr_backbone=1e-5))
    rates = {group["name"]: group["lr"] for group in groups}
    blocks, frozen = {"resnet_tiny": (4, 2), "swin_nano": (8, 3), "vit_nano": (8, 3)}[backbone]
    names = ["backbone", *(f"backbone-{block}" for block in range(1, blocks + 1))]
    if freeze != "none":
        del names[-frozen:]
    assert list(rates) == ["main", "sampling", *names]
    assert [rates[name] for name in names] == pytest.approx([1e-5 * 0.5**block for block in range(len(names))])
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sorted(name for group in groups for name in group["names"]) == sorted(trainable)
    place = {name: group["name"] for group in groups for name in group["names"]}
    if backbone == "swin_nano":
        assert place["backbone.norm1.weight"] == place["backbone.layers.3.blocks.1.mlp.fc2.bias"] == "backbone"
        assert place["backbone.layers.2.downsample.reduction.weight"] == "backbone-2"


def test_detr_has_no_sampling_group() -> None:
    model = build_model(DetrConfig(arch="detr", feature_levels=1, **SMALL))
    model.backbone.freeze("stem_and_layer1")
    groups = parameter_groups(model, TrainSection(lr=1e-4, lr_backbone=1e-5))
    assert {group["name"]: group["lr"] for group in groups} == pytest.approx({"main": 1e-4, "backbone": 1e-5})
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sorted(name for group in groups for name in group["names"]) == sorted(trainable)


def test_shared_parameters_are_grouped_once() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    (group,) = parameter_groups(model, TrainSection())
    assert group["names"] == ["a.weight", "a.bias", "b.bias"]


def factor(step: int, drops: tuple[float, ...] = (), warmup: int = 0) -> float:
    return lr_factor(step, samples=100, global_batch=10, drop_epochs=drops, warmup_steps=warmup)


@pytest.mark.parametrize(
    ("step", "drops", "expected"),
    [(0, (), 1.0), (19, (2,), 1.0), (20, (2,), 0.1), (24, (2.45, 4), 1.0), (25, (2.45, 4), 0.1), (40, (2, 4), 0.01)],
    ids=["no drop", "before", "at", "before a fraction", "after a fraction", "two"],
)
def test_the_rate_drops_at_epochs(step: int, drops: tuple[float, ...], expected: float) -> None:
    assert factor(step, drops) == pytest.approx(expected)


def test_the_rate_warms_up_linearly() -> None:
    assert [factor(step, warmup=4) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_setting_the_rate_twice_does_not_compound() -> None:
    model = build_model(DetrConfig(**SMALL))
    optimizer = make_optimizer(parameter_groups(model, TrainSection(lr=1e-3)))
    assert isinstance(optimizer, torch.optim.AdamW)
    for _ in range(2):
        set_learning_rates(optimizer, 0.1)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-4, 1e-5, 2e-6])
