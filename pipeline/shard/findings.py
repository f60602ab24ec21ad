"""The rules for input that is wrong, and what they find: it stops the work, or is cleaned, counted and listed.

The list is `problems.jsonl` beside the manifest, one JSON object a line: `kind` (the rule), `image` (its file name,
null where there is none of this id), `image_id`, `annotation_id` (null where it is no annotation's, or no whole
number), `position` (from 0 in the file's `annotations`, else null), `key` (that is wrong in it), `told` and `done`.
"""

import json
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from pipeline.config.sections import OnError
from pipeline.data.images import EXIF_ASSUMED, EXIF_IGNORED
from pipeline.errors import UserError, shown
from pipeline.shard.document import is_whole
from pipeline.store import Place

PROBLEMS_NAME = "problems.jsonl"
EXAMPLES = 3
"""Problems of each rule whose messages are kept where they are cleaned."""
BLOCK_BYTES = 2**20


class Rule(NamedTuple):
    """The key of an image or an annotation that is wrong, and what is done about it."""

    key: str
    does: str


RULES: dict[str, Rule] = {
    "image_missing": Rule("file_name", "leave the image out"),
    "image_truncated": Rule("file_name", "leave the image out"),
    "image_unreadable": Rule("file_name", "leave the image out"),
    "image_size_mismatch": Rule("width, height", "leave the image out"),
    "duplicate_image_id": Rule("id", "keep the first one"),
    "image_under_two_ids": Rule("file_name", "give its objects to the first id"),
    "annotation_id_missing": Rule("id", "give it a new id"),
    "duplicate_annotation_id": Rule("id", "give it a new id"),
    "annotation_of_unknown_image": Rule("image_id", "leave the annotation out"),
    "annotation_of_unknown_category": Rule("category_id", "leave the annotation out"),
    "box_malformed": Rule("bbox", "leave the annotation out"),
    "box_not_finite": Rule("bbox", "leave the annotation out"),
    "box_without_area": Rule("bbox", "leave the annotation out"),
    "box_outside_image": Rule("bbox", "leave the annotation out"),
    "box_partly_outside_image": Rule("bbox", "clip the box"),
    "area_not_finite": Rule("area", "use the area of the box"),
    "crowd_unclear": Rule("iscrowd", "leave the annotation out"),
    "segmentation_malformed": Rule("segmentation", "leave the segmentation out"),
}
"""Every rule for input that is wrong and can be cleaned, with what `dataset.on_error: skip` does."""

NOTES: dict[str, str] = {
    EXIF_ASSUMED: "EXIF turns them and the size cannot tell: taken as turned, as viewers show them",
    EXIF_IGNORED: "EXIF turns them and the annotation file has the stored size: taken as stored",
}
"""What is counted, listed and told, whatever `dataset.on_error` says: the input may be right."""


class Where(NamedTuple):
    """The image or the annotation that is wrong; the beginning of a message, whose text is made only for one.

    `file` is the annotation file or the image's, `image` the name that the annotation file gives it.
    """

    file: Place | str
    image: str | None
    image_id: int
    position: int | None = None
    own_id: Any = None

    @property
    def annotation_id(self) -> int | None:
        """The annotation's id, if it is one."""
        return int(self.own_id) if is_whole(self.own_id) else None

    def __str__(self) -> str:
        if self.position is None:
            return f"{shown(self.file, 400)}: image {self.image_id}"
        own_id = self.annotation_id
        name = f"annotations[{self.position}]" if own_id is None else f"annotation {own_id}"
        image = "" if self.image is None else f" ({shown(self.image)})"
        return f"{self.file}: {name} of image {self.image_id}{image}"


class Findings:
    """Applies `on_error` to what the rules find: raises, or counts and lists."""

    def __init__(self, on_error: OnError) -> None:
        self.on_error = on_error
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}
        self._packer = zlib.compressobj(level=1)
        self._packed = bytearray()

    def report(self, rule: str, where: Where, told: str) -> None:
        """Raises `UserError` when on_error is "fail"; otherwise counts and lists it, and the caller cleans."""
        key, does = RULES[rule]
        if self.on_error == "fail":
            raise UserError(f"{where}: {told}. Mend the data, or set dataset.on_error: skip to {does}.")
        self._list(rule, where, key, told, does)
        examples = self.examples.setdefault(rule, [])
        if len(examples) < EXAMPLES:
            examples.append(f"{where}: {told}")

    def note(self, note: str | None, where: Where) -> None:
        """Counts and lists one of `NOTES`."""
        if note is not None:
            self._list(note, where, "width, height", NOTES[note], "nothing")

    def _list(self, kind: str, where: Where, key: str, told: str, done: str) -> None:
        self.counts[kind] += 1
        line = {"kind": kind, "image": where.image, "image_id": where.image_id, "annotation_id": where.annotation_id,
                "position": where.position, "key": key, "told": told, "done": done}  # fmt: skip
        self._packed += self._packer.compress(json.dumps(line).encode() + b"\n")

    @property
    def packed(self) -> bytes:
        """The lines, packed since there may be millions, for `unpacked`; empty where nothing was found."""
        return bytes(self._packed) + self._packer.copy().flush() if self.counts else b""


def unpacked(packed: bytes) -> Iterator[bytes]:
    """The lines that `Findings.packed` holds, in blocks."""
    unpacker = zlib.decompressobj()
    while packed:
        yield unpacker.decompress(packed, BLOCK_BYTES)
        packed = unpacker.unconsumed_tail
    yield unpacker.flush()
