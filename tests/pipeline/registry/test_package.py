"""What a version of a registered model carries."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.registry.package import REQUIREMENTS, SERVED, requirements
from pipeline.registry.register import Registration
from pipeline.tracking.tracker import Tracker
from tests.pipeline.registry.registered import LABELS, files_of

PROJECT = Path(__file__).resolve().parents[3]
OWN = ("model", "pipeline")
ENTRY = "pipeline/predict/answers.py"


def imports(node: ast.AST, *, later: bool = False) -> Iterator[tuple[str, bool]]:
    """The modules, and names in modules, that are imported below a node, and whether only when a function is called.

    What type checkers alone see is left out.
    """
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            yield from imports(ast.Module(child.orelse, []), later=later)
            continue
        if isinstance(child, ast.Import):
            yield from ((alias.name, later) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from ((f"{child.module}.{alias.name}", later) for alias in child.names)
        function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from imports(child, later=later or function)


def file_of(name: str) -> str | None:
    """The file of this project that importing a module, or a name of one, reads."""
    while name.split(".")[0] in OWN:
        path = name.replace(".", "/")
        for file in (f"{path}.py", f"{path}/__init__.py"):
            if (PROJECT / file).is_file():
                return file
        name = name.rpartition(".")[0]
    return None


def imports_of(file: str) -> list[tuple[str, bool]]:
    return list(imports(ast.parse((PROJECT / file).read_text(encoding="utf-8"))))


def test_served_is_all_that_the_answers_import() -> None:
    found, waiting = set(), [ENTRY]
    while waiting:
        file = waiting.pop()
        found.add(file)
        named = {file_of(name) for name, _ in imports_of(file)}
        waiting += [other for other in named if other and other.startswith("pipeline/") and other not in found]
    assert sorted(SERVED) == sorted(file.removeprefix("pipeline/") for file in found)


@pytest.mark.parametrize(
    "file",
    [
        *(f"pipeline/{name}" for name in SERVED),
        *sorted(path.relative_to(PROJECT).as_posix() for path in (PROJECT / "model").rglob("*.py")),
    ],
)
def test_nothing_that_answers_is_imported_later(file: str) -> None:
    """When a registered model answers, `model` and `pipeline` are other packages again."""
    found = imports_of(file)
    assert not [name for name, later in found if later and name.split(".")[0] in OWN]
    if file != "model/__init__.py":  # which imports when it is asked for a name: so nothing keeps it to ask it later
        assert not [name for name, later in found if later and name.split(".")[0] == "importlib"]
        assert not [name for name, _ in found if name in OWN]


def test_what_it_carries(tracker: Tracker, version: Registration, tmp_path: Path) -> None:
    from mlflow.models import Model

    folder = files_of(tracker, version, tmp_path)
    suffixes = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert suffixes <= {"", ".py", ".json", ".txt", ".yaml", ".safetensors"}
    assert {path.name for path in (folder / "code" / "raydetr").iterdir()} == {"model", "pipeline"}
    card = Model.load(folder)
    assert card.metadata["label_map"] == LABELS.to_json()
    assert card.metadata["config"]["train"] == {"lr": 0.1}
    assert (card.metadata["data_digest"], card.metadata["val_digest"]) == ("0123456789abcdef", "val")
    assert (card.metadata["metrics"]["AP"], card.metadata["source_run"]) == (0.5, tracker.run_id)
    assert str(card.signature.inputs) == "['image': Any (required)]"
    assert str(card.signature.params) == "['score_threshold': double (default: 0.4)]"
    assert card.signature.outputs.input_names() == ["detections", "error"]
    assert card.saved_input_example_info is not None
    assert (folder / "requirements.txt").read_text().split() == requirements()


def test_its_code_is_what_answers_and_no_more(tracker: Tracker, version: Registration, tmp_path: Path) -> None:
    code = files_of(tracker, version, tmp_path) / "code" / "raydetr"
    sizes = {path.relative_to(code / "pipeline"): path.stat().st_size for path in (code / "pipeline").rglob("*.*")}
    assert {path.as_posix() for path, size in sizes.items() if size} == set(SERVED)
    assert {path.name for path, size in sizes.items() if not size} == {"__init__.py"}
    copied = {path.relative_to(code): path.read_bytes() for path in code.rglob("*.*")}
    assert not [path for path, content in copied.items() if content and content != (PROJECT / path).read_bytes()]


def test_metrics_are_those_of_the_logged_model(tracker: Tracker, version: Registration) -> None:
    made = tracker.client.get_model_version("shown", "1")
    logged = tracker.client.get_logged_model(made.source.removeprefix("models:/"))
    assert {metric.key: metric.value for metric in logged.metrics}["AP"] == 0.5


def test_requirements_are_pinned() -> None:
    assert [line.split("==")[0] for line in requirements()] == list(REQUIREMENTS)
    assert not any("+" in line for line in requirements())
