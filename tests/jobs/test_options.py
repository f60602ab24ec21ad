import pytest

from jobs.options import STEPS, Step, steps_between
from pipeline.errors import UserError


@pytest.mark.parametrize(
    ("first", "last", "steps"),
    [
        ("shard", "register", STEPS),
        ("train", "evaluate", ("train", "evaluate")),
        ("register", "register", ("register",)),
    ],
)
def test_steps(first: Step, last: Step, steps: tuple[Step, ...]) -> None:
    assert steps_between(first, last) == steps


def test_steps_backwards() -> None:
    told = r"^--from evaluate --until train: the steps are shard, train, evaluate, register, in this order$"
    with pytest.raises(UserError, match=told):
        steps_between("evaluate", "train")
