"""The model that training begins with."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from model import DetrConfig, build_model
from pipeline import checkpoint
from pipeline.config.load import load_config
from pipeline.config.sections import InitSection, TrainSection
from pipeline.data.manifest import Manifest
from pipeline.distributed import World
from pipeline.errors import UserError
from pipeline.train.initial import check_init, hindrance, make_model
from pipeline.train.loop import train
from pipeline.train.run import TrainJob
from tests.pipeline.train.runs import losses, make_job, train_on
from tests.ranks import Ranks


@pytest.mark.parametrize("key", ["backbone", "weights"])
def test_weights_that_are_not_there_are_told_unless_training_has_begun(key: str, tmp_path: Path) -> None:
    missing = InitSection.model_validate({key: "none.pth"})
    with pytest.raises(UserError, match=rf"train\.init\.{key}: none\.pth: there is no such file or folder"):
        check_init(missing, tmp_path)
    state = tmp_path / "checkpoint-5" / "state.json"
    state.parent.mkdir(parents=True)
    state.touch()
    check_init(missing, tmp_path)


@pytest.mark.parametrize("source", ["imagenet", "https://example.org/resnet.pth"])
def test_a_download_is_no_path(source: str, tmp_path: Path) -> None:
    check_init(InitSection(backbone=source), tmp_path)


RANDOM = {"freeze_backbone": "none", "lr": 5e-4, "lr_backbone": 5e-4, "global_batch": 4}
"""Settings by which weights that begin at random learn."""


@pytest.mark.parametrize(
    ("settings", "norm", "mends"),
    [
        pytest.param({}, "group_norm", (), id="none"),
        pytest.param({"freeze_backbone": "all"}, "group_norm", ("train.freeze_backbone: none",), id="frozen"),
        pytest.param({"lr_backbone": 5e-5}, "group_norm", ("train.lr_backbone: 0.0005",), id="slow"),
        pytest.param({}, "frozen_batch_norm", ("model.backbone_norm: group_norm",), id="norm"),
        pytest.param({"global_batch": 32}, "group_norm", ("(these are 250)",), id="few steps"),
        pytest.param({"global_batch": 32, "max_steps": 5}, "group_norm", (), id="a trial"),
        pytest.param({"lr_backbone": 0, "init": {"weights": "a.pth"}}, "frozen_batch_norm", (), id="given"),
        pytest.param({"lr_backbone": 0, "init": {"backbone": "imagenet"}}, "frozen_batch_norm", (), id="backbone"),
    ],
)
def test_what_hinders_random_weights_is_told(settings: dict[str, Any], norm: Any, mends: tuple[str, ...]) -> None:
    train = TrainSection.model_validate({**RANDOM, **settings})
    told = hindrance(DetrConfig(backbone_norm=norm), train, samples=160)
    assert hindrance(DetrConfig(backbone="swin_nano"), train, samples=160) == (told if norm == "group_norm" else None)
    assert (told is None) == (not mends)
    assert all(mend in (told or "") for mend in mends)


def test_the_defaults_are_for_weights_that_have_learnt() -> None:
    told = hindrance(DetrConfig(), TrainSection(), samples=160)
    assert told is not None
    assert all(key in told for key in ("freeze_backbone", "lr_backbone", "backbone_norm", "train.epochs"))


@pytest.mark.parametrize(("name", "samples"), [("demo", 1200), ("bccd", 205), ("small", 160)])
def test_nothing_hinders_what_is_shipped_for_random_weights(name: str, samples: int) -> None:
    config = load_config(Path(__file__).resolve().parents[3] / "jobs" / "configs" / f"{name}.yaml")
    assert hindrance(config.model, config.train, samples) is None


def test_a_registered_version_is_no_path(tmp_path: Path) -> None:
    check_init(InitSection(weights="models:/cells@champion"), tmp_path)


def test_a_registered_version_that_nobody_fetched(manifest: Manifest, world: World, tmp_path: Path) -> None:
    job = make_job(manifest, tmp_path, init={"weights": "models:/cells@champion"})
    with pytest.raises(UserError, match=r"models:/cells@champion: .* alone ask the registry; name a file of weights"):
        make_model(job, None, world)


@pytest.mark.parametrize("kind", ["weights", "backbone", "registered"])
def test_training_begins_with_given_weights_on_all_ranks(
    manifest: Manifest, straight: tuple[TrainJob, Path], ranks: Ranks, tmp_path: Path, kind: str
) -> None:
    given = checkpoint.load_model_weights(straight[1])
    source = straight[1]
    if kind == "backbone":
        given = {name: tensor for name, tensor in given.items() if name.startswith("backbone.")}
        source = tmp_path / "backbone.pth"
        torch.save({name.removeprefix("backbone."): tensor for name, tensor in given.items()}, source)
    init = {"weights": "models:/cells/1"} if kind == "registered" else {kind: str(source)}
    job = make_job(
        manifest, tmp_path / "run", init=init, max_steps=1, seed=5,
        lr=1e-12, lr_backbone=0, lr_sampling_factor=0, weight_decay=0,
    )  # fmt: skip
    job = replace(job, parent=source / checkpoint.MODEL if kind == "registered" else None)
    weights = checkpoint.load_model_weights(ranks.run(train_on, job)[0])
    for name, tensor in given.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-10)


def test_missing_weights_stop_all_ranks(manifest: Manifest, ranks: Ranks, tmp_path: Path) -> None:
    outcomes = ranks.outcomes(
        train_on, make_job(manifest, tmp_path, init={"weights": str(tmp_path / "none.safetensors")})
    )
    assert all(isinstance(outcome, UserError) and "none.safetensors" in str(outcome) for outcome in outcomes)


@pytest.mark.parametrize(("freeze", "still"), [("all", "backbone."), ("stem_and_layer1", "backbone.layer1.")])
def test_frozen_weights_stay(manifest: Manifest, world: World, tmp_path: Path, freeze: str, still: str) -> None:
    job = make_job(manifest, tmp_path, freeze_backbone=freeze, max_steps=2)
    weights = checkpoint.load_model_weights(train(job, world))
    torch.manual_seed(job.train.seed)
    initial = build_model(job.model).state_dict()
    changed = {name for name, tensor in weights.items() if not torch.equal(tensor, initial[name])}
    assert changed
    assert not [name for name in changed if name.startswith(still)]
    assert any(name.startswith("backbone.layer3") for name in changed) == (freeze != "all")


@pytest.mark.parametrize("stage", [0, 1])
def test_activation_checkpointing_changes_no_number(
    manifest: Manifest, straight: tuple[TrainJob, Path], world: World, tmp_path: Path, stage: int
) -> None:
    """Also when it is turned on in the middle of a run."""
    train(make_job(manifest, tmp_path, max_steps=4, zero_stage=stage), world)
    job = make_job(manifest, tmp_path, zero_stage=stage, activation_checkpointing=True)
    train(job, world)
    assert losses(job.out) == pytest.approx(losses(straight[0].out), rel=1e-6)


def test_a_compiled_transformer_trains_alike(
    manifest: Manifest, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the code of the graph, which takes a C++ compiler a minute: the graph runs as it is."""
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda graph, *_, **__: graph)
    curves = []
    counters.clear()
    for compiled in (False, True):
        job = make_job(manifest, tmp_path / str(compiled), max_steps=2, compile=compiled)
        train(replace(job, model=replace(job.model, dropout=0.0, feature_levels=1)), world)
        curves.append(losses(job.out))
        assert (counters["stats"]["unique_graphs"] > 0) == compiled
    torch.compiler.reset()
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
