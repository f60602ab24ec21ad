"""Who works on a folder in a store: one command at a time, wherever it runs.

No clock is compared with another: the holder counts, and who wants the lease watches whether it still does.
"""

import json
import os
import secrets
import socket
import time
from dataclasses import dataclass, replace

from pipeline.errors import UserError
from pipeline.log import get_logger
from pipeline.store import StorePath

RENEW_SECONDS = 5.0
"""Between two counts of the holder."""
LOST_SECONDS = 40.0
"""A holder that has not counted for so long is gone: it may have waited for its store meanwhile."""
LOOK_SECONDS = 1.0
"""Between two looks at another's count."""
SETTLE_SECONDS = 1.0
"""After which one of two that took it at the same moment finds the other's name there."""
READS = 3
"""Of a file that makes no sense: some stores give a mixture of two while one is written over."""

logger = get_logger(__name__)


@dataclass(frozen=True)
class Holder:
    """What the file says."""

    token: str
    """Of the copy of the folder that its holder works on."""
    host: str
    pid: int
    since: str
    count: int = 0
    is_over: bool = False
    """Whether it ended in order."""

    def __str__(self) -> str:
        return f"on {self.host} since {self.since}, process {self.pid}"


class Lease:
    """The right to work on a folder, as a file in its store.

    Args:
        path: the file.
        what: is worked on, for messages.
    """

    def __init__(self, path: StorePath, what: str) -> None:
        self._path, self._what = path, what
        self._own = Holder(secrets.token_hex(8), socket.gethostname(), os.getpid(), time.strftime("%F %T"))
        self._renewed = 0.0

    def take(self, token: str | None, *, wait: bool = False) -> bool:
        """Take it.

        Args:
            token: of the copy that this machine has; no other process of it may work on that copy.
            wait: for a holder who is still there, instead of being refused.

        Returns:
            Whether the copy is the newest: nobody has worked on the folder since with another.

        Raises:
            UserError: another holds it, named by host, process and time.
        """
        before = _read(self._path, self._what)
        is_newest = before is not None and before.token == token
        if before is not None and not is_newest:
            self._wait_until_gone(before, wait)
        if is_newest and token is not None:
            self._own = replace(self._own, token=token)
        self._write(self._own)
        time.sleep(SETTLE_SECONDS)
        self.check()
        return is_newest

    @property
    def token(self) -> str:
        """What the copy that is worked on is known by."""
        return self._own.token

    def renew(self) -> None:
        """Count on, where it is time.

        Raises:
            UserError: another has it by now.
        """
        if time.monotonic() - self._renewed >= RENEW_SECONDS:
            self.check()
            self._own = replace(self._own, count=self._own.count + 1)
            self._write(self._own)

    def check(self) -> None:
        """Raise a UserError where another has it by now."""
        now = _read(self._path, self._what)
        if now is not None and (now.token, now.host, now.pid) != (self._own.token, self._own.host, self._own.pid):
            raise UserError(f"{self._what} is running {now}, which has taken it over: this command ends")

    def give_back(self) -> None:
        """Others may take it at once."""
        self._write(replace(self._own, is_over=True))

    def _wait_until_gone(self, holder: Holder, wait: bool) -> None:
        if not holder.is_over:
            logger.info("%s: looking whether it is still running %s", self._what, holder)
        unchanged = time.monotonic()
        while not holder.is_over and time.monotonic() - unchanged < LOST_SECONDS:
            time.sleep(LOOK_SECONDS)
            now = _read(self._path, self._what)
            if now is None:
                return
            if now != holder and not now.is_over:
                if not wait:
                    mend = "wait for it, stop it, or use another name"
                    raise UserError(f"{self._what} is running already {now}: {mend}")
                unchanged = time.monotonic()
            holder = now

    def _write(self, holder: Holder) -> None:
        self._path.write_bytes(json.dumps(holder.__dict__).encode())
        self._renewed = time.monotonic()


class Watch:
    """Whether somebody holds a lease, seen from elsewhere: its holder has counted since it was looked at.

    Args:
        path: the file.
    """

    def __init__(self, path: StorePath) -> None:
        self._path = path
        self._seen: Holder | None = None
        self._changed = 0.0

    def is_held(self) -> bool:
        """Whether; what has just been seen for the first time counts as held for `LOST_SECONDS`."""
        now = _read(self._path, self._path.name)
        if now != self._seen:
            self._seen, self._changed = now, time.monotonic()
        return now is not None and not now.is_over and time.monotonic() - self._changed < LOST_SECONDS


def _read(path: StorePath, what: str) -> Holder | None:
    for tries_left in reversed(range(READS)):
        try:
            return Holder(**json.loads(path.read_bytes()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            if not tries_left:
                raise UserError(f"{path}: says not who works on {what} ({error}); remove it") from error
            time.sleep(LOOK_SECONDS)
    raise AssertionError
