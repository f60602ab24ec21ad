"""A checkpoint's state, and finding the newest one."""

import dataclasses
import json
from pathlib import Path

import pytest

from model import DetrConfig
from pipeline import checkpoint
from pipeline.errors import UserError
from tests.pipeline.checkpoint.engines import (
    STEPS,
    make_folder,
    make_state,
)


def test_the_latest_is_the_whole_one_with_most_steps(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "missing") is None
    make_folder(tmp_path, "checkpoint-9")
    newest = make_folder(tmp_path, "checkpoint-10")
    make_folder(tmp_path, "checkpoint-11", state=False)
    make_folder(tmp_path, "checkpoint-12.tmp")
    make_folder(tmp_path, "checkpoint-best")
    assert checkpoint.latest(tmp_path) == newest


def test_state_comes_back_as_it_was(saved: Path) -> None:
    state = checkpoint.read_state(saved)
    assert state == make_state(STEPS, groups=state.groups)
    assert [group["name"] for group in state.groups] == ["main", "sampling", "backbone"]
    assert state.groups[0]["lr"] == 0.5 * 1e-2
    assert dataclasses.replace(state, config={"model": {"num_classes": 4}}).detr_config() == DetrConfig(num_classes=4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ("[]", "not of format"),
        (json.dumps({"format": 99}), "not of format"),
        (json.dumps({"format": 1, "step": 3}), "lacks config, data_digest"),
    ],
    ids=["missing", "torn", "list", "newer", "incomplete"],
)
def test_a_state_that_is_none_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / checkpoint.STATE).write_text(content)
    with pytest.raises(UserError, match=message):
        checkpoint.read_state(tmp_path)


def test_damaged_weights_are_refused_by_name(saved: Path, tmp_path: Path) -> None:
    (tmp_path / checkpoint.MODEL).write_bytes((saved / checkpoint.MODEL).read_bytes()[:-7])
    with pytest.raises(UserError, match=rf"{checkpoint.MODEL}: cannot be read"):
        checkpoint.load_model_weights(tmp_path)
