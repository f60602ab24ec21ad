"""Training: the same numbers at any world size, after any interruption."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from model import DetrConfig, build_model
from pipeline import checkpoint
from pipeline.config.sections import TrainSection
from pipeline.data.loader import MicroBatch, Step
from pipeline.data.manifest import Manifest, read_image_bytes
from pipeline.distributed import World, close, init_world
from pipeline.errors import UserError
from pipeline.run_folder import RunFolder
from pipeline.train.__main__ import main
from pipeline.train.engine import engine_config
from pipeline.train.loop import _agree_on_finite, dropout_seed, train
from pipeline.train.run import Run, TrainJob, resume_point
from tests.builders import make_varied_manifest
from tests.ranks import Ranks, processes

MODEL = {
    "backbone": "resnet_tiny",
    "backbone_norm": "group_norm",
    "hidden_dim": 32,
    "heads": 4,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "ffn_dim": 32,
    "num_queries": 10,
    "dropout": 0.1,
}
SETTINGS: dict[str, Any] = {
    "epochs": 100,
    "global_batch": 8,
    "micro_batch": 4,
    "lr": 5e-4,
    "lr_backbone": 5e-4,
    "freeze_backbone": "none",
    "loader_workers": 0,
    "log_steps": 1,
    "max_steps": 8,
    "lr_drop_epochs": (2.0,),
    "checkpoint_epochs": 1.0,
    "augment": {
        "short_sides": (56, 64), "max_side": 80, "crop_short_sides": (64,), "crop_min": 40, "crop_max": 64,
    },
}  # fmt: skip
SAMPLES = 20


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_varied_manifest(tmp_path_factory.mktemp("data"), SAMPLES, max_samples=6)


def make_job(manifest: Manifest, out: Path, on_error: Any = "fail", **settings: Any) -> TrainJob:
    model = DetrConfig(num_classes=manifest.labels.num_classes, **MODEL)
    return TrainJob(
        model, TrainSection.model_validate({**SETTINGS, **settings}), manifest.folder, RunFolder(out), on_error
    )


def train_on(world: World, job: TrainJob) -> Path:
    return train(job, world)


def points(job: TrainJob) -> dict[int, dict[str, float]]:
    """The points of the curves by step."""
    records = [json.loads(line) for line in job.out.train_spool.read_text().splitlines()]
    assert len({record["step"] for record in records}) == len(records), "a point was written twice"
    return {record["step"]: record["metrics"] for record in records}


def losses(job: TrainJob) -> dict[int, float]:
    return {step: point["train/loss"] for step, point in points(job).items()}


def assert_same_weights(left: Path, right: Path) -> None:
    for name in (checkpoint.MODEL, checkpoint.OPTIMIZER):
        ours, theirs = load_file(left / name), load_file(right / name)
        assert ours.keys() == theirs.keys()
        assert not [key for key, tensor in ours.items() if not torch.equal(tensor, theirs[key])]


@pytest.fixture(scope="module")
def straight(manifest: Manifest, world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainJob, Path]:
    """A run of one rank that nothing disturbed, and its last checkpoint."""
    job = make_job(manifest, tmp_path_factory.mktemp("straight"))
    return job, train(job, world)


def test_a_run_leaves_checkpoints_and_curves(straight: tuple[TrainJob, Path], manifest: Manifest) -> None:
    job, last = straight
    # An epoch is 2.5 steps: it ends with the step that reaches its last sample.
    assert [path.name for path in checkpoint.checkpoints(job.out.checkpoints)] == [f"checkpoint-{n}" for n in (3, 5, 8)]
    assert last.name == "checkpoint-8"
    state = checkpoint.read_state(last)
    assert (state.step, state.epoch, state.samples, state.skipped, state.world_size) == (8, 3, 64, 0, 1)
    assert state.detr_config() == job.model
    assert state.labels == manifest.labels.to_json()
    assert state.data_digest == manifest.digest
    assert checkpoint.load_model_weights(last).keys() == build_model(job.model).state_dict().keys()
    curve = points(job)
    assert list(curve) == list(range(1, 9))
    assert [curve[step]["train/lr_main"] for step in (1, 5, 6, 8)] == pytest.approx([5e-4, 5e-4, 5e-5, 5e-5])
    assert curve[8]["train/lr_sampling"] == pytest.approx(5e-6)
    assert curve[5]["train/epoch"] == 2.0
    assert {"train/loss_ce", "train/loss_bbox", "train/loss_giou", "train/grad_norm"} <= curve[1].keys()


def test_the_same_seed_gives_the_same_bits(straight: tuple[TrainJob, Path], world: World, tmp_path: Path) -> None:
    again = make_job(_manifest(straight), tmp_path)
    assert_same_weights(train(again, world), straight[1])
    assert losses(again) == losses(straight[0])


def test_another_seed_gives_other_losses(straight: tuple[TrainJob, Path], world: World, tmp_path: Path) -> None:
    other = make_job(_manifest(straight), tmp_path, seed=1, max_steps=1)
    train(other, world)
    assert losses(other)[1] != losses(straight[0])[1]


def _manifest(straight: tuple[TrainJob, Path]) -> Manifest:
    from pipeline.data.manifest import read_manifest

    return read_manifest(straight[0].shards)


@pytest.fixture(scope="module")
def twenty(manifest: Manifest, world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of 20 steps of one rank."""
    job = make_job(manifest, tmp_path_factory.mktemp("twenty"), max_steps=20)
    train(job, world)
    return losses(job)


