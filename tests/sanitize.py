"""The CPU operator under AddressSanitizer and UndefinedBehaviorSanitizer: `make sanitize`, on Linux with g++.

Builds `_raydetr` with both in a temporary folder and runs tests/model/ops/test_kernels.py with it, once for each
instruction set of this processor. The first read or write outside of its memory, or overflow, ends it with a report
and exit code 1.
"""

import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from torch.utils import cpp_extension

PROJECT = Path(__file__).resolve().parents[1]
CXX = os.environ.get("CXX", "g++")
SANITIZERS = [
    # A NaN that is converted to an integer is not in `undefined`.
    "-fsanitize=address,undefined,float-cast-overflow",
    "-fno-sanitize-recover=all",
    "-D_GLIBCXX_ASSERTIONS",
]
FLAGS = ["-O1", "-g", "-fno-omit-frame-pointer", "-fPIC", "-std=c++17", "-Wno-psabi"]
MACROS = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
INSTRUCTION_SETS = ("default", "avx2", "avx512")
TESTS = "tests/model/ops/test_kernels.py"
# For every instruction set, as is done here.
STARTS_PYTEST = f"{TESTS}::TestGradients::test_every_instruction_set"

# Imports the instrumented module before pytest can find the one that lies in the project's folder.
RUN = """
import sys, torch, _raydetr
assert _raydetr.__file__ == sys.argv[1], _raydetr.__file__
if _raydetr.cpu != sys.argv[2]:
    sys.exit(77)
import pytest
sys.exit(pytest.main(sys.argv[3:]))
"""
LACKS_IT = 77


def build(folder: Path) -> Path:
    """The instrumented module, made of the sources that need no CUDA."""
    module = folder / "_raydetr.so"
    includes = [f"-isystem{path}" for path in (*cpp_extension.include_paths(), sysconfig.get_path("include"))]
    libraries = [part for path in cpp_extension.library_paths() for part in (f"-L{path}", f"-Wl,-rpath,{path}")]
    objects = []
    for source in (*(PROJECT / "csrc").glob("*.cpp"), *(PROJECT / "csrc" / "cpu").glob("*.cpp")):
        objects.append(folder / f"{source.parent.name}_{source.stem}.o")
        _call(CXX, *FLAGS, *SANITIZERS, *MACROS, *includes, "-c", source, "-o", objects[-1])
    _call(CXX, "-shared", *SANITIZERS, *objects, *libraries, "-ltorch_cpu", "-ltorch", "-lc10", "-o", module)
    return module


def run_tests(module: Path, instruction_set: str) -> int:
    """The exit code of pytest, or LACKS_IT where this processor has no such instructions."""
    runtimes = [_call(CXX, f"-print-file-name={name}").strip() for name in ("libasan.so", "libubsan.so")]
    environment = {
        **os.environ,
        # The interpreter was not built with them, so they have to be there before it.
        "LD_PRELOAD": " ".join(runtimes),
        # Python and torch keep memory until they end: those would be the leaks that are found.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "RAYDETR_CPU": instruction_set,
        "PYTHONPATH": f"{module.parent}{os.pathsep}{PROJECT}",
    }
    # A report ends the process, and what pytest has captured is lost with it.
    pytest = ["--capture=no", "-p", "no:cacheprovider", "-o", "addopts=-q", "--deselect", STARTS_PYTEST, TESTS]
    pytest += ["-k", "not emulated and not TestOrderOfQueries"]  # not instrumented
    command = [sys.executable, "-P", "-c", RUN, str(module), instruction_set, *pytest]
    return subprocess.run(command, cwd=PROJECT, env=environment, check=False).returncode


def _call(*command: str | Path) -> str:
    return subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        module = build(Path(folder))
        for instruction_set in INSTRUCTION_SETS:
            code = run_tests(module, instruction_set)
            if code == LACKS_IT:
                print(f"sanitize: this processor has no {instruction_set}", flush=True)
            elif code != 0:
                sys.exit(f"sanitize: {instruction_set} failed, exit code {code}")
            else:
                print(f"sanitize: {instruction_set} is clean", flush=True)


if __name__ == "__main__":
    main()
