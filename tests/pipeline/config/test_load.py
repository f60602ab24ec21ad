"""Reading a YAML file: overrides, and errors that name the key and the mend."""

from pathlib import Path

import pytest

from pipeline.config.load import ConfigError, load_config


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


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
        ("model.two_stage=mixd", ["`model.two_stage` is 'mixd'", "True or 'mixed'"]),
        ("model.look_forward_twice=true", [": model.look_forward_twice needs model.with_box_refine: without"]),
        ("model.two_stage=true", [": model.two_stage needs model.with_box_refine: the proposals"]),
        ("train.augment.crop_min=700", [": train.augment.crop_min 700 is more than train.augment.crop_max 600"]),
        ("train.augment.jitter=[2, 0.1]", [": train.augment.jitter [2.0, 0.1] must be the least and the greatest"]),
        ("train.augment.jitter=[0, 1]", [": train.augment.jitter [0.0, 1.0] must be"]),
        ("train.augment.jitter=[1, .inf]", [": train.augment.jitter [1.0, inf] must be"]),
        ("train.augment.jitter_side=0", ["`train.augment.jitter_side` is 0"]),
        ("train.augment.plain_after=0", ["`train.augment.plain_after` is 0"]),
        ("model.num_classes=3", ["model.num_classes follows from dataset.labels"]),
        ("train.global_batch=15", ["train.global_batch 15 is not a multiple of train.micro_batch 2"]),
        ("cluster.workers=5", ["5 cluster.workers cannot share equally"]),
        ("cluster.workers=[5,7]", ["5 to 7 cluster.workers cannot share equally"]),
        ("cluster.workers=[2,1]", ["cluster.workers [2, 1]: the first must not be greater than the second"]),
        ("cluster.workers=0", ["cluster.workers must be at least 1, not 0"]),
        ("cluster.workers=[0,4]", ["cluster.workers must be at least 1, not 0"]),
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


def test_detr_on_its_own_says_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"set model\.feature_levels: 1, or model\.arch: deformable_detr"):
        load_config(write(tmp_path, "name: a\nmodel: {arch: detr}\n"))


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
