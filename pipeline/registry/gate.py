"""Whether a new version becomes the champion: the gates of `register.gate`, a pin, and the metric."""

import json
import math
from collections.abc import Mapping
from typing import Any

from pipeline.config.sections import GateSection
from pipeline.registry.aliases import Standing

METRIC_TAG = "raydetr.metric."
"""Begin of the tags of a version with its metrics."""
CATEGORY_TAG = "raydetr.category_AP."
"""Begin of the tags of a version with the AP of each category, as JSON in pieces."""
VAL_TAG = "raydetr.val_digest"
"""Tag with the digest of the validation split that a version was scored on."""
TINY = 1e-9
"""Differences of decimal numbers are not exact: 0.6 - 0.5 is less than 0.1."""
PIECE = 4000
"""Characters of a piece; MLflow's databases hold 5000 in a tag, other servers less of them."""


def category_tags(by_category: Mapping[str, float]) -> dict[str, str]:
    """The tags that hold the AP of each category."""
    text = json.dumps(dict(by_category))
    return {f"{CATEGORY_TAG}{start // PIECE}": text[start : start + PIECE] for start in range(0, len(text), PIECE)}


def category_scores(tags: Mapping[str, str]) -> dict[str, float] | None:
    """The AP of each category that the tags of a version hold; None where they do not."""
    numbers = sorted(int(key.removeprefix(CATEGORY_TAG)) for key in tags if key.startswith(CATEGORY_TAG))
    try:
        return dict(json.loads("".join(tags[f"{CATEGORY_TAG}{number}"] for number in numbers)))
    except ValueError:
        return None


def decide(
    champion: Any | None, now: Standing, metadata: Mapping[str, Any], metric: str, gate: GateSection
) -> tuple[bool, str]:
    """Whether `@champion` moves to a new version, and why or why not.

    Args:
        champion: MLflow's version that is the champion, or None.
        now: what the aliases are, and whether the champion is pinned.
        metadata: of the new version; its "metrics", "baseline", "category_AP" and "val_digest" count.
        metric: name of the metric that decides.
        gate: what a champion has to reach.
    """
    new = float(metadata["metrics"][metric])
    if new < 0:
        return False, f"no champion: there is no object on the validation split that {metric} could be of"
    stays = f"@champion stays version {champion.version}" if champion is not None else "no champion"
    if gate.minimum is not None and not new >= gate.minimum:
        return False, f"{stays}: {metric} {new:.4f} is below register.gate.minimum {gate.minimum:g}"
    constant = metadata.get("baseline", {}).get(metric, -1.0)
    if gate.baseline and new <= constant:
        return False, (
            f"{stays}: {metric} {new:.4f} is no better than the {constant:.4f} of one constant box a category for "
            "every image (register.gate.baseline)"
        )
    if now.pin is not None:
        return False, f"{stays}: {pin_told(now.pin)}; `raydetr models unpin` lets it move"
    if champion is None:
        return True, "the first champion"
    if champion.tags.get(VAL_TAG) != metadata["val_digest"]:
        return False, (
            f"{stays}: it was scored on another validation split, so the two cannot be compared; score both on one "
            "split, or move it with `raydetr models promote`"
        )
    try:
        old = float(champion.tags[f"{METRIC_TAG}{metric}"])
    except (KeyError, ValueError):
        return False, f"{stays}: its tags do not give its {metric}"
    if not (math.isfinite(new) and new > old):
        return False, f"{stays}: {metric} {new:.4f} is not better than its {old:.4f}"
    if new - old < gate.margin - TINY:
        return (
            False,
            f"{stays}: {metric} {new:.4f} is not register.gate.margin {gate.margin:g} above its {old:.4f}",
        )
    if gate.category_drop is not None:
        why = _dropped(category_scores(champion.tags), metadata.get("category_AP", {}), gate.category_drop)
        if why is not None:
            return False, f"{stays}: {why}"
    return True, f"{metric} {new:.4f} is better than {old:.4f} of version {champion.version}"


def pin_told(pin: Mapping[str, str]) -> str:
    """Who pinned a champion, when and why, for people."""
    reason = f": {pin['why']}" if pin["why"] else ""
    return f"it is pinned (by {pin['who']} on {pin['when']}{reason})"


def _dropped(before: Mapping[str, float] | None, after: Mapping[str, float], most: float) -> str | None:
    """The category whose AP falls most, where that is by more than `most`; None where none does."""
    if before is None:
        return "its tags do not give its AP by category, which register.gate.category_drop is about"
    drops = {name: value - max(0.0, after.get(name, 0.0)) for name, value in before.items() if value >= 0}
    worst = max(drops, key=lambda name: drops[name], default=None)
    if worst is None or not drops[worst] > most + TINY:
        return None
    return (
        f"AP of {worst} falls from {before[worst]:.4f} to {after.get(worst, 0.0):.4f}, by more than "
        f"register.gate.category_drop {most:g}"
    )
