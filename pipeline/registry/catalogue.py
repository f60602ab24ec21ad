"""What a registry holds, as values of JSON: its models, the versions of one, two versions beside each other."""

import time
from dataclasses import asdict
from typing import Any

from pipeline.config.sections import METRICS
from pipeline.registry.aliases import standing_of
from pipeline.registry.gate import METRIC_TAG, VAL_TAG, category_scores
from pipeline.registry.lock import LOCKS
from pipeline.registry.parent import PARENT_TAG
from pipeline.registry.register import CHAMPION_TAG
from pipeline.registry.versions import EXPORT_TAG, find_model
from pipeline.tracking.server import every

PAGE = 100
"""Entries of an answer of the server."""


def list_models(client: Any) -> list[dict[str, Any]]:
    """All registered models: name, champion with its AP, challenger, previous, whether pinned, when it changed."""
    models = every(lambda token: client.search_registered_models(max_results=PAGE, page_token=token))
    found = [_summary(client, model) for model in models if not model.name.startswith(LOCKS)]
    return sorted(found, key=lambda model: str(model["name"]))


def show_model(client: Any, name: str) -> dict[str, Any]:
    """One registered model: what `list_models` says, its pin, its versions (newest first) and its last changes.

    Raises:
        UserError: there is no such model.
    """
    model = find_model(client, name)
    standing = standing_of(model)
    named = f"name='{name}'"
    found = every(lambda token: client.search_model_versions(named, max_results=PAGE, page_token=token))
    versions = sorted(found, key=lambda version: -int(version.version))
    by_version: dict[str, list[str]] = {}
    for alias, number in dict(model.aliases or {}).items():
        by_version.setdefault(str(number), []).append(alias)
    return {
        **_summary(client, model),
        "pin": standing.pin,
        "versions": [describe(version, sorted(by_version.get(str(version.version), []))) for version in versions],
        "changes": [asdict(change) for change in standing.changes],
    }


def describe(version: Any, aliases: list[str] | None = None) -> dict[str, Any]:
    """A version: its metrics, and what it was made of, by whom and from what."""
    tags = version.tags
    return {
        "name": version.name,
        "version": int(version.version),
        "aliases": aliases if aliases is not None else list(version.aliases or []),
        "metrics": {name: float(tags[METRIC_TAG + name]) for name in METRICS if METRIC_TAG + name in tags},
        "category_AP": category_scores(tags),
        "step": tags.get("raydetr.step"),
        "parent": tags.get(PARENT_TAG),
        "run_id": version.run_id,
        "data_digest": tags.get("raydetr.data_digest"),
        "val_digest": tags.get(VAL_TAG),
        "code": {name: tags.get(f"raydetr.{name}") for name in ("version", "git_commit", "git_dirty")},
        "exports": {key.removeprefix(EXPORT_TAG): tags[key] for key in sorted(tags) if key.startswith(EXPORT_TAG)},
        "note": tags.get(CHAMPION_TAG),
        "created": _date(version.creation_timestamp),
    }


def compare(first: Any, second: Any) -> dict[str, Any]:
    """Two versions beside each other, with how much the second is above the first by number and by category."""
    sides = [describe(first), describe(second)]

    def differences(key: str) -> dict[str, dict[str, float | None]]:
        one, other = (side[key] or {} for side in sides)
        return {
            name: {
                "first": one.get(name),
                "second": other.get(name),
                "difference": other[name] - one[name] if min(one.get(name, -1), other.get(name, -1)) >= 0 else None,
            }
            for name in dict.fromkeys((*one, *other))
        }

    return {
        "first": sides[0],
        "second": sides[1],
        "same_validation_split": sides[0]["val_digest"] == sides[1]["val_digest"],
        "metrics": differences("metrics"),
        "category_AP": differences("category_AP"),
    }


def _summary(client: Any, model: Any) -> dict[str, Any]:
    standing = standing_of(model)
    champion = client.get_model_version(model.name, standing.champion) if standing.champion else None
    value = champion.tags.get(f"{METRIC_TAG}AP") if champion else None
    return {
        "name": model.name,
        **{alias: int(number) for alias, number in standing.aliases.items()},
        "AP": float(value) if value is not None else None,
        "pinned": standing.pin is not None,
        "changed": _date(model.last_updated_timestamp),
    }


def _date(milliseconds: int) -> str:
    return time.strftime("%F %T", time.gmtime(milliseconds / 1000))
