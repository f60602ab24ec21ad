"""Data that the tests of this room read."""

import pytest

from pipeline.data.manifest import Manifest
from tests.builders import make_varied_manifest


@pytest.fixture(scope="package")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """31 images of several shapes."""
    return make_varied_manifest(tmp_path_factory.mktemp("varied"), 31, max_samples=6)
