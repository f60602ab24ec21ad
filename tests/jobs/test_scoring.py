"""What tasks that score checkpoints go by; tests/jobs/test_beside.py runs them."""

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from jobs.scoring import Scoring
from pipeline.config.sections import EvaluateSection
from pipeline.errors import UserError
from pipeline.run_folder import RunFolder

SCORING = Scoring(RunFolder(Path("runs/a")), EvaluateSection(precision="bf16"), "cpu", 2.5, 0, {}, "fail")


def test_what_is_set_aside() -> None:
    assert SCORING.resources == {"CPU": 2.5}
    assert replace(SCORING, device="cuda", gpus=0.25).resources == {"CPU": 2.5, "GPU": 0.25}
    assert pickle.loads(pickle.dumps(SCORING)) == SCORING


def test_a_task_has_its_threads_and_its_device(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        with SCORING.here(tmp_path) as path:
            assert (path, torch.get_num_threads()) == (tmp_path, 2)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_host_without_the_device_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="torch finds no GPU there to score on"),
        replace(SCORING, device="cuda").here(tmp_path),
    ):
        pass
