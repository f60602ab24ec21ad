"""A run: its settings, and where it goes on."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model import DetrConfig
from pipeline import checkpoint
from pipeline.config.sections import TrainSection
from pipeline.config.values import flatten
from pipeline.data.manifest import Manifest
from pipeline.distributed import World
from pipeline.errors import UserError
from pipeline.run_folder import METRICS_FILE
from pipeline.train.loop import train
from pipeline.train.run import MAY_DIFFER, Run, TrainJob, resume_point
from tests.builders import make_varied_manifest, without_sums, write_checkpoint
from tests.pipeline.train.runs import SAMPLES, SETTINGS, make_job, train_on
from tests.ranks import Ranks


def test_what_a_checkpoint_keeps_of_a_job(manifest: Manifest, tmp_path: Path) -> None:
    job = make_job(manifest, tmp_path)
    assert job.config.keys() == {"model", "train"}
    assert json.loads(json.dumps(job.config)) == job.config
    assert DetrConfig(**job.config["model"]) == job.model
    assert TrainSection(**job.config["train"]) == job.train


def test_settings_that_may_differ_are_settings(manifest: Manifest, tmp_path: Path) -> None:
    known = flatten(make_job(manifest, tmp_path).config).keys()
    assert MAY_DIFFER
    assert not MAY_DIFFER - known


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 1e-3, "micro_batch": 2}, r"train\.lr: 0\.0005 -> 0\.001; train\.micro_batch: 4 -> 2.*use another name"),
        ({"augment": {**SETTINGS["augment"], "flip": 0.0}}, r"train\.augment\.flip: 0\.5 -> 0\.0"),
        ({"max_steps": 7}, r"beyond the end of the schedule, step 7: raise train\.epochs or train\.max_steps"),
    ],
    ids=["other rate", "other augmentation", "fewer steps"],
)
def test_other_settings_are_refused(
    manifest: Manifest, straight: tuple[TrainJob, Path], world: World, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train(make_job(manifest, straight[0].out.path, **settings), world)


def test_other_data_is_refused(straight: tuple[TrainJob, Path], world: World, tmp_path: Path) -> None:
    other = make_varied_manifest(tmp_path, SAMPLES - 1)
    with pytest.raises(UserError, match=r"digest of .*use another name"):
        train(make_job(other, straight[0].out.path), world)


def test_settings_that_change_no_step_may_change(
    manifest: Manifest, straight: tuple[TrainJob, Path], world: World
) -> None:
    job = make_job(manifest, straight[0].out.path, log_steps=5, keep_checkpoints=1, zero_stage=1, max_restarts=9)
    assert train(job, world) == straight[1]


@pytest.mark.parametrize(("value", "goes_on"), [("none", True), ("sqrt", False)], ids=["default", "another value"])
def test_a_checkpoint_from_before_a_setting_was_there(
    manifest: Manifest, straight: tuple[TrainJob, Path], tmp_path: Path, value: str, goes_on: bool
) -> None:
    job = make_job(manifest, tmp_path, scale_lr=value)
    shutil.copytree(straight[0].out.checkpoints, job.out.checkpoints)
    for path in checkpoint.checkpoints(job.out.checkpoints):
        without_sums(path, lambda values: values["config"]["train"].pop("scale_lr"))
    if goes_on:
        assert resume_point(job, manifest) is not None
    else:
        with pytest.raises(UserError, match=r"train\.scale_lr: none -> sqrt"):
            resume_point(job, manifest)


@pytest.mark.parametrize(
    ("section", "key"), [("augment", "crop"), ("criterion", "focal_gamma"), ("init", "reset_heads")]
)
def test_a_checkpoint_from_before_a_nested_setting_was_there(
    manifest: Manifest, straight: tuple[TrainJob, Path], tmp_path: Path, section: str, key: str
) -> None:
    job = make_job(manifest, tmp_path)
    shutil.copytree(straight[0].out.checkpoints, job.out.checkpoints)
    without_sums(job.out.checkpoints / straight[1].name, lambda values: values["config"]["train"][section].pop(key))
    found = resume_point(job, manifest)
    assert found is not None
    assert found[0].name == straight[1].name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda train: train["augment"].update(hue=0.5),
            "config.train.augment.hue is a setting that",
        ),
        (lambda train: train.update(momentum=0.9), "config.train.momentum is a setting that this version does"),
        (lambda train: train.update(augment=None), "config.train.augment: "),
        (lambda train: train.update(lr="fast"), "config.train.lr: "),
    ],
    ids=["nested", "unknown", "null", "text"],
)
def test_settings_that_this_version_cannot_use_are_told_by_name(
    manifest: Manifest,
    straight: tuple[TrainJob, Path],
    tmp_path: Path,
    change: Callable[[dict[str, Any]], Any],
    message: str,
) -> None:
    job = make_job(manifest, tmp_path)
    shutil.copytree(straight[0].out.checkpoints, job.out.checkpoints)
    without_sums(job.out.checkpoints / straight[1].name, lambda values: change(values["config"]["train"]))
    with pytest.raises(UserError, match=rf"{straight[1].name}/state\.json: {re.escape(message)}") as caught:
        resume_point(job, manifest)
    assert "\n" not in str(caught.value)


def test_micro_batches_must_be_shared_equally(manifest: Manifest, ranks: Ranks, tmp_path: Path) -> None:
    outcomes = ranks.outcomes(train_on, make_job(manifest, tmp_path, global_batch=12))
    assert all("3 micro-batches of 4, which 2 workers cannot share" in str(outcome) for outcome in outcomes)


@pytest.mark.parametrize(
    ("epochs", "after"),
    [
        (1.0, [3, 5, 8, 10, 11]),
        (2.0, [5, 10, 11]),
        (0.5, [2, 3, 4, 5, 7, 8, 9, 10, 11]),
        (0.1, list(range(1, 12))),
        (99, [11]),
    ],
    ids=["every epoch", "every other", "half", "more often than steps", "the last alone"],
)
def test_checkpoints_follow_epochs(
    manifest: Manifest, world: World, tmp_path: Path, epochs: float, after: list[int]
) -> None:
    run = Run(make_job(manifest, tmp_path, max_steps=11, checkpoint_epochs=epochs), world, manifest)
    assert [step + 1 for step in range(11) if run.saves_after(step)] == after


def test_the_best_of_the_scored_checkpoints(manifest: Manifest, world: World, tmp_path: Path) -> None:
    job = dataclasses.replace(make_job(manifest, tmp_path), metric="AP50")
    run = Run(job, world, manifest)
    assert run.best_scored() is None
    for step, value in ((5, 0.25), (10, 0.5), (15, 0.5), (20, 0.25), (25, None)):
        write_checkpoint(job.out.checkpoints, manifest.labels, step)
        file = job.out.evaluation / f"checkpoint-{step}" / METRICS_FILE
        file.parent.mkdir(parents=True)
        file.write_text("{" if value is None else json.dumps({"AP": 1 - value, "AP50": value}))
    assert run.best_scored() == "checkpoint-15"
    shutil.rmtree(job.out.checkpoints / "checkpoint-15")
    assert run.best_scored() == "checkpoint-10"
    part = job.out.results(2) / "checkpoint-5" / METRICS_FILE
    part.parent.mkdir(parents=True)
    part.write_text('{"AP50": 0.01}')
    of_part = Run(dataclasses.replace(job, subset=2), world, manifest)
    assert (run.best_scored(), of_part.best_scored()) == ("checkpoint-10", "checkpoint-5")
