from dataclasses import replace
from typing import Any

import pytest

from model.config import CriterionConfig, Denoising, DetrConfig, OneToMany


def test_published_settings_are_the_defaults() -> None:
    config = DetrConfig()
    assert (config.num_queries, config.hidden_dim, config.ffn_dim, config.feature_levels, config.points) == (
        *(300, 256, 1024),
        *(4, 4),
    )
    loss = CriterionConfig()
    assert (loss.class_weight, loss.bbox_weight, loss.giou_weight) == (2.0, 5.0, 2.0)


def test_logits() -> None:
    assert DetrConfig(num_classes=5).num_logits == 5
    assert DetrConfig(num_classes=5, class_loss="softmax").num_logits == 6


def test_what_is_learned_of_a_query() -> None:
    assert DetrConfig().query_width == 512
    assert DetrConfig(with_box_refine=True, two_stage="mixed").query_width == 256
    assert DetrConfig(with_box_refine=True, two_stage=True).query_width == 0


def test_strides() -> None:
    assert DetrConfig().strides == [8, 16, 32, 64]
    assert DetrConfig(feature_levels=5, dilation=True).strides == [8, 16, 16, 32, 64]
    assert [DetrConfig(feature_levels=1, dilation=dilation).strides for dilation in (False, True)] == [[32], [16]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param({"arch": "dert"}, "did you mean detr", id="arch"),
        pytest.param({"backbone": "resnet5"}, "did you mean resnet50", id="backbone"),
        pytest.param({"class_loss": "bce"}, "one of focal, vfl, ia_bce, ma, softmax", id="class loss"),
        pytest.param({"num_queries": 0}, "^num_queries is 0", id="no query"),
        pytest.param({"hidden_dim": 100}, "not a multiple of heads", id="heads"),
        pytest.param({"hidden_dim": 80}, "not a multiple of 32", id="groups"),
        pytest.param({"feature_levels": 6}, "must be 1 to 5", id="sixth level"),
        pytest.param({"feature_levels": 2}, "use 1", id="two levels"),
        pytest.param({"dropout": 1.0}, "dropout", id="dropout"),
        pytest.param({"drop_path": 1.0, "backbone": "swin_tiny"}, r"^drop_path is 1\.0", id="drop path"),
        pytest.param(
            {"drop_path": 0.1}, "drop_path is of a Swin or ViT, and backbone is resnet50", id="drop path of a ResNet"
        ),
        pytest.param(
            {"backbone": "swin_large", "dilation": True}, "leave out backbone_norm and dil", id="dilated Swin"
        ),
        pytest.param({"backbone": "swin_tiny", "backbone_norm": "group_norm"}, "leave out backbone_norm", id="norm"),
        pytest.param({"backbone": "vit_base", "dilation": True}, "vit_base has layer norms", id="dilated ViT"),
        pytest.param({"two_stage": True}, "needs with_box_refine", id="two-stage"),
        pytest.param({"two_stage": "mixd"}, "one of false, true, mixed; did you mean mixed", id="mixd"),
        pytest.param({"two_stage": "mixed"}, "needs with_box_refine", id="mixed"),
        pytest.param({"look_forward_twice": True}, "^look_forward_twice needs with_box_refine", id="look twice"),
    ],
)
def test_impossible_architectures_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DetrConfig(**settings)  # type: ignore[arg-type]


def test_detr_names_all_that_it_does_not_have_at_once() -> None:
    DetrConfig(arch="detr", feature_levels=1, num_queries=100, ffn_dim=2048, class_loss="softmax")
    with pytest.raises(ValueError, match=r"^arch detr") as caught:
        DetrConfig(
            arch="detr", with_box_refine=True, look_forward_twice=True, two_stage="mixed", points=8,
            one_to_many=OneToMany(), denoising=Denoising(),
        )  # fmt: skip
    needed = ("feature_levels: 1", "with_box_refine: false", "look_forward_twice: false", "two_stage: false")
    for setting in (*needed, "points: 4", "one_to_many: null", "denoising: null"):
        assert setting in str(caught.value)
    with pytest.raises(ValueError, match="set feature_levels: 1, or arch: deformable_detr"):
        DetrConfig(arch="detr")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"queries": 0}, "queries is 0, it must be at least 1"),
        ({"repeats": 0}, "repeats is 0"),
        ({"weight": 0.0}, "weight is 0.0, it must be above 0"),
    ],
)
def test_impossible_queries_of_training_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OneToMany(**settings)


def test_what_training_alone_has_is_not_there_at_inference() -> None:
    plain = DetrConfig(num_classes=3, with_box_refine=True, two_stage=True)
    assert replace(plain, one_to_many=OneToMany(), denoising=Denoising()).at_inference() == plain


def test_impossible_losses_are_refused() -> None:
    with pytest.raises(ValueError, match="giou_weight"):
        CriterionConfig(giou_weight=-1)
    with pytest.raises(ValueError, match="class_cost is -1, it must not be negative"):
        CriterionConfig(class_cost=-1)
    with pytest.raises(ValueError, match="ma_gamma is -1, it must not be negative"):
        CriterionConfig(ma_gamma=-1)
    for name in ("focal_alpha", "ia_bce_alpha"):
        with pytest.raises(ValueError, match=name):
            CriterionConfig(**{name: 2.0})
