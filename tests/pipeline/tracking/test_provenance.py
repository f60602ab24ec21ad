"""Who runs a command, and of which code."""

import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from pipeline.tracking import provenance


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e@x", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not here")
def test_the_commit_of_its_own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "pipeline" / "provenance.py"
    source.parent.mkdir()
    source.write_text("")
    monkeypatch.setattr(provenance, "__file__", str(source))
    assert provenance.code_version().keys() == {"version"}
    git(tmp_path, "init", "-q")
    assert provenance.code_version().keys() == {"version"}, "a copy below another repository"
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "one")
    found = provenance.code_version()
    assert (found["git_commit"], found["git_dirty"]) == (git(tmp_path, "rev-parse", "HEAD"), "false")
    source.write_text("changed")
    assert provenance.code_version()["git_dirty"] == "true"


def test_who() -> None:
    assert provenance.who() == f"{provenance.user()}@{socket.gethostname()}"
