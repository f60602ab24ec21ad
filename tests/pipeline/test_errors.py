"""What of the user's text reaches a terminal."""

import logging

import pytest

from pipeline.errors import TrackingError, UserError, printable, shown
from pipeline.log import get_logger, set_up_logging


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cat", "cat"),
        ("Kätzchen 猫", "Kätzchen 猫"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("two\nlines", "two\\nlines"),
        ("caf\udce9.jpg", "caf\\udce9.jpg"),
        ("right\u202eleft", "right\\u202eleft"),
    ],
)
def test_printable(text: str, expected: str) -> None:
    assert printable(text) == expected
    assert printable(expected) == expected
    assert str(UserError(text)) == str(TrackingError(text)) == expected


def test_shown_leaves_out_the_middle() -> None:
    text = shown("begin" + "x" * 5000 + "end")
    assert len(text) <= 123
    assert text.startswith("begin")
    assert text.endswith("end")


def test_a_log_message_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger("raydetr")
    before = root.handlers[:], root.level, root.propagate
    try:
        set_up_logging()
        get_logger("test").warning("left out: %s", "a\x1b[2J\n.jpg")
        assert capsys.readouterr().err.endswith("left out: a\\x1b[2J\\n.jpg\n")
    finally:
        root.handlers[:], root.level, root.propagate = before
