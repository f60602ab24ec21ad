"""The page about a dataset."""

import html
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config.sections import AugmentSection
from pipeline.shard.coco import open_source
from pipeline.shard.look import PICTURES, RATIOS, SIDES, VIEWS, _histogram, write_look
from tests.builders import make_annotation, write_coco

AUGMENT = AugmentSection(flip=1.0, crop=0.0, short_sides=(48,), max_side=64)


def page(root: Path, images: Any, annotations: Any, **more: Any) -> str:
    files = write_coco(root, images, annotations, **more)
    write_look(root / "look.html", "cells", {"train": open_source(*files)}, AUGMENT)
    return (root / "look.html").read_text()


def row(text: str, name: str) -> str:
    """The cell beside a name."""
    found = re.search(rf"<td>{re.escape(name)}</td><td[^>]*>([^<]*)</td>", text)
    assert found is not None, name
    return found[1]


def test_counts_what_training_would_get(tmp_path: Path) -> None:
    annotations = [
        make_annotation(1, 1, (0, 0, 10, 10), 1),
        make_annotation(2, 1, (5, 5, 20, 5), 3),
        make_annotation(3, 2, (0, 0, 8, 8), 3, iscrowd=1),
        make_annotation(4, 2, (0, 0, 0, 0), 3),
    ]
    text = page(tmp_path, [1, 2, 3], annotations)
    wanted = {"images": 3, "of them without an object": 2, "objects": 2, "crowd regions": 1, "categories": 3}
    assert {name: int(row(text, name)) for name in wanted} == wanted
    assert (row(text, "cat"), row(text, "dog")) == ("1", "1")
    assert row(text, "box_without_area") == "1"
    assert "dataset.on_error: skip would leave the annotation out" in text
    assert "annotation 4 of image 2" in text
    assert row(text, "8 to 16") == "2"
    assert row(text, "32 x 24") == "3"


def test_shows_pictures_with_their_boxes_as_they_are_and_augmented(tmp_path: Path) -> None:
    text = page(tmp_path, [1], [make_annotation(1, 1, (2, 4, 10, 8), 1)])
    assert text.count("<figure>") == 1 + VIEWS
    boxes = re.findall(r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"', text)
    # Flipped and twice as large: 32 x 24 becomes 64 x 48.
    assert boxes == [("2.0", "4.0", "10.0", "8.0")] + [("40.0", "8.0", "20.0", "16.0")] * VIEWS
    assert "flipped, 64 x 48" in text


def test_shows_a_few_of_many_and_none_that_cannot_be_read(tmp_path: Path) -> None:
    files = write_coco(tmp_path, range(1, 41), [make_annotation(1, 1)])
    (files.images / "000000000040.jpg").write_text("no picture")
    write_look(tmp_path / "look.html", "cells", {"train": open_source(*files)}, AUGMENT)
    text = (tmp_path / "look.html").read_text()
    assert text.count("<figure>") == (PICTURES - 1) * (1 + VIEWS)
    assert row(text, "image_unreadable") == "1"


def test_user_text_stays_text(tmp_path: Path) -> None:
    name = "<script>alert(1)</script>"
    categories = [{"id": 1, "name": name}, {"id": 3, "name": "b"}, {"id": 90, "name": "c"}]
    text = page(tmp_path, [{"id": 1, "file_name": "<b>.jpg"}], [make_annotation(1, 1)], categories=categories)
    assert "<script" not in text
    assert "<b>" not in text
    assert html.escape(name) in text


def test_needs_nothing_beside_it(tmp_path: Path) -> None:
    text = page(tmp_path, [1], [make_annotation(1, 1)])
    assert set(re.findall(r'(?:href|src)="([^"]{1,22})', text)) == {"data:image/jpeg;base64"}


@pytest.mark.parametrize("bounds", [SIDES, RATIOS], ids=["sides", "ratios"])
def test_a_histogram_counts_every_value_once(bounds: tuple[float, ...]) -> None:
    values = np.concatenate([np.asarray(bounds[1:]), np.asarray(bounds[1:]) * 1.01, [1e9]])
    rows = _histogram(values, bounds)
    assert len(rows) == len(bounds)
    assert sum(count for _, count in rows) == len(values)
    assert rows[0] == (f"0 to {bounds[1]:g}", 0)
