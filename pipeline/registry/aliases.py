"""Which version of a registered model is what, and who decided that, when and why.

    @champion     the version in use
    @challenger   the newest version that did not become the champion
    @previous     the champion before this one

A person who promotes a version or rolls back pins the champion: no registration moves it until it is unpinned. All
changes are made under the registry's lock. Each is a tag of the registered model, written with what it leads to before
any alias moves, so that whoever holds the lock next completes one that was cut.
"""

import json
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pipeline.errors import UserError
from pipeline.registry.lock import registry_lock
from pipeline.tracking.provenance import who

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
ALIASES = (CHAMPION, CHALLENGER, PREVIOUS)
PIN_TAG = "raydetr.pin"
"""Tag of a registered model whose champion is pinned: who did it, when and why."""
CHANGE_TAG = "raydetr.change."
"""Begin of the tags of a registered model with its changes, followed by their number."""
DONE_TAG = "raydetr.changes_done"
"""Tag of a registered model with the number of the last change that was completed."""
MOST_CHANGES = 100
"""Changes that are kept."""
MOST_REASON = 1000
"""Characters that are kept of a reason."""

Action = Literal["register", "promote", "rollback", "pin", "unpin"]


@dataclass(frozen=True)
class Change:
    """What was done to a registered model, and the state that it leads to."""

    number: int
    """From 1 on."""
    action: Action
    """What was done."""
    aliases: dict[str, str]
    """The version of each alias afterwards; one that is missing is none."""
    is_pinned: bool
    """Whether the champion is pinned afterwards."""
    who: str
    """Who did it: user@host."""
    when: str
    """Date and time, UTC."""
    why: str
    """Reason."""


@dataclass(frozen=True)
class Standing:
    """The aliases of a registered model, and its changes."""

    aliases: dict[str, str]
    """The version of each alias of `ALIASES` that there is."""
    pin: dict[str, str] | None
    """Who pinned the champion, when and why; None where it is not pinned."""
    changes: list[Change]
    """Oldest first."""
    done: int
    """Number of the last change that was completed."""

    @property
    def champion(self) -> str | None:
        """The version in use."""
        return self.aliases.get(CHAMPION)


def standing_of(model: Any) -> Standing:
    """The standing that the tags and aliases of MLflow's registered model tell."""
    tags: Mapping[str, str] = model.tags or {}
    aliases = {alias: str(version) for alias, version in dict(model.aliases or {}).items() if alias in ALIASES}
    numbers = sorted(int(key.removeprefix(CHANGE_TAG)) for key in tags if key.startswith(CHANGE_TAG))
    changes = [Change(number, **json.loads(tags[f"{CHANGE_TAG}{number}"])) for number in numbers]
    pin = json.loads(tags[PIN_TAG]) if PIN_TAG in tags else None
    return Standing(aliases, pin, changes, int(tags.get(DONE_TAG, "0")))


def settled(client: Any, name: str) -> Standing:
    """The standing of a model, after a change that was cut is completed. The lock must be held."""
    standing = standing_of(client.get_registered_model(name))
    if standing.changes and standing.changes[-1].number > standing.done:
        return _complete(client, name, standing, standing.changes[-1])
    return standing


def record(
    client: Any, name: str, now: Standing, action: Action, aliases: Mapping[str, str], why: str, *, pins: bool
) -> Standing:
    """Change the aliases of a model. The lock must be held.

    Args:
        client: MLflow's client.
        name: the registered model.
        now: what `settled` gave.
        action: what is done.
        aliases: the version of each alias afterwards.
        why: reason.
        pins: whether the champion is pinned afterwards.
    """
    number = (now.changes[-1].number if now.changes else now.done) + 1
    when = time.strftime("%F %T", time.gmtime())
    change = Change(number, action, dict(aliases), pins, who(), when, why[:MOST_REASON])
    content = {key: value for key, value in asdict(change).items() if key != "number"}
    client.set_registered_model_tag(name, f"{CHANGE_TAG}{number}", json.dumps(content))
    return _complete(client, name, now, change)


def _complete(client: Any, name: str, now: Standing, change: Change) -> Standing:
    for alias in ALIASES:
        before, after = now.aliases.get(alias), change.aliases.get(alias)
        if after is not None and after != before:
            client.set_registered_model_alias(name, alias, after)
        elif after is None and before is not None:
            client.delete_registered_model_alias(name, alias)
    pin = {"who": change.who, "when": change.when, "why": change.why} if change.is_pinned else None
    if pin is None and now.pin is not None:
        client.delete_registered_model_tag(name, PIN_TAG)
    elif pin is not None and (change.action != "register"):
        client.set_registered_model_tag(name, PIN_TAG, json.dumps(pin))
    client.set_registered_model_tag(name, DONE_TAG, str(change.number))
    changes = [each for each in now.changes if each.number != change.number]
    for old in changes[: max(0, len(changes) + 1 - MOST_CHANGES)]:
        client.delete_registered_model_tag(name, f"{CHANGE_TAG}{old.number}")
    return standing_of(client.get_registered_model(name))


def promote(client: Any, name: str, version: str, why: str) -> Standing:
    """Make a version, which must be there, the champion, and pin it."""
    with _locked(client, name) as now:
        aliases = _with_champion(now, version)
        return record(client, name, now, "promote", aliases, why, pins=True)


def roll_back(client: Any, name: str, why: str) -> Standing:
    """Make the champion before this one the champion again, and pin it.

    Raises:
        UserError: there was none.
    """
    with _locked(client, name) as now:
        if PREVIOUS not in now.aliases:
            raise UserError(f"{name}: there is no @previous to go back to; `raydetr models promote` takes any version")
        aliases = _with_champion(now, now.aliases[PREVIOUS])
        return record(client, name, now, "rollback", aliases, why, pins=True)


def pin(client: Any, name: str, why: str) -> Standing:
    """Keep registrations from moving `@champion`.

    Raises:
        UserError: there is no champion.
    """
    with _locked(client, name) as now:
        if now.champion is None:
            raise UserError(f"{name}: there is no @champion to pin; `raydetr models promote` makes a version one")
        return record(client, name, now, "pin", now.aliases, why, pins=True)


def unpin(client: Any, name: str, why: str) -> Standing:
    """Let registrations move `@champion` again.

    Raises:
        UserError: it is not pinned.
    """
    with _locked(client, name) as now:
        if now.pin is None:
            raise UserError(f"{name}: @champion is not pinned")
        return record(client, name, now, "unpin", now.aliases, why, pins=False)


def after_registration(now: Standing, version: str, *, moves: bool) -> dict[str, str]:
    """The aliases when a version has been registered, and whether it becomes the champion is decided."""
    return _with_champion(now, version) if moves else {**now.aliases, CHALLENGER: version}


def _with_champion(now: Standing, version: str) -> dict[str, str]:
    """The aliases with another champion; the one before becomes `@previous`, a challenger that won is none."""
    aliases = {**now.aliases, CHAMPION: version}
    if now.champion is not None and now.champion != version:
        aliases[PREVIOUS] = now.champion
    if aliases.get(CHALLENGER) == version:
        del aliases[CHALLENGER]
    return aliases


@contextmanager
def _locked(client: Any, name: str) -> Iterator[Standing]:
    with registry_lock(client, f"{who()} {uuid.uuid4().hex[:12]}", name):
        yield settled(client, name)
