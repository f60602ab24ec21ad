"""Long ways of training: a worker that is killed, and a run that takes every change of the ZeRO stage."""

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from jobs.cluster import connected
from jobs.train import train as train_on_ray
from pipeline import checkpoint
from pipeline.config.sections import ClusterSection
from pipeline.data.manifest import Manifest
from pipeline.distributed import World
from pipeline.train.loop import train
from tests.builders import make_varied_manifest
from tests.jobs.test_train import STEPS, make_config
from tests.pipeline.checkpoint.engines import CUT
from tests.pipeline.train.runs import SAMPLES, assert_same_weights, losses, make_job, train_on
from tests.ranks import Ranks


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return make_varied_manifest(tmp_path / "data", SAMPLES, max_samples=6)


def workers() -> list[int]:
    """Processes of Ray's training workers."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process.pid)
    return found


def test_a_killed_worker_changes_nothing(manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    steady, config = make_config(tmp_path, "steady"), make_config(tmp_path, "killed", max_restarts=1)
    done = threading.Event()
    killed: list[int] = []

    def kill_one() -> None:
        """In a thread: the driver's own look, once a second, would be too late for so short a run."""
        spool = config.folder.train_spool
        while not killed and not done.wait(0.01):
            if spool.exists() and len(spool.read_text().splitlines()) >= 4:
                os.kill(workers()[-1], signal.SIGKILL)
                killed.append(len(losses(config.folder)))

    with connected(ClusterSection(workers=2, device="cpu")), ThreadPoolExecutor(1) as pool:
        straight = train_on_ray(steady, manifest)
        killing = pool.submit(kill_one)
        try:
            last = train_on_ray(config, manifest)
        finally:
            done.set()
        killing.result()
    assert killed, "no worker was killed"
    assert killed[0] < STEPS, "it was not killed in time"
    assert_same_weights(last, straight)
    assert losses(config.folder) == losses(steady.folder)


STAGES = (0, 1, 0, 2, 0, 3, 1, 2, 1, 3, 2, 3, 0)
"""Every change from one ZeRO stage to another, once."""


def test_every_change_of_the_stage_goes_on(manifest: Manifest, world: World, ranks: Ranks, tmp_path: Path) -> None:
    """A step at each, by two ranks; the losses and the average of the weights are those of one rank at stage 0."""
    cut: Any = {"ema": 0.6, "deepspeed": CUT}
    steady = make_job(manifest, tmp_path / "steady", max_steps=len(STAGES), **cut)
    straight = train(steady, world)
    for steps, stage in enumerate(STAGES, start=1):
        job = make_job(manifest, tmp_path / "changed", max_steps=steps, zero_stage=stage, **cut)
        last = ranks.run(train_on, job)[0]
        assert checkpoint.read_state(last).zero_stage == stage
    assert losses(job.out) == pytest.approx(losses(steady.out), rel=1e-5)
    assert len(losses(job.out)) == len(STAGES)
    ours, theirs = (checkpoint.load_model_weights(path, checkpoint.EMA) for path in (last, straight))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-5)