@pytest.mark.parametrize("stage", [0, 1])
def test_one_and_two_ranks_agree(
    manifest: Manifest, ranks: Ranks, twenty: dict[int, float], stage: int, tmp_path: Path
) -> None:
    job = make_job(manifest, tmp_path, max_steps=20, zero_stage=stage)
    ranks.run(train_on, job)
    assert losses(job) == pytest.approx(twenty, rel=1e-5)
    assert len(twenty) == 20


@pytest.mark.parametrize(
    ("before", "after"), [((1, 0), (2, 1)), ((2, 1), (1, 0)), ((1, 1), (1, 0)), ((2, 0), (2, 1))],
    ids=lambda value: "{} rank(s) stage {}".format(*value),
)  # fmt: skip
def test_another_world_goes_on(
    straight: tuple[TrainJob, Path], world: World, ranks: Ranks, before: Any, after: Any, tmp_path: Path
) -> None:
    for (size, stage), steps in ((before, 4), (after, 8)):
        job = make_job(_manifest(straight), tmp_path, max_steps=steps, zero_stage=stage)
        last = train(job, world) if size == 1 else ranks.run(train_on, job)[0]
    assert losses(job) == pytest.approx(losses(straight[0]), rel=1e-5)
    assert checkpoint.read_state(last).world_size == after[0]


def test_more_steps_go_on_to_the_same_bits(straight: tuple[TrainJob, Path], world: World, tmp_path: Path) -> None:
    for steps in (4, 6, 8):
        last = train(make_job(_manifest(straight), tmp_path, max_steps=steps), world)
    assert_same_weights(last, straight[1])
    assert losses(make_job(_manifest(straight), tmp_path)) == losses(straight[0])


def _train_alone(job: TrainJob) -> None:
    torch.set_num_threads(1)
    world = init_world("cpu")
    train(job, world)
    close(world)


