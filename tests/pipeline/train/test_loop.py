"""Training: the same numbers at any world size, after any interruption."""

import itertools
import math
import os
import shutil
import signal
import time
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from model import build_model
from model.config import Denoising, OneToMany
from pipeline import checkpoint
from pipeline.checkpoint.state import Scaling
from pipeline.data.loader import MicroBatch, Step
from pipeline.data.manifest import Manifest, UnreadableSampleError, read_image_bytes, read_manifest
from pipeline.distributed import World, close, init_world
from pipeline.errors import UserError
from pipeline.predict.detector import Detector
from pipeline.run_folder import RunFolder
from pipeline.train.loop import _agree, _begin_to_share, _on_device, dropout_seed, noise_draws, train
from pipeline.train.loss_scale import LossScale
from pipeline.train.run import Run, TrainJob
from pipeline.train.stop import StoppedError
from tests.builders import spoil
from tests.pipeline.checkpoint.engines import CUT
from tests.pipeline.train.runs import SAMPLES, SETTINGS, assert_same_weights, losses, make_job, points, train_on
from tests.ranks import Ranks, processes


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
    curve = points(job.out)
    assert list(curve) == list(range(1, 9))
    assert [curve[step]["train/lr_main"] for step in (1, 5, 6, 8)] == pytest.approx([5e-4, 5e-4, 5e-5, 5e-5])
    assert curve[8]["train/lr_sampling"] == pytest.approx(5e-6)
    assert curve[5]["train/epoch"] == 2.0
    assert {"train/loss_ce", "train/loss_bbox", "train/loss_giou", "train/grad_norm"} <= curve[1].keys()


def test_the_same_seed_gives_the_same_bits(
    manifest: Manifest, straight: tuple[TrainJob, Path], world: World, tmp_path: Path
) -> None:
    again = make_job(manifest, tmp_path)
    assert_same_weights(train(again, world), straight[1])
    assert losses(again.out) == losses(straight[0].out)


def test_another_seed_gives_other_losses(
    manifest: Manifest, straight: tuple[TrainJob, Path], world: World, tmp_path: Path
) -> None:
    other = make_job(manifest, tmp_path, seed=1, max_steps=1)
    train(other, world)
    assert losses(other.out)[1] != losses(straight[0].out)[1]


