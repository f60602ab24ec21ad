"""A lock among all that register in one MLflow, on whatever host.

MLflow has no compare-and-set: setting a tag or an alias overwrites what is there, and a file lock is not seen by other
hosts. What it does do once for all is to make a registered model of a name: the second one is told that it exists. So
the lock is a registered model without versions, there while it is held. Its holder is a run, which finds its own lock
again after a crash; one that is left for `LEASE` seconds is taken from a run that never came back. That time is
measured by whoever waits, so that the clocks of hosts need not agree.
"""

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipeline.log import get_logger
from pipeline.tracking.server import error_code, server_errors

logger = get_logger(__name__)

LOCKS = "raydetr.lock."
"""Begin of the names of locks."""
LEASE = 300.0
"""Seconds after which a lock is taken from its holder: many times what it does under it."""
POLL = 0.2
"""Seconds between two looks at a lock that another holds."""
OWNER_TAG = "raydetr.owner"


@contextmanager
def registry_lock(client: Any, owner: str, model_name: str) -> Iterator[None]:
    """Hold the lock of a registered model; the same owner may enter again where it was cut.

    Args:
        client: MLflow's client.
        owner: a run's id, or who gives a command and a mark of that command.
        model_name: the registered model.

    Raises:
        Exception: one of `server_errors`; the lock may be held then, and the run that holds it comes back.
    """
    name = f"{LOCKS}{hashlib.sha256(model_name.encode()).hexdigest()[:16]}"
    _acquire(client, name, owner)
    try:
        yield
    finally:
        _unless_gone(lambda: client.delete_registered_model(name))


def _acquire(client: Any, name: str, owner: str) -> None:
    seen, since = None, time.monotonic()
    while True:
        try:
            client.create_registered_model(name, {OWNER_TAG: owner}, "There while a version is registered.")
            return
        except server_errors() as error:
            if error_code(error) not in ("RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST"):
                raise
        holder = _unless_gone(lambda: client.get_registered_model(name))
        if holder is None:
            continue
        if holder.tags.get(OWNER_TAG) == owner:
            return
        if seen != (holder.tags.get(OWNER_TAG), holder.creation_timestamp):
            if seen is None:
                logger.info("waiting for the registry, which is held by %s", holder.tags.get(OWNER_TAG))
            seen, since = (holder.tags.get(OWNER_TAG), holder.creation_timestamp), time.monotonic()
        elif time.monotonic() - since > LEASE:
            _take_away(client, name, holder)
        time.sleep(POLL)


def _take_away(client: Any, name: str, holder: Any) -> None:
    """Remove a lock that was left, but not the one of somebody who was faster: it is put aside, looked at, put back."""
    aside = f"{name}.{holder.creation_timestamp}"
    _unless_gone(lambda: client.rename_registered_model(name, aside))
    found = _unless_gone(lambda: client.get_registered_model(aside))
    if found is None:
        return
    if found.tags.get(OWNER_TAG) != holder.tags.get(OWNER_TAG):
        client.rename_registered_model(aside, name)
    else:
        _unless_gone(lambda: client.delete_registered_model(aside))


def _unless_gone(ask: Any) -> Any:
    """What a request gives, or None where there is no such model."""
    try:
        return ask()
    except server_errors() as error:
        if error_code(error) not in ("RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS"):
            raise
        return None
