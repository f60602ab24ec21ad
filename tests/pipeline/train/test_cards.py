"""pipeline/train/cards.py: data sheets."""

import pytest

from model.complexity import Work
from pipeline.errors import UserError
from pipeline.train.cards import CARDS, card_of_device, find_card


def test_a_card_by_its_name() -> None:
    assert find_card("h100") is find_card("H100")
    assert find_card("H100").memory == 80e9


def test_an_unknown_card_lists_the_known() -> None:
    with pytest.raises(UserError, match="--gpu RTX9: not a known card; choose one of V100, A100, H100, H200, B200"):
        find_card("RTX9")


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("Tesla V100-SXM2-32GB", "V100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("CPU, 1 thread", None),
    ],
)
def test_a_device_tells_its_card(device: str, name: str | None) -> None:
    card = card_of_device(device)
    assert (card.name if card else None) == name


def test_convolutions_in_fp32_have_the_tensor_cores() -> None:
    card = find_card("A100")
    assert card.seconds(Work(156e12, 156e12, 0), "fp32", 1.0) == pytest.approx(1)
    assert card.seconds(Work(19.5e12, 0, 0), "fp32", 0.5) == pytest.approx(2)
    assert card.seconds(Work(312e12, 1e12, 0), "bf16", 1.0) == pytest.approx(1)
    assert card.seconds(Work(312e12, 1e12, 0), "fp16", 1.0) == pytest.approx(1)


def test_what_is_moved_takes_time_beside_what_is_computed() -> None:
    assert find_card("A100").seconds(Work(312e12, 0, 2039e9), "bf16", 0.5) == pytest.approx(4)


def test_no_card_is_faster_in_fp32_than_with_fewer_bits() -> None:
    assert all(card.fp32 <= card.tf32 <= card.fp16 for card in CARDS)


def test_a_v100_has_no_bf16() -> None:
    assert not find_card("V100").has("bf16")
    assert find_card("V100").has("fp32")
    with pytest.raises(UserError, match=r"train\.precision: a V100 has no bf16"):
        find_card("V100").seconds(Work(1, 0, 0), "bf16", 1)