@pytest.fixture(scope="module")
def twenty(manifest: Manifest, world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of 20 steps of one rank."""
    job = make_job(manifest, tmp_path_factory.mktemp("twenty"), max_steps=20)
    train(job, world)
    return losses(job.out)


@pytest.mark.parametrize("stage", [0, 1])
def test_one_and_two_ranks_agree(
    manifest: Manifest, ranks: Ranks, twenty: dict[int, float], stage: int, tmp_path: Path
) -> None:
    job = make_job(manifest, tmp_path, max_steps=20, zero_stage=stage)
    ranks.run(train_on, job)
    assert losses(job.out) == pytest.approx(twenty, rel=1e-5)
    assert len(twenty) == 20


@pytest.mark.parametrize(
    ("before", "after"), [((1, 0), (2, 1)), ((2, 1), (1, 0)), ((1, 1), (1, 0)), ((2, 0), (2, 1))],
    ids=lambda value: "{} rank(s) stage {}".format(*value),
)  # fmt: skip
def test_another_world_goes_on(
    manifest: Manifest,
    straight: tuple[TrainJob, Path],
    world: World,
    ranks: Ranks,
    before: Any,
    after: Any,
    tmp_path: Path,
) -> None:
    for (size, stage), steps in ((before, 4), (after, 8)):
        job = make_job(manifest, tmp_path, max_steps=steps, zero_stage=stage)
        last = train(job, world) if size == 1 else ranks.run(train_on, job)[0]
    assert losses(job.out) == pytest.approx(losses(straight[0].out), rel=1e-5)
    assert checkpoint.read_state(last).world_size == after[0]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_ranks_go_on_to_the_same_bits(manifest: Manifest, ranks: Ranks, tmp_path: Path, stage: int) -> None:
    cut: Any = {"ema": 0.6, "deepspeed": CUT}
    straight = make_job(manifest, tmp_path / "straight", zero_stage=stage, max_steps=4, **cut)
    ends = [ranks.run(train_on, straight)[0]]
    for steps in (2, 4):
        job = make_job(manifest, tmp_path / "again", zero_stage=stage, max_steps=steps, **cut)
        last = ranks.run(train_on, job)[0]
    assert_same_weights(last, ends[0])
    assert losses(job.out) == losses(straight.out)


def test_more_steps_go_on_to_the_same_bits(
    manifest: Manifest, straight: tuple[TrainJob, Path], world: World, tmp_path: Path
) -> None:
    for steps in (4, 6, 8):
        last = train(make_job(manifest, tmp_path, max_steps=steps), world)
    assert_same_weights(last, straight[1])
    assert losses(make_job(manifest, tmp_path).out) == losses(straight[0].out)


SUCCESSORS: dict[str, Any] = {
    "with_box_refine": True,
    "two_stage": "mixed",
    "look_forward_twice": True,
    "class_loss": "ma",
    "one_to_many": OneToMany(12, 3, 0.5),
    "denoising": Denoising(16, 0.5, 1.0),
}
JITTERED = {**SETTINGS["augment"], "jitter": (0.5, 1.5), "jitter_side": 64, "plain_after": 1}
"""Until the middle of the third step."""


def make_successor(manifest: Manifest, out: Path, steps: int) -> TrainJob:
    job = make_job(manifest, out, max_steps=steps, ema=0.6, augment=JITTERED)
    return replace(job, model=replace(job.model, decoder_layers=2, dropout=0.0, **SUCCESSORS))


def test_successors_go_on_to_the_same_bits_at_any_world_size(
    manifest: Manifest, world: World, ranks: Ranks, tmp_path: Path
) -> None:
    straight = make_successor(manifest, tmp_path / "straight", 3)
    last = train(straight, world)
    for steps in (1, 3):
        job = make_successor(manifest, tmp_path / "again", steps)
        again = train(job, world)
    assert_same_weights(again, last)
    ours, theirs = (checkpoint.load_model_weights(path, checkpoint.EMA) for path in (again, last))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert losses(job.out) == losses(straight.out)
    job = make_successor(manifest, tmp_path / "two", 3)
    ranks.run(train_on, job)
    assert losses(job.out) == pytest.approx(losses(straight.out), rel=1e-5)
    assert {"train/loss_ce_many", "train/loss_giou_many_0", "train/loss_bbox_dn"} <= points(job.out)[2].keys()


def make_swin(manifest: Manifest, out: Path, **settings: Any) -> TrainJob:
    job = make_job(manifest, out, **({"max_steps": 2, "layer_decay": 0.8} | settings))
    swin = {"backbone": "swin_nano", "backbone_norm": "frozen_batch_norm", "drop_path": 0.5, "dropout": 0.0}
    return replace(job, model=replace(job.model, **swin))


def test_a_swin_with_paths_dropped_goes_on_to_the_same_bits_at_any_world_size(
    manifest: Manifest, world: World, ranks: Ranks, tmp_path: Path
) -> None:
    straight = make_swin(manifest, tmp_path / "straight", activation_checkpointing=True)
    last = train(straight, world)
    for steps in (1, 2):
        again = train(make_swin(manifest, tmp_path / "again", max_steps=steps), world)
    assert_same_weights(again, last)
    ranks.run(train_on, make_swin(manifest, tmp_path / "two"))
    assert losses(RunFolder(tmp_path / "two")) == pytest.approx(losses(straight.out), rel=1e-5)
    assert {"train/lr_backbone", "train/lr_backbone-8"} <= points(straight.out)[2].keys()


def test_noise_is_of_a_step_a_micro_batch_and_an_image() -> None:
    draws = noise_draws(7, 3, 1, 2, 10)
    assert draws.shape == (2, 10, 8)
    assert (draws >= 0).all()
    assert (draws < 1).all()
    assert len(np.unique(draws)) == draws.size
    np.testing.assert_array_equal(draws[:1], noise_draws(7, 3, 1, 1, 10))
    for other in ((8, 3, 1), (7, 4, 1), (7, 3, 2), (7, 1, 3)):
        assert not np.isin(draws, noise_draws(*other, 2, 10)).any()
    assert noise_draws(7, 3, 1, 50, 100).mean() == pytest.approx(0.5, abs=0.01)


def test_a_detector_is_without_what_training_alone_has(manifest: Manifest, world: World, tmp_path: Path) -> None:
    job = make_successor(manifest, tmp_path, 1)
    detector = Detector.from_checkpoint(train(job, world))
    assert detector.config == job.model.at_inference()
    names = detector.model.state_dict().keys()
    assert not {"one_to_many_embed.weight", "transformer.label_embed.weight"} & names


def test_a_run_whose_hours_are_over_is_kept_and_goes_on(
    manifest: Manifest, straight: tuple[TrainJob, Path], world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count()
    monkeypatch.setattr("pipeline.train.stop.time", SimpleNamespace(time=lambda: next(ticks), monotonic=time.monotonic))
    job = make_job(manifest, tmp_path)
    with pytest.raises(StoppedError, match=r"training is kept in .*checkpoint-4"):
        train(replace(job, ends=4.0), world)
    assert_same_weights(train(job, world), straight[1])


def _train_alone(job: TrainJob) -> None:
    torch.set_num_threads(1)
    world = init_world("cpu")
    train(job, world)
    close(world)


def test_a_killed_run_ends_with_the_same_bits(
    manifest: Manifest, straight: tuple[TrainJob, Path], tmp_path: Path
) -> None:
    job = make_job(manifest, tmp_path)
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
    assert len(losses(job.out)) < 8, "it was not killed in time"
    torn = job.out.checkpoints / "checkpoint-7"
    torn.mkdir()
    (torn / checkpoint.MODEL).write_bytes(b"half")
    again = processes().Process(target=_train_alone, args=(job,))
    again.start()
    again.join(60)
    assert again.exitcode == 0
    assert not torn.exists()
    assert_same_weights(job.out.checkpoints / "checkpoint-8", straight[1])
    assert losses(job.out) == losses(straight[0].out)


def test_a_finished_run_returns_at_once(straight: tuple[TrainJob, Path], world: World) -> None:
    before = points(straight[0].out)
    assert train(straight[0], world) == straight[1]
    assert points(straight[0].out) == before


def test_a_loss_that_is_not_finite_stops_all_ranks(manifest: Manifest, ranks: Ranks, tmp_path: Path) -> None:
    job = make_job(manifest, tmp_path, lr=1e30, clip_grad_norm=0, checkpoint_epochs=0.1)
    outcomes = ranks.outcomes(train_on, job)
    assert str(outcomes[0]) == str(outcomes[1])
    assert "step 1: not finite: loss nan" in str(outcomes[0])
    assert "checkpoint-1 is whole" in str(outcomes[0])
    weights = checkpoint.load_model_weights(checkpoint.latest(job.out.checkpoints))
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


def disagree(
    world: World, job: TrainJob, manifest: Manifest, bad: float, norm: float, asked: bool = False, fails: bool = False
) -> tuple[dict[str, float], bool]:
    value = bad if world.rank == 1 else 1.0
    micro = MicroBatch(batch=None, targets=[], index=world.rank, image_ids=[10 * world.rank + 1])  # type: ignore[arg-type]
    mine = {"loss": torch.tensor(value, dtype=torch.float64), "loss_ce": torch.tensor(0.25, dtype=torch.float64)}
    error = UserError("no space") if fails and world.rank == 1 else None
    run = Run(job, world, manifest)
    shared = _begin_to_share(mine, run, asked and world.rank == 1, error)
    with closing(checkpoint.CheckpointWriter(world, job.out.checkpoints, None)) as writer:
        return _agree(mine, shared, torch.tensor(norm), Step(3, 0, [micro]), run, error, writer)


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
    outcomes = ranks.outcomes(disagree, make_job(manifest, tmp_path), manifest, bad, norm)
    assert all(isinstance(outcome, UserError) and message in str(outcome) for outcome in outcomes)


@pytest.mark.parametrize(
    ("loss", "factor", "message"),
    [(math.nan, 8.0, "not finite: loss nan, grad_norm inf"), (1.0, 1.0, "not finite: grad_norm inf")],
    ids=["the loss itself", "the least scale"],
)
def test_what_a_smaller_loss_scale_does_not_mend_is_raised(
    manifest: Manifest, world: World, tmp_path: Path, loss: float, factor: float, message: str
) -> None:
    run = Run(make_job(manifest, tmp_path, precision="fp16"), world, manifest)
    mine, scale = {"loss": torch.tensor(loss, dtype=torch.float64)}, LossScale(Scaling(factor), 1)
    shared = _begin_to_share(mine, run, False, None)
    with (
        closing(checkpoint.CheckpointWriter(world, run.job.out.checkpoints, None)) as writer,
        pytest.raises(UserError, match=message),
    ):
        _agree(mine, shared, torch.tensor(math.inf), Step(3, 0, []), run, None, writer, scale)


def test_finite_losses_are_summed_over_ranks(manifest: Manifest, ranks: Ranks, tmp_path: Path) -> None:
    expected = {"loss": 3.0, "loss_ce": 0.5, "grad_norm": 0.5}
    for asked in (False, True):
        results = ranks.run(disagree, make_job(manifest, tmp_path), manifest, 2.0, 0.5, asked)
        assert results == [(expected, asked)] * 2


def test_an_error_of_one_rank_is_raised_on_all(manifest: Manifest, ranks: Ranks, tmp_path: Path) -> None:
    outcomes = ranks.outcomes(disagree, make_job(manifest, tmp_path), manifest, math.nan, 0.5, False, True)
    assert [str(outcome) for outcome in outcomes] == ["no space"] * 2


@pytest.fixture
def damaged(manifest: Manifest, tmp_path: Path) -> tuple[Manifest, int]:
    """The shards with one image overwritten, and its id."""
    shutil.copytree(manifest.folder, tmp_path / "damaged")
    copy = read_manifest(tmp_path / "damaged")
    sample = copy.samples[7]
    spoil(copy, sample.image_id)
    with pytest.raises(UnreadableSampleError):
        read_image_bytes(copy, sample)
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
    assert losses(two.out) == pytest.approx(losses(one.out), rel=1e-5)
    assert points(one.out)[5]["train/skipped"] == 2


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
    zero = [
        step for step, point in points(job.out).items() if point["train/loss"] == 0 and point["train/grad_norm"] == 0
    ]
    assert len(zero) == 1


class Told:
    """Stands for a tensor on a GPU and for a stream: notes what is asked of it."""

    def __init__(self, name: str, events: list[str]) -> None:
        self.name, self.events = name, events

    def to(self, device: torch.device, non_blocking: bool = False) -> Any:
        self.events.append(f"copy {self.name}")
        return SimpleNamespace(pixels=self, mask=self) if self.name.startswith("batch") else self

    def record_stream(self, stream: "Told") -> None:
        self.events.append(f"{stream.name} uses {self.name}")

    def wait_stream(self, stream: "Told") -> None:
        self.events.append(f"{self.name} waits for {stream.name}")


def test_a_micro_batch_is_copied_to_a_gpu_before_the_one_before_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr("torch.cuda.stream", lambda stream: nullcontext())
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: Told("network", events))
    micros: Any = [
        SimpleNamespace(batch=Told(f"batch {n}", events), targets=[{"boxes": Told(f"boxes {n}", events)}])
        for n in range(2)
    ]
    copies: Any = Told("copies", events)
    for micro, _, _ in _on_device(micros, torch.device("cuda"), copies):
        events.append(f"compute {micro.batch.name}")
    handed = [["network waits for copies", *(f"network uses {name} {n}" for name in ("batch", "batch", "boxes"))]
              for n in range(2)]  # fmt: skip
    assert events == [
        *("copy boxes 0", "copy batch 0"), *handed[0], *("copy boxes 1", "copy batch 1"), "compute batch 0",
        *handed[1], "compute batch 1",
    ]  # fmt: skip


def test_dropout_is_seeded_by_step_and_micro_batch() -> None:
    seeds = [dropout_seed(seed, step, index) for seed in range(2) for step in range(3) for index in range(4)]
    assert len(set(seeds)) == len(seeds)
    assert seeds[0] == dropout_seed(0, 0, 0)
    assert all(0 <= seed < 2**63 for seed in seeds)
