"""Shards both splits of a dataset as Ray tasks; what is sharded already is not done again."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import ray

from jobs.console import ProgressDisplay, make_console
from jobs.room import wait_for_room
from jobs.tasks import run_tasks
from pipeline.config.sections import Config
from pipeline.data.manifest import MANIFEST_NAME, Manifest
from pipeline.log import get_logger
from pipeline.shard.coco import open_split
from pipeline.shard.synthetic import draw_configured
from pipeline.shard.write import (
    ShardPlan,
    WriteAll,
    WriteTask,
    WrittenShard,
    check_same_categories,
    shard_split,
    verify_shard,
)

logger = get_logger(__name__)


def shard(
    config: Config, *, verify: bool = False, splits: Sequence[Literal["train", "val"]] = ("train", "val")
) -> dict[str, Manifest]:
    """Writes the shards of the splits, drawing the synthetic dataset first when one is configured.

    Ray must be connected, and every node must see the dataset and the shards' folder.

    Args:
        config: the pipeline.
        verify: decode every image fully; shards that are there already are read again.
        splits: which; nothing of another one has to be there.

    Returns:
        The manifests by split.

    Raises:
        UserError: bad input, other shards in the folder, or no space.
    """
    draw_configured(config.dataset)
    sources = {split: open_split(config.dataset, getattr(config.dataset, split)) for split in splits}
    if len(sources) == 2:
        check_same_categories(sources["train"], sources["val"])
    out = config.shards_folder
    manifests: dict[str, Manifest] = {}
    for split, source in sources.items():
        found = (out / split / MANIFEST_NAME).exists()
        manifests[split] = shard_split(
            source,
            split,
            out,
            config.dataset,
            config.shards,
            verify=verify,
            needs_objects=split == "train",
            write_all=_write_with_ray(split, config),
        )
        if verify and found:
            _verify(manifests[split], config)
    return manifests


def _write_with_ray(split: str, config: Config) -> WriteAll:
    def write_all(plans: list[ShardPlan], task: WriteTask) -> Iterator[WrittenShard]:
        return _run(f"shard: {split}", task, plans, config)

    return write_all


def _verify(manifest: Manifest, config: Config) -> None:
    def check(number: int) -> None:
        verify_shard(manifest, number)

    for _ in _run(f"verify: {manifest.split}", check, list(range(len(manifest.shards))), config):
        pass
    logger.info("%s: all %d samples decode", manifest.split, len(manifest.samples))


def _run(what: str, task: Callable[[Any], Any], arguments: list[Any], config: Config) -> Iterator[Any]:
    """The results of a task for each argument, as they come, on one CPU each."""
    resources = config.cluster.resources.shard
    if resources:
        wait_for_room(config.cluster, [1], {"CPU": 1.0} | resources, "shard")
    at_once = config.shards.workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
    with ProgressDisplay(make_console(), what, len(arguments), "shards") as shown:
        for _, result in run_tasks(task, arguments, at_once=at_once, resources=resources):
            shown.advance(1)
            yield result
