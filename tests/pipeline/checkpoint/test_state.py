"""A checkpoint's state, and finding the newest one."""

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from model import DetrConfig
from pipeline import checkpoint
from pipeline.checkpoint.state import DamagedError, State
from pipeline.config.values import digest
from pipeline.data.labels import Category, LabelMap
from pipeline.errors import UserError
from pipeline.predict.detector import Detector
from tests.builders import write_checkpoint
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
    assert state == make_state(STEPS, groups=state.groups, files=state.files)
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


LABELS = LabelMap("coco91", (Category(1, "cat"), Category(3, "dog")))


def change_state(path: Path, change: Callable[[dict[str, Any]], None], *, sealed: bool = False) -> None:
    """Change state.json; `sealed` gives it sums and a digest that fit."""
    values = json.loads((path / checkpoint.STATE).read_text())
    change(values)
    if sealed:
        seal(path, values)
    (path / checkpoint.STATE).write_text(json.dumps(values))


def seal(path: Path, values: dict[str, Any]) -> None:
    state = checkpoint.read_state(path)
    values.pop("digest", None)
    names = (checkpoint.MODEL, checkpoint.OPTIMIZER)
    values["files"] = {name: checkpoint.checked_sum(path, state, name) for name in names}
    values["digest"] = digest(values)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A checkpoint from before sums were kept."""
    return write_checkpoint(tmp_path, LABELS)


@pytest.fixture
def sealed(old: Path) -> Path:
    """A checkpoint with sums."""
    change_state(old, lambda _: None, sealed=True)
    return old


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": None}, "step: Input should be a valid integer"),
        ({"step": "5"}, "step: Input should be a valid integer"),
        ({"step": 5.5}, "step: Input should be a valid integer"),
        ({"step": True}, "step: Input should be a valid integer"),
        ({"step": -5}, "step: .* greater than or equal to 0"),
        ({"step": 121}, "step 121 is not that of the folder's name"),
        ({"epoch": None}, "epoch: "),
        ({"samples": "many"}, "samples: "),
        ({"skipped": -1}, "skipped: "),
        ({"seeds": None}, "seeds: "),
        ({"seeds": {"train": "0"}}, r"seeds\.train: "),
        ({"world_size": 0}, "world_size: "),
        ({"zero_stage": 4}, "zero_stage: "),
        ({"config": None}, "config: "),
        ({"config": {"model": {}}}, r"lacks config\.train"),
        ({"config": {"model": None, "train": {}}}, r"config\.model: "),
        ({"labels": []}, "labels: "),
        ({"labels": {"kind": "contiguous"}}, r"lacks labels\.categories"),
        ({"labels": {"kind": "other", "categories": []}}, r"labels\.kind: "),
        (
            {"labels": {"kind": "contiguous", "categories": [{"id": "1", "name": "cat"}]}},
            r"labels\.categories\.0\.id: ",
        ),
        ({"data_digest": 7}, "data_digest: "),
        ({"scaling": {"factor": 0.5}}, r"scaling\.factor: "),
        ({"groups": None}, "groups: "),
        ({"groups": [None]}, r"groups\.0: "),
        ({"step": None, "epoch": None}, "step: .*; epoch: "),
    ],
    ids=str,
)
def test_a_field_of_another_type_is_told_by_name(old: Path, change: dict[str, Any], message: str) -> None:
    change_state(old, lambda values: values.update(change))
    with pytest.raises(DamagedError, match=rf"checkpoint-5/state\.json: {message}"):
        checkpoint.read_state(old)


@pytest.mark.parametrize(
    "field", [name for name in State.__dataclass_fields__ if name not in ("scaling", "files", "format")]
)
def test_a_missing_field_is_told_by_name(old: Path, field: str) -> None:
    change_state(old, lambda values: values.pop(field))
    with pytest.raises(DamagedError, match=rf"checkpoint-5/state\.json: lacks {field}; "):
        checkpoint.read_state(old)


def without(values: dict[str, Any], *keys: str) -> None:
    for key in keys[:-1]:
        values = values[key]
    del values[keys[-1]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: without(v, "config", "train", "augment"), r"lacks config\.train\.augment"),
        (lambda v: without(v, "config", "train", "augment", "max_side"), r"lacks config\.train\.augment\.max_side"),
        (lambda v: v["config"]["train"].update(augment=None), r"config\.train\.augment: "),
        (lambda v: v["config"]["train"]["augment"].update(short_sides=[]), r"config\.train\.augment\.short_sides: "),
        (lambda v: v["config"]["train"]["augment"].update(short_sides=7), r"config\.train\.augment\.short_sides: "),
        (lambda v: v["config"]["model"].update(heads=None), r"config\.model\.heads: "),
        (lambda v: v["config"]["model"].update(heads=-2), r"config\.model: .*heads is -2"),
        (
            lambda v: v["config"]["model"].update(wings=2),
            r"config\.model\.wings is a setting that this version does not",
        ),
    ],
    ids=["no augment", "no max_side", "null augment", "no sides", "a number", "null heads", "negative", "unknown"],
)
def test_a_detector_names_the_setting_that_it_cannot_use(
    old: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    change_state(old, change)
    with pytest.raises(UserError, match=rf"checkpoint-5/state\.json: {message}"):
        Detector.from_checkpoint(old)


def test_a_newer_setting_has_its_default_in_an_old_checkpoint(old: Path) -> None:
    change_state(old, lambda values: without(values, "config", "train", "criterion", "focal_gamma"))
    change_state(old, lambda values: without(values, "config", "model", "auxiliary_losses"))
    state = checkpoint.read_state(old)
    assert state.train_section().criterion.focal_gamma == 2.0
    assert state.detr_config().auxiliary_losses


def test_a_state_that_is_not_as_it_was_written_is_told(sealed: Path) -> None:
    checkpoint.read_state(sealed)
    change_state(sealed, lambda values: values.update(skipped=1))
    with pytest.raises(DamagedError, match=r"state\.json: is not as it was written"):
        checkpoint.read_state(sealed)


@pytest.mark.parametrize("key", ["digest", "files"])
def test_a_state_does_not_become_an_old_one_by_losing_a_key(sealed: Path, key: str) -> None:
    change_state(sealed, lambda values: values.pop(key))
    with pytest.raises(DamagedError, match=r"state\.json: is not as it was written"):
        checkpoint.read_state(sealed)


def test_another_format_is_no_damage(sealed: Path) -> None:
    change_state(sealed, lambda values: values.update(format=2), sealed=True)
    with pytest.raises(UserError, match="not of format 1") as caught:
        checkpoint.read_state(sealed)
    assert not isinstance(caught.value, DamagedError)


@pytest.mark.parametrize("name", [checkpoint.MODEL, checkpoint.OPTIMIZER])
def test_a_file_that_is_not_as_it_was_written_is_told(sealed: Path, name: str) -> None:
    state, content = checkpoint.read_state(sealed), (sealed / name).read_bytes()
    checkpoint.checked_sum(sealed, state, name)
    (sealed / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DamagedError, match=rf"checkpoint-5/{name}: is not as it was written"):
        checkpoint.checked_sum(sealed, state, name)
    (sealed / name).unlink()
    with pytest.raises(DamagedError, match=rf"checkpoint-5/{name}: is missing"):
        checkpoint.checked_sum(sealed, state, name)


def test_a_checkpoint_without_sums_loads_which_is_said_once(old: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            Detector.from_checkpoint(old)
    assert [record.message for record in caplog.records] == [
        f"{old} is from before sums were kept: its files are not checked"
    ]


def test_a_checkpoint_without_sums_must_be_whole(old: Path) -> None:
    (old / checkpoint.MODEL).write_bytes((old / checkpoint.MODEL).read_bytes()[:-7])
    with pytest.raises(DamagedError, match=r"model\.safetensors: is not whole"):
        Detector.from_checkpoint(old)


def test_whoever_uses_the_weights_of_a_checkpoint_checks_them(sealed: Path, tmp_path: Path) -> None:
    from jobs.convert import convert
    from pipeline.evaluate.results import weights_digest

    weights = load_file(sealed / checkpoint.MODEL)
    save_file({name: tensor + 1 for name, tensor in weights.items()}, sealed / checkpoint.MODEL)
    for use in (
        Detector.from_checkpoint,
        checkpoint.weights_in,
        weights_digest,
        lambda path: convert(path, tmp_path / "out.safetensors", "raydetr"),
    ):
        with pytest.raises(DamagedError, match=r"model\.safetensors: is not as it was written"):
            use(sealed)
