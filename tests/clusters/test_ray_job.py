"""A plain `ray job submit` of the source tree against a head on this machine."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from model import ops
from tests.end_to_end.test_pipeline import SMALL
from tests.heads import RayHead, ray_head


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHead]:
    with ray_head(tmp_path_factory.mktemp("head")) as head:
        yield head


def test_a_submitted_job_finishes(head: RayHead, tmp_path: Path) -> None:
    settings = {**SMALL, "runs": tmp_path / "runs", "dataset.root": tmp_path / "shapes", "train.epochs": 1}
    # Every training worker refuses where it does not find the compiled operator.
    settings["cluster.require_compiled"] = ops.compiled()
    overrides = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    result = head.submit("python", "-m", "jobs", "run", "-c", "jobs/configs/demo.yaml", *overrides)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "runs" / "demo" / "evaluate" / "metrics.json").is_file()
    assert "raydetr-demo" in result.stdout


@pytest.mark.skipif(not ops.compiled(), reason="the operator is not compiled here")
def test_the_compiled_operator_serves_the_packages_of_the_job(head: RayHead) -> None:
    result = head.submit("python", "-m", "tests.clusters.operator_of_worker")
    assert result.returncode == 0, result.stdout + result.stderr
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("{"))
    worker = json.loads(line)
    assert worker["process"] != worker["driver"]
    assert worker["compiled"]
    # The packages are the upload's, which carries no extension; that one is the installed one.
    assert "working_dir_files" in worker["model"]
    assert "working_dir_files" not in worker["extension"]
    assert worker["carried"] == []
