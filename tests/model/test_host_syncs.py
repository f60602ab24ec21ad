"""A training step reads from the device twice: the costs of the matching, and what the ranks agree on at its end.

All else would wait for it, too.

On the host the same calls are made, so they are counted here without a GPU.
"""

from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from model.config import CriterionConfig, Denoising, OneToMany
from model.denoising import DRAWS, add_noise
from model.losses.criterion import Criterion
from model.losses.groups import groups_of
from pipeline.distributed import World
from pipeline.train import loop
from tests.builders import make_batch, make_detector, make_target, make_varied_manifest
from tests.pipeline.train.runs import make_job

aten: Any = torch.ops.aten
READS = {
    aten._local_scalar_dense,  # item, bool, int, float, and tolist of a scalar
    aten.nonzero,
    aten.masked_select,
    aten.is_nonzero,
    aten.equal,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,
    aten.repeat_interleave,
}
"""Operators whose results the host has to wait for: values, or shapes that depend on values."""
BY_MASK = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
TRANSFERS = {torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.__array__}


class Operators(TorchDispatchMode):
    """Counts some operators, and indexing by a mask."""

    def __init__(self, counted: set[Any] = READS) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._counted = counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        indices = args[1] if packet in BY_MASK else ()
        if packet in self._counted or any(index is not None and index.dtype == torch.bool for index in indices):
            self.counts[str(packet)] += 1
        return func(*args, **(kwargs or {}))


class Calls(TorchFunctionMode):
    """Counts `TRANSFERS`, which are no operators on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        to_host = func is torch.Tensor.to and torch.device("cpu") in [torch.device(a) for a in args if a == "cpu"]
        if func in TRANSFERS or to_host:
            self.counts[func.__name__] += 1
        return func(*args, **(kwargs or {}))


def reads_of(work: Any) -> tuple[Counter[str], Counter[str]]:
    with Operators() as operators, Calls() as calls:
        work()
    return operators.counts, calls.counts


@pytest.mark.parametrize("counts", [(3, 2), (0, 4)], ids=["objects", "an image without"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"with_box_refine": True, "two_stage": True},
        {"with_box_refine": True, "two_stage": "mixed", "look_forward_twice": True},
        {"with_box_refine": True, "two_stage": "mixed", "one_to_many": OneToMany(20, 3), "denoising": Denoising(12)},
        {"class_loss": "softmax"},
        {"class_loss": "vfl"},
        {"class_loss": "ia_bce"},
        {"class_loss": "ma"},
        {"arch": "detr"},
    ],
    ids=["base", "two-stage", "mixed", "hybrid", "softmax", "varifocal", "IoU-aware", "matchability-aware", "detr"],
)
def test_the_matching_alone_reads_from_the_device(settings: dict[str, Any], counts: tuple[int, int]) -> None:
    model = make_detector(decoder_layers=6, **settings).train()
    criterion = Criterion(CriterionConfig(), model.config.class_loss)
    batch, targets = make_batch(), [make_target(count) for count in counts]

    def step() -> None:
        noised = None
        if model.config.denoising is not None:
            noised = add_noise(targets, model.config.denoising, 5, np.full((2, 12, DRAWS), 0.5))
        outputs = model(batch) if noised is None else model(batch, noised)
        groups = groups_of(outputs, targets, model.config.one_to_many, noised)
        criterion(groups, float(sum(counts))).total().backward()

    step()
    operators, calls = reads_of(step)
    assert operators == {}
    assert calls == {"cpu": 1, "numpy": 1}


@pytest.mark.parametrize("settings", [{}, {"with_box_refine": True, "two_stage": True}], ids=["base", "two-stage"])
def test_no_layer_takes_numbers_from_the_host(settings: dict[str, Any]) -> None:
    model, batch = make_detector(encoder_layers=2, decoder_layers=2, **settings).train(), make_batch()
    with Operators({aten.lift_fresh}) as operators:  # what torch.tensor makes of numbers
        model(batch)
    assert operators.counts == {}


def test_a_step_of_training_reads_once_more(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the batch on the device to the moved average: the costs of the matching, and all that ranks agree on."""
    manifest = make_varied_manifest(tmp_path, 8)
    reads: list[tuple[Counter[str], Counter[str]]] = []

    def counted(engine: Any, criterion: Criterion, step: Any, *rest: Any) -> Any:
        """Begin to count where the forward pass begins; the generator of the steps ends it."""
        modes.enter_context(operators := Operators())
        modes.enter_context(calls := Calls())
        reads.append((operators.counts, calls.counts))
        return backward_each(engine, criterion, step, *rest)

    def until_it_is_told(*arguments: Any) -> None:
        modes.close()

    backward_each = loop.backward_each
    with ExitStack() as modes:
        monkeypatch.setattr(loop, "backward_each", counted)
        monkeypatch.setattr(loop.Curves, "step_done", until_it_is_told)
        loop.train(make_job(manifest, tmp_path / "run", global_batch=4, max_steps=3, ema=0.9), world)
    assert len(reads) == 3
    for operators, calls in reads[1:]:
        assert operators == {}
        assert calls == {"cpu": 1, "numpy": 1, "tolist": 1}


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: x.masked_fill(x > 0, 0).nonzero(),
        lambda x: torch.where(x > 0),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
    ],
    ids=["item", "bool", "mask", "nonzero", "where", "tolist", "cpu"],
)
def test_a_read_is_seen(read: Any) -> None:
    operators, calls = reads_of(lambda: read(torch.ones(3)))
    assert operators + calls


def test_work_on_the_device_is_not_counted() -> None:
    index = torch.tensor([0, 2])
    operators, calls = reads_of(lambda: torch.where(torch.ones(3) > 0, 1.0, 2.0)[index].masked_fill_(index > 0, 0.0))
    assert not operators + calls
