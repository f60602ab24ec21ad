"""Training without Ray, in this process or in those that `torchrun` starts; the shards must be there.

    python -m pipeline.train -c config.yaml
    torchrun --nproc-per-node 2 -m pipeline.train -c config.yaml --set train.zero_stage=1

`jobs/train.py` runs the same function in Ray Train's workers.
"""

import argparse
import logging
import os
import sys

from pipeline.config.load import load_config
from pipeline.data.cache import cache_of
from pipeline.data.manifest import read_manifest
from pipeline.distributed import close, init_world, together
from pipeline.errors import UserError
from pipeline.log import set_up_logging
from pipeline.train.loop import train
from pipeline.train.run import TrainJob
from pipeline.train.stop import StoppedError, StopRequest, end_of

EXIT_STOPPED = 130


def main(arguments: list[str] | None = None) -> int:
    """Train in this process, or in those that `torchrun` started. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.train", description=main.__doc__)
    parser.add_argument("-c", "--config", required=True, help="YAML file of the pipeline")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a setting")
    options = parser.parse_args(arguments)
    try:
        config = load_config(options.config, options.set)
        world = init_world(config.cluster.device, config.cluster.collective_timeout)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    set_up_logging(world.rank)
    try:
        shards, cache = config.shards_folder / "train", cache_of(config.shards)
        labels = together(world, lambda: read_manifest(shards, cache)).labels
        model = config.model_for(labels.num_classes)
        stop = StopRequest(config.folder.stop, end_of(config.train.max_hours))
        stop.on_signals()
        job = TrainJob(
            model=model,
            train=config.train,
            shards=shards,
            out=config.folder,
            on_error=config.dataset.on_error,
            cache=cache,
            timeout=config.cluster.timeout,
            step_timeout=config.cluster.step_timeout,
        )
        train(job, world, stop)
    except UserError as error:
        if world.rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except StoppedError as stopped:
        if world.rank == 0:
            print(f"{stopped}; the same command goes on from there", file=sys.stderr)
        return EXIT_STOPPED
    finally:
        close(world)
    return 0


if __name__ == "__main__":
    code = main()
    # Not through the interpreter's own end: where a thread of gloo lets go of its last tensors during it, C++ aborts.
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)
