"""What the tests of several rooms need."""

import logging
from collections.abc import Iterator

import pytest

from pipeline.log import ROOT


@pytest.fixture
def restored_logging() -> Iterator[None]:
    """The logger is left as it was."""
    root = logging.getLogger(ROOT)
    before = (root.handlers[:], root.level, root.propagate)
    yield
    root.handlers[:], root.propagate = before[0], before[2]
    root.setLevel(before[1])
