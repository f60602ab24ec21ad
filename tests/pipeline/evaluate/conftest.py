"""A split and a checkpoint of it, which the tests of this room read."""

from pathlib import Path

import pytest

from pipeline.data.manifest import Manifest
from tests.builders import make_varied_manifest, write_checkpoint


@pytest.fixture(scope="package")
def split(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Five images of several shapes."""
    return make_varied_manifest(tmp_path_factory.mktemp("split"), 5)


@pytest.fixture(scope="package")
def checkpoint(split: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained detector of its categories."""
    return write_checkpoint(tmp_path_factory.mktemp("run"), split.labels)
