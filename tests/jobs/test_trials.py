"""The trials of a sweep: what a command asks for, what is refused, what is done, which one is the best."""

import csv
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.trials import Sweep, Trial, plan_sweep, write_results
from pipeline.config.load import load_config
from pipeline.errors import UserError
from pipeline.files import write_json


def plan(folder: Path, *over: str, search: Any = "grid", trials: int | None = None, overrides: Any = ()) -> Sweep:
    (folder / "my.yaml").write_text(f"{{name: my, runs: {folder}/runs, train: {{global_batch: 8, micro_batch: 4}}}}")
    return plan_sweep(folder / "my.yaml", overrides, over, search, trials)


def write_record(sweep: Sweep, trial: Trial, **content: Any) -> None:
    write_json(sweep.record(trial), {"schedule": trial.schedule, "state": "done", "checkpoint": "c"} | content)


class TestPlan:
    def test_a_grid_has_all_combinations(self, tmp_path: Path) -> None:
        over = ("train.lr=1e-4,2e-4", "model.two_stage=true,mixed", "train.lr_drop_epochs=[4,6],[8]")
        sweep = plan(tmp_path, *over, overrides=["model.with_box_refine=true"])
        assert sweep.config.name == "my-sweep"
        assert [trial.config.name for trial in sweep.trials] == [f"my-sweep-{number}" for number in range(1, 9)]
        configs = [trial.config for trial in sweep.trials]
        assert {(each.train.lr, each.model.two_stage, each.train.lr_drop_epochs) for each in configs} == {
            (lr, kind, drops) for lr in (1e-4, 2e-4) for kind in (True, "mixed") for drops in ((4.0, 6.0), (8.0,))
        }
        assert sweep.trials[0].settings == {
            "train.lr": 1e-4,
            "model.two_stage": True,
            "train.lr_drop_epochs": [4.0, 6.0],
        }
        assert str(sweep.trials[0]) == (
            "my-sweep-1 (train.lr 0.0001, model.two_stage true, train.lr_drop_epochs [4.0, 6.0])"
        )

    def test_what_trials_share_is_overridden(self, tmp_path: Path) -> None:
        sweep = plan(tmp_path, "train.lr=1e-4,2e-4", overrides=["name=other", "train.epochs=3"])
        assert {trial.config.train.epochs for trial in sweep.trials} == {3}
        assert sweep.trials[1].config.name == "other-sweep-2"

    def test_drawn_trials_differ_and_are_drawn_again_alike(self, tmp_path: Path) -> None:
        over = ("train.lr=1e-5..1e-3", "train.seed=1..9", "train.clip_grad_norm=0..1", "model.num_queries=10,20")
        sweep = plan(tmp_path, *over, search="random", trials=40)
        drawn = [trial.settings for trial in sweep.trials]
        assert drawn == [trial.settings for trial in plan(tmp_path, *over, search="asha", trials=40).trials]
        assert len({str(settings) for settings in drawn}) == 40
        rates = sorted(settings["train.lr"] for settings in drawn)
        assert 1e-5 <= rates[0] < 5e-5 < rates[20] < 5e-4 < rates[-1] <= 1e-3
        assert {settings["train.seed"] for settings in drawn} == set(range(1, 10))
        other = plan(tmp_path, *over, search="random", trials=40, overrides=["train.seed=1"])
        assert [trial.settings for trial in other.trials] != drawn

    def test_listed_values_are_drawn_without_repeating_a_trial(self, tmp_path: Path) -> None:
        sweep = plan(tmp_path, "train.lr=1e-4,2e-4", "train.seed=1,2,3", search="random", trials=6)
        assert len({str(trial.settings) for trial in sweep.trials}) == 6

    @pytest.mark.parametrize(
        ("over", "more", "told"),
        [
            pytest.param(
                ["train.lrr=1"], {}, r"--over train\.lrr=1: .*unknown key `train\.lrr`; did you mean", id="key"
            ),
            pytest.param(["train.lr=fast"], {}, r"--over train\.lr=fast: .*`train\.lr` is 'fast'", id="type"),
            pytest.param(["train.global_batch=6"], {}, r"6 is not a multiple of train.micro_batch 4", id="together"),
            pytest.param(["name=a,b"], {}, r"--over name=a,b: trials differ in settings of train and model", id="name"),
            pytest.param(["train=1"], {}, r"--over train=1: trials differ in settings of", id="a section"),
            pytest.param(["train.lr="], {}, r"--over train\.lr=: there are no values", id="no values"),
            pytest.param(["train.lr"], {}, r"--over train\.lr: there are no values", id="no equals"),
            pytest.param(["train.lr=[1"], {}, r"--over train\.lr=\[1: the values are not YAML", id="not YAML"),
            pytest.param([], {}, "give the settings that differ", id="none"),
            pytest.param(["train.lr=1", "train.lr=2"], {}, r"train\.lr is given twice", id="key twice"),
            pytest.param(["train.lr=1e-4,0.0001"], {}, "and 2 are the same: name each value once", id="value twice"),
            pytest.param(["train.lr=1e-4"], {"trials": 2}, "--trials is for drawn trials", id="trials"),
            pytest.param(["train.lr=1e-4"], {"search": "random"}, "say how many with --trials", id="no trials"),
            pytest.param(
                ["train.lr=1"],
                {"search": "asha", "overrides": ["evaluate.beside=false"]},
                "which is false",
                id="beside",
            ),
            pytest.param(["train.lr=1e-5..1e-3"], {}, r"--over train\.lr: a range is drawn from", id="range of a grid"),
            pytest.param(["train.lr=2..1"], {"search": "random", "trials": 2}, "must be less than", id="range"),
            pytest.param(["train.lr=1,2"], {"search": "random", "trials": 3}, "only 2 different trials", id="too few"),
        ],
    )
    def test_what_is_wrong_is_told(self, over: list[str], more: dict[str, Any], told: str, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=told):
            plan(tmp_path, *over, **more)
        assert not (tmp_path / "runs").exists()


