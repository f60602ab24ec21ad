"""The manifest of a split's shards: what is in which tar at which offset, and reading it back.

`<out>/<split>/manifest.json` is written last, so a folder that has one is complete. Members are read by `os.pread` with
the offsets of the index; nothing is unpacked.
"""

import hashlib
import json
import math
import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from pipeline.data.labels import LabelMap
from pipeline.errors import UserError, shown
from pipeline.files import write_whole

FORMAT = 1
MANIFEST_NAME = "manifest.json"
OPEN_FILES = 128

Value = TypeVar("Value")


class UnreadableSampleError(Exception):
    """A sample whose bytes are not what the manifest says; the message names the shard, the key and the image id."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of a split: `members` maps a member's extension to its (offset, size) in bytes in the shard."""

    key: str
    image_id: int
    width: int
    height: int
    shard: int
    members: dict[str, tuple[int, int]]

    @property
    def extension(self) -> str:
        """Extension of the image's member: jpg or png."""
        return next(extension for extension in self.members if extension != "json")


@dataclass(frozen=True)
class Shard:
    """One tar and its index."""

    name: str
    bytes: int
    sha256: str
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class Manifest:
    """The shards of a split.

    `source_digest` is that of the COCO files, `settings` how they were sharded, `problems` what was cleaned.
    `folder` is where the shards lie here: it is no part of the content, nor of the digest.
    """

    folder: Path
    split: str
    labels: LabelMap
    source_digest: str
    settings: dict[str, Any]
    shards: tuple[Shard, ...]
    problems: dict[str, int] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        # Cached values are made again where the manifest arrives; open files cannot travel.
        return {name: value for name, value in self.__dict__.items() if name in self.__dataclass_fields__}

    @cached_property
    def samples(self) -> list[Sample]:
        """All samples in the order of the shards."""
        return [sample for shard in self.shards for sample in shard.samples]

    @cached_property
    def shard_sizes(self) -> tuple[int, ...]:
        """Samples of each shard."""
        return tuple(len(shard.samples) for shard in self.shards)

    @cached_property
    def digest(self) -> str:
        """The hex sha256 of the content: the name of this data in orders, checkpoints and the registry."""
        return hashlib.sha256(_canonical(self.to_json())).hexdigest()

    @cached_property
    def reader(self) -> "ShardReader":
        """Reads members; its files stay open in this process."""
        return ShardReader([self.folder / shard.name for shard in self.shards])

    def to_json(self) -> dict[str, Any]:
        """The content, as it is written."""
        labels = self.labels.to_json()
        return {
            "format": FORMAT,
            "split": self.split,
            "categories": labels["categories"],
            "label_map": labels,
            "source_digest": self.source_digest,
            "settings": self.settings,
            "problems": self.problems,
            "shards": [
                {
                    "name": shard.name,
                    "samples": len(shard.samples),
                    "bytes": shard.bytes,
                    "sha256": shard.sha256,
                    "index": [
                        {
                            "key": sample.key,
                            "image_id": sample.image_id,
                            "width": sample.width,
                            "height": sample.height,
                            "members": {name: list(place) for name, place in sample.members.items()},
                        }
                        for sample in shard.samples
                    ],
                }
                for shard in self.shards
            ],
        }


class ShardReader:
    """Reads byte ranges of tars by `os.pread`, keeping at most `OPEN_FILES` descriptors."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths
        self._descriptors: OrderedDict[int, int] = OrderedDict()

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """`size` bytes at `offset` of a shard; fewer only where the file ends. OSError where it cannot be read."""
        return os.pread(self._descriptor(shard), size, offset)

    def _descriptor(self, shard: int) -> int:
        descriptor = self._descriptors.get(shard)
        if descriptor is None:
            descriptor = os.open(self._paths[shard], os.O_RDONLY | os.O_CLOEXEC)
            self._descriptors[shard] = descriptor
            if len(self._descriptors) > OPEN_FILES:
                os.close(self._descriptors.popitem(last=False)[1])
        else:
            self._descriptors.move_to_end(shard)
        return descriptor

    def close(self) -> None:
        """Closes the files; a later read opens them again."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __del__(self) -> None:
        self.close()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder of shards, whose tars are all there.

    Raises:
        UserError: there is none, it is not one that this version reads, or a tar is missing or of another size.
    """
    path = folder / MANIFEST_NAME
    again = f"delete {folder} and shard again"
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such manifest; write the shards first with `raydetr shard`") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}; {again}") from None
    version = content.get("format") if isinstance(content, dict) else None
    if version != FORMAT:
        raise UserError(f"{path}: its format is {version!r}, this version reads {FORMAT}; delete it and shard again")
    try:
        manifest = _from_json(folder, content)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: not a manifest ({shown(repr(error))}); {again}") from None
    for shard in manifest.shards:
        _refuse_other_size(folder / shard.name, shard.bytes, again)
    return manifest


def _refuse_other_size(path: Path, size: int, again: str) -> None:
    try:
        found = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: this shard cannot be read ({error.strerror}); {again}") from error
    if found != size:
        raise UserError(f"{path}: this shard has {found} bytes, the manifest says {size}; {again}")


def write_manifest(manifest: Manifest) -> Path:
    """Writes `manifest.json` into the manifest's folder: to a temporary name, flushed to the disk, then renamed."""
    path = manifest.folder / MANIFEST_NAME
    write_whole(path, _canonical(manifest.to_json()))
    return path


