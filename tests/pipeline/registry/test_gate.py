"""Whether a version becomes the champion: each gate, on either side of its limit."""

from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.config.sections import GateSection
from pipeline.registry.aliases import Standing
from pipeline.registry.gate import VAL_TAG, category_scores, category_tags, decide

FREE = Standing({"champion": "3"}, None, [], 0)
PINNED = Standing({"champion": "3"}, {"who": "ann@lab", "when": "2026-11-01 10:00:00", "why": "audit"}, [], 0)


def champion(value: float = 0.5, **by_category: float) -> Any:
    tags = {"raydetr.metric.AP": repr(value), VAL_TAG: "val", **(category_tags(by_category) if by_category else {})}
    return SimpleNamespace(version="3", tags=tags)


def made(value: float, val_digest: str = "val", **by_category: float) -> dict[str, Any]:
    return {"metrics": {"AP": value}, "category_AP": by_category, "val_digest": val_digest}


@pytest.mark.parametrize(
    ("before", "new", "gate", "moves", "note"),
    [
        pytest.param(None, made(0.1), {}, True, "the first champion", id="first"),
        pytest.param(None, made(0.1), {"minimum": 0.2}, False, "no champion: AP 0.1000 is below", id="first, too low"),
        pytest.param(None, made(0.2), {"minimum": 0.2}, True, "first", id="first, just enough"),
        pytest.param(
            None, made(0.1) | {"baseline": {"AP": 0.1}}, {}, False, "AP 0.1000 is no better than the 0.1000",
            id="first, blind",
        ),
        pytest.param(None, made(0.11) | {"baseline": {"AP": 0.1}}, {}, True, "first", id="first, seeing"),
        pytest.param(
            None, made(0.1) | {"baseline": {"AP": 0.1}}, {"baseline": False}, True, "first", id="first, blind, allowed"
        ),
        pytest.param(champion(), made(0.6), {}, True, "AP 0.6000 is better than 0.5000 of version 3", id="better"),
        pytest.param(champion(), made(0.5), {}, False, "is not better than its 0.5000", id="equal"),
        pytest.param(champion(), made(0.9, "other"), {}, False, "another validation split", id="another split"),
        pytest.param(champion(), made(-1.0), {}, False, "no object on the validation split", id="no objects"),
        pytest.param(champion(), made(0.6), {"minimum": 0.7}, False, "below register.gate.minimum 0.7", id="minimum"),
        pytest.param(champion(), made(0.6), {"margin": 0.1}, True, "better", id="margin reached"),
        pytest.param(champion(), made(0.59), {"margin": 0.1}, False, "not register.gate.margin 0.1 above", id="margin"),
        pytest.param(
            champion(0.5, cat=0.5, dog=0.5), made(0.6, cat=0.9, dog=0.3), {"category_drop": 0.2}, True, "better",
            id="a category at its limit",
        ),
        pytest.param(
            champion(0.5, cat=0.5, dog=0.5), made(0.6, cat=0.9, dog=0.29), {"category_drop": 0.2}, False,
            "AP of dog falls from 0.5000 to 0.2900, by more than register.gate.category_drop 0.2", id="a category",
        ),
        pytest.param(
            champion(0.5, cat=0.5, dog=-1.0), made(0.6, cat=0.5, dog=-1.0), {"category_drop": 0.0}, True, "better",
            id="a category without objects",
        ),
        pytest.param(champion(), made(0.6, cat=0.5), {"category_drop": 0.1}, False, "by category", id="not known"),
    ],
)  # fmt: skip
def test_gates(before: Any, new: dict[str, Any], gate: dict[str, float], moves: bool, note: str) -> None:
    decided, why = decide(before, FREE, new, "AP", GateSection(**gate))
    assert decided == moves
    assert note in why


def test_a_pinned_champion_stays_whatever_comes() -> None:
    moves, note = decide(champion(), PINNED, made(0.9), "AP", GateSection())
    assert not moves
    assert note == (
        "@champion stays version 3: it is pinned (by ann@lab on 2026-11-01 10:00:00: audit); `raydetr models unpin` "
        "lets it move"
    )


@pytest.mark.parametrize("count", [0, 1, 80, 1203])
def test_categories_fit_into_tags(count: int) -> None:
    scores = {f"kind {number} \N{SNOWMAN} of many": number / 7 for number in range(count)}
    tags = category_tags(scores)
    assert max(map(len, tags.values())) <= 4000
    assert category_scores(tags) == scores


def test_versions_of_before_tell_no_categories() -> None:
    assert category_scores({"raydetr.metric.AP": "0.5"}) is None
