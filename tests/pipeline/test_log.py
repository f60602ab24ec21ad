"""The logger and its rank."""

import logging

import pytest

from pipeline.log import get_logger, set_up_logging

pytestmark = pytest.mark.usefixtures("restored_logging")


@pytest.mark.parametrize(
    ("rank", "shown"), [(0, ["said", "warned"]), (1, ["[rank 1] warned"])], ids=["rank 0", "rank 1"]
)
def test_information_is_for_rank_zero_and_warnings_for_all(
    rank: int, shown: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    set_up_logging(rank)
    logger = get_logger("pipeline.anything")
    logger.debug("hidden")
    logger.info("said")
    logger.warning("warned")
    assert [line.split(" ", 1)[1] for line in capsys.readouterr().err.splitlines()] == shown


def test_setting_up_twice_prints_once(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging(1)
    set_up_logging(0)
    get_logger("x").info("once")
    assert capsys.readouterr().err.count("once") == 1


def test_other_loggers_stay_as_they_are() -> None:
    before = logging.getLogger().handlers[:]
    set_up_logging()
    assert logging.getLogger().handlers == before
