"""The sections: the shipped configurations, roles of settings, and what follows from them."""

import math
import re
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import pytest
import torch
from pydantic import Field, ValidationError

from model import DetrConfig, build_model
from model.config import Denoising, OneToMany
from pipeline.config.load import ConfigError, dump_config, load_config, parse_config
from pipeline.config.sections import (
    METRICS,
    AugmentSection,
    Config,
    DatasetSection,
    EvaluateSection,
    Role,
    Section,
    ShardsSection,
    TrackingSection,
    TrainSection,
    default_tracking_uri,
    settings_with,
)

CONFIGS = sorted((Path(__file__).resolve().parents[3] / "jobs" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_survives_a_round_trip(path: Path) -> None:
    config = load_config(path)
    assert parse_config(dump_config(config), "again") == config


def test_the_shipped_configs_are_the_promised_ones() -> None:
    others = {"demo", "tiny_coco", "bccd", "small", "coco_swin_l_best"}
    assert {path.stem for path in CONFIGS} == others | RECIPES.keys()


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
MIXED = {
    **dict.fromkeys(("with_box_refine", "look_forward_twice"), True),
    **{"two_stage": "mixed", "dropout": 0.0, "ffn_dim": 2048},
}
# Two-stage with blocks twice as wide, and positions of queries alone from the proposals
WIDE = 12 * (2 * 256 * 1024 + 1024) - (512 * 256 + 256 + 512)
HYBRID, BEST = WIDE + (300 + 1500) * 256, WIDE + (900 + 91) * 256
RECIPES = PUBLISHED | {
    "coco_r50_12": Published(
        41_181_529 + HYBRID, 40_959_129 + HYBRID, {**MIXED, "one_to_many": OneToMany(1500, 6, 1.0)}, 12, 11, 16
    ),
    "coco_r50_best": Published(
        *(41_181_529 + BEST, 40_959_129 + BEST),
        {**MIXED, "num_queries": 900, "class_loss": "ia_bce", "denoising": Denoising(200, 0.25, 1.0)},
        *(24, 22, 16, 1e-4, 1.0),
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name: str) -> None:
    published = RECIPES[name]
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
    assert (loss.class_cost, train.ema) == ((2.0, 0.9997) if name == "coco_r50_best" else (None, None))
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


def test_the_largest_recipe_is_h_detr_s() -> None:
    """That of HDETR/H-Deformable-DETR at f58ceb1, 36eps/swin/drop_path0.5_swin_large_..._n900_dp0_mqs_lft_...sh."""
    config = load_config(next(path for path in CONFIGS if path.stem == "coco_swin_l_best"))
    train, model = config.train, config.model_for(91)
    assert model == DetrConfig(
        backbone="swin_large", drop_path=0.5, num_queries=900, ffn_dim=2048, dropout=0.0, with_box_refine=True,
        two_stage="mixed", look_forward_twice=True, one_to_many=OneToMany(1500, 6, 1.0),
    )  # fmt: skip
    assert (train.epochs, train.lr_drop_epochs, train.global_batch, train.lr_batch) == (36, (30,), 16, 16)
    assert (train.lr, train.lr_backbone, train.lr_sampling_factor, train.layer_decay) == (2e-4, 2e-5, 0.1, 1.0)
    assert (train.weight_decay, train.clip_grad_norm, train.freeze_backbone) == (1e-4, 0.1, "none")
    loss = train.criterion
    assert (loss.class_weight, loss.bbox_weight, loss.giou_weight) == (2.0, 5.0, 2.0)
    with torch.device("meta"):
        detector = build_model(model)
    assert sum(parameter.numel() for parameter in detector.parameters()) == 218_101_677


def test_total_steps_covers_every_sample() -> None:
    train = TrainSection(epochs=3, global_batch=4)
    assert train.total_steps(samples=10) == 8  # 30 samples in steps of 4
    assert train.model_copy(update={"max_steps": 5}).total_steps(samples=10) == 5


def test_shards_are_shared_by_the_runs_of_a_dataset() -> None:
    config = Config(name="a", dataset=DatasetSection(root="data/birds"))
    assert config.shards_folder == Path("runs/shards/birds").absolute()
    assert config.model_copy(update={"shards": ShardsSection(out="/x/y")}).shards_folder == Path("/x/y")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        pytest.param({"max_side": 0}, "`shards.max_side` is 0", id="no side"),
        pytest.param({"max_side": 800.5}, "`shards.max_side` is 800.5", id="half a pixel"),
        pytest.param({"max_side": 800, "quality": 0}, "`shards.quality` is 0", id="no quality"),
        pytest.param({"max_side": 800, "quality": 101}, "`shards.quality` is 101", id="above the best"),
        pytest.param({"quality": 80}, "shards.quality 80 is that of smaller copies: set shards.max_side", id="alone"),
    ],
)
def test_smaller_copies_that_cannot_be_made_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        parse_config({"name": "a", "shards": settings}, "my.yaml")


def test_patience_needs_scores() -> None:
    sections: dict[str, Any] = {"name": "a", "train": {"patience": 2}}
    assert Config.model_validate(sections).train.patience == 2
    with pytest.raises(ValueError, match=r"train\.patience looks at the scores of evaluate\.beside, which is false"):
        Config.model_validate({**sections, "evaluate": {"beside": False}})


@pytest.mark.parametrize(
    ("every", "epochs", "steps"),
    [
        (1, 1.0, list(range(1, 12))),
        (2, 1.0, [5, 10, 11]),
        (3, 1.0, [8, 11]),
        (99, 1.0, [11]),
        (2, 0.1, list(range(1, 12))),
    ],
    ids=["all", "every other", "every third", "the last alone", "more often than steps"],
)
def test_which_checkpoints_are_scored_while_training_goes_on(every: int, epochs: float, steps: list[int]) -> None:
    train = {"global_batch": 4, "micro_batch": 2, "max_steps": 11, "checkpoint_epochs": epochs}
    config = Config.model_validate({"name": "a", "train": train, "evaluate": {"every": every}})
    assert [step for step in range(1, 12) if config.scores_beside(step, samples=10)] == steps


@pytest.mark.parametrize("settings", [{"every": 0}, {"subset": -1}, {"gpus": 2}, {"device": "gpu"}], ids=str)
def test_no_part_of_the_checkpoints_images_or_gpus(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"evaluate\.{next(iter(settings))}` is .*should be"):
        parse_config({"name": "a", "evaluate": settings}, "my.yaml")


def test_workers_that_do_not_share_a_step_equally_are_skipped() -> None:
    train = {"global_batch": 24, "micro_batch": 2}
    config = Config.model_validate({"name": "a", "train": train, "cluster": {"workers": [2, 8]}})
    assert config.world_sizes == [6, 4, 3, 2]
    assert Config.model_validate({"name": "a", "train": train, "cluster": {"workers": 4}}).world_sizes == [4]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"train": {"GPU": 2}}, "cluster.resources.train: GPU is Ray's own; cluster.cpus_per_worker, cluster.device"),
        ({"shard": {"disk": 0}}, "cluster.resources.shard: disk 0: Ray counts from 0.0001"),
        ({"shard": {"disk": math.nan}}, "cluster.resources.shard: disk nan: Ray counts from 0.0001"),
        ({"evaluate": {"disk": "much"}}, "cluster.resources.evaluate.disk` is 'much'"),
        ({"register": {"disk": 1}}, "unknown key `cluster.resources.register`"),
    ],
    ids=["Ray's own", "none", "no number", "a word", "a step"],
)
def test_what_is_no_resource_of_a_step(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        parse_config({"name": "a", "cluster": {"resources": settings}}, "my.yaml")


def test_runs_in_a_store_need_a_server() -> None:
    server = {"uri": "http://mlflow:5000"}
    config = Config.model_validate({"name": "a", "runs": "s3://bucket/runs", "tracking": server})
    assert str(config.folder) == "s3://bucket/runs/a"
    assert str(config.shards_folder).startswith("s3://bucket/runs/shards/")
    for uri in (None, "mlflow.db", "sqlite:////shared/mlflow.db"):
        with pytest.raises(ValidationError, match=r"runs s3://bucket/runs: set tracking\.uri to an MLflow server"):
            Config.model_validate({"name": "a", "runs": "s3://bucket/runs", "tracking": {"uri": uri}})
    with pytest.raises(ValidationError, match="a web server takes no files"):
        Config.model_validate({"name": "a", "runs": "https://host/runs", "tracking": server})
    with pytest.raises(ValidationError, match="runs"):
        Config.model_validate({"name": "a", "runs": "ftp://host/runs", "tracking": server})


def test_the_tracking_server_is_embedded_unless_one_is_named(tmp_path: Path) -> None:
    embedded = f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert default_tracking_uri(tmp_path) == embedded
    assert (
        default_tracking_uri("runs") == default_tracking_uri() == f"sqlite:///{Path('runs').absolute() / 'mlflow.db'}"
    )
    assert Config(name="a", runs=str(tmp_path)).tracking_uri == embedded
    named = TrackingSection(uri="http://127.0.0.1:5000")
    assert Config(name="a", runs=str(tmp_path), tracking=named).tracking_uri == "http://127.0.0.1:5000"


@pytest.mark.parametrize(
    ("section", "role", "settings"),
    [
        (
            TrainSection,
            Role.MAY_DIFFER,
            (
                *("epochs", "max_steps", "zero_stage", "offload", "activation_checkpointing", "loader_workers"),
                *(
                    "checkpoint_epochs",
                    "keep_checkpoints",
                    "max_hours",
                    "patience",
                    "log_steps",
                    "profile",
                    "max_restarts",
                ),
            ),
        ),
        (EvaluateSection, Role.SCORES, ("batch_size", "precision", "short_side", "max_side", "max_detections")),
        (EvaluateSection, Role.SERVES, ("short_side", "max_side", "max_detections")),
        (AugmentSection, Role.MAY_DIFFER, ()),
    ],
    ids=["may differ", "scores", "serves", "none"],
)
def test_settings_have_the_roles(section: type[Section], role: Role, settings: tuple[str, ...]) -> None:
    assert settings_with(section, role) == settings


def test_a_role_is_found_beside_other_metadata() -> None:
    class Some(Section):
        first: Annotated[int, Role.SCORES, Role.SERVES] = Field(1, ge=1)
        second: Annotated[int, Field(ge=1), Role.SERVES] = 1
        third: int = 1

    assert settings_with(Some, Role.SERVES) == ("first", "second")
    assert settings_with(Some, Role.SCORES) == ("first",)


def test_the_metrics_are_coco_s_twelve() -> None:
    assert METRICS == ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
