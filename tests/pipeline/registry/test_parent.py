"""The version that a run begins with: resolved and downloaded once."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.checkpoint.state import load_model_weights
from pipeline.config.sections import RegisterSection
from pipeline.errors import UserError
from pipeline.registry.catalogue import describe
from pipeline.registry.parent import fetch_parent, read_parent
from pipeline.registry.register import Registration, register
from pipeline.run_folder import WEIGHTS
from pipeline.tracking.tracker import Tracker
from tests.builders import write_checkpoint
from tests.pipeline.registry.registered import LABELS, SECTION, make_metrics, register_some


@pytest.fixture(scope="module")
def own_tracker(mlflow_uri: str, tmp_path_factory: pytest.TempPathFactory) -> Tracker:
    """A run beside the one of `version`."""
    return Tracker(mlflow_uri, "registry", "parents", tmp_path_factory.mktemp("run") / "mlflow.json")


def test_an_alias_becomes_weights_and_a_version(
    tracker: Tracker, version: Registration, checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run" / "parent"
    assert read_parent(folder) is None
    fetch_parent("models:/shown@champion", tracker.uri, folder)
    assert read_parent(folder) == "models:/shown/1"
    found, wanted = load_file(folder / WEIGHTS), load_model_weights(checkpoint)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())
    assert [path.name for path in folder.parent.iterdir()] == ["parent"]


def test_a_run_keeps_what_it_began_with(own_tracker: Tracker, tmp_path: Path) -> None:
    for step, value in ((5, 0.4), (6, 0.5)):
        register_some(own_tracker, write_checkpoint(tmp_path, LABELS, step, seed=step), "moved", value)
        fetch_parent("models:/moved@champion", own_tracker.uri, tmp_path / "parent")
        assert read_parent(tmp_path / "parent") == "models:/moved/1"
    fetch_parent("models:/moved@champion", "sqlite:////none.db", tmp_path / "parent")  # nobody is asked
    fetch_parent("models:/moved/2", own_tracker.uri, tmp_path / "parent")
    assert read_parent(tmp_path / "parent") == "models:/moved/2"
    weights = load_file(tmp_path / "parent" / WEIGHTS)["query_embed.weight"]
    assert torch.equal(weights, load_model_weights(tmp_path / "checkpoint-6")["query_embed.weight"])


@pytest.mark.parametrize(
    ("reference", "uri", "message"),
    [
        pytest.param("shown@none", None, r"shown has no alias @none; its versions are 1", id="alias"),
        pytest.param("shown/7", None, r"shown has no version 7", id="version"),
        pytest.param("none/1", None, r"there is no registered model `none`.*tracking\.uri names another", id="model"),
        pytest.param("shown", None, r"shown names no version: it must be NAME@ALIAS", id="no version"),
        pytest.param("a/1", "sqlite:////none.db", r"there is no registry at .*tracking\.uri names another", id="none"),
        pytest.param("a/1", "http://127.0.0.1:9", r"the registry at http://127\.0\.0\.1:9 is away", id="away"),
    ],
)
def test_what_is_not_there_is_one_error(
    reference: str, uri: str | None, message: str, tracker: Tracker, version: Registration, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=rf"^train\.init\.weights: {message}"):
        fetch_parent(f"models:/{reference}", uri or tracker.uri, tmp_path / "parent")
    assert not list(tmp_path.iterdir())


def test_a_version_names_its_parent(own_tracker: Tracker, checkpoint: Path) -> None:
    section = RegisterSection(model_name="heir")
    made = register(own_tracker, checkpoint, make_metrics(0.5), "val", section, SECTION, {}, "models:/shown/1")
    assert made is not None
    found = own_tracker.client.get_model_version("heir", str(made.version))
    assert found.tags["raydetr.parent"] == describe(found)["parent"] == "models:/shown/1"
    other = register_some(own_tracker, checkpoint, "orphan")
    assert describe(own_tracker.client.get_model_version("orphan", str(other.version)))["parent"] is None
