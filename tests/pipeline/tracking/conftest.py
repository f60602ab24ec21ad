"""A clock that several files of this room read."""

from collections.abc import Callable

import pytest


@pytest.fixture
def clock() -> Callable[[], float]:
    """A second later each time that it is looked at."""
    ticks = iter(range(1_700_000_000, 1_800_000_000))
    return lambda: float(next(ticks))
