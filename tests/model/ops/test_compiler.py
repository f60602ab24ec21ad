"""Which C++ compiler the operator is built with."""

import subprocess
import sys

import pytest

from model.ops import compiler as module
from model.ops.compiler import compiler


@pytest.mark.parametrize(
    ("named", "there", "found"),
    [
        pytest.param("", ["g++", "clang++"], "/bin/g++", id="the first usual one"),
        pytest.param("", [], None, id="none"),
        pytest.param("icpx -O2", ["icpx", "g++"], "/bin/icpx", id="CXX with flags"),
        pytest.param("icpx", ["g++"], None, id="CXX that is not there"),
    ],
)
def test_which(monkeypatch: pytest.MonkeyPatch, named: str, there: list[str], found: str | None) -> None:
    monkeypatch.setenv("CXX", named)
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}" if name in there else None)
    assert compiler() == found


def test_its_file_alone_needs_no_torch() -> None:
    program = f"import runpy, sys; runpy.run_path({module.__file__!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
