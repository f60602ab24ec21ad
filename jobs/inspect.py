"""What `raydetr inspect` shows: a configured network, or its data."""

from pathlib import Path

from model.complexity import MEAN_SIZE, measure
from pipeline.config.sections import Config
from pipeline.data.cache import cache_of
from pipeline.data.labels import COCO91_LOGITS
from pipeline.data.manifest import read_manifest
from pipeline.errors import UserError
from pipeline.files import disk_told, make_folder
from pipeline.shard.coco import open_split
from pipeline.shard.look import write_look
from pipeline.shard.synthetic import draw_configured


def inspect_model(config: Config, classes: int | None = None) -> dict[str, str]:
    """The network's parts, its size and its cost by name, for people.

    The image has `evaluate.short_side` and the mean shape of COCO's images.

    Args:
        config: the pipeline.
        classes: number of classes; None takes it from the label space or from the shards.
    """
    architecture = config.model_for(classes or _classes(config))
    height = config.evaluate.short_side
    width = min(config.evaluate.max_side, round(height * MEAN_SIZE[1] / MEAN_SIZE[0]))
    complexity = measure(architecture, config.train.freeze_backbone, (height, width))
    return {
        "network": f"{architecture.arch}, {architecture.backbone}, {architecture.num_logits} logits",
        "parameters": f"{complexity.parameters:,}",
        "trained": f"{complexity.trainable:,}",
        "tensors": f"{complexity.tensors}",
        "GFLOPs": f"{complexity.multiply_adds / 1e9:.1f} (multiply-adds of one image of {height} x {width})",
    }


def inspect_data(config: Config, out: Path) -> None:
    """Write the page about both splits of the dataset, which need not be sharded.

    Raises:
        UserError: bad input, or the page cannot be written.
    """
    draw_configured(config.dataset)
    splits = {"train": config.dataset.train, "val": config.dataset.val}
    sources = {name: open_split(config.dataset, split) for name, split in splits.items()}
    make_folder(out.parent, "give another --out")
    with disk_told(out, "another --out"):
        write_look(out, config.dataset.name, sources, config.train.augment)


def _classes(config: Config) -> int:
    if config.dataset.labels == "coco91":
        return COCO91_LOGITS
    try:
        return read_manifest(config.shards_folder / "train", cache_of(config.shards)).labels.num_classes
    except UserError as error:
        raise UserError(f"{error}; or say how many classes there are with --classes") from error