def read_image_bytes(manifest: Manifest, sample: Sample) -> bytes:
    """The source's bytes of a sample's image. Raises `UnreadableSampleError`."""
    return _member(manifest, sample, sample.extension)


def read_annotations(manifest: Manifest, sample: Sample) -> dict[str, Any]:
    """The JSON member of a sample: image_id, file_name, width, height, annotations.

    Raises:
        UnreadableSampleError: it cannot be read, is of another image, or an annotation is not one that is written.
    """
    try:
        content = json.loads(_member(manifest, sample, "json"))
        told = (content["image_id"], content["width"], content["height"])
        matches = told == (sample.image_id, sample.width, sample.height) and isinstance(content["file_name"], str)
        known = manifest.labels.names
        matches = matches and all(_is_annotation(entry, known) for entry in content["annotations"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        matches = False
    if not matches:
        raise UnreadableSampleError(f"{describe(manifest, sample)}: its JSON member is damaged")
    return dict(content)


def _is_annotation(entry: Mapping[str, Any], categories: Mapping[int, str]) -> bool:
    box, area = entry["bbox"], entry["area"]
    numbers = [*box, area]
    return (
        entry["category_id"] in categories
        and entry["iscrowd"] in (0, 1)
        and len(box) == 4
        and all(type(number) in (int, float) and math.isfinite(number) for number in numbers)
    )


def describe(manifest: Manifest, sample: Sample) -> str:
    """Where a sample is, for messages."""
    shard = manifest.folder / manifest.shards[sample.shard].name
    return f"{shard}: sample {shown(sample.key)} (image id {sample.image_id})"


def ground_truth(manifest: Manifest) -> dict[str, Any]:
    """The split as a COCO document: images, annotations with iscrowd and area, categories.

    The annotations are numbered from 1, whatever their ids were: a match with id 0 counts as none in pycocotools.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for sample in manifest.samples:
        try:
            content = read_annotations(manifest, sample)
        except UnreadableSampleError as error:
            raise UserError(f"{error}; delete {manifest.folder} and shard again") from None
        images.append({"id": sample.image_id} | {key: content[key] for key in ("file_name", "width", "height")})
        annotations.extend(content["annotations"])
    numbered = [{**annotation, "id": number} for number, annotation in enumerate(annotations, start=1)]
    return {"images": images, "annotations": numbered, "categories": manifest.labels.to_json()["categories"]}


def _member(manifest: Manifest, sample: Sample, extension: str) -> bytes:
    offset, size = sample.members[extension]
    try:
        content = manifest.reader.read(sample.shard, offset, size)
    except OSError as error:
        raise UnreadableSampleError(f"{describe(manifest, sample)}: cannot be read: {error.strerror}") from error
    if len(content) != size:
        raise UnreadableSampleError(f"{describe(manifest, sample)}: the shard ends before its {extension} member does")
    return content


def _canonical(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _from_json(folder: Path, content: Mapping[str, Any]) -> Manifest:
    shards = tuple(_shard(number, shard) for number, shard in enumerate(content["shards"]))
    if not shards:
        raise ValueError("it has no shards")
    return Manifest(
        folder=folder,
        split=_expect(content["split"], str),
        labels=LabelMap.from_json(content["label_map"]),
        source_digest=_expect(content["source_digest"], str),
        settings=_expect(content["settings"], dict),
        shards=shards,
        problems={_expect(rule, str): _at_least(0, count) for rule, count in content["problems"].items()},
    )


def _shard(number: int, shard: Mapping[str, Any]) -> Shard:
    name = _expect(shard["name"], str)
    if os.path.basename(name) != name or name in ("", ".", "..") or not name.isprintable():
        raise ValueError(f"the shard name {shown(repr(name))} is not one of a file in its folder")
    size = _at_least(0, shard["bytes"])
    samples = tuple(_sample(number, size, entry) for entry in shard["index"])
    return Shard(name, size, _expect(shard["sha256"], str), samples)


def _sample(shard: int, shard_bytes: int, entry: Mapping[str, Any]) -> Sample:
    members = {name: (_at_least(0, offset), _at_least(0, size)) for name, (offset, size) in entry["members"].items()}
    key = _expect(entry["key"], str)
    if len(members) != 2 or "json" not in members:
        raise ValueError(f"sample {shown(key)} has the members {shown(list(members))}, not an image and json")
    if any(offset + size > shard_bytes for offset, size in members.values()):
        raise ValueError(f"sample {shown(key)} lies beyond the {shard_bytes} bytes of its shard")
    image_id, width, height = _at_least(0, entry["image_id"]), entry["width"], entry["height"]
    return Sample(key, image_id, _at_least(1, width), _at_least(1, height), shard, members)


def _expect(value: Any, kind: type[Value]) -> Value:
    if not isinstance(value, kind):
        raise TypeError(f"{shown(repr(value))} is not of the type {kind.__name__}")
    return value


def _at_least(least: int, value: Any) -> int:
    if type(value) is not int or value < least:
        raise ValueError(f"{shown(repr(value))} is not a whole number of at least {least}")
    return value
