"""jobs/inspect.py: the size and cost of a configured network."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from jobs.cli import app
from jobs.inspect import inspect_model
from pipeline.config.load import load_config
from pipeline.errors import UserError
from tests.builders import make_annotation, make_manifest, write_coco

CONFIGS = Path(__file__).resolve().parents[2] / "jobs" / "configs"


def test_a_published_network() -> None:
    found = inspect_model(load_config(CONFIGS / "coco_r50_two_stage.yaml"))
    assert found["network"] == "deformable_detr, resnet50, 91 logits"
    assert (found["parameters"], found["trained"], found["tensors"]) == ("41,181,529", "40,959,129", "630")
    assert found["GFLOPs"] == "175.3 (multiply-adds of one image of 800 x 1101)"


@pytest.mark.parametrize(("name", "queries"), [("coco_r50_12", 300), ("coco_r50_best", 900)])
def test_what_the_successors_cost(name: str, queries: int) -> None:
    """What training alone has counts no operations: there are wider blocks, and more queries in six layers."""
    cells, levels = 100 * 138 + 50 * 69 + 25 * 35 + 13 * 18, 4
    wider = 6 * 2 * 256 * 1024 * (cells + queries)
    projections = 6 * 256**2 + 256 * 3 * 8 * levels * 4 + 2 * 256 * 1024
    heads = 256 * 91 + 2 * 256**2 + 256 * 4
    more = 6 * ((queries - 300) * (projections + heads) + 2 * 256 * (queries**2 - 300**2))
    found = float(inspect_model(load_config(CONFIGS / f"{name}.yaml"))["GFLOPs"].split()[0])
    assert found == pytest.approx(175.3 + (wider + more) / 1e9, abs=0.3)


def test_classes_come_from_the_shards(tmp_path: Path) -> None:
    make_manifest(tmp_path)
    config = load_config(CONFIGS / "demo.yaml", [f"shards.out={tmp_path / 'shards'}"])
    assert inspect_model(config)["network"] == "deformable_detr, resnet_tiny, 3 logits"
    assert inspect_model(config, classes=7)["network"].endswith("7 logits")


def test_without_shards_the_number_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--classes"):
        inspect_model(load_config(CONFIGS / "demo.yaml", [f"shards.out={tmp_path}"]))


def test_the_page_about_the_data_needs_no_shards(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_coco(tmp_path, [1, 2], [make_annotation(1, 1)], split=split)
    overrides = [
        f"dataset.root={tmp_path}",
        "dataset.synthetic=null",
        "dataset.train={annotations: annotations/train.json, images: train}",
        "dataset.val={annotations: annotations/val.json, images: val}",
    ]
    out = tmp_path / "pages" / "data.html"
    words = [part for override in overrides for part in ("--set", override)]
    command = ["inspect", "--data", "--out", str(out), "-c", str(CONFIGS / "demo.yaml"), *words]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{out}: open it in a browser\n"
    assert "<h2>train</h2>" in out.read_text()
    assert "<h2>val</h2>" in out.read_text()
