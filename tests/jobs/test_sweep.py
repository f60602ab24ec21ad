"""`raydetr sweep`, as it is typed."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jobs.cli import app
from jobs.sweep import print_sweep
from pipeline.errors import UserError

ROW = {"trial": "my-sweep-2", "train.lr": 0.00012349, "AP": 0.5, "AP50": None, "epochs": 2.0, "state": "failed"}
RESULT: dict[str, Any] = {"trials": [ROW], "best": "best.yaml", "registered": None, "plot": "p.png", "page": "mlflow"}


def arguments(folder: Path, *more: str) -> list[str]:
    (folder / "my.yaml").write_text(f"{{name: my, runs: {folder}/runs}}")
    return ["sweep", "-c", str(folder / "my.yaml"), *more]


def test_wrong_settings_are_refused_before_anything_begins(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="say how many with --trials"):
        CliRunner().invoke(
            app, arguments(tmp_path, "--over", "train.lr=1,2", "--search", "random"), catch_exceptions=False
        )
    assert not (tmp_path / "runs").exists()


def test_the_table_of_a_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    print_sweep(RESULT)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == list(ROW)
    assert lines[1] == ["my-sweep-2", "0.0001235", "0.5000", "-", "2.0000", "failed"]
    assert lines[3] == ["registered", "refused", "by", "the", "tracking", "server"]


def test_json_is_all_that_is_printed_and_a_failed_trial_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(sweep: object, at_once: int | None) -> dict[str, Any]:
        print("shards")
        return RESULT

    monkeypatch.setattr("jobs.tuning.run_sweep", run)
    result = CliRunner().invoke(app, arguments(tmp_path, "--over", "train.lr=1,2", "--json"))
    assert json.loads(result.stdout) == RESULT
    assert result.exit_code == 1
    assert result.stderr.splitlines() == ["shards", "error: my-sweep-2 failed; the same command tries again"]
