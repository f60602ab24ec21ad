"""Aliases: promoted, rolled back and pinned, and under changes that are cut."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.registry import aliases, package
from pipeline.registry.aliases import Standing, pin, promote, roll_back, standing_of, unpin
from pipeline.tracking.tracker import Tracker
from tests.pipeline.registry.registered import register_some
from tests.servers import CuttingClient


@pytest.fixture(autouse=True)
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions without a network."""

    def write(detector: Any, folder: Path, card: Any) -> None:
        folder.mkdir(parents=True)
        (folder / "MLmodel").write_text("flavors: {}\n")

    monkeypatch.setattr(package, "write_model", write)


@pytest.fixture
def name(tracker: Tracker, request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A registered model of three versions; the second is the champion."""
    name: str = request.node.name
    tracker.client.create_registered_model(name)
    for _ in range(3):
        tracker.client.create_model_version(name, str(tmp_path))
    tracker.client.set_registered_model_alias(name, "champion", "2")
    return name


def standing(tracker: Tracker, name: str) -> Standing:
    return standing_of(tracker.client.get_registered_model(name))


def test_promoted_and_rolled_back(tracker: Tracker, name: str) -> None:
    tracker.client.set_registered_model_alias(name, "challenger", "3")
    promoted = promote(tracker.client, name, "3", "fewer misses")
    assert promoted == standing(tracker, name)
    assert promoted.aliases == {"champion": "3", "previous": "2"}
    assert promoted.pin is not None
    assert promoted.pin["why"] == "fewer misses"
    assert "@" in promoted.pin["who"]
    back = roll_back(tracker.client, name, "misses small cells")
    assert back.aliases == {"champion": "2", "previous": "3"}
    assert [(change.action, change.why) for change in back.changes] == [
        ("promote", "fewer misses"),
        ("rollback", "misses small cells"),
    ]
    assert roll_back(tracker.client, name, "").aliases == {"champion": "3", "previous": "2"}


def test_nothing_to_go_back_to(tracker: Tracker, name: str) -> None:
    with pytest.raises(UserError, match="there is no @previous to go back to"):
        roll_back(tracker.client, name, "")
    with pytest.raises(UserError, match="is not pinned"):
        unpin(tracker.client, name, "")
    tracker.client.delete_registered_model_alias(name, "champion")
    with pytest.raises(UserError, match="no @champion to pin"):
        pin(tracker.client, name, "")


def test_a_pin_holds_against_better_versions_until_it_is_taken_out(tracker: Tracker, checkpoint: Path) -> None:
    register_some(tracker, checkpoint, "pinned", 0.5)
    worse = register_some(tracker, checkpoint, "pinned", 0.4)
    assert standing(tracker, "pinned").aliases == {"champion": "1", "challenger": "2"}
    assert not worse.is_champion
    pin(tracker.client, "pinned", "audit")
    better = register_some(tracker, checkpoint, "pinned", 0.8)
    assert not better.is_champion
    assert "it is pinned (by" in better.note
    assert standing(tracker, "pinned").aliases == {"champion": "1", "challenger": "3"}
    assert tracker.client.get_model_version("pinned", "3").tags["raydetr.champion"] == better.note
    unpin(tracker.client, "pinned", "")
    assert register_some(tracker, checkpoint, "pinned", 0.9).is_champion
    assert standing(tracker, "pinned").aliases == {"champion": "4", "previous": "1", "challenger": "3"}


def test_a_rollback_is_not_undone_by_the_next_registration(tracker: Tracker, checkpoint: Path) -> None:
    for value in (0.5, 0.6):
        register_some(tracker, checkpoint, "rolled back", value)
    roll_back(tracker.client, "rolled back", "false alarms")
    assert not register_some(tracker, checkpoint, "rolled back", 0.7).is_champion
    assert standing(tracker, "rolled back").champion == "1"


def test_a_version_that_fails_a_gate_is_the_challenger(tracker: Tracker, checkpoint: Path) -> None:
    made = register_some(tracker, checkpoint, "gated", 0.3, gate={"minimum": 0.4})
    assert (made.version, made.is_champion) == (1, False)
    assert "below register.gate.minimum 0.4" in made.note
    assert standing(tracker, "gated").aliases == {"challenger": "1"}


@pytest.mark.parametrize("is_done", [False, True], ids=["before", "after"])
def test_cut_at_every_request_the_next_command_completes_it(tracker: Tracker, name: str, is_done: bool) -> None:
    """Rolled back once, never twice or by half."""
    promote(tracker.client, name, "1", "")
    cut, before = 0, standing(tracker, name)
    while True:
        cut += 1
        client = CuttingClient(tracker.client, cut, is_done=is_done)
        try:
            now = aliases._with_champion(before, before.aliases["previous"])
            aliases.record(client, name, aliases.settled(client, name), "rollback", now, "cut", pins=True)
        except ConnectionResetError:
            after = aliases.settled(tracker.client, name)
            assert after.aliases in ({"champion": "1", "previous": "2"}, {"champion": "2", "previous": "1"})
            assert (after.champion == "2") == (after.changes[-1].action == "rollback")
            assert after.done == after.changes[-1].number
            promote(tracker.client, name, "2", "")
            promote(tracker.client, name, "1", "")
            before = standing(tracker, name)
            continue
        break
    assert cut > 5


def test_only_so_many_changes_are_kept(tracker: Tracker, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aliases, "MOST_CHANGES", 3)
    for version in ("1", "2", "3", "1", "2"):
        promote(tracker.client, name, version, "")
    assert [change.number for change in standing(tracker, name).changes] == [3, 4, 5]
