"""`raydetr convert`: weights from one format to another."""

from pathlib import Path

from model.build import build_model
from model.config import DetrConfig
from model.weights.files import BackboneOnlyError, export_weights, load_weights, read_weights
from pipeline.checkpoint.state import STATE, read_state, weights_in
from pipeline.config.keys import with_keys
from pipeline.data.labels import LabelMap
from pipeline.errors import UserError


def convert(source: Path, out: Path, to: str, settings: DetrConfig | None = None) -> str:
    """Write the weights in `source` to `out`; every value stays as it is.

    Args:
        source: a file or folder of any format that `read_weights` takes, or a checkpoint of a run.
        out: a file, or a folder for `hf`; nothing may be there.
        to: `raydetr`, `original` or `hf`.
        settings: the architecture, but for the number of classes; what `source` tells when None.

    Returns:
        What was done, and what had to be assumed, as lines for a person.

    Raises:
        UserError: `source` cannot be read, does not fit the settings, or `to` cannot hold it.
    """
    if out.exists():
        raise UserError(f"{out}: is there already; delete it, or choose another name")
    if not out.absolute().parent.is_dir():
        raise UserError(f"{out}: its folder does not exist; make it first")
    names = None
    try:
        weights = read_weights(weights_in(source))
        assumed: list[str] = []
        if (source / STATE).is_file():
            state = read_state(source)
            settings = settings or state.detr_config(source / STATE)
            names = _class_names(LabelMap.from_json(state.labels))
        if settings is not None:
            config = weights.with_classes_of(settings)
        else:
            config = weights.config()
            assumed = [f"model.{name}: {str(getattr(config, name)).lower()}" for name in weights.assumed()]
        model = build_model(config.at_inference())
        report = load_weights(model, weights)
        export_weights(model, out, to, names)
    except BackboneOnlyError as error:
        raise UserError(f"{error}; it is for train.init.backbone") from error
    except ValueError as error:
        raise UserError(with_keys(str(error), "model")) from error
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error})") from error
    lines = [f"{with_keys(str(report), 'model')} to {out} ({to})"]
    if assumed:
        lines.append(f"assumed, as {source} does not tell: {', '.join(assumed)}; if that is wrong, say so with -c FILE")
    return "\n".join(lines)


def _class_names(labels: LabelMap) -> list[str]:
    """A name for each logit, which transformers wants; one that is no category is N/A, as in COCO's models."""
    categories = [labels.category(label) for label in range(labels.num_classes)]
    return ["N/A" if category is None else labels.names[category] for category in categories]
