"""The weights of an engine by name, and averages in their place."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pipeline import checkpoint
from pipeline.distributed import World
from tests.pipeline.checkpoint.engines import Net, make_engine


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_averages_stand_under_every_name_of_a_trained_weight(world: World, saved: Path, stage: int) -> None:
    engine = make_engine(world, stage, saved)
    own = checkpoint.trained_weights(engine)
    assert own.keys() == {name for name, weight in Net().named_parameters() if weight.requires_grad}
    averages = {name: torch.full_like(weight, 3) for name, weight in own.items()}
    gathered = checkpoint.gather_weights(engine, world, averages)
    weights = checkpoint.load_model_weights(saved)
    assert gathered.keys() == weights.keys()
    for name, tensor in gathered.items():
        expected = weights[name] if name in ("frozen", "statistics") else torch.full_like(weights[name], 3)
        assert torch.equal(tensor, expected), name
    again = {name: torch.zeros_like(average) for name, average in averages.items()}
    checkpoint.restore_averages(engine, world, again, gathered)
    assert all(torch.equal(again[name], average) for name, average in averages.items())


@pytest.mark.parametrize("saved_as", [{}, {"w": torch.zeros(3)}, {"w": torch.zeros(2).half()}], ids=str)
def test_averages_that_do_not_fit_are_named(world: World, saved_as: dict[str, torch.Tensor]) -> None:
    engine = SimpleNamespace(module=nn.ParameterDict({"w": torch.zeros(2)}))
    with pytest.raises(ValueError, match=r"^w is missing, or not of the model's shape or type"):
        checkpoint.restore_averages(engine, world, {"w": torch.zeros(2)}, saved_as)