def test_a_killed_run_ends_with_the_same_bits(straight: tuple[TrainJob, Path], tmp_path: Path) -> None:
    job = make_job(_manifest(straight), tmp_path)
    process = processes().Process(target=_train_alone, args=(job,))
    process.start()
    deadline = time.monotonic() + 60
    # In the middle of the second epoch, one step after the checkpoint of the first.
    while not (job.out.train_spool.exists() and len(job.out.train_spool.read_text().splitlines()) >= 4):
        assert time.monotonic() < deadline
        assert process.is_alive()
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert len(losses(job)) < 8, "it was not killed in time"
    torn = job.out.checkpoints / "checkpoint-7"
    torn.mkdir()
    (torn / checkpoint.MODEL).write_bytes(b"half")
    again = processes().Process(target=_train_alone, args=(job,))
    again.start()
    again.join(60)
    assert again.exitcode == 0
    assert not torn.exists()
    assert_same_weights(job.out.checkpoints / "checkpoint-8", straight[1])
    assert losses(job) == losses(straight[0])


def test_a_finished_run_returns_at_once(straight: tuple[TrainJob, Path], world: World) -> None:
    before = points(straight[0])
    assert train(straight[0], world) == straight[1]
    assert points(straight[0]) == before


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
    straight: tuple[TrainJob, Path], world: World, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train(make_job(_manifest(straight), straight[0].out.path, **settings), world)


def test_other_data_is_refused(straight: tuple[TrainJob, Path], world: World, tmp_path: Path) -> None:
    other = make_varied_manifest(tmp_path, SAMPLES - 1)
    with pytest.raises(UserError, match=r"digest of .*use another name"):
        train(make_job(other, straight[0].out.path), world)


def test_settings_that_change_no_step_may_change(straight: tuple[TrainJob, Path], world: World) -> None:
    job = make_job(
        _manifest(straight), straight[0].out.path, log_steps=5, keep_checkpoints=1, zero_stage=1, max_restarts=9
    )
    assert train(job, world) == straight[1]


def without_sums(path: Path, change: Callable[[dict[str, Any]], Any] = lambda _: None) -> None:
    """Make a checkpoint one from before sums were kept, and change its state."""
    state = json.loads((path / checkpoint.STATE).read_text())
    for key in ("files", "digest"):
        state.pop(key, None)
    change(state)
    (path / checkpoint.STATE).write_text(json.dumps(state))


@pytest.mark.parametrize(("value", "goes_on"), [("none", True), ("sqrt", False)], ids=["default", "another value"])
def test_a_checkpoint_from_before_a_setting_was_there(
    straight: tuple[TrainJob, Path], tmp_path: Path, value: str, goes_on: bool
) -> None:
    manifest = _manifest(straight)
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
    straight: tuple[TrainJob, Path], tmp_path: Path, section: str, key: str
) -> None:
    manifest = _manifest(straight)
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
    straight: tuple[TrainJob, Path], tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    manifest = _manifest(straight)
    job = make_job(manifest, tmp_path)
    shutil.copytree(straight[0].out.checkpoints, job.out.checkpoints)
    without_sums(job.out.checkpoints / straight[1].name, lambda values: change(values["config"]["train"]))
    with pytest.raises(UserError, match=rf"{straight[1].name}/state\.json: {re.escape(message)}") as caught:
        resume_point(job, manifest)
    assert "\n" not in str(caught.value)


def test_micro_batches_must_be_shared_equally(manifest: Manifest, ranks: Ranks, tmp_path: Path) -> None:
    outcomes = ranks.outcomes(train_on, make_job(manifest, tmp_path, global_batch=12))
    assert all("3 micro-batches of 4, which 2 workers cannot share" in str(outcome) for outcome in outcomes)


def test_a_loss_that_is_not_finite_stops_all_ranks(manifest: Manifest, ranks: Ranks, tmp_path: Path) -> None:
    job = make_job(manifest, tmp_path, lr=1e30, clip_grad_norm=0, checkpoint_epochs=0.1)
    outcomes = ranks.outcomes(train_on, job)
    assert str(outcomes[0]) == str(outcomes[1])
    assert "step 1: not finite: loss nan" in str(outcomes[0])
    assert "checkpoint-1 is whole" in str(outcomes[0])
    weights = checkpoint.load_model_weights(checkpoint.latest(job.out.checkpoints))
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


