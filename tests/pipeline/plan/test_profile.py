"""pipeline/plan/profile.py: measured times, and those that follow from them."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from model.config import Denoising, DetrConfig, OneToMany
from pipeline.config.sections import TrainSection
from pipeline.errors import UserError
from pipeline.plan.profile import Point, Profile, measure_profile, profile_settings, read_profile
from pipeline.run_folder import RunFolder
from pipeline.train.flops import micro_batch
from pipeline.train.run import TrainJob
from tests.pipeline.train.runs import MODEL, SETTINGS

ARCHITECTURE = DetrConfig(num_classes=3, **MODEL)
TRAIN = TrainSection.model_validate({**SETTINGS, "micro_batch": 2})


def profile_of(*times: tuple[int, float]) -> Profile:
    points = tuple(Point(2, 64, 64, flops, seconds, 1000) for flops, seconds in times)
    return Profile("CPU, 1 thread", profile_settings(ARCHITECTURE, TRAIN), points, 0.5)


def test_times_lie_on_a_line() -> None:
    profile = profile_of((100, 3.0), (300, 5.0))
    assert profile.seconds(200) == pytest.approx(4)
    assert profile.seconds(1000) == pytest.approx(12)


@pytest.mark.parametrize("times", [((100, 1.0),), ((100, 1.0), (200, 3.0)), ((100, 2.0), (200, 1.0))])
def test_a_line_without_a_negative_part(times: tuple[tuple[int, float], ...]) -> None:
    profile = profile_of(*times)
    assert 0 < profile.seconds(1) < profile.seconds(1000)
    assert profile.seconds(1000) == pytest.approx(1000 * sum(seconds / flops for flops, seconds in times) / len(times))


def test_measuring_trains_what_is_configured(tmp_path: Path) -> None:
    missing = TRAIN.init.model_copy(update={"weights": "nowhere.pth"})
    job = TrainJob(
        ARCHITECTURE, TRAIN.model_copy(update={"init": missing}), tmp_path / "no", RunFolder(tmp_path / "run")
    )
    profile = measure_profile(job, [(64, 64), (128, 160)], torch.device("cpu"))
    assert [(point.images, point.height, point.width) for point in profile.points] == [(2, 64, 64), (2, 128, 160)]
    assert all(point.seconds > 0 for point in profile.points)
    assert profile.optimizer > 0
    for point in profile.points:
        counted = micro_batch(ARCHITECTURE, TRAIN, (point.height, point.width))
        assert point.flops == counted.work().flops
        assert point.activations == pytest.approx(counted.memory()[0], rel=0.1)
    assert not list(tmp_path.iterdir()), "nothing is written"
    (tmp_path / "profile.json").write_text(json.dumps(asdict(profile)))
    assert read_profile(tmp_path / "profile.json", profile_settings(ARCHITECTURE, TRAIN)) == profile


def test_measuring_has_the_queries_of_training(tmp_path: Path) -> None:
    more = {"with_box_refine": True, "two_stage": True, "one_to_many": OneToMany(20, 3), "denoising": Denoising(16)}
    job = TrainJob(replace(ARCHITECTURE, **more), TRAIN, tmp_path, RunFolder(tmp_path))  # type: ignore[arg-type]
    (point,) = measure_profile(job, [(64, 64)], torch.device("cpu")).points
    counted = micro_batch(job.model, TRAIN, (64, 64))
    assert point.flops == counted.work().flops
    assert point.activations == pytest.approx(counted.memory()[0], rel=0.1)


def test_a_profile_is_for_any_batch_and_size_of_its_network() -> None:
    other = TRAIN.model_copy(update={"global_batch": 64, "micro_batch": 8, "zero_stage": 2})
    assert profile_settings(ARCHITECTURE, other) == profile_settings(ARCHITECTURE, TRAIN)


def test_a_profile_of_another_network_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(json.dumps(asdict(profile_of((100, 1.0)))))
    settings = profile_settings(replace(ARCHITECTURE, num_queries=11), TRAIN.model_copy(update={"precision": "bf16"}))
    with pytest.raises(UserError) as error:
        read_profile(tmp_path / "p.json", settings)
    assert "model.num_queries: 10 -> 11; train.precision: fp32 -> bf16" in str(error.value)
    assert "--measure" in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{}",
        '{"points": [{}]}',
        '{"points": [], "device": "", "settings": {}, "optimizer": 1}',
        json.dumps(asdict(profile_of((100, 0.0)))),
        json.dumps(asdict(replace(profile_of((100, 1.0)), optimizer="1"))),  # type: ignore[arg-type]
    ],
    ids=["list", "empty", "point", "none", "zero", "text"],
)
def test_what_is_no_profile_is_told(tmp_path: Path, content: str) -> None:
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(UserError, match=r"p\.json: not a profile .* raydetr plan --measure"):
        read_profile(tmp_path / "p.json", {})
