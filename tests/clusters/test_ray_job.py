"""Jobs as the runbook gives them, its commands read from there, against a head that was started from a plain shell."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from model import ops
from pipeline.config.load import dump_config, load_config
from tests.end_to_end.test_pipeline import PROJECT, SMALL
from tests.heads import RayHead, ray_head

BIN = Path(sys.executable).parent
RUNBOOK = (PROJECT / "infra" / "README.md").read_text().partition("## As a Ray job")[2].partition("\n## ")[0]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHead]:
    with ray_head(tmp_path_factory.mktemp("head"), path="/usr/bin:/bin") as head:
        yield head


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A folder of the sources, with a configuration of one's own in it."""
    folder = tmp_path / "sources"
    for name in ("jobs", "model", "pipeline"):
        shutil.copytree(PROJECT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    settings = {
        **SMALL,
        "dataset.root": folder / "shapes",
        "train.epochs": 1,
        # Every training worker refuses where it does not find the compiled operator.
        "cluster.require_compiled": ops.compiled(),
    }
    config = load_config(PROJECT / "jobs/configs/demo.yaml", [f"{key}={value}" for key, value in settings.items()])
    (folder / "my.yaml").write_text(yaml.safe_dump(dump_config(config)))
    return folder


def given(head: RayHead, sources: Path, beginning: str) -> subprocess.CompletedProcess[str]:
    """A command of the runbook in a plain shell, with the names of this cluster in place of its examples."""
    (line,) = re.findall(rf"^    ({re.escape(beginning)} .+)", RUNBOOK, re.MULTILINE)
    line = line.replace("http://host-0:8265", head.address).replace("/shared/", f"{sources}/")
    line = re.sub(r"(?<!\S)(/opt/raydetr/)?\.venv/bin/", f"{BIN}/", line)
    environment = {**head.environment, "PYTHONPATH": str(PROJECT)}
    return subprocess.run(
        ["bash", "-c", line], cwd=sources, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_a_plain_job_of_the_runbook_finishes(head: RayHead, sources: Path) -> None:
    head.submit("true")  # it answers
    result = given(head, sources, ".venv/bin/ray job submit")
    assert result.returncode == 0, result.stdout + result.stderr
    assert (sources / "runs" / "demo" / "evaluate" / "metrics.json").is_file()
    assert "raydetr-demo" in result.stdout


def test_raydetr_submit_of_the_runbook_finishes(head: RayHead, sources: Path) -> None:
    head.submit("true")
    result = given(head, sources, ".venv/bin/raydetr submit")
    assert result.returncode == 0, result.stdout + result.stderr
    assert (sources / "runs" / "demo" / "evaluate" / "metrics.json").is_file()
    assert "raydetr-demo-1: SUCCEEDED" in result.stderr


@pytest.mark.skipif(not ops.compiled(), reason="the operator is not compiled here")
def test_the_compiled_operator_serves_the_packages_of_the_job(head: RayHead) -> None:
    result = head.submit(sys.executable, "-m", "tests.clusters.operator_of_worker")
    assert result.returncode == 0, result.stdout + result.stderr
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("{"))
    worker = json.loads(line)
    assert worker["process"] != worker["driver"]
    assert worker["compiled"]
    # The packages are the upload's, which carries no extension; that one is the installed one.
    assert "working_dir_files" in worker["model"]
    assert "working_dir_files" not in worker["extension"]
    assert worker["carried"] == []
