"""What the contract of imports (`[tool.importlinter]` in pyproject.toml, proved by `make check`) cannot say."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
PACKAGES = ("model", "pipeline", "jobs")
FILES = sorted(path.relative_to(PROJECT) for package in PACKAGES for path in (PROJECT / package).rglob("*.py"))
FACES = [path for path in FILES if path.name == "__init__.py"]
MODULES = [path for path in FILES if path.name != "__init__.py"]

MODEL_MAY_IMPORT = {"model", "torch", "numpy", "scipy", "safetensors", *sys.stdlib_module_names}
READS_FILES = {"open", "io.open", "os.open", "torch.load", "torch.save"}
LAZY_FACES = (Path("model/__init__.py"), Path("pipeline/data/__init__.py"))
BUILD_NETWORKS = {"pipeline/train/initial.py", "pipeline/predict/detector.py"}
WITHOUT_A_TEST_FILE = {
    "jobs/__main__.py": "test_cli.py runs every command through it",
    "model/heads.py": "layers of detectors, which test_detr.py and test_deformable_detr.py build",
    "model/losses/groups.py": "what the criterion takes: test_criterion.py and test_matcher.py",
    "model/ops/reference.py": "test_operator.py computes it anew, and test_kernels.py compares the kernels with it",
    "model/ops/shapes.py": "test_operator.py, where wrong shapes are refused",
}
"""Modules that are tested in other files, or hold nothing to test."""


def tree(path: Path) -> ast.Module:
    return ast.parse((PROJECT / path).read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[str]:
    """Full names of the modules, and of the names in modules, that a file imports anywhere in it."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def roots(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def of(package: str) -> list[Path]:
    return [path for path in FILES if path.is_relative_to(package)]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_are_absolute(path: Path) -> None:
    assert not [name for name in imports(path) if name.startswith(".")]


@pytest.mark.parametrize("path", of("model"), ids=str)
class TestModel:
    def test_imports_torch_and_little_else(self, path: Path) -> None:
        assert not roots(path) - MODEL_MAY_IMPORT

    def test_files_are_touched_in_weights_alone(self, path: Path) -> None:
        if path.is_relative_to("model/weights"):
            return
        assert not roots(path) & {"pathlib", "safetensors"}
        called = {ast.unparse(node.func) for node in ast.walk(tree(path)) if isinstance(node, ast.Call)}
        assert not called & READS_FILES
        assert not [name for name in called if name.endswith(".open")]


@pytest.mark.parametrize("path", of("pipeline"), ids=str)
def test_few_rooms_build_a_network(path: Path) -> None:
    """Nor by `from model import build_model`, which the contract does not see."""
    names = {name.rpartition(".")[2] for name in imports(path)}
    names |= {node.attr for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute)}
    assert ("build_model" in names) == (path.as_posix() in BUILD_NETWORKS)


@pytest.mark.parametrize("path", FACES, ids=str)
class TestFaces:
    def test_hold_imports_alone(self, path: Path) -> None:
        if path not in LAZY_FACES:
            assert not [ast.unparse(node) for node in tree(path).body if not belongs_in_a_face(node)]

    def test_export_nothing_of_their_own_name(self, path: Path) -> None:
        """`pipeline.train` is the room, never a function in it, whatever was imported first."""
        names = {name for node in tree(path).body for name in exported(node)}
        names |= {name.rpartition(".")[2] for name in imports(path)}
        assert path.parent.name not in names


def belongs_in_a_face(node: ast.stmt) -> bool:
    """Whether it is an import, `__all__` or a docstring."""
    is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return isinstance(node, ast.Import | ast.ImportFrom) or bool(exported(node)) or is_text


def exported(node: ast.stmt) -> list[str]:
    """The names of `__all__`, where a statement gives it."""
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
        return list(ast.literal_eval(node.value))
    return []


class TestFiles:
    @pytest.mark.parametrize("path", MODULES, ids=str)
    def test_every_module_has_one_of_its_name(self, path: Path) -> None:
        expected = PROJECT / "tests" / path.with_name(f"test_{path.stem.strip('_')}.py")
        assert expected.is_file() != (path.as_posix() in WITHOUT_A_TEST_FILE), expected

    def test_those_without_one_are_there(self) -> None:
        assert not WITHOUT_A_TEST_FILE.keys() - {path.as_posix() for path in MODULES}

    def test_make_runs_all(self) -> None:
        halves = re.findall(r"^WITH(?:OUT)?_RAY := (.+)", (PROJECT / "Makefile").read_text(encoding="utf-8"), re.M)
        project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))
        assert sorted(" ".join(halves).split()) == sorted(project["tool"]["pytest"]["ini_options"]["testpaths"])


class TestContract:
    @pytest.mark.parametrize(
        ("file", "statement", "broken"),
        [
            pytest.param("pipeline/errors.py", "import ray", "ray lives in jobs", id="vendor"),
            pytest.param(
                "pipeline/data/order.py",
                "import pipeline.train.optim",
                "each room of pipeline imports only those below it; rooms of one line do not meet",
                id="room above",
            ),
            pytest.param(
                "model/boxes.py",
                "import pipeline.errors",
                "jobs import pipeline, which imports model; never upward",
                id="package above",
            ),
        ],
    )
    def test_can_fail(self, file: str, statement: str, broken: str, tmp_path: Path) -> None:
        for package in PACKAGES:
            shutil.copytree(PROJECT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        shutil.copy(PROJECT / "pyproject.toml", tmp_path)
        with (tmp_path / file).open("a") as module:
            module.write(f"\n{statement}\n")
        command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert result.returncode == 1, result.stdout + result.stderr
        assert re.search(rf"^{re.escape(broken)} *BROKEN$", result.stdout, re.MULTILINE), result.stdout
