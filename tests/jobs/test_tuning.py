"""Which trials ASHA ends, and how they are told. A whole sweep, which takes minutes, is in tests/clusters."""

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.trials import Sweep
from jobs.tuning import Asha, run_sweep
from pipeline.errors import UserError
from tests.jobs.test_trials import plan, write_record

IMAGES = 24


def ran(sweep: Sweep, asha: Asha, number: int, *scores: float) -> bool:
    """Whether a trial that came to these scores, three epochs apart, was told to stop."""
    trial = SimpleNamespace(trial_id=str(number), config={"trial": number})
    asha.on_trial_add(None, trial)
    for index, score in enumerate(scores, 1):
        result = {"epochs": 3.0 * index, "score": score, "checkpoint": f"checkpoint-{index}", "is_last": index == 4}
        assert asha.on_trial_result(None, trial, result) == "CONTINUE"
    return sweep.trials[number - 1].config.folder.pruned.exists()


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    settings = ("train.epochs=12", "train.checkpoint_epochs=3")
    return plan(tmp_path, "train.seed=1,2,3,4,5,6", search="asha", overrides=settings)


class TestAsha:
    def test_a_trial_that_is_behind_at_its_first_checkpoint_ends(self, sweep: Sweep) -> None:
        asha = Asha(sweep, IMAGES)
        assert not ran(sweep, asha, 1, 0.2, 0.3, 0.4, 0.5)
        assert ran(sweep, asha, 2, 0.1)
        assert not ran(sweep, asha, 3, 0.3)
        told = json.loads(sweep.trials[1].config.folder.pruned.read_text())
        assert told == {"checkpoint": "checkpoint-1", "epochs": 3.0, "score": 0.1}

    def test_or_later(self, sweep: Sweep) -> None:
        asha = Asha(sweep, IMAGES)
        assert not ran(sweep, asha, 1, 0.2, 0.3, 0.5)
        assert not ran(sweep, asha, 2, 0.25, 0.3)
        assert ran(sweep, asha, 3, 0.25, 0.3, 0.4)

    def test_at_the_end_of_its_schedule_there_is_nothing_to_stop(self, sweep: Sweep) -> None:
        asha = Asha(sweep, IMAGES)
        assert not ran(sweep, asha, 1, 0.2, 0.3, 0.5, 0.6)
        assert not ran(sweep, asha, 2, 0.25, 0.3, 0.6, 0.1)

    def test_trials_that_were_done_before_count(self, sweep: Sweep) -> None:
        done: dict[str, Any] = {"metrics": {"AP": 0.5}, "curve": [[3.0, 0.2], [6.0, 0.3], [9.0, 0.5]]}
        write_record(sweep, sweep.trials[0], **done)
        assert ran(sweep, Asha(sweep, IMAGES), 2, 0.1)


def test_nothing_of_the_configuration_is_in_what_tune_writes(sweep: Sweep) -> None:
    assert str(sweep.config.runs).encode() not in pickle.dumps(Asha(sweep, IMAGES))


def test_weights_that_are_not_there_are_told_before_anything_begins(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.init\.weights: none\.pth: there is no such file"):
        run_sweep(plan(tmp_path, "train.init.weights=null,none.pth"))
    assert not (tmp_path / "runs").exists()
