"""Reads tars as plain webdataset writes them, without a manifest: `<key>.<jpg|png|...>` and `<key>.json` beside it.

A JSON member is that of our own shards, or has `image_id` and `annotations` as in COCO, and perhaps `file_name`,
`width`, `height` and `categories`. Nothing is unpacked here: an image is where it lies in its tar.
"""

import json
import os
import posixpath
import re
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from pipeline.data.images import MOST_BYTES, PICTURES, BadImageError, shown_size
from pipeline.errors import UserError, shown
from pipeline.log import get_logger
from pipeline.shard.coco import NEEDS
from pipeline.shard.document import check_entry, image_id, is_whole, read_document, text
from pipeline.shard.foreign import SPLITS, Packed, Split, split_folders
from pipeline.shard.origin import leads_out

MEMBER = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
"""Key and extension of a member, as webdataset has them: the key ends at the first dot of the file's name."""
READ_BYTES = 2**20

logger = get_logger(__name__)


class _Sample(NamedTuple):
    """Members with one key that lie together, by their extensions."""

    tar: Path
    key: str
    members: dict[str, Packed]

    @property
    def where(self) -> str:
        """What messages call it."""
        return f"{self.tar}: sample {shown(self.key)}"

    def one(self, extensions: tuple[str, ...], what: str) -> tuple[str, Packed]:
        """The one member that is wanted, with its extension."""
        found = [extension for extension in self.members if extension.lower() in extensions]
        if len(found) != 1:
            raise UserError(
                f"{self.where} has {len(found)} {what} ({shown(', '.join(self.members))}); each sample needs one "
                "image and one .json with its image_id and its annotations, side by side"
            )
        return found[0], self.members[found[0]]


class _Read(NamedTuple):
    """What the tars of a split hold."""

    images: list[dict[str, Any]]
    annotations: list[dict[str, Any]]
    files: dict[str, Packed]
    categories: dict[int, str]


def read_webdataset(source: Path, categories: Path | None = None) -> dict[str, Split]:
    """The splits of a folder of tars by their names, of which `train` is always there.

    Args:
        source: the folder; a split is a folder in it, or the tars whose names begin with the split's.
        categories: a JSON file that names the categories, as annotation files and manifests do.

    Raises:
        UserError: a tar is damaged or holds what is no sample.
    """
    read = {split: _read_split(tars) for split, tars in _tars(source).items()}
    names = _named(source, read, categories)
    listed = [{"id": number, "name": name} for number, name in sorted(names.items())]
    return {
        split: Split({"images": own.images, "annotations": own.annotations, "categories": listed}, {**own.files})
        for split, own in read.items()
    }


def _tars(source: Path) -> dict[str, list[Path]]:
    if not source.is_dir():
        raise UserError(f"{source}: no such folder; give the folder of the tars")
    found: dict[str, list[Path]] = {}
    folders = split_folders(source)
    for split, folder in folders.items():
        found[split] = sorted(folder.glob("*.tar"))
        if not found[split]:
            raise UserError(f"{folder}: no .tar files; unpack what is packed (.tar.gz), or take this folder away")
    if folders:
        return found
    for path in sorted(source.glob("*.tar")):
        found.setdefault(_split_of(path), []).append(path)
    if not found:
        raise UserError(f"{source}: no .tar files; unpack what is packed (.tar.gz), or give the folder of the tars")
    if "" in found and len(found) > 1:
        raise UserError(f"{found[''][0]}: its name tells no split, as others do; let it begin with train or val")
    if "" not in found and "train" not in found:
        raise UserError(f"{source}: no tar whose name begins with train; add the training split")
    return {split or "train": tars for split, tars in found.items()}


def _split_of(path: Path) -> str:
    """The split that a tar's name begins with; empty for none."""
    word = re.split("[^a-z]", path.name.lower())[0]
    return next((split for split, names in SPLITS.items() if word in names), "")


def _read_split(tars: list[Path]) -> _Read:
    read = _Read([], [], {}, {})
    for path in tars:
        try:
            with path.open("rb") as file:
                for sample in _samples(path, file):
                    _add(read, sample, file)
        except (OSError, EOFError, ValueError, tarfile.TarError) as error:
            raise UserError(f"{path}: this tar cannot be read ({shown(error)}); copy it again") from error
    ids = {entry["id"] for entry in read.annotations if is_whole(entry.get("id"))}
    if len(ids) < len(read.annotations):  # some count in each image anew
        for number, entry in enumerate(read.annotations, start=1):
            entry["id"] = number
    return read


def _samples(path: Path, file: BinaryIO) -> Iterator[_Sample]:
    """The samples of a tar; members that have no key, as of webdataset's own, are passed over."""
    key, members = "", dict[str, Packed]()
    for name, member in _members(path, file):
        parts = MEMBER.fullmatch(name)
        if parts is None:
            continue
        if parts[1] != key and members:
            yield _Sample(path, key, members)
            members = {}
        key = parts[1]
        if parts[2] in members:
            raise UserError(f"{path}: it has {shown(name)} twice; name each sample by a key of its own")
        members[parts[2]] = member
    if members:
        yield _Sample(path, key, members)


