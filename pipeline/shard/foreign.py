"""Reads datasets of other formats as COCO documents: YOLO, Pascal VOC and CVAT for images 1.1.

hotcoco reads the label files. This module finds those of each split, and gives hotcoco each image with its label file
in the one layout that it takes, so that no image and no file name is lost: images without objects are kept.
"""

import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import yaml

from pipeline.data.images import PICTURES, BadImageError, read_image_file, shown_size
from pipeline.errors import UserError, shown
from pipeline.log import get_logger

if TYPE_CHECKING:
    from hotcoco import COCO

Format = Literal["yolo", "voc", "cvat"]

SPLITS = {"train": ("train", "trainval"), "val": ("val", "valid", "validation"), "test": ("test",)}
"""The splits, and what others call them."""

YOLO_CLASSES = ("classes.txt", "labels/classes.txt")
"""Where the names of YOLO's classes may stand if there is no YAML file."""

VOC_IMAGES = ("JPEGImages", "images", ".")
"""Where a VOC folder has its images."""

logger = get_logger(__name__)


class Packed(NamedTuple):
    """A file in a tar, by where its content lies."""

    tar: Path
    offset: int
    size: int


@dataclass(frozen=True)
class Split:
    """A split as a COCO document, and the image files of its file names."""

    document: dict[str, Any]
    files: dict[str, Path | Packed]


def read_foreign(kind: Format, source: Path) -> dict[str, Split]:
    """The splits of a dataset by their names, of which `train` is always there.

    Args:
        kind: the format.
        source: the folder of the dataset.

    Raises:
        UserError: a file is missing or cannot be read.
    """
    if not source.is_dir():
        raise UserError(f"{source}: no such folder; give the folder of the dataset")
    splits = READERS[kind](source)
    for split, read in splits.items():
        if not read.files:
            raise UserError(f"{source}: its split `{split}` has no images; put them there, or leave the split out")
    return splits


def _read_yolo(source: Path) -> dict[str, Split]:
    """Ultralytics' and Roboflow's layouts: labels lie beside `images` in `labels`, or with the images."""
    settings, names = _yolo_settings(source)
    folders = {split: _yolo_images(source, split, settings) for split in SPLITS}
    if folders["train"] is None:
        raise UserError(
            f"{source}: no training images: there is no images/train, no train/images and no images folder without "
            "folders in it; name the folder of the training images as `train` in data.yaml"
        )
    found = {}
    for split, images in folders.items():
        if images is None:
            continue
        pictures = _pictures(images)
        labels = _yolo_labels(images, pictures)
        if pictures and not any(file.is_file() for file in labels.values()):
            if split != "test":
                raise UserError(
                    f"{images}: no image of it has a label file, as {next(iter(labels.values()))}; move them there"
                )
            logger.warning("%s: none of its images has a label file: the split is left out", images)
            continue
        found[split] = _yolo_split(pictures, labels, names)
    return found


def _yolo_settings(source: Path) -> tuple[dict[str, Any], list[str]]:
    """What data.yaml says, and the names of the classes, which may stand in classes.txt instead."""
    files = sorted([*source.glob("*.yaml"), *source.glob("*.yml")])
    path = next((file for file in files if file.stem == "data"), files[0] if len(files) == 1 else None)
    settings: Any = {}
    if path is None:
        path = next((source / name for name in YOLO_CLASSES if (source / name).is_file()), None)
        if path is None:
            raise UserError(f"{source}: no data.yaml and no classes.txt; write a data.yaml with the list `names`")
        names: Any = _text(path).strip().splitlines()
    else:
        try:
            settings = yaml.safe_load(_text(path))
        except (ValueError, yaml.YAMLError) as error:
            raise UserError(f"{path}: not YAML ({shown(error)}); mend it") from None
        names = settings.get("names") if isinstance(settings, dict) else None
    if isinstance(names, dict) and sorted(names, key=str) == sorted(range(len(names)), key=str):
        names = [names[number] for number in range(len(names))]
    if not isinstance(names, list) or not names:
        raise UserError(f"{path}: it has no `names`; list the names of the classes, or number them from 0")
    names = [str(name) for name in names]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{path}: two classes have the name {shown(twice)}; give each class its own")
    for split in (name for other in SPLITS.values() for name in other):
        told = settings.get(split)
        if told and (not isinstance(told, str) or told.endswith(".txt")):
            raise UserError(
                f"{path}: its `{split}` is {shown(repr(told))}, not a folder; put the images of the split into one "
                "folder, with their label files, and name that"
            )
    return settings, names


