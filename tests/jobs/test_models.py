"""`raydetr models`: what a person types, on a registry with versions."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jobs.cli import app
from pipeline.errors import UserError
from pipeline.tracking.tracker import Tracker
from tests.builders import write_checkpoint, write_image
from tests.pipeline.registry.registered import LABELS, register_some

COMMANDS = ["list", "show", "compare", "promote", "rollback", "pin", "unpin", "download"]


@pytest.fixture(scope="module")
def uri(mlflow_uri: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A registry where `cells` has two versions; the first is better."""
    folder = tmp_path_factory.mktemp("run")
    tracker = Tracker(mlflow_uri, "models", "run", folder / "mlflow_run.json")
    checkpoint = write_checkpoint(folder, LABELS)
    for value in (0.5, 0.4):
        register_some(tracker, checkpoint, "cells", value)
    return mlflow_uri


def models(uri: str, *arguments: str) -> str:
    result = CliRunner().invoke(app, ["models", *arguments, "--tracking-uri", uri], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command: str) -> None:
    assert f"Example: raydetr models {command}" in CliRunner().invoke(app, ["models", command, "--help"]).output


def test_a_champion_from_promotion_to_rollback(uri: str) -> None:
    assert "cells" in models(uri, "list")
    told = models(uri, "promote", "cells@challenger", "--reason", "new camera")
    assert told == "cells: @champion version 2, @previous version 1; pinned\n"
    shown = models(uri, "show", "cells")
    assert "@champion stays version 2: it is pinned (by" in shown
    assert "new camera" in shown
    assert models(uri, "rollback", "cells") == "cells: @champion version 1, @previous version 2; pinned\n"
    assert models(uri, "unpin", "cells") == "cells: @champion version 1, @previous version 2\n"
    assert models(uri, "pin", "cells").endswith("; pinned\n")
    (listed,) = [model for model in json.loads(models(uri, "list", "--json")) if model["name"] == "cells"]
    assert (listed["champion"], listed["previous"], listed["pinned"]) == (1, 2, True)
    changes = json.loads(models(uri, "show", "cells", "--json"))["changes"]
    assert [change["action"] for change in changes][-4:] == ["promote", "rollback", "unpin", "pin"]


def test_two_beside_each_other(uri: str) -> None:
    table = models(uri, "compare", "cells/1", "cells/2").splitlines()
    assert table[0].split() == ["metric", "cells/1", "cells/2", "difference"]
    assert table[1].split() == ["AP", "0.5000", "0.4000", "-0.1000"]
    assert json.loads(models(uri, "compare", "cells/1", "cells/2", "--json"))["same_validation_split"]


def test_a_download_predicts(uri: str, tmp_path: Path) -> None:
    models(uri, "download", "cells/2", "--out", str(tmp_path / "model"))
    picture = write_image(tmp_path / "a.jpg")
    arguments = ["predict", "-m", str(tmp_path / "model"), "--out", str(tmp_path / "drawn"), str(picture)]
    assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
    assert (tmp_path / "drawn" / "detections.json").is_file()
    with pytest.raises(UserError, match="is there already"):
        models(uri, "download", "cells/1", "--out", str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["promote", "cells/9"], "cells has no version 9; its versions are 1, 2"),
        (["rollback", "cell"], "there is no registered model `cell`"),
        (["compare", "cells@champion", "cells@best"], "cells has no alias @best"),
        (["download", "cells", "--out", "x"], "cells names no version"),
    ],
)
def test_what_is_not_there_is_one_error(uri: str, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        models(uri, *arguments)


def test_the_registry_is_that_of_a_configuration(uri: str, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(f"name: run\ntracking: {{uri: '{uri}'}}\n")
    result = CliRunner().invoke(app, ["models", "list", "-c", str(tmp_path / "my.yaml")], catch_exceptions=False)
    assert "cells" in result.stdout
