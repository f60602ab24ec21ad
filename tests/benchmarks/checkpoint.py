"""How long a step waits for a checkpoint of R50 Deformable DETR (160 MB of weights, 480 MB in all), against writing it.

    python tests/benchmarks/checkpoint.py

Training goes on while a checkpoint is written: the step waits for the gathering of the weights, and before the weights
change for what is left of their copy. Both are timed in a step of two images; then the same checkpoint is waited for.
"""

import argparse
import statistics
import tempfile
import time
from contextlib import closing
from pathlib import Path

import torch

from model.batch import ImageBatch
from model.build import build_model
from pipeline.checkpoint.optimizer import group_settings
from pipeline.checkpoint.save import CheckpointWriter
from pipeline.checkpoint.state import State
from pipeline.config.load import load_config
from pipeline.distributed import init_world
from pipeline.train.engine import engine_config, import_deepspeed, take_step
from pipeline.train.optim import make_optimizer, parameter_groups

MOST = 0.05
SIDE = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="checkpoints of both kinds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config, world = load_config("jobs/configs/coco_r50.yaml"), init_world("cpu")
    deepspeed, train = import_deepspeed(world), config.train.model_copy(update={"global_batch": 2, "micro_batch": 2})
    model = build_model(config.model_for(91))
    optimizer = make_optimizer(parameter_groups(model, train))
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=engine_config(train, 1), dist_init_required=False
    )
    batch = ImageBatch(torch.rand(2, 3, SIDE, SIDE), torch.zeros(2, SIDE, SIDE, dtype=torch.bool))

    def forward_backward() -> None:
        outputs = engine(batch)
        engine.backward(outputs["pred_logits"].square().mean() + outputs["pred_boxes"].square().mean())

    waits, written = [], []
    with tempfile.TemporaryDirectory() as name, closing(CheckpointWriter(world, Path(name), 1)) as writer:
        forward_backward()
        take_step(engine, train.clip_grad_norm)
        for step in range(1, options.repeats + 1):
            state = State(step, 0, 2 * step, 0, {}, 1, 0, {"train": {}, "model": {}}, {}, "", group_settings(optimizer))
            began = time.perf_counter()
            writer.begin(engine, state)
            writer.finish()
            written.append(time.perf_counter() - began)
            began = time.perf_counter()
            writer.begin(engine, state)
            waited = time.perf_counter() - began
            forward_backward()
            began = time.perf_counter()
            writer.wait_copied()
            waits.append(waited + time.perf_counter() - began)
            take_step(engine, train.clip_grad_norm)
            writer.finish()
            print(f"written in {written[-1]:.2f} s; the step beside it waited {1000 * waits[-1]:.0f} ms")
    share = statistics.median(waits) / statistics.median(written)
    print(f"the step waits for {share:.3f} of the time that writing takes")
    if share > MOST:
        raise SystemExit(f"more than {MOST}")


if __name__ == "__main__":
    main()
