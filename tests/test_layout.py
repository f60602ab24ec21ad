"""The walls of the house: who may import what."""

import ast
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
SOURCES = sorted(path for package in ("model", "pipeline", "jobs") for path in (PROJECT / package).rglob("*.py"))

LAYERS = {"model": 0, "pipeline": 1, "jobs": 2}
STEPS = {"shard", "train", "evaluate", "register"}
MODEL_MAY_IMPORT = {"torch", "numpy", "scipy", "safetensors", "model"}
VENDORS = {
    "deepspeed": {"pipeline/train/loop.py", "pipeline/checkpoint/save.py"},
    "mlflow": {"pipeline/tracking/tracker.py", "pipeline/registry/register.py", "pipeline/predict/detector.py"},
    "webdataset": {"pipeline/shard/write.py", "pipeline/data/loader.py"},
    "pycocotools": {"pipeline/shard/coco.py", "pipeline/evaluate/score.py"},
}
BUILDERS_OF_MODELS = {"pipeline/train/loop.py", "pipeline/evaluate/score.py", "pipeline/predict/detector.py"}


def imported_modules(path: Path) -> set[str]:
    """Full names of all modules that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def relative(path: Path) -> str:
    return path.relative_to(PROJECT).as_posix()


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_imports_go_downward(path: Path) -> None:
    own = LAYERS[relative(path).split("/")[0]]
    upward = {name for name in imported_modules(path) if LAYERS.get(name.split(".")[0], -1) > own}
    assert not upward


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_vendors_are_fenced(path: Path) -> None:
    roots = {name.split(".")[0] for name in imported_modules(path)}
    outside = {vendor for vendor, files in VENDORS.items() if vendor in roots and relative(path) not in files}
    assert not outside
    if "ray" in roots:
        assert relative(path).startswith("jobs/")
    if relative(path).startswith("model/"):
        import sys

        assert roots - MODEL_MAY_IMPORT <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", [p for p in SOURCES if p.parent.name == "jobs"], ids=relative)
def test_steps_do_not_import_each_other(path: Path) -> None:
    jobs = {name.split(".")[1] for name in imported_modules(path) if name.startswith("jobs.")}
    if path.stem in STEPS:
        assert jobs <= {"cluster"}
    if path.stem == "cluster":
        assert not jobs


@pytest.mark.parametrize("path", [p for p in SOURCES if relative(p).startswith("pipeline/")], ids=relative)
def test_few_build_models(path: Path) -> None:
    builds = any(name.endswith("build_model") for name in imported_modules(path))
    assert not builds or relative(path) in BUILDERS_OF_MODELS


def test_only_weights_touches_files_in_model() -> None:
    for path in SOURCES:
        if relative(path).startswith("model/") and path.parent.name != "weights":
            called = {
                node.func.id
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            }
            assert "open" not in called, path
            assert not {"pathlib", "safetensors"} & {name.split(".")[0] for name in imported_modules(path)}, path
