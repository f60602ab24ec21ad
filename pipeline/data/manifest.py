"""The manifest of a split's shards: what is in which tar, and reading it back.

`<out>/<split>/manifest.json` is written last, so a folder that has one is complete. It is small; where each sample is
stands in the index beside it, and its own sha256 in `manifest.sha256`, as `sha256sum` writes it. Members are read by
`os.pread`; nothing is unpacked.
"""

import hashlib
import json
import math
import os
import re
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from pipeline.data.cache import DEFAULT_CACHE, Cache, FetchAhead
from pipeline.data.index import INDEX_NAME, Index, Member, Sample, open_rows
from pipeline.data.labels import LabelMap
from pipeline.errors import UserError, shown
from pipeline.files import sha256_of, write_whole
from pipeline.store import Place, StorePath, size_of

FORMAT = 2
MANIFEST_NAME = "manifest.json"
SUM_NAME = "manifest.sha256"
ORIGINAL_SIZE = ("original_width", "original_height")
"""What the JSON member of a smaller copy has, with everything else in pixels of the copy."""
OPEN_FILES = 128

Value = TypeVar("Value")


class UnreadableSampleError(Exception):
    """A sample whose bytes are not what the manifest says; the message names the shard, the key and the image id."""


@dataclass(frozen=True)
class Shard:
    """One tar: its file name, the number of its samples, its size and its hex sha256."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The shards of a split, as `read_manifest` gives them.

    `digest` is the hex sha256 of the file: the name of this data in orders, checkpoints and the registry.
    `source_digest` is that of the COCO files, `settings` how they were sharded, `problems` what was cleaned.
    `folder` is where the shards lie. Pickled, it is that path and the digest.
    """

    folder: Place = field(compare=False)
    digest: str
    split: str
    labels: LabelMap
    source_digest: str
    settings: dict[str, Any]
    shards: tuple[Shard, ...]
    problems: dict[str, int]
    samples: Index = field(compare=False, repr=False)
    """All samples in the order of the shards."""
    cache: Cache = field(default=DEFAULT_CACHE, compare=False, repr=False)
    """Where the files of a folder in a store are kept on each machine."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrived, (self.folder, self.digest, self.cache)

    @cached_property
    def shard_sizes(self) -> tuple[int, ...]:
        """Samples of each shard."""
        return tuple(shard.samples for shard in self.shards)

    @cached_property
    def reader(self) -> "ShardReader":
        """Reads members; its files stay open in this process."""
        return ShardReader(self._open)

    def fetch_ahead(self) -> FetchAhead | None:
        """Fetches shards by their numbers in the background, where they lie in a store; else None."""
        folder = self.folder
        if not isinstance(folder, StorePath):
            return None

        def fetch(number: int) -> None:
            shard = self.shards[number]
            self.cache.fetch(folder / shard.name, shard.sha256, shard.bytes, wait=False)

        return FetchAhead(fetch)

    def _open(self, number: int) -> int:
        shard = self.shards[number]
        path = self.folder / shard.name
        if isinstance(path, StorePath):
            return self.cache.open(path, shard.sha256, shard.bytes)
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


class ShardReader:
    """Reads byte ranges of tars by `os.pread`, keeping at most `OPEN_FILES` descriptors.

    Args:
        open_shard: the descriptor of the shard of a number.
    """

    def __init__(self, open_shard: Callable[[int], int]) -> None:
        self._open = open_shard
        self._descriptors: OrderedDict[int, int] = OrderedDict()

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """`size` bytes at `offset` of a shard; fewer only where the file ends. OSError where it cannot be read."""
        return os.pread(self._descriptor(shard), size, offset)

    def _descriptor(self, shard: int) -> int:
        descriptor = self._descriptors.get(shard)
        if descriptor is None:
            descriptor = self._open(shard)
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


def read_manifest(folder: Place, cache: Cache = DEFAULT_CACHE) -> Manifest:
    """The manifest of a folder of shards, whose tars are all there and whose index is the one that was written.

    Args:
        folder: of this machine or in a store.
        cache: where the files of a store are kept on this machine.

    Raises:
        UserError: there is none, it is not one that this version reads or has changed, a tar is missing or of another
            size, or the index is missing or changed.
    """
    manifest, index, index_sha256 = _read(folder, cache)
    again = f"delete {folder} and shard again"
    _refuse_other_sum(folder, manifest.digest, again)
    if isinstance(folder, StorePath):
        sizes = folder.list()
        for shard in manifest.shards:
            _refuse_other_size(folder / shard.name, sizes.get(shard.name), shard.bytes, again)
        again = "delete this copy of it"
    else:
        for shard in manifest.shards:
            _refuse_other_size(folder / shard.name, size_of(folder / shard.name), shard.bytes, again)
    # Read and not mapped: what is mapped and touched counts as this process's memory.
    if sha256_of(index) != index_sha256:
        raise UserError(f"{index}: its sha256 is not the manifest's: the file has changed; {again}")
    return manifest


def write_manifest(
    folder: Place,
    split: str,
    labels: LabelMap,
    source_digest: str,
    settings: dict[str, Any],
    shards: Sequence[Shard],
    problems: Mapping[str, int],
    cache: Cache = DEFAULT_CACHE,
) -> Manifest:
    """Write `manifest.json`, and before it its sum, into a folder that holds its shards and its index, and read it."""
    content = {
        "format": FORMAT,
        "split": split,
        "categories": labels.to_json()["categories"],
        "label_map": labels.to_json(),
        "source_digest": source_digest,
        "settings": settings,
        "problems": dict(sorted(problems.items())),
        "index": {"name": INDEX_NAME, "sha256": sha256_of(folder / INDEX_NAME)},
        "shards": [asdict(shard) for shard in shards],
    }
    text = (json.dumps(content, sort_keys=True, indent=1) + "\n").encode()
    write_whole(folder / SUM_NAME, _sum_line(hashlib.sha256(text).hexdigest()))
    write_whole(folder / MANIFEST_NAME, text)
    return _read(folder, cache)[0]


def _arrived(folder: Place, digest: str, cache: Cache) -> Manifest:
    """The manifest that another process has read and checked."""
    manifest, *_ = _read(folder, cache, digest)
    if manifest.digest != digest:
        raise UserError(f"{folder / MANIFEST_NAME}: it was replaced by another while it was in use; start again")
    return manifest


def _read(folder: Place, cache: Cache, digest: str | None = None) -> tuple[Manifest, Path, str]:
    """The manifest, its files unchecked, its index on this machine, and the sha256 that that has to have.

    A manifest in a store whose digest is known is read from there once a machine.
    """
    path = folder / MANIFEST_NAME
    again = f"delete {folder} and shard again"
    try:
        if isinstance(path, StorePath) and digest is not None:
            text = cache.fetch(path, digest, None).read_bytes()
        else:
            text = path.read_bytes()
        content = json.loads(text)
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
        shards = tuple(_shard(shard) for shard in content["shards"])
        index_sha256 = _sha256(content["index"]["sha256"])
        values = _values(content)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: not a manifest ({shown(repr(error))}); {again}") from None
    sizes = [shard.samples for shard in shards]
    try:
        index = folder / INDEX_NAME
        local = cache.fetch(index, index_sha256, None) if isinstance(index, StorePath) else index
        samples = Index(open_rows(local, sum(sizes)), sizes)
    except OSError as error:
        raise UserError(f"{folder / INDEX_NAME}: cannot be read ({error.strerror}); {again}") from error
    except (ValueError, EOFError) as error:
        raise UserError(f"{folder / INDEX_NAME}: not the index of these shards ({shown(error)}); {again}") from None
    digest = hashlib.sha256(text).hexdigest()
    manifest = Manifest(folder=folder, digest=digest, shards=shards, samples=samples, cache=cache, **values)
    return manifest, local, index_sha256


def _sum_line(digest: str) -> bytes:
    return f"{digest}  {MANIFEST_NAME}\n".encode()


def _refuse_other_sum(folder: Place, digest: str, again: str) -> None:
    """Raise a `UserError` where the sum is another; shards of a release that wrote none are taken as they are."""
    try:
        told = (folder / SUM_NAME).read_bytes()
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{folder / SUM_NAME}: cannot be read ({error.strerror}); {again}") from error
    if told != _sum_line(digest):
        raise UserError(
            f"{folder / MANIFEST_NAME}: its sha256 is not the one in {SUM_NAME}: one of them has changed; {again}"
        )


def _refuse_other_size(path: Place, found: int | None, size: int, again: str) -> None:
    if found is None:
        raise UserError(f"{path}: this shard is missing or cannot be read; {again}")
    if found != size:
        raise UserError(f"{path}: this shard has {found} bytes, the manifest says {size}; {again}")


def read_image_bytes(manifest: Manifest, sample: Sample) -> bytes:
    """The source's bytes of a sample's image. Raises `UnreadableSampleError`."""
    return _content(manifest, sample, sample.image, sample.extension)


def read_annotations(manifest: Manifest, sample: Sample) -> dict[str, Any]:
    """The JSON member of a sample: image_id, file_name, width, height, annotations.

    That of a smaller copy also has the original_width and original_height of its image.

    Raises:
        UnreadableSampleError: it cannot be read, is of another image, or an annotation is not one that is written.
    """
    try:
        content = json.loads(_content(manifest, sample, sample.json, "json"))
        told = (content["image_id"], content["width"], content["height"])
        matches = told == (sample.image_id, sample.width, sample.height) and isinstance(content["file_name"], str)
        known = manifest.labels.names
        matches = matches and all(_is_annotation(entry, known) for entry in content["annotations"])
        original = [content[key] for key in ORIGINAL_SIZE if key in content]
        matches = matches and len(original) in (0, 2) and all(_at_least(1, side) for side in original)
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


def _content(manifest: Manifest, sample: Sample, member: Member, extension: str) -> bytes:
    """The bytes of a member, which are those that were written."""
    shard = manifest.shards[sample.shard]
    if not 0 <= member.offset <= member.offset + member.size <= shard.bytes:
        raise UnreadableSampleError(
            f"{describe(manifest, sample)}: its {extension} member lies beyond the {shard.bytes} bytes of its shard"
        )
    try:
        content = manifest.reader.read(sample.shard, member.offset, member.size)
    except OSError as error:
        raise UnreadableSampleError(f"{describe(manifest, sample)}: cannot be read: {error.strerror}") from error
    if len(content) != member.size:
        raise UnreadableSampleError(f"{describe(manifest, sample)}: the shard ends before its {extension} member does")
    if zlib.crc32(content) != member.crc32:
        raise UnreadableSampleError(f"{describe(manifest, sample)}: the bytes of its {extension} member have changed")
    return content


def _values(content: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest holds beside its shards and its index."""
    if not content["shards"]:
        raise ValueError("it has no shards")
    return {
        "split": _expect(content["split"], str),
        "labels": LabelMap.from_json(content["label_map"]),
        "source_digest": _expect(content["source_digest"], str),
        "settings": _expect(content["settings"], dict),
        "problems": {_expect(rule, str): _at_least(0, count) for rule, count in content["problems"].items()},
    }


def _shard(shard: Mapping[str, Any]) -> Shard:
    name = _expect(shard["name"], str)
    if os.path.basename(name) != name or name in ("", ".", "..") or not name.isprintable():
        raise ValueError(f"the shard name {shown(repr(name))} is not one of a file in its folder")
    return Shard(name, _at_least(1, shard["samples"]), _at_least(0, shard["bytes"]), _sha256(shard["sha256"]))


def _expect(value: Any, kind: type[Value]) -> Value:
    if not isinstance(value, kind):
        raise TypeError(f"{shown(repr(value))} is not of the type {kind.__name__}")
    return value


def _sha256(value: Any) -> str:
    """A sha256 in hex, which names a file of the cache."""
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
        raise ValueError(f"{shown(repr(value))} is not a sha256")
    return value


def _at_least(least: int, value: Any) -> int:
    if type(value) is not int or value < least:
        raise ValueError(f"{shown(repr(value))} is not a whole number of at least {least}")
    return value
