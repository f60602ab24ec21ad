"""`python -m pipeline.train`, alone and under torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.data.manifest import Manifest
from pipeline.train.__main__ import main
from pipeline.train.run import TrainJob
from tests.pipeline.train.runs import MODEL, SETTINGS, losses, make_job


@pytest.fixture
def config_file(manifest: Manifest, tmp_path: Path) -> Path:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "train").symlink_to(manifest.folder)
    file = tmp_path / "small.yaml"
    sections = {
        "name": "small",
        "runs": str(tmp_path / "runs"),
        "shards": {"out": str(tmp_path / "shards")},
        "model": MODEL,
        "train": json.loads(json.dumps(SETTINGS)),
        "cluster": {"device": "cpu", "workers": 2},
    }
    file.write_text(yaml.safe_dump(sections))
    return file


def test_torchrun_trains_like_one_process(
    config_file: Path, manifest: Manifest, straight: tuple[TrainJob, Path], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "pipeline.train"]
    subprocess.run(
        [*command, "-c", str(config_file), "--set", "train.max_steps=2"],
        check=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    job = make_job(manifest, tmp_path / "runs" / "small")
    expected = {step: loss for step, loss in losses(straight[0].out).items() if step <= 2}
    assert losses(job.out) == pytest.approx(expected, rel=1e-5)


@pytest.mark.usefixtures("restored_logging")
def test_wrong_input_ends_with_2_and_one_line(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-c", str(config_file), "--set", f"shards.out={config_file.parent / 'nowhere'}"]) == 2
    assert main(["-c", str(config_file), "--set", "train.learning_rate=1"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("error: ") for line in lines)
