"""A detector that answers: pictures in, detections with category names out.

    detector = Detector.from_checkpoint(Path("runs/demo/checkpoints/checkpoint-900"))
    detector(Path("street.jpg").read_bytes())
    # [{"category_id": 3, "category": "car", "score": 0.91, "bbox": [x, y, width, height]}, ...]

`Detector.save` writes the folder that a registered model carries (weights as safetensors, the rest as JSON).
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file

from model.batch import ImageBatch, PixelBatch
from model.build import build_model
from model.config import DetrConfig
from model.detections import postprocess
from model.weights.files import BackboneOnlyError, load_weights, read_weights, save_tensors
from pipeline.checkpoint.state import STATE, checked_sum, load_model_weights, read_state, weights_in
from pipeline.config.keys import with_keys
from pipeline.config.sections import EvaluateSection
from pipeline.data.augment import plan_eval
from pipeline.data.images import BadImageError, decode_image, shown_size
from pipeline.data.labels import LabelMap
from pipeline.errors import UserError
from pipeline.files import write_json
from pipeline.run_folder import WEIGHTS

FORMAT = 1
SETTINGS = "detector.json"

Detection = dict[str, Any]
"""category_id, category, score, bbox (xywh pixels of the picture, not clipped)."""


class Detector:
    """A network with what it takes to use it: label map and evaluation sizes.

    Args:
        model: the network; it is put into evaluation mode on `device`.
        config: its architecture.
        labels: between its logits and the category ids.
        evaluate: sizes that pictures are resized to, and the most detections of a picture.
        device: where it runs.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        config: DetrConfig,
        labels: LabelMap,
        evaluate: EvaluateSection,
        device: torch.device | str = "cpu",
    ) -> None:
        self.model = model.to(device).eval()
        self.config = config
        self.labels = labels
        self.evaluate = evaluate
        self.device = torch.device(device)

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Path, evaluate: EvaluateSection | None = None, device: torch.device | str = "cpu"
    ) -> "Detector":
        """Load a checkpoint; the sizes are the greatest of its training where `evaluate` is not given.

        Raises:
            UserError: the folder is not a whole checkpoint, or its weights are not as they were written.
        """
        state = read_state(checkpoint)
        checked_sum(checkpoint, state, state.weights)
        if evaluate is None:
            short_side, max_side = state.sizes(checkpoint / STATE)
            evaluate = EvaluateSection(short_side=short_side, max_side=max_side)
        config = state.detr_config(checkpoint / STATE).at_inference()
        model = _with_weights(config, load_model_weights(checkpoint, state.weights), checkpoint)
        return cls(model, config, LabelMap.from_json(state.labels), evaluate, device)

    @classmethod
    def from_weights(
        cls,
        source: Path,
        config: DetrConfig,
        labels: LabelMap,
        evaluate: EvaluateSection,
        device: torch.device | str = "cpu",
    ) -> "Detector":
        """Load weights of any format that `model.weights.read_weights` takes.

        Raises:
            UserError: they cannot be read, or are not those of the architecture.
        """
        try:
            weights = read_weights(weights_in(source))
            classes = weights.with_classes_of(config).num_classes
            if classes != config.num_classes:
                raise UserError(
                    f"{source}: of {classes} classes, and the data has {config.num_classes} (dataset.labels: "
                    f"{labels.kind}); weights are scored on the categories that they were trained on"
                )
            config = config.at_inference()
            model = build_model(config)
            load_weights(model, weights)
        except BackboneOnlyError as error:
            raise UserError(f"{error}; it is for train.init.backbone") from error
        except ValueError as error:
            raise UserError(with_keys(str(error), "model")) from error
        return cls(model, config, labels, evaluate, device)

    @classmethod
    def load(
        cls, folder: Path, evaluate: EvaluateSection | None = None, device: torch.device | str = "cpu"
    ) -> "Detector":
        """Load what `save` wrote; with other sizes than it was saved with where `evaluate` is given.

        Raises:
            UserError: the folder is not one that `save` wrote, or its format is another.
        """
        try:
            settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
            weights = load_file(folder / WEIGHTS)
            found = settings["format"]
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise UserError(f"{folder}: not a folder of a registered detector ({error})") from error
        if found != FORMAT:
            raise UserError(f"{folder / SETTINGS}: format {found!r} is not {FORMAT}, which this reads")
        try:
            config = DetrConfig(**settings["model"])
            labels = LabelMap.from_json(settings["labels"])
            evaluate = evaluate or EvaluateSection(**settings["evaluate"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            reason = f"lacks {error}" if isinstance(error, KeyError) else error
            raise UserError(f"{folder / SETTINGS}: not settings of a detector that this reads: {reason}") from error
        return cls(_with_weights(config, weights, folder), config, labels, evaluate, device)

    def save(self, folder: Path) -> None:
        """Write weights (safetensors) and settings (JSON), which `load` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()}
        save_tensors(weights, folder / WEIGHTS)
        sizes = ("short_side", "max_side", "max_detections")
        settings = {
            "format": FORMAT,
            "model": asdict(self.config),
            "labels": self.labels.to_json(),
            "evaluate": {name: getattr(self.evaluate, name) for name in sizes},
        }
        write_json(folder / SETTINGS, settings)

    def __call__(self, image: bytes | NDArray[np.uint8], score_threshold: float = 0.0) -> list[Detection]:
        """Detect the objects of one picture, best first.

        Args:
            image: an encoded picture, which is turned as its EXIF says, or RGB uint8 [height, width, 3].
            score_threshold: least score.

        Raises:
            UserError: the bytes are not a picture.
        """
        (found,) = self.detect_in([read_picture(image) if isinstance(image, bytes) else image])
        return [entry for entry in found if entry["score"] >= score_threshold]

    def detect_in(self, pictures: Sequence[NDArray[np.uint8]]) -> list[list[Detection]]:
        """Detect the objects of pictures, RGB uint8 [height, width, 3], that go through the network at once.

        Returns:
            Those of each picture, best first.

        Raises:
            UserError: the network gives numbers that are not finite.
        """
        names = self.labels.names
        return [
            [
                {
                    "category_id": entry["category_id"],
                    "category": names[entry["category_id"]],
                    "score": entry["score"],
                    "bbox": entry["bbox"],
                }
                for entry in found
            ]
            for found in self.detect(*self.prepare(pictures))
        ]

    def prepare(self, pictures: Sequence[NDArray[np.uint8]]) -> tuple[ImageBatch, torch.Tensor]:
        """Make a batch of pictures, RGB uint8 [height, width, 3], and their sizes, as `detect` takes them."""
        sizes = [pixels.shape[:2] for pixels in pictures]
        plans = [plan_eval(width, height, self.evaluate.short_side, self.evaluate.max_side) for height, width in sizes]
        resized = [plan.apply_image(pixels) for plan, pixels in zip(plans, pictures, strict=True)]
        return PixelBatch.collate(resized).to(self.device), torch.tensor(sizes)

    def detect(self, batch: ImageBatch, sizes: torch.Tensor) -> list[list[dict[str, Any]]]:
        """Detect the objects of a batch.

        Args:
            batch: normalised images on the detector's device.
            sizes: [batch, 2] height and width of the original images, in pixels.

        Returns:
            For each image category_id, bbox (xywh in original pixels, not clipped) and score, best first; logits that
            are no category are left out.

        Raises:
            UserError: the network gives numbers that are not finite.
        """
        return [_entries(result, self.labels) for result in self.results(batch, sizes, self.evaluate.max_detections)]

    @torch.inference_mode()
    def results(self, batch: ImageBatch, sizes: torch.Tensor, top: int) -> list[dict[str, torch.Tensor]]:
        """Return the `top` best of each image as `postprocess` does; arguments and errors are of `detect`."""
        outputs = self.model(batch)
        logits, boxes = outputs["pred_logits"].float(), outputs["pred_boxes"].float()
        if not bool(torch.isfinite(logits).all() & torch.isfinite(boxes).all()):
            raise UserError("the network gives numbers that are not finite: its weights are spoilt; take others")
        return postprocess(logits, boxes, sizes.to(self.device), self.config.class_loss, top)


def _entries(result: dict[str, torch.Tensor], labels: LabelMap) -> list[dict[str, Any]]:
    """One image's detections with original category ids and xywh boxes."""
    columns = (result["scores"].tolist(), result["labels"].tolist(), result["boxes"].double().tolist())
    entries = []
    for score, label, (left, top, right, bottom) in zip(*columns, strict=True):
        category_id = labels.category(label)
        if category_id is not None:
            box = [left, top, right - left, bottom - top]
            entries.append({"category_id": category_id, "bbox": box, "score": score})
    return entries


def _with_weights(config: DetrConfig, weights: dict[str, torch.Tensor], source: Path) -> torch.nn.Module:
    model = build_model(config)
    try:
        load_weights(model, weights)
    except ValueError as error:
        raise UserError(f"{source}: the weights are not those of its architecture: {error}") from error
    return model


def read_picture(content: bytes) -> NDArray[np.uint8]:
    """Decode a picture to RGB [height, width, 3], turned as its EXIF says: as a viewer shows it, and as in training.

    Raises:
        UserError: it is not a picture of a format that training takes, cut off, or damaged.
    """
    try:
        return decode_image(content, *shown_size(content))
    except BadImageError as error:
        raise UserError(f"these bytes are not a picture that can be used: {error}") from error


def detector_in(folder: Path, evaluate: EvaluateSection | None = None, device: torch.device | str = "cpu") -> Detector:
    """Load the detector of a folder: a checkpoint, a registered model's, or one that `Detector.save` wrote.

    Args:
        folder: where it is.
        evaluate: sizes and the number of detections; those that it was trained or saved with when None.
        device: where it runs.

    Raises:
        UserError: the folder is none of these, or damaged.
    """
    for place in (folder, folder / "artifacts" / "detector"):
        if (place / SETTINGS).is_file():
            return Detector.load(place, evaluate, device)
    if (folder / STATE).is_file():
        return Detector.from_checkpoint(folder, evaluate, device)
    raise UserError(f"{folder}: neither a checkpoint (with {STATE}) nor a registered detector (with {SETTINGS})")
