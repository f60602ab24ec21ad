"""The DeepSpeed engine of a run."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline import checkpoint
from pipeline.config.sections import TrainSection
from pipeline.data.manifest import Manifest
from pipeline.distributed import World
from pipeline.train.engine import engine_config
from pipeline.train.loop import train
from pipeline.train.run import TrainJob
from tests.pipeline.train.runs import losses, make_job


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_engine_gets_batches_of_a_rank(size: int) -> None:
    config = engine_config(TrainSection(global_batch=32, micro_batch=2, zero_stage=1, clip_grad_norm=0.1), size)
    assert config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * size == 32
    assert config["zero_optimization"]["stage"] == 1
    assert config["gradient_clipping"] == 0.1


def test_the_optimizer_may_lie_on_the_host() -> None:
    config = engine_config(TrainSection(zero_stage=2, offload="cpu"), 1)
    assert config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    with pytest.raises(ValueError, match="it needs zero_stage 1 to 3"):
        TrainSection(offload="cpu")


def test_deepspeed_comes_without_mlflow_which_may_come_after_it() -> None:
    code = (
        "import sys\n"
        "from pipeline.distributed import init_world\n"
        "from pipeline.train.engine import import_deepspeed\n"
        "import_deepspeed(init_world('cpu'))\n"
        "assert 'mlflow' not in sys.modules\n"
        "import mlflow"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(("precision", "stage"), [("bf16", 0), ("bf16", 1), ("fp16", 0), ("fp16", 1)])
def test_fewer_bits_train_fp32_weights(
    manifest: Manifest, straight: tuple[TrainJob, Path], world: World, tmp_path: Path, precision: str, stage: int
) -> None:
    job = make_job(manifest, tmp_path, precision=precision, zero_stage=stage, max_steps=2)
    weights = checkpoint.load_model_weights(train(job, world))
    assert {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()} == {torch.float32}
    assert losses(job.out)[1] == pytest.approx(losses(straight[0].out)[1], rel=0.05)
    assert losses(job.out)[1] != losses(straight[0].out)[1]
