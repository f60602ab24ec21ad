"""jobs/interpreter.py: the line takes the interpreter that Ray's processes name, and quotes what it is given."""

import os
import subprocess
import sys

import pytest
from ray._common.utils import load_class

from jobs.interpreter import HOOK, VARIABLE, entry_point


def shell(line: str, **variables: str) -> str:
    return subprocess.run(["/bin/sh", "-c", line], env=variables, capture_output=True, text=True, check=True).stdout


def test_the_named_interpreter_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "")
    load_class(HOOK)()  # as Ray calls it
    named = os.environ[VARIABLE]
    assert named == sys.executable
    assert shell(entry_point("-c", "import sys; print(sys.executable)"), RAYDETR_PYTHON=named) == f"{named}\n"


def test_without_a_name_it_is_the_paths() -> None:
    assert shell(entry_point("-c", "print(1)"), PATH="/usr/bin:/bin") == "1\n"


@pytest.mark.parametrize("text", ["a b", "$(id)", "'; id; '", "`id`", '"', "*"])
def test_words_stay_words(text: str) -> None:
    line = entry_point("-c", "import sys; print(sys.argv[1:])", text)
    assert shell(line, RAYDETR_PYTHON=sys.executable) == f"{[text]}\n"
