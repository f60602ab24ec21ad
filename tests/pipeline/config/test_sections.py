"""pipeline/config.py: strict sections, overrides, clear errors."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from model import DetrConfig, build_model
from pipeline.config.keys import with_keys
from pipeline.config.load import ConfigError, dump_config, load_config, parse_config
from pipeline.config.values import differences, digest, flatten

CONFIGS = sorted((Path(__file__).resolve().parents[3] / "jobs" / "configs").glob("*.yaml"))


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_survives_a_round_trip(path: Path) -> None:
    config = load_config(path)
    assert parse_config(dump_config(config), "again") == config


def test_the_shipped_configs_are_the_promised_ones() -> None:
    assert {path.stem for path in CONFIGS} == {"demo", "tiny_coco", "bccd"} | PUBLISHED.keys()


class Published(NamedTuple):
    """What a published model is, and how it was trained."""

    parameters: int
    trainable: int
    model: dict[str, Any]
    epochs: int = 50
    drop: int = 40
    batch: int = 32
    lr: float = 2e-4
    class_weight: float = 2.0


DETR = {"arch": "detr", "feature_levels": 1, "ffn_dim": 2048}
PUBLISHED = {
    "coco_r50_single_scale": Published(34_066_593, 33_844_193, {"feature_levels": 1}),
    "coco_r50_single_scale_dc5": Published(34_066_593, 33_844_193, {"feature_levels": 1, "dilation": True}),
    "coco_r50": Published(40_069_665, 39_847_265, {}),
    "coco_r50_refine": Published(40_849_660, 40_627_260, {"with_box_refine": True}),
    "coco_r50_two_stage": Published(41_181_529, 40_959_129, {"with_box_refine": True, "two_stage": True}),
    "coco_r50_detr": Published(
        41_524_768, 41_302_368, {**DETR, "num_queries": 100, "class_loss": "softmax"}, 500, 400, 64, 1e-4, 1.0
    ),
    "coco_r50_detr_dc5": Published(
        *(41_524_768, 41_302_368, {**DETR, "num_queries": 100, "class_loss": "softmax", "dilation": True}),
        *(500, 400, 64, 1e-4, 1.0),
    ),
    # 300 queries in place of 100, and no logit for "no object"
    "coco_r50_detr_dc5_plus": Published(
        *(41_524_768 + 200 * 256 - 257, 41_302_368 + 200 * 256 - 257, {**DETR, "dilation": True}),
        *(50, 40, 64, 1e-4, 2.0),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes(name: str) -> None:
    published = PUBLISHED[name]
    config = load_config(next(path for path in CONFIGS if path.stem == name))
    train, model, loss = config.train, config.model_for(91), config.train.criterion
    assert config.name == name
    assert model == DetrConfig(**published.model)
    assert (train.epochs, train.lr_drop_epochs, train.global_batch) == (
        published.epochs,
        (published.drop,),
        published.batch,
    )
    assert (train.lr, train.lr_backbone, train.lr_sampling_factor) == (published.lr, published.lr / 10, 0.1)
    assert (train.scale_lr, train.lr_batch, train.warmup_steps) == ("none", published.batch, 0)
    assert (train.weight_decay, train.clip_grad_norm) == (1e-4, 0.1)
    assert train.augment.short_sides == tuple(range(480, 801, 32))
    assert (loss.class_weight, loss.bbox_weight, loss.giou_weight) == (published.class_weight, 5.0, 2.0)
    assert (loss.focal_alpha, loss.focal_gamma, loss.no_object_weight) == (0.25, 2.0, 0.1)
    assert (config.dataset.labels, train.init.backbone) == ("coco91", "imagenet")
    assert config.evaluate.batch_size == train.micro_batch  # padding costs a DC5 network that never saw it
    with torch.device("meta"):
        detector = build_model(model)
    detector.backbone.freeze(train.freeze_backbone)
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in detector.parameters()]
    assert sum(size for size, _ in sizes) == published.parameters
    assert sum(size for size, trained in sizes if trained) == published.trainable


def test_published_architectures_are_the_papers() -> None:
    """The counts above do not show all of a network: heads, points and dropout have no parameters of their own."""
    for name in PUBLISHED:
        model = load_config(next(path for path in CONFIGS if path.stem == name)).model
        assert (model.hidden_dim, model.heads, model.encoder_layers, model.decoder_layers) == (256, 8, 6, 6)
        assert (model.points, model.dropout, model.backbone_norm) == (4, 0.1, "frozen_batch_norm")
        assert model.ffn_dim == (2048 if model.arch == "detr" else 1024)
        assert model.num_queries == (100 if model.class_loss == "softmax" else 300)


def test_detr_on_its_own_says_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"set model\.feature_levels: 1, or model\.arch: deformable_detr"):
        load_config(write(tmp_path, "name: a\nmodel: {arch: detr}\n"))


def test_overrides_are_yaml(tmp_path: Path) -> None:
    path = write(tmp_path, "name: a\ntrain: {epochs: 5}\n")
    config = load_config(
        path, ["train.epochs=3", "train.lr=5e-4", "tracking.uri=null", "train.augment.short_sides=[64, 96]"]
    )
    assert (config.train.epochs, config.train.lr, config.tracking.uri) == (3, 5e-4, None)
    assert config.train.augment.short_sides == (64, 96)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.epoch=3", ["unknown key `train.epoch`", "`train.epochs`"]),
        ("model.hiden_dim=3", ["unknown key `model.hiden_dim`", "`model.hidden_dim`"]),
        ("register.modl_name=x", ["unknown key `register.modl_name`", "`register.model_name`"]),
        ("train.criterion.giou=1", ["`train.criterion.giou_weight`"]),
        ("trian.epochs=3", ["unknown key `trian`", "`train`"]),
        ("train.lr=fast", ["`train.lr` is 'fast'"]),
        ("train.lr=.inf", ["`train.lr` is inf"]),
        ("train.lr_drop_epochs=[-1]", ["`train.lr_drop_epochs", "-1"]),
        ("register.metric=mAP", ["`register.metric` is 'mAP'", "'AP50'"]),
        ("model.heads=7", ["model.hidden_dim 256 is not a multiple of model.heads 7"]),
        ("model.num_queries=0", [": model.num_queries is 0, it must be at least 1"]),
        ("model.backbone=resnet5", ["`model.backbone` is 'resnet5'"]),
        ("train.criterion.giou_weight=-1", [": train.criterion.giou_weight is -1", "must not be negative"]),
        ("model.two_stage=true", [": model.two_stage needs model.with_box_refine: the proposals"]),
        ("train.augment.crop_min=700", [": train.augment.crop_min 700 is more than train.augment.crop_max 600"]),
        ("model.num_classes=3", ["model.num_classes follows from dataset.labels"]),
        ("train.global_batch=15", ["train.global_batch 15 is not a multiple of train.micro_batch 2"]),
        ("cluster.workers=5", ["5 cluster.workers cannot share equally"]),
        ("name=a/b", ["`name`"]),
        ("train.epochs", ["section.key=value"]),
        ("name.x=1", ["name is a value, not a section"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_override_is_one_clear_error(tmp_path: Path, override: str, words: list[str]) -> None:
    path = write(tmp_path, "name: a\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path, [override])
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "text", ["- a\n- b\n", "name: [\n", "", "runs: x\n"], ids=["list", "broken", "empty", "no name"]
)
def test_a_file_that_is_no_config_is_named(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=str(path)):
        load_config(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read"):
        load_config(tmp_path / "nowhere.yaml")


def test_total_steps_covers_every_sample(tmp_path: Path) -> None:
    train = load_config(write(tmp_path, "name: a\ntrain: {epochs: 3, global_batch: 4}\n")).train
    assert train.total_steps(samples=10) == 8  # 30 samples in steps of 4
    assert train.model_copy(update={"max_steps": 5}).total_steps(samples=10) == 5


def test_settings_in_a_message_go_by_their_keys() -> None:
    said = "/data/heads: 91 class heads; set heads: 4, points: 8 and reset_heads: true, or model.arch: detr"
    assert with_keys(said, "model", "train.init") == (
        "/data/heads: 91 class heads; set model.heads: 4, model.points: 8 and train.init.reset_heads: true, "
        "or model.arch: detr"
    )


def test_digest_and_differences() -> None:
    old, new = {"a": {"b": 1, "c": [1]}, "d": None}, {"a": {"b": 2, "c": [1]}, "e": 3}
    assert differences(old, new) == ["a.b: 1 -> 2", "d: None -> (absent)", "e: (absent) -> 3"]
    assert digest({"x": 1, "y": 2}) == digest({"y": 2, "x": 1}) != digest({"x": 1, "y": 3})
    assert flatten(old) == {"a.b": 1, "a.c": [1], "d": None}


def test_shards_are_shared_by_the_runs_of_a_dataset(tmp_path: Path) -> None:
    path = write(tmp_path, "name: a\ndataset: {root: data/birds}\n")
    assert load_config(path).shards_folder == Path("runs/shards/birds").absolute()
    assert load_config(path, ["shards.out=/x/y"]).shards_folder == Path("/x/y")
