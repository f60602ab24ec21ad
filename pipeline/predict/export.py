"""A detector as one file that needs nothing of this project: an ONNX model, or a program of `torch.export`.

What goes in: `images`, uint8 `[batch, 3, height, width]`, RGB, each a whole picture without padding, resized as
`Detector.prepare` does: with Pillow's bilinear filter, the short side to `short_side` unless the long one were more
than `max_side` then. What comes out, as of `Detector.results`, without a threshold, best first:

    boxes   float32 [batch, k, 4]  left, top, right, bottom in pixels of `images`, not clipped
    scores  float32 [batch, k]
    labels  int64 [batch, k]       category ids; NO_CATEGORY where the logit is none

k is `evaluate.max_detections`, or less where the network has fewer pairs of a query and a class. The categories'
names and the two sides are JSON in the file: the entry `raydetr` of ONNX's metadata, `torch.export.load`'s extra file
of that name.
"""

import importlib.util
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.batch import PixelBatch
from model.detections import best_detections
from pipeline.data.augment import plan_eval
from pipeline.errors import UserError
from pipeline.files import disk_told
from pipeline.predict.detector import Detector

Kind = Literal["onnx", "torch"]
SUFFIXES: dict[Kind, str] = {"onnx": ".onnx", "torch": ".pt2"}
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
"""What writes and runs ONNX."""
OPSET = 18
"""Of ONNX; GridSample is of 16."""
LEAST_SIDE = 64
"""Least height and width of an image, in pixels: two cells of C5."""
NO_CATEGORY = -1
"""Label of a logit that is no category, which only `dataset.labels: coco91` has."""
TOLERANCE = 1e-3
"""Most that an exported detector may differ: of scores, and of a box as a part of the image's sides."""
METADATA = "raydetr"
NAMES = ("boxes", "scores", "labels")

Columns = tuple[Tensor, Tensor, Tensor]
"""Boxes, scores and labels."""


class Exported(NamedTuple):
    """What came of an export: how far the file is from the detector at most."""

    boxes: float
    """As a part of the image's sides."""
    scores: float


class Program(torch.nn.Module):
    """What is exported: the network with what stands before and behind it."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.network = detector.model
        self.class_loss = detector.config.class_loss
        self.top = detector.evaluate.max_detections
        self.register_buffer("category_ids", _category_ids(detector))

    def forward(self, images: Tensor) -> Columns:
        """See the module's docstring."""
        batch, _, height, width = images.shape
        padding = torch.zeros(batch, height, width, dtype=torch.bool, device=images.device)
        outputs = self.network(PixelBatch(images, padding).to(images.device))
        sizes = torch.tensor([[height, width]], device=images.device).expand(batch, 2)
        logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
        scores, labels, boxes, _ = best_detections(logits, boxes, sizes, self.class_loss, self.top)
        return boxes, scores, self.category_ids[labels]  # type: ignore[index]


def _category_ids(detector: Detector) -> Tensor:
    """The category id of every label."""
    ids = [detector.labels.category(label) for label in range(detector.config.num_classes)]
    return torch.tensor([NO_CATEGORY if category_id is None else category_id for category_id in ids])


def export_detector(detector: Detector, out: Path, kind: Kind, size: tuple[int, int] | None) -> Exported:
    """Write a detector as one file, run that, and compare it with the detector.

    Args:
        detector: on the CPU.
        out: file to write; it appears when it was compared.
        kind: `onnx` or `torch`.
        size: height and width of the one image that the file takes at once; batches of images of any size when None.

    Raises:
        UserError: `out` is there, has another suffix or cannot be written, `size` is too small, or None with a Swin
            or ViT, whose windows depend on it, a package is missing, or the file does not find what the detector finds.
    """
    check_export(out, kind, size)
    if size is None and detector.config.has_vision_transformer:
        raise UserError(
            f"{out}: a detector with a {detector.config.backbone}, whose windows have to fit, is exported for images "
            "of one size: give --size HEIGHTxWIDTH, not --dynamic"
        )
    program = _trace(Program(detector), size)
    folder = out.absolute().parent
    with disk_told(out, "--out"), tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=folder) as draft:
        file = Path(draft) / out.name
        told = _metadata(detector)
        run = _write_onnx(program, told, file, size) if kind == "onnx" else _write_torch(program, told, file)
        exported = _compare(detector, run, _pictures(detector, size))
        if max(exported) > TOLERANCE:
            raise UserError(
                f"{out}: not written, as it does not find what the detector finds: boxes differ by {exported.boxes:.1e}"
                f" of the image, scores by {exported.scores:.1e}, and {TOLERANCE:g} is allowed"
            )
        file.replace(out)
    return exported


def check_export(out: Path, kind: Kind, size: tuple[int, int] | None) -> None:
    """Refuse what `export_detector` cannot do, before a detector is loaded; its errors are of there."""
    if out.suffix != SUFFIXES[kind]:
        raise UserError(f"{out}: the name of a file of --to {kind} ends with {SUFFIXES[kind]}")
    if out.exists():
        raise UserError(f"{out}: is there already; delete it, or choose another --out")
    if not out.absolute().parent.is_dir():
        raise UserError(f"{out}: its folder does not exist; make it first")
    if size is not None and min(size) < LEAST_SIDE:
        raise UserError(f"--size {size[0]}x{size[1]}: height and width are {LEAST_SIDE} pixels at least")
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if kind == "onnx" and missing:
        raise UserError(f"--to onnx needs {', '.join(missing)}: pip install {' '.join(missing)}")


