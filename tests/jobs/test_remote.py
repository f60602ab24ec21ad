"""jobs/remote.py: what is refused before a cluster is asked; the rest is in clusters/test_submit.py."""

import pytest

from tests.jobs.test_cli import raydetr

NOWHERE = ("--address", "http://127.0.0.1:1")
DEMO = ("-c", "jobs/configs/demo.yaml")
SHARED = ("--set", "runs=/r", "--set", "dataset.root=/d")
SWEEP = ("submit", "sweep", *DEMO, *SHARED, *NOWHERE)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("submit", "run", *DEMO, "--set", "train.epoch=1"), "unknown key `train.epoch`"),
        (("submit", "run", *DEMO), "runs runs, dataset.root runs/data/shapes: a job runs in a folder"),
        (("submit", "run", *DEMO, *SHARED, *NOWHERE), "no Ray answers"),
        (SWEEP, "give the settings that differ: --over"),
        ((*SWEEP, "--over", "train.lrr=1"), "--over train.lrr=1: jobs/configs/demo.yaml: unknown key `train.lrr`"),
        ((*SWEEP, "--over", "train.lr=1..2", "--search", "random"), "say how many with --trials"),
        ((*SWEEP, "--over", "train.init.weights=null,w.pth"), "train.init.weights w.pth: a job runs in a folder"),
        ((*SWEEP, "--over", "train.lr=1,2"), "no Ray answers"),
        (("submit", "predict", *DEMO), "'predict' is not one of"),
        (("jobs", "stop", "demo", *NOWHERE), "no Ray answers"),
        (("jobs", "list", "--address", "head:8265"), "--address head:8265: must be"),
    ],
    ids=[
        *("a key", "a folder of this machine", "no cluster", "no trials", "a trial's key", "how many trials"),
        *("a trial's file of this machine", "no cluster for a sweep", "another command", "no cluster to stop on"),
        "no address",
    ],
)
def test_is_one_line(words: tuple[str, ...], told: str) -> None:
    result = raydetr(*words)
    assert result.returncode == 2
    assert told in result.stderr
    assert result.stderr.count("\n") == 1
