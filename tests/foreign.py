"""Writes COCO documents in other formats, for the tests that import them."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.builders import make_annotation, write_image

NAMES = ["red cell", "white: cell", "platelet"]


def make_document(*images: tuple[str, int, int], boxes: Iterable[tuple[str, int, tuple[float, ...]]]) -> dict[str, Any]:
    """A document of images (name, width, height), with boxes (name of the image, category id, xywh)."""
    ids = {image[0]: number for number, image in enumerate(images, start=1)}
    return {
        "images": [{"id": ids[name], "file_name": name, "width": w, "height": h} for name, w, h in images],
        "annotations": [
            make_annotation(number, ids[name], box, category_id)
            for number, (name, category_id, box) in enumerate(boxes, start=1)
        ],
        "categories": [{"id": number, "name": name} for number, name in enumerate(NAMES, start=1)],
    }


TRAIN = make_document(
    ("a.jpg", 64, 48), ("background.png", 32, 32), ("sub/b.c.jpeg", 40, 60),
    boxes=[("a.jpg", 1, (2, 3, 10, 8)), ("a.jpg", 3, (0, 0, 64, 48)), ("sub/b.c.jpeg", 1, (4.5, 6.25, 7, 9))],
)  # fmt: skip
VAL = make_document(("v.jpg", 48, 36), boxes=[("v.jpg", 2, (1, 2, 30, 20))])


def draw(document: dict[str, Any], images: Path) -> None:
    """The images of a document, below a folder."""
    for image in document["images"]:
        write_image(images / image["file_name"], image["width"], image["height"], seed=image["id"])


def copy(document: dict[str, Any], source: Path, images: Path) -> None:
    """The images of a document from another folder."""
    images.mkdir(parents=True, exist_ok=True)
    for image in document["images"]:
        shutil.copy(source / image["file_name"], images)


def write_yolo(document: dict[str, Any], labels: Path) -> None:
    """A label file for each image that has objects; its classes are numbered in the order of the categories."""
    numbers = {category["id"]: number for number, category in enumerate(document["categories"])}
    labels.mkdir(parents=True, exist_ok=True)
    for image, annotations in _of_each_image(document):
        path = labels / Path(image["file_name"]).with_suffix(".txt")
        path.parent.mkdir(exist_ok=True)
        for entry in annotations:
            x, y, w, h = entry["bbox"]
            width, height = image["width"], image["height"]
            values = ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
            with path.open("a") as file:
                file.write(f"{numbers[entry['category_id']]} {' '.join(f'{value:.6f}' for value in values)}\n")


def write_voc(document: dict[str, Any], labels: Path) -> None:
    """An XML file for each image, whose pixels are counted from 1; crowds are difficult objects."""
    names = {category["id"]: category["name"] for category in document["categories"]}
    labels.mkdir(parents=True, exist_ok=True)
    for image, annotations in _of_each_image(document):
        text = f"<annotation><filename>{image['file_name']}</filename><size><width>{image['width']}</width>"
        text += f"<height>{image['height']}</height><depth>3</depth></size>"
        for entry in annotations:
            x, y, w, h = entry["bbox"]
            text += f"<object><name>{names[entry['category_id']]}</name><difficult>{entry['iscrowd']}</difficult>"
            text += f"<bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox>"
            text += "</object>"
        (labels / Path(image["file_name"]).with_suffix(".xml").name).write_text(f"{text}</annotation>\n")


def write_cvat(document: dict[str, Any], path: Path) -> None:
    """CVAT for images 1.1."""
    names = {category["id"]: category["name"] for category in document["categories"]}
    text = "".join(f"<label><name>{name}</name></label>" for name in names.values())
    text = f"<annotations><version>1.1</version><meta><task><labels>{text}</labels></task></meta>\n"
    for image, annotations in _of_each_image(document):
        text += f'<image id="{image["id"]}" name="{image["file_name"]}" width="{image["width"]}"'
        text += f' height="{image["height"]}">\n'
        for entry in annotations:
            x, y, w, h = entry["bbox"]
            text += f'<box label="{names[entry["category_id"]]}" xtl="{x}" ytl="{y}" xbr="{x + w}" ybr="{y + h}"/>\n'
        text += "</image>\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}</annotations>\n")


def boxes_of(document: dict[str, Any]) -> dict[str, list[tuple[str, list[float]]]]:
    """Of each image by its name: the category's name and the box of each object, in their order."""
    names = {category["id"]: category["name"] for category in document["categories"]}
    return {
        image["file_name"]: [(names[entry["category_id"]], entry["bbox"]) for entry in annotations]
        for image, annotations in _of_each_image(document)
    }


def _of_each_image(document: dict[str, Any]) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    own: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in document["images"]}
    for entry in document["annotations"]:
        own[entry["image_id"]].append(entry)
    return [(image, own[image["id"]]) for image in document["images"]]