def _yolo_images(source: Path, split: str, settings: Mapping[str, Any]) -> Path | None:
    """The folder of a split's images: as data.yaml says where that is there, else where it usually is."""
    places = []
    for name in SPLITS[split]:
        told = settings.get(name)
        if isinstance(told, str):  # Roboflow writes ../train/images and means train/images
            root = str(settings.get("path") or "")
            places += [source / root / told, source / told, source / re.sub(r"^(\.\./)+", "", told)]
    for name in SPLITS[split]:
        places += [source / "images" / name, source / name / "images"]
    flat = source / "images"
    if split == "train" and flat.is_dir() and not any(path.is_dir() for path in flat.iterdir()):
        places.append(flat)  # with folders in it, it may hold other splits
    return next((place for place in places if place.is_dir()), None)


def _yolo_labels(images: Path, pictures: Mapping[str, Path]) -> dict[str, Path]:
    """Where the label file of each image is, if it has one."""
    parts = images.absolute().parts
    labels = images
    if "images" in parts:
        last = len(parts) - 1 - parts[::-1].index("images")
        beside = Path(*parts[:last], "labels", *parts[last + 1 :])
        labels = beside if beside.is_dir() else images
    others = {file for file in labels.rglob("*.txt") if file.name != "classes.txt"}
    files = {name: labels / Path(name).with_suffix(".txt") for name in pictures}
    _tell_left_out(labels, "label files have no image", {file.name for file in others - {*files.values()}})
    return files


def _yolo_split(pictures: dict[str, Path], files: Mapping[str, Path], names: Sequence[str]) -> Split:
    sizes = {name: _size(file) for name, file in pictures.items()}
    with _staged([*files.values()], "labels") as folder:
        (folder / "images").mkdir()
        for number, file in enumerate(pictures.values(), start=1):
            (folder / "images" / f"{number:012d}.jpg").symlink_to(file.absolute())
        # The names are set below: hotcoco reads few of YAML's ways to write them.
        (folder / "labels/data.yaml").write_text(f"names: {[*range(len(names))]}\n")
        read = _hotcoco().from_yolo(str(folder / "labels"), images_dir=str(folder / "images"))
    document = _named(read.dataset, [*pictures])
    document["categories"] = [{"id": number, "name": name} for number, name in enumerate(names, start=1)]
    return Split(_upright(document, sizes), {**pictures})


