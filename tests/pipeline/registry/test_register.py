"""Registering: once, and which version is champion."""

from pathlib import Path

from pipeline.registry.register import Registration
from pipeline.tracking.tracker import Tracker
from tests.pipeline.registry.registered import register_some


def test_first_is_champion(version: Registration) -> None:
    assert (version.version, version.is_champion, version.is_new) == (1, True, True)


def test_tags_tell_what_was_scored(tracker: Tracker, version: Registration) -> None:
    made = tracker.client.get_model_version("shown", "1")
    assert made.run_id == tracker.run_id
    assert made.tags["raydetr.val_digest"] == "val"
    assert float(made.tags["raydetr.metric.AP"]) == 0.5
    assert tracker.client.get_run(tracker.run_id).data.tags["raydetr.registered"] == "models:/shown/1"


class TestChampion:
    def test_the_same_again_is_skipped(self, tracker: Tracker, checkpoint: Path) -> None:
        first = register_some(tracker, checkpoint, "again")
        second = register_some(tracker, checkpoint, "again")
        assert (second.version, second.is_new, second.is_champion) == (first.version, False, True)

    def test_moves_only_when_better_on_the_same_split(self, tracker: Tracker, checkpoint: Path) -> None:
        def champion() -> int:
            return int(tracker.client.get_model_version_by_alias("rivals", "champion").version)

        register_some(tracker, checkpoint, "rivals", 0.5)
        worse = register_some(tracker, checkpoint, "rivals", 0.4)
        assert (worse.is_champion, champion()) == (False, 1)
        assert "AP 0.4000 is not better than its 0.5000" in worse.note
        other = register_some(tracker, checkpoint, "rivals", 0.9, val_digest="another")
        assert (other.is_champion, champion()) == (False, 1)
        assert "another validation split" in other.note
        better = register_some(tracker, checkpoint, "rivals", 0.6, metric="AP50")
        assert (better.is_champion, champion()) == (True, 4)
        assert "AP50 0.6000 is better than 0.5000 of version 1" in better.note

    def test_a_split_without_objects_makes_no_champion(self, tracker: Tracker, checkpoint: Path) -> None:
        made = register_some(tracker, checkpoint, "blind", -1.0)
        assert (made.version, made.is_champion) == (1, False)
        assert "no object on the validation split" in made.note