def disagree_on_finite(world: World, job: TrainJob, manifest: Manifest, bad: float, norm: float) -> dict[str, float]:
    value = bad if world.rank == 1 else 1.0
    micro = MicroBatch(batch=None, targets=[], index=world.rank, image_ids=[10 * world.rank + 1])  # type: ignore[arg-type]
    mine = {"loss": torch.tensor(value, dtype=torch.float64), "loss_ce": torch.tensor(0.25, dtype=torch.float64)}
    return _agree_on_finite(mine, torch.tensor(norm), Step(3, 0, [micro]), Run(job, world, manifest))


@pytest.mark.parametrize(
    ("bad", "norm", "message"),
    [
        (math.nan, 1.0, "step 3: not finite: loss nan; it comes from the micro-batches of images [11]"),
        (-math.inf, 1.0, "step 3: not finite: loss -inf; it comes"),
        (1.0, math.inf, "step 3: not finite: grad_norm inf; lower train.lr"),
    ],
    ids=["NaN", "infinite", "gradient"],
)
def test_what_one_rank_sees_is_raised_on_all(
    manifest: Manifest, ranks: Ranks, tmp_path: Path, bad: float, norm: float, message: str
) -> None:
    outcomes = ranks.outcomes(disagree_on_finite, make_job(manifest, tmp_path), manifest, bad, norm)
    assert all(isinstance(outcome, UserError) and message in str(outcome) for outcome in outcomes)


def test_finite_losses_are_summed_over_ranks(manifest: Manifest, ranks: Ranks, tmp_path: Path) -> None:
    results = ranks.run(disagree_on_finite, make_job(manifest, tmp_path), manifest, 2.0, 0.5)
    assert results == [{"loss": 3.0, "loss_ce": 0.5, "grad_norm": 0.5}] * 2


@pytest.fixture
def damaged(manifest: Manifest, tmp_path: Path) -> tuple[Manifest, int]:
    """The shards with one image overwritten, and its id."""
    from pipeline.data.manifest import read_manifest

    shutil.copytree(manifest.folder, tmp_path / "damaged")
    copy = read_manifest(tmp_path / "damaged")
    sample = copy.samples[7]
    offset, size = sample.members[sample.extension]
    with (copy.folder / copy.shards[sample.shard].name).open("r+b") as shard:
        shard.seek(offset)
        shard.write(b"\0" * size)
    assert set(read_image_bytes(copy, sample)) == {0}
    return copy, sample.image_id


def test_an_unreadable_sample_stops_all_ranks(damaged: tuple[Manifest, int], ranks: Ranks, tmp_path: Path) -> None:
    outcomes = ranks.outcomes(train_on, make_job(damaged[0], tmp_path / "run"))
    assert all(isinstance(outcome, UserError) and f"image id {damaged[1]}" in str(outcome) for outcome in outcomes)


def test_unreadable_samples_are_left_out_and_counted(
    damaged: tuple[Manifest, int], ranks: Ranks, world: World, tmp_path: Path
) -> None:
    two = make_job(damaged[0], tmp_path / "two", "skip", max_steps=5)
    state = checkpoint.read_state(ranks.run(train_on, two)[0])
    assert (state.epoch, state.skipped) == (2, 2)
    one = make_job(damaged[0], tmp_path / "one", "skip", max_steps=5)
    train(one, world)
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert points(one)[5]["train/skipped"] == 2


def test_a_micro_batch_without_images_adds_nothing(damaged: tuple[Manifest, int], world: World, tmp_path: Path) -> None:
    """With micro-batches of one image, the damaged one is a placeholder."""
    job = make_job(
        damaged[0],
        tmp_path / "run",
        "skip",
        global_batch=1,
        micro_batch=1,
        max_steps=SAMPLES,
        lr=1e-9,
        lr_backbone=1e-9,
    )
    train(job, world)
    zero = [step for step, point in points(job).items() if point["train/loss"] == 0 and point["train/grad_norm"] == 0]
    assert len(zero) == 1


