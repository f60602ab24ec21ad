"""Pictures of a report: images as JPEG, and over them what is there and what was found, each with how it came out."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pipeline.data.images import BadImageError, Pixels, jpeg_address
from pipeline.data.manifest import UnreadableSampleError
from pipeline.errors import shown
from pipeline.evaluate.diagnose import Diagnosis, LabelError
from pipeline.evaluate.evaluated import Evaluated
from pipeline.log import get_logger

logger = get_logger(__name__)

SIDE, CROP_SIDE, QUALITY = 560, 240, 78
"""Longest side in pixels of a picture and of a part of one, and their JPEG quality: about 60 and 10 kB on the page."""
MOST_FOUND = 50
"""Detections of a picture, the best."""
MARGIN = 0.6
"""What a part shows around a box, as a share of its longer side."""

Rectangle = tuple[float, float, float, float]
"""x, y, width, height in pixels of the image."""


class Mark(NamedTuple):
    """A box on a picture."""

    box: Rectangle
    category: int
    score: float | None
    """Of a detection; of an object the score of the detection that finds it, None where none does."""
    kind: str
    """Of a detection "right", "wrong" or "ignored"; of an object "object" or "crowd"."""


@dataclass(frozen=True)
class Picture:
    """An image, or a part of one, with its boxes."""

    number: int
    title: str
    ap: float | None
    frame: Rectangle
    """The part of the image that is shown."""
    address: str | None
    """The pixels as a `data:` address; None where they cannot be read."""
    objects: list[Mark]
    found: list[Mark]

    def counts(self, least_score: float) -> tuple[int, int, int]:
        """Objects found, detections that are wrong and objects missed, from a score on."""
        kinds = [mark.kind for mark in self.found if mark.score is not None and mark.score >= least_score]
        missed = sum(
            mark.kind == "object" and (mark.score is None or mark.score < least_score) for mark in self.objects
        )
        return kinds.count("right"), kinds.count("wrong"), missed


class Pictures:
    """Makes the pictures of an evaluation. Marks of images: [number] in the order of the documents."""

    def __init__(self, evaluated: Evaluated, diagnosis: Diagnosis, wanted: Iterable[int]) -> None:
        self._evaluated, self._diagnosis = evaluated, diagnosis
        numbers = set(wanted)
        self._ids = {number: image_id for image_id, number in evaluated.truth.images.items()}
        self._annotations = {
            entry["id"]: entry for entry in evaluated.truth.document["annotations"] if entry["image_id"] in numbers
        }
        self._objects: dict[int, list[Mark]] = defaultdict(list)
        for number, entry in self._annotations.items():
            self._objects[entry["image_id"]].append(self._object(number))
        self._found: dict[int, list[Mark]] = defaultdict(list)
        for index, image in enumerate(evaluated.found.images):
            if image in numbers:
                self._found[image].append(self._detection(index + 1))

    def title(self, number: int) -> str:
        """The name of an image's file, or its id where the document tells no name."""
        name = self._evaluated.truth.files[number].rpartition("/")[2]
        return shown(name or f"image {self._ids[number]}")

    def whole(self, number: int) -> Picture | None:
        """An image with all objects and the best detections; None where nobody knows its size."""
        pixels = self._pixels(number)
        size = self._evaluated.truth.sizes[number] or (None if pixels is None else (pixels.shape[1], pixels.shape[0]))
        if size is None:
            return None
        address = None if pixels is None else jpeg_address(pixels, SIDE, QUALITY)
        ranked = sorted(self._found[number], key=lambda mark: -(mark.score or 0))[:MOST_FOUND]
        score = self._diagnosis.images.get(number)
        ap = score.ap if score is not None else None
        frame = (0.0, 0.0, float(size[0]), float(size[1]))
        return Picture(number, self.title(number), ap, frame, address, self._objects[number], ranked)

    def part(self, error: LabelError) -> Picture | None:
        """What a label error is about; None where the image cannot be read."""
        pixels = self._pixels(error.image)
        if pixels is None:
            return None
        width, height = self._evaluated.truth.sizes[error.image] or (pixels.shape[1], pixels.shape[0])
        found = self._detection(error.detection)
        objects = [] if error.annotation is None else [self._object(error.annotation)]
        frame = _around([mark.box for mark in (found, *objects)], width, height)
        x, y = pixels.shape[1] / width, pixels.shape[0] / height
        left, top, right, bottom = (
            round(value) for value in (frame[0] * x, frame[1] * y, (frame[0] + frame[2]) * x, (frame[1] + frame[3]) * y)
        )
        part = pixels[top : max(bottom, top + 1), left : max(right, left + 1)]
        address = jpeg_address(part, CROP_SIDE, QUALITY) if part.size else None
        return Picture(error.image, self.title(error.image), None, frame, address, objects, [found])

    def _pixels(self, number: int) -> Pixels | None:
        if self._evaluated.read is None:
            return None
        try:
            return self._evaluated.read(number)
        except (UnreadableSampleError, BadImageError, OSError) as error:
            logger.warning("image %s is not shown: %s", shown(self._ids[number]), error)
            return None

    def _title(self, number: int) -> str:
        name = self._evaluated.truth.files[number]
        return shown(name.rpartition("/")[2] or f"image {self._ids[number]}")

    def _object(self, number: int) -> Mark:
        entry = self._annotations[number]
        match = self._diagnosis.matches.get(number)
        score = None if match is None else self._evaluated.found.scores[match - 1]
        return Mark(_rectangle(entry["bbox"]), entry["category_id"], score, "crowd" if entry["iscrowd"] else "object")

    def _detection(self, number: int) -> Mark:
        found, index = self._evaluated.found, number - 1
        kind = {"tp": "right", "fp": "wrong"}.get(self._diagnosis.states.get(number, ""), "ignored")
        box = _rectangle(found.shapes[4 * index : 4 * index + 4])
        return Mark(box, found.categories[index], found.scores[index], kind)


def worst_and_best(diagnosis: Diagnosis, worst: int, best: int) -> tuple[list[int], list[int]]:
    """Numbers of the images of the least AP, the least first, and of the greatest; none is among both.

    Images without objects have none.
    """
    scores = {number: score for number, score in diagnosis.images.items() if score.right + score.missed}
    ranked = sorted(
        scores, key=lambda number: (scores[number].ap, -scores[number].missed, -scores[number].wrong, number)
    )
    half = (len(ranked) + 1) // 2
    return ranked[: min(worst, half)], ranked[half:][::-1][:best]


def _around(boxes: Sequence[Rectangle], width: int, height: int) -> Rectangle:
    """A square around boxes with a margin, within the image."""
    left, top = min(box[0] for box in boxes), min(box[1] for box in boxes)
    right, bottom = max(box[0] + box[2] for box in boxes), max(box[1] + box[3] for box in boxes)
    margin = max(MARGIN * max(right - left, bottom - top), 8.0)
    side = max(right - left, bottom - top) + 2 * margin
    across, down = min(side, float(width)), min(side, float(height))
    left = min(max(0.0, (left + right - across) / 2), width - across)
    top = min(max(0.0, (top + bottom - down) / 2), height - down)
    return left, top, across, down


def _rectangle(box: Sequence[float]) -> Rectangle:
    x, y, width, height = box
    return x, y, width, height
