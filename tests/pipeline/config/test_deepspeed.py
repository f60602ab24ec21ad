"""DeepSpeed settings of one's own."""

from typing import Any

import pytest

from pipeline.config.deepspeed import merged, refused
from pipeline.config.load import ConfigError, parse_config


@pytest.mark.parametrize(
    ("settings", "keys"),
    [
        ({}, []),
        ({"zero_optimization": {"overlap_comm": True}, "comms_logger": {"enabled": True}}, []),
        ({"zero_optimization": {"stage": 2}}, ["zero_optimization.stage"]),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, ["zero_optimization.offload_optimizer"]),
        ({"fp16": {}}, ["fp16"]),
        ({"gradient_clipping": 1, "optimizer": {"type": "Adam"}}, ["gradient_clipping", "optimizer"]),
        ({"optimizers": 1}, []),
    ],
    ids=str,
)
def test_what_follows_from_other_settings_is_refused(settings: dict[str, Any], keys: list[str]) -> None:
    assert [line.split()[0] for line in refused(settings)] == keys


def test_no_value_stands_in_place_of_a_section_that_is_not_the_users() -> None:
    assert "zero_optimization.stage (follows from train.zero_stage)" in refused({"zero_optimization": None})


def test_the_error_names_the_key_and_the_mend() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"name": "a", "train": {"deepspeed": {"bf16": {"enabled": True}}}}, "my.yaml")
    expected = "my.yaml: train.deepspeed: not yours to set: bf16 (follows from train.precision); remove it"
    assert str(caught.value) == expected


def test_sections_are_merged() -> None:
    base = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert merged(base, {"a": {"c": {"f": 4}}, "e": 5, "g": {}}) == {
        "a": {"b": 1, "c": {"d": 2, "f": 4}}, "e": 5, "g": {},
    }  # fmt: skip
    assert base == {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