class TestBegun:
    def test_the_same_goes_on(self, tmp_path: Path) -> None:
        plan(tmp_path, "train.lr=1e-4,2e-4", "train.seed=1").check_begun()
        plan(tmp_path, "train.seed=1", "train.lr=1e-4,2e-4").check_begun()
        plan(tmp_path, "train.seed=1", "train.lr=1e-4,2e-4", overrides=["train.epochs=60"]).check_begun()

    @pytest.mark.parametrize(
        ("over", "override", "told"),
        [
            pytest.param("train.lr=1e-4", "train.epochs=3", "over.train.lr: 1e-4,2e-4 -> 1e-4;? ?", id="over"),
            pytest.param("train.lr=1e-4,2e-4", "train.lr_backbone=1", "train.lr_backbone: 2e-05 -> 1.0", id="shared"),
            pytest.param("train.lr=1e-4,2e-4", "dataset.root=other", "dataset.root: data -> other", id="data"),
        ],
    )
    def test_another_is_refused(self, over: str, override: str, told: str, tmp_path: Path) -> None:
        plan(tmp_path, "train.lr=1e-4,2e-4").check_begun()
        with pytest.raises(UserError, match=rf"sweep\.json: .* other settings \({told}\): use another name"):
            plan(tmp_path, over, overrides=[override]).check_begun()


class TestResults:
    def test_a_trial_is_done_until_its_schedule_is_longer(self, tmp_path: Path) -> None:
        sweep = plan(tmp_path, "train.lr=1e-4,2e-4,3e-4")
        write_record(sweep, sweep.trials[0], metrics={"AP": 0.1})
        write_record(sweep, sweep.trials[1], state="failed", error="no")
        assert [sweep.is_done(trial) for trial in sweep.trials] == [True, False, False]
        longer = plan(tmp_path, "train.lr=1e-4,2e-4,3e-4", overrides=["train.epochs=60"])
        assert [longer.is_done(trial) for trial in longer.trials] == [False, False, False]

    def test_the_best_comes_first(self, tmp_path: Path) -> None:
        sweep = plan(tmp_path, "train.lr=1e-4,2e-4,3e-4,4e-4", overrides=["register.metric=AR1"])
        assert sweep.best() is None
        for trial, score in zip(sweep.trials[1:], (0.2, 0.3, 0.3), strict=True):
            write_record(sweep, trial, metrics={"AP": 1 - score, "AP50": 0.5, "AR1": score}, epochs=2.0)
        assert sweep.best() is sweep.trials[2]
        assert [row["trial"] for row in sweep.rows()] == [f"my-sweep-{number}" for number in (3, 4, 2, 1)]
        table, chosen = write_results(sweep)
        with table.open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert rows[0] == {
            **{"trial": "my-sweep-3", "train.lr": "0.0003", "AR1": "0.3", "AP": "0.7", "AP50": "0.5"},
            **{"epochs": "2", "state": "done", "checkpoint": "c"},
        }
        assert rows[3]["AP"] == rows[3]["state"] == ""
        assert chosen.read_text().startswith("# The best of 4 trials, AR1 0.3000: raydetr run -c best.yaml\n")
        assert yaml.safe_load(chosen.read_text())["train"]["lr"] == 3e-4
        assert load_config(chosen) == sweep.trials[2].config
