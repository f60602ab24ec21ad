"""Training of the demo on shards in an S3 store whose cache is warm, against the same shards on this disk.

    python tests/benchmarks/remote.py

One process, two loader processes; a real S3 server (moto's) on loopback. Both take turns. The first run on the store
fills the cache, and is told beside the others.
"""

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
from pathlib import Path

import torch

from pipeline.config.load import load_config
from pipeline.config.sections import Config
from pipeline.data.cache import cache_of
from pipeline.data.manifest import read_manifest
from pipeline.distributed import World, close, init_world
from pipeline.run_folder import RunFolder
from pipeline.shard.coco import open_split
from pipeline.shard.synthetic import draw_configured
from pipeline.shard.write import shard_split
from pipeline.train.loop import train
from pipeline.train.run import TrainJob

sys.path.append(str(Path(__file__).parents[2]))
from tests.stores import S3Server

MOST = 1.05
"""Times that a step may take."""


def seconds_of_a_step(config: Config, world: World, out: Path) -> float:
    """The median of the points of a run's curves but the first."""
    shards, cache = config.shards_folder / "train", cache_of(config.shards)
    model = config.model_for(read_manifest(shards, cache).labels.num_classes)
    job = TrainJob(model, config.train, shards, RunFolder(out), cache=cache)
    train(job, world)
    points = [json.loads(line)["metrics"] for line in job.out.train_spool.read_text().splitlines()]
    speeds = [point["train/images_per_second"] for point in points[1:]]
    return config.train.global_batch / statistics.median(speeds)


def main() -> None:
    """Print the ratio; the exit code is 1 where it is too great."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="steps of a run")
    parser.add_argument("--repeats", type=int, default=5, help="runs of both")
    options = parser.parse_args()
    torch.set_num_threads(1)
    server = S3Server()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    os.environ |= server.environment()
    world = init_world("cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        places = {"disk": str(folder / "shards"), "store": f"s3://{server.bucket()}/shards"}
        configs = {}
        for place, out in places.items():
            configs[place] = load_config("jobs/configs/demo.yaml", [
                f"runs={folder}", f"dataset.root={folder}/data", f"shards.out={out}", f"shards.cache={folder}/cache",
                "dataset.synthetic.train_images=800", "dataset.synthetic.val_images=8", "train.loader_workers=2",
                f"train.max_steps={options.steps}", "train.log_steps=10",
            ])  # fmt: skip
            dataset = configs[place].dataset
            draw_configured(dataset)
            source = open_split(dataset, dataset.train)
            shard_split(source, "train", configs[place].shards_folder, dataset, configs[place].shards)
        cold = seconds_of_a_step(configs["store"], world, folder / "cold")
        ratios = []
        for turn in range(options.repeats):
            own = {place: seconds_of_a_step(configs[place], world, folder / f"{place}{turn}") for place in configs}
            ratios.append(own["store"] / own["disk"])
            print(f"a step {1e3 * own['disk']:.1f} ms from the disk, {ratios[-1]:.3f} times from the store", flush=True)
    close(world)
    server.stop()
    print(f"median {statistics.median(ratios):.3f}; {1e3 * cold:.1f} ms while the cache was filled")
    if statistics.median(ratios) > MOST:
        raise SystemExit(f"more than {MOST}")


if __name__ == "__main__":
    main()
