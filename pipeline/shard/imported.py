"""Makes a dataset of another format a folder in COCO's format, with the names that the configuration expects."""

import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import yaml

from pipeline.data.order import permutation
from pipeline.errors import UserError
from pipeline.files import disk_told, make_folder, write_json
from pipeline.log import get_logger
from pipeline.shard.coco import clean, open_source
from pipeline.shard.foreign import Format, Packed, Split, read_foreign
from pipeline.shard.webdataset import read_webdataset

logger = get_logger(__name__)


class Imported(NamedTuple):
    """What an import wrote: images and objects of each split, the number of classes, and a configuration that fits."""

    counts: dict[str, tuple[int, int]]
    categories: int
    config: str


def import_dataset(
    kind: Format | Literal["webdataset"],
    source: Path,
    out: Path,
    val_share: float | None = None,
    categories: Path | None = None,
) -> Imported:
    """Write a dataset of another format as a folder in COCO's format, with the names that the configuration expects.

    Images are hard links where the disk allows it, else copies; those of tars are unpacked. All is written into a
    hidden folder beside `out`, then renamed.

    Args:
        kind: the format.
        source: the folder of the dataset.
        out: the folder to write; nothing may be there.
        val_share: part of the training images that become the validation split, where there is none.
        categories: a JSON file that names the categories of tars.

    Raises:
        UserError: bad input, or `out` is there or cannot be written.
    """
    if out.exists() or out.is_symlink():
        raise UserError(f"{out}: is there already; delete it, or choose another --out")
    if categories is not None and kind != "webdataset":
        raise UserError(f"--categories {categories}: {kind} names its own classes; leave it out")
    read = read_webdataset(source, categories) if kind == "webdataset" else read_foreign(kind, source)
    splits = _same_categories(_with_val(read, source, val_share))
    _tell_shared(splits)
    out = out.absolute()
    make_folder(out.parent, "choose another --out")
    with (
        disk_told(out, "another --out"),
        tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as hidden,
    ):
        unfinished = Path(hidden) / out.name
        problems = [_write(unfinished, split, own, out) for split, own in splits.items()]
        unfinished.rename(out)
    counts = {split: (len(own.files), len(own.document["annotations"])) for split, own in splits.items()}
    return Imported(counts, len(splits["train"].document["categories"]), _config(out, any(problems)))


def _with_val(splits: dict[str, Split], source: Path, share: float | None) -> dict[str, Split]:
    """The splits with one for validation, drawn from the training images where there is none."""
    if "val" in splits:
        if share is not None:
            raise UserError(f"{source}: it has a validation split, so none is drawn; leave --val-share out")
        return splits
    if share is None:
        raise UserError(f"{source}: it has no validation split; add one, or draw one from its images: --val-share 0.1")
    names = sorted(splits["train"].files)
    count = max(1, round(share * len(names)))
    if count == len(names):
        raise UserError(f"{source}: {len(names)} images cannot be split; add images, or a lower --val-share")
    drawn = {names[number] for number in permutation(len(names), np.random.SeedSequence(0))[:count]}
    train = _part(splits["train"], {*names} - drawn)
    return {"train": train, "val": _part(splits["train"], drawn), **{k: v for k, v in splits.items() if k != "train"}}


def _tell_shared(splits: dict[str, Split]) -> None:
    shared = {*splits["train"].files.values()} & {*splits["val"].files.values()}
    if shared:
        logger.warning(
            "%d images are both in train and in val, as %s: scores will be too good", len(shared), min(map(str, shared))
        )


def _part(split: Split, names: set[str]) -> Split:
    images = [image for image in split.document["images"] if image["file_name"] in names]
    ids = {image["id"] for image in images}
    annotations = [annotation for annotation in split.document["annotations"] if annotation["image_id"] in ids]
    document = {**split.document, "images": images, "annotations": annotations}
    return Split(document, {name: file for name, file in split.files.items() if name in names})


def _same_categories(splits: dict[str, Split]) -> dict[str, Split]:
    """Splits whose categories are the same list: a split may lack objects of a class."""
    lists = [split.document["categories"] for split in splits.values()]
    if all(own == lists[0] for own in lists):
        return splits
    names = [category["name"] for split in splits.values() for category in split.document["categories"]]
    ids = {name: number for number, name in enumerate(dict.fromkeys(names), start=1)}
    for split in splits.values():
        own = {category["id"]: ids[category["name"]] for category in split.document["categories"]}
        for annotation in split.document["annotations"]:
            annotation["category_id"] = own[annotation["category_id"]]
        split.document["categories"] = [{"id": number, "name": name} for name, number in ids.items()]
    return splits


def _write(root: Path, split: str, read: Split, out: Path) -> dict[str, int]:
    """Write a split; what `clean` finds in it is told, and returned."""
    images, annotations = root / f"{split}2017", root / "annotations" / f"instances_{split}2017.json"
    for name, file in read.files.items():
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        _link(file, images / name)
    write_json(annotations, read.document, indent=None)
    try:
        checked = clean(open_source(annotations, images), "skip")
    except UserError as error:
        raise UserError(str(error).replace(str(root), str(out))) from None
    for rule, count in checked.problems.items():
        example = checked.examples[rule][0].replace(str(root), str(out))
        logger.warning("%s: %d times %s, as %s", split, count, rule, example)
    return checked.problems


def _link(source: Path | Packed, target: Path) -> None:
    if isinstance(source, Packed):
        with source.tar.open("rb") as file:
            target.write_bytes(os.pread(file.fileno(), source.size, source.offset))
        return
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def _config(out: Path, is_dirty: bool) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", out.name).lstrip("._-") or "imported"
    dataset = {"root": str(out), **({"on_error": "skip"} if is_dirty else {})}
    return yaml.safe_dump({"name": name, "dataset": dataset}, sort_keys=False, allow_unicode=True)