def _members(path: Path, file: BinaryIO) -> Iterator[tuple[str, Packed]]:
    """The files of a tar, which is whole: a damaged header would else look like its end."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            if leads_out(member.name):
                raise UserError(f"{path}: the name {shown(repr(member.name))} leads out of it; write the tar anew")
            if member.isdir():
                continue
            if not member.isreg() or member.issparse():
                raise UserError(f"{path}: {shown(member.name)} is a link or a device; write the tar with its file")
            if member.size > MOST_BYTES:
                raise UserError(f"{path}: {shown(member.name)} has {member.size} bytes, more than {MOST_BYTES}")
            yield posixpath.normpath(member.name), Packed(path, member.offset_data, member.size)
        end = tar.offset
    file.seek(end)
    is_whole_tar = len(rest := file.read(tarfile.BLOCKSIZE)) == tarfile.BLOCKSIZE
    while rest:
        is_whole_tar = is_whole_tar and not any(rest)
        rest = file.read(READ_BYTES)
    if not is_whole_tar:
        raise UserError(f"{path}: this tar is damaged or cut off at byte {end}; copy it again")


def _add(read: _Read, sample: _Sample, file: BinaryIO) -> None:
    """Adds a sample to what is read."""
    extension, image = sample.one(tuple(suffix[1:] for suffix in PICTURES), "images")
    _, member = sample.one(("json",), "JSON members")
    content = _json(sample.where, file, member)
    content.setdefault("file_name", f"{sample.key}.{extension}")
    check_entry(sample.where, "its JSON member", content, {"image_id": image_id, "file_name": text})
    number, name = int(content["image_id"]), posixpath.normpath(content["file_name"])
    if leads_out(name) or name == ".":
        raise UserError(f"{sample.where}: its file_name {shown(repr(name))} leads out of the images' folder; mend it")
    if name in read.files:
        raise UserError(f"{sample.where}: another sample has its file_name {shown(repr(name))}, too; mend one of them")
    width, height = _size(sample.where, content, file, image)
    read.images.append({"id": number, "file_name": name, "width": width, "height": height})
    read.files[name] = image
    for position, entry in enumerate(_list(sample.where, content, "annotations")):
        if isinstance(entry, dict) and entry.setdefault("image_id", number) != number:
            other = shown(repr(entry["image_id"]))
            raise UserError(f"{sample.where}: annotations[{position}] is of image {other}, not of {number}; mend one")
        check_entry(sample.where, f"annotations[{position}]", entry, NEEDS["annotations"])
        read.annotations.append(entry)
    if "categories" in content:
        _add_names(sample.where, read.categories, _list(sample.where, content, "categories"))


def _json(where: str, file: BinaryIO, member: Packed) -> dict[str, Any]:
    try:
        content = json.loads(os.pread(file.fileno(), member.size, member.offset))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: its JSON member is not JSON ({shown(error)}); mend it") from None
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise UserError(f"{where}: its JSON member is a {kind}, not an object with image_id and annotations; mend it")
    return content


def _list(where: str, content: Mapping[str, Any], name: str) -> list[Any]:
    found = content.get(name)
    if not isinstance(found, list):
        raise UserError(f"{where}: its JSON member has no list `{name}`; give it one, which may be empty")
    return found


def _size(where: str, content: Mapping[str, Any], file: BinaryIO, image: Packed) -> tuple[int, int]:
    """Width and height of an image as its JSON member has them, else as it is shown."""
    if "width" in content or "height" in content:
        check_entry(where, "its JSON member", content, {key: NEEDS["images"][key] for key in ("width", "height")})
        return int(content["width"]), int(content["height"])
    try:
        return shown_size(os.pread(file.fileno(), image.size, image.offset))
    except BadImageError as error:
        raise UserError(f"{where}: its image cannot be read ({error}); replace it, or take the sample out") from None


def _add_names(where: str, known: dict[int, str], entries: list[Any]) -> None:
    for position, entry in enumerate(entries):
        check_entry(where, f"categories[{position}]", entry, NEEDS["categories"])
        name = known.setdefault(int(entry["id"]), entry["name"])
        if name != entry["name"]:
            raise UserError(
                f"{where}: category {entry['id']} is {shown(entry['name'])} here and {shown(name)} elsewhere; mend one"
            )


def _named(source: Path, read: Mapping[str, _Read], categories: Path | None) -> dict[int, str]:
    """The names of the categories by their ids: of the file, of the tars, or made of the ids."""
    names: dict[int, str] = {}
    if categories is not None:
        document = read_document(categories, "file of categories")[1]
        entries = document.get("categories") if isinstance(document, dict) else document
        if not isinstance(entries, list):
            raise UserError(f"{categories}: it has no list `categories`; give an annotation file or a manifest.json")
        _add_names(str(categories), names, entries)
        return names
    for split, own in read.items():
        entries = [{"id": number, "name": name} for number, name in own.categories.items()]
        _add_names(f"{source}: {split}", names, entries)
    if not names:
        names = {int(entry["category_id"]): f"category {int(entry['category_id'])}"
                 for own in read.values() for entry in own.annotations}  # fmt: skip
        logger.warning(
            "%s: its tars do not name the categories: they are called after their ids; a file that names them may be "
            "given by --categories (an annotation file, or the manifest.json of the shards)", source
        )  # fmt: skip
    return names