@pytest.mark.parametrize("kind", ["weights", "backbone"])
def test_training_begins_with_given_weights_on_all_ranks(
    straight: tuple[TrainJob, Path], ranks: Ranks, tmp_path: Path, kind: str
) -> None:
    given = checkpoint.load_model_weights(straight[1])
    source = straight[1]
    if kind == "backbone":
        given = {name: tensor for name, tensor in given.items() if name.startswith("backbone.")}
        source = tmp_path / "backbone.pth"
        torch.save({name.removeprefix("backbone."): tensor for name, tensor in given.items()}, source)
    job = make_job(
        _manifest(straight), tmp_path / "run", init={kind: str(source)}, max_steps=1, seed=5,
        lr=1e-12, lr_backbone=0, lr_sampling_factor=0, weight_decay=0,
    )  # fmt: skip
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
def test_bf16_trains_fp32_weights(straight: tuple[TrainJob, Path], world: World, tmp_path: Path, stage: int) -> None:
    job = make_job(_manifest(straight), tmp_path, precision="bf16", zero_stage=stage, max_steps=2)
    weights = checkpoint.load_model_weights(train(job, world))
    assert {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()} == {torch.float32}
    assert losses(job)[1] == pytest.approx(losses(straight[0])[1], rel=0.05)
    assert losses(job)[1] != losses(straight[0])[1]


@pytest.mark.parametrize("stage", [0, 1])
def test_activation_checkpointing_changes_no_number(
    straight: tuple[TrainJob, Path], world: World, tmp_path: Path, stage: int
) -> None:
    """Also when it is turned on in the middle of a run."""
    manifest = _manifest(straight)
    train(make_job(manifest, tmp_path, max_steps=4, zero_stage=stage), world)
    job = make_job(manifest, tmp_path, zero_stage=stage, activation_checkpointing=True)
    train(job, world)
    assert losses(job) == pytest.approx(losses(straight[0]), rel=1e-6)


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
        curves.append(losses(job))
        assert (counters["stats"]["unique_graphs"] > 0) == compiled
    torch.compiler.reset()
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)


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


def test_dropout_is_seeded_by_step_and_micro_batch() -> None:
    seeds = [dropout_seed(seed, step, index) for seed in range(2) for step in range(3) for index in range(4)]
    assert len(set(seeds)) == len(seeds)
    assert seeds[0] == dropout_seed(0, 0, 0)
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_engine_gets_batches_of_a_rank(size: int) -> None:
    config = engine_config(TrainSection(global_batch=32, micro_batch=2, zero_stage=1, clip_grad_norm=0.1), size)
    assert config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * size == 32
    assert config["zero_optimization"]["stage"] == 1
    assert config["gradient_clipping"] == 0.1


@pytest.fixture
def config_file(manifest: Manifest, tmp_path: Path) -> Path:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "train").symlink_to(manifest.folder)
    file = tmp_path / "small.yaml"
    sections = {
        "name": "small",
        "runs": str(tmp_path / "runs"),
        "shards": {"out": str(tmp_path / "shards")},
        "model": MODEL,
        "train": json.loads(json.dumps(SETTINGS)),
        "cluster": {"device": "cpu", "workers": 2},
    }
    file.write_text(yaml.safe_dump(sections))
    return file


def test_torchrun_trains_like_one_process(config_file: Path, straight: tuple[TrainJob, Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "pipeline.train"]
    subprocess.run(
        [*command, "-c", str(config_file), "--set", "train.max_steps=2"],
        check=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    job = make_job(_manifest(straight), tmp_path / "runs" / "small")
    expected = {step: loss for step, loss in losses(straight[0]).items() if step <= 2}
    assert losses(job) == pytest.approx(expected, rel=1e-5)


def test_wrong_input_ends_with_2_and_one_line(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-c", str(config_file), "--set", f"shards.out={config_file.parent / 'nowhere'}"]) == 2
    assert main(["-c", str(config_file), "--set", "train.learning_rate=1"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("error: ") for line in lines)
