"""jobs/remote.py: what is refused before a cluster is asked; the rest is in clusters/test_submit.py."""

import pytest

from tests.jobs.test_cli import raydetr

NOWHERE = ("--address", "http://127.0.0.1:1")
DEMO = ("-c", "jobs/configs/demo.yaml")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("submit", "run", *DEMO, "--set", "train.epoch=1"), "unknown key `train.epoch`"),
        (("submit", "run", *DEMO), "runs runs, dataset.root runs/data/shapes: a job runs in a folder"),
        (("submit", "run", *DEMO, "--set", "runs=/r", "--set", "dataset.root=/d", *NOWHERE), "no Ray answers"),
        (("submit", "predict", *DEMO), "'predict' is not one of"),
        (("jobs", "stop", "demo", *NOWHERE), "no Ray answers"),
        (("jobs", "list", "--address", "head:8265"), "--address head:8265: must be"),
    ],
    ids=["a key", "a folder of this machine", "no cluster", "another command", "no cluster to stop on", "no address"],
)
def test_is_one_line(words: tuple[str, ...], told: str) -> None:
    result = raydetr(*words)
    assert result.returncode == 2
    assert told in result.stderr
    assert result.stderr.count("\n") == 1
