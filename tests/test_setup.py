"""What `setup.py` decides to build."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[1] / "setup.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("raydetr_setup", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TestWithCuda:
    @pytest.mark.parametrize(
        ("wanted", "torch_cuda", "nvcc", "built"),
        [
            ("", None, None, False),
            ("", None, "13.0", False),
            ("", "13.0", "13.1", True),
            ("1", "12.8", "12.9", True),
            ("0", "13.0", "13.0", False),
        ],
    )
    def test_decides(
        self, script: ModuleType, wanted: str, torch_cuda: str | None, nvcc: str | None, built: bool
    ) -> None:
        assert script.with_cuda(wanted, torch_cuda, nvcc) is built

    @pytest.mark.parametrize(
        ("torch_cuda", "nvcc", "message"),
        [
            ("13.0", None, "there is no nvcc"),
            ("13.0", "12.8", "nvcc is of CUDA 12.8 and torch is built for 13.0"),
        ],
    )
    def test_what_does_not_fit_is_a_warning_or_an_error(
        self, script: ModuleType, torch_cuda: str | None, nvcc: str | None, message: str
    ) -> None:
        with pytest.warns(UserWarning, match=message):
            assert not script.with_cuda("", torch_cuda, nvcc)
        with pytest.raises(SystemExit, match=message):
            script.with_cuda("1", torch_cuda, nvcc)

    def test_architectures_that_the_compiler_knows(self, script: ModuleType) -> None:
        assert script.architectures("13.0") == "8.0;8.6;8.9;9.0;10.0;12.0+PTX"
        assert script.architectures("12.6") == "8.0;8.6;8.9;9.0+PTX"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("yes", "RAYDETR_CUDA is 'yes': set it to 0 or 1"),
        pytest.param(
            "1",
            "RAYDETR_CUDA=1, but torch is a CPU build",
            marks=pytest.mark.skipif(torch.version.cuda is not None, reason="torch is a CUDA build"),
        ),
    ],
)
def test_one_clear_line(value: str, message: str) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--version"],
        cwd=SCRIPT.parent,
        env={**os.environ, "RAYDETR_CUDA": value},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith(message)
    assert "Traceback" not in done.stderr
