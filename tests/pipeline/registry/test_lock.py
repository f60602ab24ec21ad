"""The registry's lock: one holder at a time, entered again by its own run, taken when it was left."""

import threading
from pathlib import Path
from typing import ClassVar

import pytest

from pipeline.registry import lock
from pipeline.tracking.tracker import Tracker


@pytest.fixture
def two(mlflow_uri: str, tmp_path: Path) -> list[Tracker]:
    return [Tracker(mlflow_uri, "lock", name, tmp_path / name / "mlflow_run.json") for name in ("first", "second")]


def test_one_holds_it_at_a_time_and_the_same_run_enters_again(two: list[Tracker]) -> None:
    inside = threading.Event()
    with lock.registry_lock(two[0].client, two[0].run_id, "locked"):
        with lock.registry_lock(two[0].client, two[0].run_id, "locked"):
            pass
        with lock.registry_lock(two[0].client, two[0].run_id, "locked"):

            def enter() -> None:
                with lock.registry_lock(two[1].client, two[1].run_id, "locked"):
                    inside.set()

            other = threading.Thread(target=enter)
            other.start()
            assert not inside.wait(1)
    other.join(20)
    assert inside.is_set()


def test_one_that_was_left_is_taken_after_its_lease(two: list[Tracker], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "LEASE", 1.0)
    holding = lock.registry_lock(two[0].client, two[0].run_id, "left")
    holding.__enter__()
    with lock.registry_lock(two[1].client, two[1].run_id, "left"):
        pass
    client = two[0].client
    assert not [each.name for each in client.search_registered_models() if each.name.startswith("raydetr.lock")]


def test_the_lock_of_somebody_faster_is_put_back(two: list[Tracker]) -> None:
    with lock.registry_lock(two[0].client, two[0].run_id, "put back"):
        client = two[0].client
        (held,) = [each for each in client.search_registered_models() if each.name.startswith("raydetr.lock")]

        class Gone:
            creation_timestamp = held.creation_timestamp
            tags: ClassVar[dict[str, str]] = {lock.OWNER_TAG: "somebody"}

        lock._take_away(client, held.name, Gone)
        assert client.get_registered_model(held.name).tags[lock.OWNER_TAG] == two[0].run_id
