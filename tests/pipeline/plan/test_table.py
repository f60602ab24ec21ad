"""pipeline/plan/table.py: the rows of a plan."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from model.config import DetrConfig
from pipeline.config.sections import AugmentSection, TrainSection
from pipeline.distributed import World
from pipeline.plan.data import PlannedData
from pipeline.plan.profile import Point, Profile
from pipeline.plan.table import NETWORK, Plan, profile_canvases
from pipeline.train.cards import find_card
from pipeline.train.flops import micro_batch
from pipeline.train.run import Run
from tests.builders import make_varied_manifest
from tests.pipeline.train.runs import MODEL, make_job

IMAGES = 1000
TRAIN = TrainSection(
    epochs=3, global_batch=32, micro_batch=2, lr_drop_epochs=(2.0,),
    augment=AugmentSection(short_sides=(96, 160), max_side=256, crop=0),
)  # fmt: skip
DATA = PlannedData("a test", IMAGES, 10**9, np.array([[640, 480], [480, 640]]), 3, whole_shards=False)
CARD = find_card("A100")
PLAN = Plan(DetrConfig(num_classes=3, **MODEL), TRAIN, DATA, CARD, utilisation=0.5, price=2.0)
UPDATE = 7 * 4 * PLAN.layout.trained / CARD.memory_bandwidth
"""Seconds of the optimizer's step."""


def trained(plan: Plan, **settings: object) -> Plan:
    return replace(plan, train=plan.train.model_copy(update=settings))


def test_the_steps_are_those_of_the_schedule() -> None:
    assert PLAN.steps == 94
    assert trained(PLAN, max_steps=10).steps == 10


def test_a_row_adds_up() -> None:
    row = PLAN.row(1, 4)
    assert row.micro_batches == 4
    assert row.compute == pytest.approx(4 * CARD.seconds(PLAN.work, "fp32", 0.5) + UPDATE)
    assert row.hours == pytest.approx(94 * row.step / 3600)
    assert row.cost == pytest.approx(2.0 * 4 * row.hours)
    assert row.gpu_hours == pytest.approx(4 * row.hours)
    assert row.node_bytes == 10**9


def test_more_gpus_share_the_same_step() -> None:
    one, eight = PLAN.row(1, 1), PLAN.row(1, 8)
    assert one.communication == 0
    assert one.compute - UPDATE == pytest.approx(8 * (eight.compute - UPDATE))
    assert eight.communication > 0
    assert PLAN.row(2, 8).communication > PLAN.row(1, 16).communication, "the network is slower than the machine's link"


def test_machines_share_the_reading_of_what_they_see_all() -> None:
    assert PLAN.row(2, 8).node_bytes == 10**9 / 2
    assert replace(PLAN, data=replace(DATA, whole_shards=True)).row(2, 8).node_bytes == 10**9


def test_links() -> None:
    assert PLAN.link(1).bandwidth == find_card("A100").link
    assert PLAN.link(2).bandwidth == NETWORK
    assert replace(PLAN, bandwidth=7e9).link(1).bandwidth == replace(PLAN, bandwidth=7e9).link(2).bandwidth == 7e9


def test_numbers_of_gpus_that_do_not_divide_a_step() -> None:
    assert [gpus for gpus in range(1, 33) if PLAN.problem(gpus) is None] == [1, 2, 4, 8, 16]
    assert "16 micro-batches of 2 do not divide by 64: --set train.global_batch=128 would" in (PLAN.problem(64) or "")
    assert trained(PLAN, global_batch=128).problem(64) is None
    assert "train.global_batch=36 " in (PLAN.problem(6) or "")


def test_half_the_utilisation_is_twice_the_time() -> None:
    slow = replace(PLAN, utilisation=0.25)
    assert slow.row(1, 1).compute - UPDATE == pytest.approx(2 * (PLAN.row(1, 1).compute - UPDATE))


def test_a_profile_takes_the_place_of_the_card() -> None:
    profile = Profile("somewhere", {}, (Point(2, 64, 64, round(PLAN.work.flops), 3.0, 0),), optimizer=0.5)
    plan = replace(PLAN, card=None, profile=profile)
    assert plan.row(1, 4).compute == pytest.approx(4 * 3.0 + 0.5)
    assert trained(plan, zero_stage=1).row(1, 4).compute == pytest.approx(4 * 3.0 + 0.5 / 4), "its part of the moments"


def test_the_canvases_that_are_counted() -> None:
    mean, greatest, area = PLAN.canvases
    assert greatest == (224, 224), "two images that lie differently"
    assert mean == (128, 128), "of those that occur the nearest to the mean area, which counts"
    assert 96 * 128 < area < 160 * 224
    assert profile_canvases(PLAN) == [(64, 64), mean, greatest]
    of_canvas = micro_batch(PLAN.model, TRAIN, mean).work()
    assert PLAN.work == of_canvas.times(area / (128 * 128))


@pytest.mark.parametrize(
    ("period", "epochs", "max_steps", "keep"),
    [(1.0, 3, None, 2), (0.7, 2, None, None), (50.0, 1, None, 3), (1, 9, 7, 1)],
)
def test_checkpoints_are_written_as_the_run_does(
    tmp_path: Path, period: float, epochs: int, max_steps: int | None, keep: int | None
) -> None:
    manifest = make_varied_manifest(tmp_path, 20)
    settings = {"checkpoint_epochs": period, "epochs": epochs, "max_steps": max_steps, "keep_checkpoints": keep}
    job = make_job(manifest, tmp_path, **settings)
    run = Run(job, World(0, 1, 0, None), manifest)  # type: ignore[arg-type]
    written = sum(run.saves_after(step) for step in range(run.total))
    plan = replace(PLAN, train=job.train, data=replace(DATA, images=20))
    assert plan.steps == run.total
    assert plan.checkpoints.written == written
    assert plan.checkpoints.kept == (written if keep is None else min(written, keep + 1))


def test_an_average_is_another_set_of_weights() -> None:
    saved = 4 * PLAN.layout.saved
    assert trained(PLAN, ema=0.99).checkpoints.bytes - PLAN.checkpoints.bytes == saved
    told = trained(PLAN, ema=0.99).row(1, 8).memory
    assert told[0].average == 4 * PLAN.layout.trained
    assert told[3].average < told[0].average / 7