def _upright(document: dict[str, Any], sizes: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """The document with boxes for the images as they are shown: YOLO's are fractions, and EXIF may turn an image."""
    scales = {}
    for image in document["images"]:
        width, height = sizes[image["file_name"]]
        scales[image["id"]] = np.array([width / image["width"], height / image["height"]] * 2)
        image["width"], image["height"] = width, height
    for annotation in document["annotations"]:
        annotation["bbox"] = (annotation["bbox"] * scales[annotation["image_id"]]).tolist()
    return document


def _read_voc(source: Path) -> dict[str, Split]:
    """The VOC kit's layout with its lists of each split, or a folder for each split."""
    if (source / "Annotations").is_dir():
        own = _voc_files(source)
        lists = {split: _first_file(source / "ImageSets/Main", SPLITS[split]) for split in SPLITS}
        if lists["train"] is None:
            return {"train": _voc_split(own, source)}
        listed = {split: _listed(own, path) for split, path in lists.items() if path is not None}
        if lists["train"].stem == "trainval" and "val" in listed:
            train = {stem: file for stem, file in listed["train"].labels.items() if stem not in listed["val"].labels}
            listed["train"] = listed["train"]._replace(labels=train)
        return {split: _voc_split(files, source) for split, files in listed.items()}
    folders = split_folders(source) or {"train": source}
    return {split: _voc_split(_voc_files(folder), source) for split, folder in folders.items()}


class _VocFiles(NamedTuple):
    labels: dict[str, Path]
    """XML files by their stems."""
    images: Path
    names: dict[str, str]
    """Names of the images by their stems."""


def _voc_files(folder: Path) -> _VocFiles:
    labels = folder / "Annotations" if (folder / "Annotations").is_dir() else folder
    found = {path.stem: path for path in sorted(labels.glob("*.xml"))}
    if not found:
        raise UserError(f"{labels}: no XML files; give the folder that holds Annotations and JPEGImages")
    images = next(folder / name for name in VOC_IMAGES if (folder / name).is_dir())
    names: dict[str, str] = {}
    for name in _pictures(images):
        stem = Path(name).stem
        if stem in names and stem in found:
            raise UserError(f"{found[stem]}: {images} has {names[stem]} and {name}, one of which must go")
        names[stem] = name
    missing = next((stem for stem in found if stem not in names), None)
    if missing is not None:
        raise UserError(f"{found[missing]}: no image of its name is in {images}; add it, or delete this file")
    _tell_left_out(images, "images have no XML file", {name for stem, name in names.items() if stem not in found})
    return _VocFiles(found, images, names)


def _listed(files: _VocFiles, path: Path) -> _VocFiles:
    """The files that a list of ImageSets/Main names."""
    wanted = [line.split()[0] for line in _text(path).splitlines() if line.strip()]
    missing = next((name for name in wanted if name not in files.labels), None)
    if missing is not None:
        raise UserError(f"{path}: it lists {shown(missing)}, which has no XML file; add it, or take it off the list")
    return files._replace(labels={name: files.labels[name] for name in wanted})


def _voc_split(files: _VocFiles, source: Path) -> Split:
    for path in files.labels.values():
        _refuse_misread(path)
    with _staged([*files.labels.values()], "Annotations") as folder:
        if (source / "labels.txt").is_file():
            shutil.copy(source / "labels.txt", folder)
        read = _hotcoco().from_voc(str(folder))
    names = [files.names[stem] for stem in files.labels]
    document = _named(read.dataset, names)
    return _with_sizes(document, {name: files.images / name for name in names})


def _read_cvat(source: Path) -> dict[str, Split]:
    """CVAT for images 1.1, as it exports a task or a project: one XML, alone or in a folder for each split."""
    folders = split_folders(source) or {"train": source}
    return {split: _cvat_split(folder) for split, folder in folders.items()}


def _cvat_split(folder: Path) -> Split:
    files = sorted(folder.glob("*.xml"))
    if len(files) != 1:
        raise UserError(
            f"{folder}: it holds {len(files)} XML files; there must be one, annotations.xml of CVAT's export"
        )
    _refuse_misread(files[0])
    if b' rotation="' in files[0].read_bytes():
        raise UserError(f"{files[0]}: it has rotated boxes, which would be read as upright; make them polygons in CVAT")
    with warnings.catch_warnings(record=True) as told, _hotcoco_told({str(files[0]): files[0]}):
        warnings.simplefilter("always")
        document = _hotcoco().from_cvat(str(files[0])).dataset
    for warning in told:
        logger.warning("%s", warning.message)
    pictures = _pictures(folder / "images" if (folder / "images").is_dir() else folder)
    for image in document["images"]:
        image["file_name"] = _one_of(pictures, unescape(image["file_name"]), files[0])
    return _with_sizes(document, {image["file_name"]: pictures[image["file_name"]] for image in document["images"]})


def _one_of(pictures: Mapping[str, Path], name: str, annotations: Path) -> str:
    """The image that CVAT means, which may have put it into a folder named as its subset."""
    if name in pictures:
        return name
    ends = [picture for picture in pictures if picture.endswith(f"/{name}")]
    if len(ends) != 1:
        raise UserError(
            f"{annotations}: {len(ends)} images {shown(name)} are beside it, not one; export it with its images"
        )
    return ends[0]


READERS: dict[Format, Callable[[Path], dict[str, Split]]] = {
    "yolo": _read_yolo,
    "voc": _read_voc,
    "cvat": _read_cvat,
}


def _hotcoco() -> "type[COCO]":
    """The reader of the label files, imported only when something is converted."""
    from hotcoco import COCO

    return COCO


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({shown(error)}); save it as UTF-8") from None


def _pictures(folder: Path) -> dict[str, Path]:
    """The image files below a folder by their names relative to it."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES)
    return {path.relative_to(folder).as_posix(): path for path in paths if not path.name.startswith(".")}


def split_folders(source: Path) -> dict[str, Path]:
    """The folders of the splits in a folder, if one for training is there."""
    found = {split: next((source / name for name in names if (source / name).is_dir()), None)
             for split, names in SPLITS.items()}  # fmt: skip
    return {split: folder for split, folder in found.items() if folder is not None} if found["train"] else {}


def _first_file(folder: Path, names: Sequence[str]) -> Path | None:
    return next((folder / f"{name}.txt" for name in names if (folder / f"{name}.txt").is_file()), None)


@contextmanager
def _staged(files: Sequence[Path], folder: str) -> Iterator[Path]:
    """A temporary folder where label files lie numbered from 1; one that is missing is empty there.

    What hotcoco says of a numbered file is raised as a `UserError` of the file itself.
    """
    with tempfile.TemporaryDirectory() as temporary:
        labels = Path(temporary) / folder
        labels.mkdir()
        told_as = {}
        for number, file in enumerate(files, start=1):
            staged = labels / f"{number:012d}{file.suffix}"
            if file.is_file():
                staged.symlink_to(file.absolute())
            else:
                staged.touch()
            told_as[str(staged)] = file
        with _hotcoco_told(told_as):
            yield Path(temporary)


@contextmanager
def _hotcoco_told(files: Mapping[str, Path]) -> Iterator[None]:
    """Raise what hotcoco says of a path as a `UserError` of the file that it stands for."""
    try:
        yield
    except (ValueError, OSError) as error:
        path, file = next((item for item in files.items() if item[0] in str(error)), next(iter(files.items())))
        told = str(error).rpartition(f"{path}: ")[2]
        raise UserError(f"{file}: cannot be read ({shown(told, 400)}); mend it") from error


def _named(document: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The document with the names of the images, which hotcoco numbers in the order of the staged files."""
    assert [image["id"] for image in document["images"]] == [*range(1, len(names) + 1)]
    for image, name in zip(document["images"], names, strict=True):
        image["file_name"] = name
    return document


def _with_sizes(document: dict[str, Any], files: Mapping[str, Path]) -> Split:
    """A split with the size of each image whose label file does not give one."""
    for image in document["images"]:
        if not (image["width"] and image["height"]):
            image["width"], image["height"] = _size(files[image["file_name"]])
    return Split(document, {**files})


def _size(path: Path) -> tuple[int, int]:
    try:
        return shown_size(read_image_file(path))
    except (OSError, BadImageError) as error:
        raise UserError(f"{path}: cannot be read as an image ({error}); replace or delete it") from None


def _refuse_misread(path: Path) -> None:
    """Raise a `UserError` for a name with an entity, of which hotcoco keeps the end alone."""
    if re.search(rb"<name>[^<]*&", path.read_bytes()):
        raise UserError(
            f"{path}: it has a name with `&`, which cannot be read; rename the class without & < > and quotes"
        )


def _tell_left_out(folder: Path, what: str, names: set[str]) -> None:
    if names:
        logger.warning("%s: %d %s, as %s: left out", folder, len(names), what, min(names))
