"""Data to train on, and a run that many tests compare with."""

from pathlib import Path

import pytest

from pipeline.data.manifest import Manifest
from pipeline.distributed import World
from pipeline.train.loop import train
from pipeline.train.run import TrainJob
from tests.builders import make_varied_manifest
from tests.pipeline.train.runs import SAMPLES, make_job


@pytest.fixture(scope="package")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Images of several shapes, in four shards."""
    return make_varied_manifest(tmp_path_factory.mktemp("data"), SAMPLES, max_samples=6)


@pytest.fixture(scope="package")
def straight(manifest: Manifest, world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainJob, Path]:
    """A run of one rank that nothing disturbed, and its last checkpoint."""
    job = make_job(manifest, tmp_path_factory.mktemp("straight"))
    return job, train(job, world)
