"""Checkpoints that the tests of this room read."""

from pathlib import Path

import pytest

from pipeline.distributed import World
from tests.pipeline.checkpoint.engines import save_after_steps


@pytest.fixture(scope="package")
def saved(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one rank at stage 0."""
    return save_after_steps(world, 0, tmp_path_factory.mktemp("saved"))
