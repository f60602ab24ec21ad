"""What a registry holds."""

import json

import pytest

from pipeline.errors import UserError
from pipeline.registry.catalogue import compare, list_models, show_model
from pipeline.registry.lock import registry_lock
from pipeline.registry.register import Registration
from pipeline.registry.versions import resolve
from pipeline.tracking.tracker import Tracker


def test_models_are_listed_without_locks(tracker: Tracker, version: Registration) -> None:
    with registry_lock(tracker.client, "somebody", "shown"):
        found = {model["name"]: model for model in list_models(tracker.client)}
    assert not [name for name in found if name.startswith("raydetr.lock")]
    assert (found["shown"]["champion"], found["shown"]["AP"], found["shown"]["pinned"]) == (1, 0.5, False)


def test_a_version_tells_what_it_is_made_of(tracker: Tracker, version: Registration) -> None:
    model = show_model(tracker.client, "shown")
    (made,) = model["versions"]
    assert (made["version"], made["aliases"], made["metrics"]["AP75"]) == (1, ["champion"], 0.5)
    assert (made["run_id"], made["val_digest"], made["category_AP"]) == (tracker.run_id, "val", {})
    assert made["code"]["version"]
    assert [(change["action"], change["aliases"]) for change in model["changes"]] == [("register", {"champion": "1"})]
    json.dumps(model)
    with pytest.raises(UserError, match="there is no registered model `none`"):
        show_model(tracker.client, "none")


def test_two_beside_each_other(tracker: Tracker, version: Registration) -> None:
    first = resolve(tracker.client, "shown/1")
    second = resolve(tracker.client, "shown/1")
    second.tags.update({"raydetr.metric.AP": "0.625", "raydetr.metric.APs": "-1.0", "raydetr.val_digest": "other"})
    first.tags["raydetr.category_AP.0"] = '{"cat": 0.5, "dog": 0.25}'
    second.tags["raydetr.category_AP.0"] = '{"cat": 0.25}'
    found = compare(first, second)
    assert found["metrics"]["AP"] == {"first": 0.5, "second": 0.625, "difference": 0.125}
    assert found["metrics"]["APs"]["difference"] is None
    assert found["category_AP"]["cat"]["difference"] == -0.25
    assert found["category_AP"]["dog"] == {"first": 0.25, "second": None, "difference": None}
    assert not found["same_validation_split"]