def _trace(program: Program, size: tuple[int, int] | None) -> Any:
    """The program of `torch.export`, without the places in our code that its nodes come from."""
    height, width = size or (4 * LEAST_SIDE, 5 * LEAST_SIDE)
    images = torch.zeros(1 if size else 2, 3, height, width, dtype=torch.uint8)
    with torch.no_grad(), _quiet():
        traced = torch.export.export(program, (images,), dynamic_shapes=_dynamic_shapes(size), strict=False)
    for module in traced.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)
    return traced


def _dynamic_shapes(size: tuple[int, int] | None) -> Any:
    if size is not None:
        return None
    height, width = (torch.export.Dim(name, min=LEAST_SIDE) for name in ("height", "width"))
    return ({0: torch.export.Dim("batch"), 2: height, 3: width},)


def _metadata(detector: Detector) -> str:
    sides = {name: getattr(detector.evaluate, name) for name in ("short_side", "max_side")}
    return json.dumps({"categories": detector.labels.to_json()["categories"], **sides})


def _write_onnx(traced: Any, metadata: str, file: Path, size: tuple[int, int] | None) -> Callable[[Tensor], Columns]:
    """Write the model; what runs it."""
    import onnxruntime

    with torch.no_grad(), _quiet():
        made = torch.onnx.export(
            traced, (), dynamo=True, opset_version=OPSET, input_names=["images"], output_names=list(NAMES),
            dynamic_shapes=_dynamic_shapes(size), verbose=False,
        )  # fmt: skip
    assert made is not None
    for node in made.model.graph.all_nodes():
        node.metadata_props.clear()
    made.model.metadata_props[METADATA] = metadata
    made.save(file)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Columns:
        boxes, scores, labels = map(torch.from_numpy, session.run(NAMES, {"images": images.numpy()}))
        return boxes, scores, labels

    return run


def _write_torch(traced: Any, metadata: str, file: Path) -> Callable[[Tensor], Columns]:
    """Write the program; what runs it."""
    torch.export.save(traced, file, extra_files={METADATA: metadata})
    module: Callable[[Tensor], Columns] = torch.export.load(file).module()
    return module


def _pictures(detector: Detector, size: tuple[int, int] | None) -> list[Tensor]:
    """Batches of smooth random images to compare on: two that lie and one that stands, where all may come."""
    sides = (detector.evaluate.short_side, detector.evaluate.max_side)
    shown = [plan_eval(width, height, *sides).size[::-1] for width, height in ((640, 480), (427, 640))]
    sizes = [(1, *size)] if size else [(2, *shown[0]), (1, *shown[1])]
    generator = torch.Generator().manual_seed(0)
    batches = []
    for count, height, width in sizes:
        colors = torch.rand(count, 3, 8, 8, generator=generator) * 255
        whole = (max(height, LEAST_SIDE), max(width, LEAST_SIDE))
        batches.append(F.interpolate(colors, whole, mode="bilinear").to(torch.uint8))
    return batches


def _compare(detector: Detector, run: Callable[[Tensor], Columns], batches: list[Tensor]) -> Exported:
    """The largest differences between what runs and the detector."""
    ids = _category_ids(detector)
    found = []
    for images in batches:
        batch, _, height, width = images.shape
        padding = torch.zeros(batch, height, width, dtype=torch.bool)
        sizes = torch.tensor([[height, width]]).expand(batch, 2)
        wanted = detector.results(PixelBatch(images, padding).to("cpu"), sizes, detector.evaluate.max_detections)
        with torch.no_grad():
            given = zip(*run(images), strict=True)
        for own, other in zip(wanted, given, strict=True):
            found.append(differences((own["boxes"], own["scores"], ids[own["labels"]]), other, (height, width)))
    return Exported(max(each.boxes for each in found), max(each.scores for each in found))


def differences(wanted: Columns, given: Columns, size: tuple[int, int]) -> Exported:
    """How far the detections of an image are from those that are wanted, `[k, 4]`, `[k]` and `[k]`, best first.

    Detections whose scores are equal, but for what the scores differ by, may have changed places, and at the end of the
    list one of them may have been left out: a box is held against the nearest of its label and score.

    Args:
        wanted: boxes in pixels, scores and labels.
        given: the same of another.
        size: height and width of the image.
    """
    if wanted[1].shape != given[1].shape or not torch.isfinite(torch.cat([given[0].flatten(), given[1]])).all():
        return Exported(float("inf"), float("inf"))
    scores = (wanted[1] - given[1]).abs().max()
    slack = 2 * scores + 1e-6
    alike = (wanted[2][:, None] == given[2]) & ((wanted[1][:, None] - given[1]).abs() <= slack)
    height, width = size
    apart = (wanted[0][:, None] - given[0]).abs() / torch.tensor([width, height, width, height])
    nearest = apart.amax(-1).masked_fill(~alike, float("inf")).amin(1)
    is_kept = wanted[1] > wanted[1][-1] + slack
    boxes = torch.cat([nearest[is_kept], nearest.new_zeros(1)]).max()
    return Exported(float(boxes), float(scores))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch and ONNX's optimizer tell of their own doing."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
