"""Traces of steps: of which, on which rank, and that they change no number."""

import dataclasses
import gzip
import json
from pathlib import Path

import pytest
import torch

from pipeline.config.load import ConfigError, parse_config
from pipeline.config.sections import ProfileSection
from pipeline.data.manifest import Manifest
from pipeline.distributed import World
from pipeline.run_folder import RunFolder
from pipeline.train.loop import train
from pipeline.train.profile import StepProfile
from tests.builders import make_varied_manifest
from tests.pipeline.train.runs import assert_same_weights, make_job


def traced_names(path: Path) -> list[str]:
    with gzip.open(path, "rt") as file:
        return [event.get("name", "") for event in json.load(file)["traceEvents"]]


def test_the_steps_of_the_rank_are_traced(tmp_path: Path) -> None:
    section = ProfileSection(steps=(2, 3), rank=1)
    for rank in (0, 1):
        profile = StepProfile(section, tmp_path / str(rank), rank)
        for step in range(6):
            profile.before(step)
            with torch.profiler.record_function(f"step {step}"):
                torch.zeros(2).sum()
        profile.close()
    assert not (tmp_path / "0").exists()
    (path,) = (tmp_path / "1").iterdir()
    assert path.name == "steps-2-3-rank-1.json.gz"
    assert {name for name in traced_names(path) if name.startswith("step ")} == {"step 2", "step 3"}


def test_a_run_with_a_trace_has_the_same_weights(world: World, tmp_path: Path) -> None:
    manifest: Manifest = make_varied_manifest(tmp_path / "data", 8)
    lasts = []
    for name, profile in (("plain", None), ("traced", {"steps": [1, 1]})):
        job = dataclasses.replace(make_job(manifest, tmp_path / name, profile=profile, max_steps=3))
        lasts.append(train(job, world))
    assert_same_weights(*lasts)
    names = traced_names(RunFolder(tmp_path / "traced").profile / "steps-1-1-rank-0.json.gz")
    assert any("conv" in name for name in names)
    assert not RunFolder(tmp_path / "plain").profile.exists()


def test_a_folder_that_cannot_be_written_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    profile = StepProfile(ProfileSection(steps=(0, 9)), tmp_path / "file" / "profile", 0)
    profile.before(0)
    with caplog.at_level("WARNING", logger="raydetr"):
        profile.close()
    assert "cannot be written" in caplog.text


def test_steps_that_are_none_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.profile.steps \[3, 2\] must be the first and the last one"):
        parse_config({"name": "a", "train": {"profile": {"steps": [3, 2]}}}, "test")
