"""pipeline/config.py: strict sections, overrides, clear errors."""

from pathlib import Path

import pytest

from pipeline.config import ConfigError, differences, digest, dump_config, flatten, load_config, parse_config

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "jobs" / "configs").glob("*.yaml"))


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_survives_a_round_trip(path: Path) -> None:
    config = load_config(path)
    assert parse_config(dump_config(config), "again") == config


def test_the_shipped_configs_are_the_promised_ones() -> None:
    assert {"demo", "tiny_coco", "bccd", "coco_r50"} <= {path.stem for path in CONFIGS}


def test_published_recipe() -> None:
    config = load_config(next(path for path in CONFIGS if path.stem == "coco_r50"))
    train, model = config.train, config.model
    assert (train.lr, train.lr_backbone, train.lr_sampling_factor, train.weight_decay) == (2e-4, 2e-5, 0.1, 1e-4)
    assert (train.epochs, train.lr_drop_epochs, train.global_batch, train.clip_grad_norm) == (50, (40,), 32, 0.1)
    assert train.augment.short_sides == tuple(range(480, 801, 32))
    assert (model.hidden_dim, model.num_queries, model.feature_levels, model.ffn_dim) == (256, 300, 4, 1024)
    assert config.dataset.labels == "coco91"


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
        ("model.heads=7", ["model.hidden_dim 256 is not a multiple of model.heads 7"]),
        ("model.num_classes=3", ["model.num_classes follows from dataset.labels"]),
        ("train.global_batch=15", ["global_batch 15 is not a multiple of micro_batch 2"]),
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


def test_digest_and_differences() -> None:
    old, new = {"a": {"b": 1, "c": [1]}, "d": None}, {"a": {"b": 2, "c": [1]}, "e": 3}
    assert differences(old, new) == ["a.b: 1 -> 2", "d: None -> (absent)", "e: (absent) -> 3"]
    assert digest({"x": 1, "y": 2}) == digest({"y": 2, "x": 1}) != digest({"x": 1, "y": 3})
    assert flatten(old) == {"a.b": 1, "a.c": [1], "d": None}


def test_shards_are_shared_by_the_runs_of_a_dataset(tmp_path: Path) -> None:
    path = write(tmp_path, "name: a\ndataset: {root: data/birds}\n")
    assert load_config(path).shards_folder == Path("runs/shards/birds").absolute()
    assert load_config(path, ["shards.out=/x/y"]).shards_folder == Path("/x/y")
