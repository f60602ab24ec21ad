"""pipeline/plan/memory.py: what is predicted of a rank, against the real engine of two ranks and its checkpoints."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from model.complexity import skeleton
from model.losses.criterion import Criterion
from model.losses.groups import groups_of
from model.memory import LiveBytes
from pipeline.checkpoint.save import CheckpointWriter
from pipeline.data.manifest import Manifest
from pipeline.distributed import World
from pipeline.plan.memory import Layout, layout_of, memory_of_rank
from pipeline.train.ema import make_average
from pipeline.train.engine import make_engine, take_step
from pipeline.train.flops import micro_batch
from pipeline.train.run import Run, TrainJob
from tests.builders import make_batch, make_target, make_varied_manifest
from tests.pipeline.train.runs import make_job
from tests.ranks import Ranks

BUCKET = 300_000
SIZE = (320, 384)


class Held(NamedTuple):
    """Bytes of a rank."""

    parameters: int
    gradients: int
    moments: int
    average: int
    peak: int
    checkpoint: int


def small_job(out: Path, stage: int) -> TrainJob:
    manifest = make_varied_manifest(out / "data", 8)
    zero = {"zero_optimization": {"reduce_bucket_size": BUCKET}}
    settings = {"freeze_backbone": "stem_and_layer1", "micro_batch": 2, "ema": 0.9, "deepspeed": zero}
    return make_job(manifest, out, zero_stage=stage, **settings)


def held(world: World, job: TrainJob, manifest: Manifest) -> Held:
    """What a rank of the real engine holds between two micro-batches of the second step, and at most in the next."""
    stage = job.train.zero_stage
    criterion = Criterion(job.train.criterion, job.model.class_loss)
    batch, targets = make_batch([SIZE, SIZE]), [make_target(7, 3), make_target(7, 3)]
    with LiveBytes() as live:
        run = Run(job, world, manifest)
        engine = make_engine(run, None)
        average = make_average(engine, run, None)
        assert average is not None
        for is_last in (True, False, True):
            live.peak = live.now
            engine.set_gradient_accumulation_boundary(is_last)
            loss = criterion(groups_of(engine(batch), targets), 14.0, 8).total()
            engine.backward(loss)
            del loss
            if not is_last:
                gradients = bytes_of(gradients_of(engine, stage))
            elif not engine.basic_optimizer.state:
                take_step(engine, 0.1)
    moments = [state[key] for state in engine.basic_optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    writer = CheckpointWriter(world, job.out.checkpoints, keep=None)
    path = writer.begin(engine, run.state(1, 0, engine.basic_optimizer), average.weights)
    writer.finish()
    writer.close()
    whole = Held(
        parameters=bytes_of([*weights_of(engine), *masters_of(engine.optimizer, stage)]),
        gradients=gradients,
        moments=bytes_of(moments),
        average=bytes_of(average.weights.values()),
        peak=live.peak,
        checkpoint=sum(tensor.nbytes for file in path.glob("*.safetensors") for tensor in load_file(file).values()),
    )
    engine.destroy()
    return whole


def bytes_of(tensors: Iterable[torch.Tensor | None]) -> int:
    """Of their storages, each once."""
    storages = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def weights_of(engine: Any) -> list[torch.Tensor]:
    return [getattr(weight, "ds_tensor", weight.data) for weight in engine.module.parameters()]


def masters_of(zero: Any, stage: int) -> list[torch.Tensor]:
    """The optimizer's own copy of its part of the weights."""
    name = "fp32_partitioned_groups_flat" if stage == 3 else "single_partition_of_fp32_groups"
    return list(getattr(zero, name)) if stage else []


def gradients_of(engine: Any, stage: int) -> list[torch.Tensor | None]:
    if stage == 3:
        return [engine.optimizer.grad_partitions_flat_buffer]
    kept: Mapping[int, list[torch.Tensor]] = engine.optimizer.all_grad_tensors if stage == 2 else {}
    return [*(weight.grad for weight in engine.module.parameters()), *(each for part in kept.values() for each in part)]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_rank_holds_what_is_predicted(ranks: Ranks, tmp_path: Path, stage: int) -> None:
    job = small_job(tmp_path, stage)
    manifest = make_varied_manifest(tmp_path / "data", 8)
    real = ranks.run(held, job, manifest)
    layout = layout_of(skeleton(job.model, job.train.freeze_backbone), job.train)
    kept, peak = micro_batch(job.model, job.train, SIZE).memory()
    told = memory_of_rank(layout, stage, 2, activations=kept, peak=peak, bucket=BUCKET, average=True)
    assert told.parameters == max(rank.parameters for rank in real)
    assert told.gradients == max(rank.gradients for rank in real)
    assert told.moments == max(rank.moments for rank in real)
    assert told.average == max(rank.average for rank in real)
    assert layout.checkpoint(average=True) == max(rank.checkpoint for rank in real)
    assert told.activations > 0.5 * told.total, "the test is about all of it"
    assert told.total == pytest.approx(max(rank.peak for rank in real), rel=0.1)


def test_parts_are_padded() -> None:
    layout = Layout(groups=((7, 2), (1,)), frozen=(5,), buffers=3, saved=20)
    none = {"activations": 0, "peak": 0, "bucket": 0, "average": False}
    first, second, third = (memory_of_rank(layout, stage, 4, **none) for stage in (1, 2, 3))  # type: ignore[arg-type]
    assert first.parameters == second.parameters == 4 * (4 * (4 + 2) + 5 + (4 + 2))
    assert first.moments == 4 * 2 * (4 + 2)
    assert second.gradients == 4 * (7 + 2), "the second rank has the end of one parameter and the beginning of another"
    assert third.parameters == 4 * ((2 + 1 + 1) + 2 + (2 + 1 + 1))
    assert third.buffers == 4 * (3 + 15)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_the_optimizer_may_lie_on_the_host(stage: int) -> None:
    layout = Layout(groups=((7, 2), (1,)), frozen=(5,), buffers=3, saved=20)
    sizes = {"activations": 10, "peak": 20, "bucket": 8}
    here, there = (
        memory_of_rank(layout, stage, 4, average=True, offload=offload, **sizes) for offload in (False, True)
    )
    assert there.moments == (0 if stage else here.moments)
    assert here.total - there.total == (here.moments * 3 // 2 if stage else 0), "two moments and a copy of the weights"
