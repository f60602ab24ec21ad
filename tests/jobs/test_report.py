"""`raydetr report`: of a run, of a file, of two runs, and what it refuses."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jobs.cli import app
from jobs.report import report, report_comparison, report_files
from pipeline.errors import UserError
from pipeline.store import StorePath
from tests.builders import write_coco
from tests.pipeline.evaluate.evaluations import FOUND, OBJECTS, PERFECT, make_split, write_evaluation


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """The folder of two evaluated runs."""
    split = make_split(tmp_path)
    for name, detections in (("a", FOUND), ("b", PERFECT)):
        write_evaluation(tmp_path / "runs" / name / "evaluate", split, detections, name=name)
    return tmp_path / "runs"


def test_beside_the_evaluation_or_elsewhere(runs: Path, tmp_path: Path) -> None:
    assert report(runs / "a", None) == runs / "a" / "evaluate" / "report.html"
    assert report(runs / "a" / "evaluate", tmp_path / "new" / "page.html") == tmp_path / "new" / "page.html"
    assert (tmp_path / "new" / "page.html").read_bytes() == (runs / "a" / "evaluate" / "report.html").read_bytes()


def test_folders_and_configurations_are_compared(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text(f"name: b\nruns: {runs}\n")
    report_comparison(runs / "a", tmp_path / "b.yaml", tmp_path / "page.html")
    assert "<title>b, step 10 against a, step 10</title>" in (tmp_path / "page.html").read_text()


def test_of_a_run_in_a_store(runs: Path, s3_folder: StorePath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("metrics.json", "detections.json", "report.json"):
        (s3_folder / "a" / "evaluate" / name).upload(runs / "a" / "evaluate" / name)
    (tmp_path / "a.yaml").write_text(f"name: a\nruns: {s3_folder}\ntracking: {{uri: 'http://127.0.0.1:1'}}\n")
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["report", "-c", "a.yaml"])
    assert result.exit_code == 0, result.output
    report(runs / "a", None)
    assert (tmp_path / "report.html").read_bytes() == (runs / "a" / "evaluate" / "report.html").read_bytes()
    report_comparison(tmp_path / "a.yaml", runs / "b", tmp_path / "page.html")
    assert "<title>b, step 10 against a, step 10</title>" in (tmp_path / "page.html").read_text()


def test_a_file_of_detections(tmp_path: Path) -> None:
    files = write_coco(tmp_path, range(1, 8), OBJECTS)
    (tmp_path / "mine.json").write_text(json.dumps(FOUND))
    report_files(files.annotations, tmp_path / "mine.json", files.images, tmp_path / "page.html")
    assert "<title>mine</title>" in (tmp_path / "page.html").read_text()


def test_a_page_that_cannot_be_written(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file: cannot be made a folder \(File exists\); give another --out"):
        report(runs / "a", tmp_path / "file" / "page.html")


class TestCommand:
    def test_of_a_configuration(self, runs: Path, tmp_path: Path) -> None:
        (tmp_path / "a.yaml").write_text(f"name: a\nruns: {runs}\n")
        result = CliRunner().invoke(app, ["report", "-c", str(tmp_path / "a.yaml")], catch_exceptions=False)
        assert result.output == f"{runs / 'a' / 'evaluate' / 'report.html'}: open it in a browser\n"

    def test_of_two(self, runs: Path, tmp_path: Path) -> None:
        words = ["report", "--compare", str(runs / "a"), str(runs / "b"), "--out", str(tmp_path / "page.html")]
        assert CliRunner().invoke(app, words, catch_exceptions=False).exit_code == 0
        assert (tmp_path / "page.html").is_file()

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ([], "give one of: a folder, -c, --annotations and --detections, --compare"),
            (["runs/a", "--compare", "runs/a", "runs/b"], "give one of"),
            (["--annotations", "a.json"], "takes --annotations, --detections, and --images"),
            (["runs/a", "--images", "pictures"], "takes --annotations, --detections, and --images"),
            (["runs/a", "--set", "name=b"], "--set changes a configuration: give one with -c"),
            (["nowhere"], "nowhere: no metrics.json here or in evaluate below it; `raydetr evaluate` first"),
        ],
        ids=["nothing", "two things", "half of the files", "images alone", "set", "no run"],
    )
    def test_what_it_refuses(self, words: list[str], message: str) -> None:
        result = CliRunner().invoke(app, ["report", *words])
        assert isinstance(result.exception, UserError)
        assert message in str(result.exception)
