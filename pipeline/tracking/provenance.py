"""Who runs a command, where, and of which code: what runs and versions of models tell about themselves."""

import getpass
import importlib.metadata
import socket
import subprocess
from pathlib import Path


def user() -> str:
    """Name of the user; that of the number where the system knows no name."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "unknown"


def who() -> str:
    """The user and the machine, as `user@host`."""
    return f"{user()}@{socket.gethostname()}"


def code_version() -> dict[str, str]:
    """The version of this package, and where its files are git's: "git_commit", and "git_dirty" `true` or `false`."""
    found = {"version": importlib.metadata.version("raydetr")}
    here = Path(__file__).resolve()
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return found  # in a site-packages folder, or a copy, below some other repository
    commit = _git(here.parent, "rev-parse", "HEAD")
    changes = _git(here.parent, "status", "--porcelain", "--untracked-files=no")
    if commit is None or changes is None:
        return found
    return {**found, "git_commit": commit, "git_dirty": str(bool(changes)).lower()}


def _git(folder: Path, *arguments: str) -> str | None:
    """What git says; None where there is no git, or it refuses."""
    try:
        asked = ["git", "-C", str(folder), *arguments]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
