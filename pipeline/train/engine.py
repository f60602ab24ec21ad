"""The DeepSpeed engine of a run, with the optimizer's state where the run goes on."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pipeline.checkpoint.optimizer import restore_optimizer
from pipeline.checkpoint.state import Scaling, State
from pipeline.config.deepspeed import merged
from pipeline.config.sections import TrainSection
from pipeline.distributed import World, together
from pipeline.log import get_logger
from pipeline.train.initial import make_model
from pipeline.train.loss_scale import install, loss_scale_of
from pipeline.train.optim import make_optimizer, parameter_groups, set_learning_rates
from pipeline.train.reduce import reduce_early
from pipeline.train.run import Run

logger = get_logger(__name__)


def take_step(engine: Any, clip: float) -> torch.Tensor:
    """Let the optimizer step on the gradients, clipped to a norm of `clip` where that is not 0.

    Returns:
        The norm before clipping, the same on every rank; computed once: DeepSpeed's own clipping at stage 0 would
        compute it again, parameter by parameter. Where it is not finite, the weights are as they were in fp16, else
        spoilt or as they were.
    """
    if engine.zero_optimization_stage() > 0:
        engine.step()
        return torch.as_tensor(engine.get_global_grad_norm())
    gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    scale = loss_scale_of(engine)
    if scale is not None:
        torch._foreach_div_(gradients, scale.cur_scale)
    # Operation by operation as DeepSpeed's, so that the bits are the same as when it clips.
    norm = torch.stack(torch._foreach_norm(gradients)).square().sum().sqrt()
    if clip > 0:
        torch._foreach_mul_(gradients, (torch.full_like(norm, clip) / (norm + 1e-6)).clamp(max=1))
    if scale is not None:
        engine.basic_optimizer.found_inf = (~torch.isfinite(norm)).float()  # leaves out the step; nothing is read
    engine.step()
    return norm


def engine_config(train: TrainSection, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration: what follows from the settings, and `train.deepspeed`.

    Parameters and gradients are fp32 at every precision; bf16 and fp16 are torch's autocast.
    """
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": train.micro_batches // world_size,
        "gradient_clipping": train.clip_grad_norm if train.zero_stage > 0 else 0.0,  # at 0 `take_step` clips
        # Buckets of 200 MB in place of 2 GB: the whole model fits into one.
        "zero_optimization": {"stage": train.zero_stage, "reduce_bucket_size": 50_000_000, "overlap_comm": False},
        "steps_per_print": 2**31,
        # It synchronises the device in every forward pass.
        "timers": {"throughput": {"enabled": False}},
    }
    if train.offload == "cpu":
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        config["zero_force_ds_cpu_optimizer"] = False  # DeepSpeed's own would be compiled first
    if train.autocast is not None:
        # Parameters of "safe" modules would have their gradients reduced in bf16: none are.
        config["torch_autocast"] = {"enabled": True, "dtype": train.autocast, "lower_precision_safe_modules": []}
    return merged(config, train.deepspeed)


def make_engine(run: Run, found: tuple[Path, State] | None) -> Any:
    job, world = run.job, run.world
    deepspeed = import_deepspeed(world)
    model = make_model(job, found, world).to(world.device)
    optimizer = make_optimizer(parameter_groups(model, job.train))
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=engine_config(job.train, world.size), dist_init_required=False
    )
    scaling = (found[1].scaling if found else None) or Scaling()
    install(engine, scaling if job.train.precision == "fp16" else None, world.size)
    reduce_early(engine, world)
    if found is not None:
        path, state = found
        set_learning_rates(engine.basic_optimizer, run.factor(state.step - 1))
        together(world, lambda: restore_optimizer(engine, world, path, state))
        logger.info("going on from %s", path)
    return engine


def import_deepspeed(world: World) -> Any:
    """Import DeepSpeed where it is needed only: it takes seconds, and picks its device from the environment."""
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    with _without("mlflow"):  # its autotuner, which training does not use, would import it: most of DeepSpeed's seconds
        import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # An all-reduce of its own for CPU inference, which would be compiled now and which training does not use.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextmanager
def _without(module: str) -> Iterator[None]:
    """In the block, a module that is not imported yet cannot be."""
    hidden = module not in sys.modules
    if hidden:
        sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hidden:
            del sys.modules[module]
