"""A split as it is scored: in the pixels of the original images, whatever copies of them the shards hold."""

from collections.abc import Sequence
from typing import Any

from pipeline.data.index import Sample
from pipeline.data.manifest import ORIGINAL_SIZE, Manifest, UnreadableSampleError, read_annotations
from pipeline.errors import UserError


def ground_truth(manifest: Manifest, indices: Sequence[int] | None = None) -> dict[str, Any]:
    """The split, or some samples of it, as a COCO document: images, annotations with iscrowd and area, categories.

    Sizes, boxes and areas are those of the original images: of smaller copies they are scaled back, and have the twelve
    digits that survive it. The annotations are numbered from 1, whatever their ids were: a match with id 0 counts as
    none in pycocotools.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for sample in manifest.samples if indices is None else (manifest.samples[index] for index in indices):
        try:
            content = read_annotations(manifest, sample)
        except UnreadableSampleError as error:
            raise UserError(f"{error}; delete {manifest.folder} and shard again") from None
        width, height = _original_size(content)
        images.append({"id": sample.image_id, "file_name": content["file_name"], "width": width, "height": height})
        entries = content["annotations"]
        if (width, height) != (sample.width, sample.height):
            entries = [_restored(entry, width / sample.width, height / sample.height) for entry in entries]
        annotations.extend(entries)
    numbered = [{**annotation, "id": number} for number, annotation in enumerate(annotations, start=1)]
    return {"images": images, "annotations": numbered, "categories": manifest.labels.to_json()["categories"]}


def original_size(manifest: Manifest, sample: Sample) -> tuple[int, int]:
    """(width, height) of the image that a sample is, or is a smaller copy of. Raises `UnreadableSampleError`."""
    if "max_side" not in manifest.settings:
        return sample.width, sample.height
    return _original_size(read_annotations(manifest, sample))


def scaled_box(box: Sequence[float], x: float, y: float) -> list[float]:
    """A box xywh in an image that is scaled by factors."""
    return [box[0] * x, box[1] * y, box[2] * x, box[3] * y]


def _original_size(content: dict[str, Any]) -> tuple[int, int]:
    width, height = (content.get(key, content[key.removeprefix("original_")]) for key in ORIGINAL_SIZE)
    return width, height


def _restored(entry: dict[str, Any], x: float, y: float) -> dict[str, Any]:
    """An annotation of a copy in its original's pixels; without its segmentation, which boxes are scored without."""
    kept = {key: value for key, value in entry.items() if key != "segmentation"}
    box = [_rounded(value) for value in scaled_box(entry["bbox"], x, y)]
    return {**kept, "bbox": box, "area": _rounded(entry["area"] * x * y)}


def _rounded(value: float) -> float:
    return float(f"{value:.12g}")
