"""What `raydetr inspect` prints of a configured network."""

from model.complexity import MEAN_SIZE, measure
from pipeline.config.sections import Config
from pipeline.data.labels import COCO91_LOGITS
from pipeline.data.manifest import read_manifest
from pipeline.errors import UserError


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


def _classes(config: Config) -> int:
    if config.dataset.labels == "coco91":
        return COCO91_LOGITS
    try:
        return read_manifest(config.shards_folder / "train").labels.num_classes
    except UserError as error:
        raise UserError(f"{error}; or say how many classes there are with --classes") from error
