"""Settings as plain values."""

import json
from typing import Any

import pytest

from model import DetrConfig
from pipeline.config.sections import AugmentSection, InitSection
from pipeline.config.values import differences, digest, flatten, plain


def test_digest_and_differences() -> None:
    old, new = {"a": {"b": 1, "c": [1]}, "d": None}, {"a": {"b": 2, "c": [1]}, "e": 3}
    assert differences(old, new) == ["a.b: 1 -> 2", "d: None -> (absent)", "e: (absent) -> 3"]
    assert digest({"x": 1, "y": 2}) == digest({"y": 2, "x": 1}) != digest({"x": 1, "y": 3})
    assert flatten(old) == {"a.b": 1, "a.c": [1], "d": None}


@pytest.mark.parametrize(
    "section", [DetrConfig(), AugmentSection(), InitSection()], ids=lambda section: type(section).__name__
)
def test_plain_values_are_those_that_json_gives_back(section: Any) -> None:
    values = plain(section)
    assert json.loads(json.dumps(values)) == values
    assert type(section)(**values) == section
