"""What stands in a shard for an image."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.shard.coco import CocoImage
from pipeline.shard.findings import Findings
from pipeline.shard.member import image_member, json_member
from pipeline.shard.origin import open_images
from pipeline.shard.smaller import Smaller
from tests.builders import write_coco

IMAGE = CocoImage(1, "a.jpg", 100, 50, 0, b"[]")


def member(root: Path, findings: Findings, cut: int | None = None, **options: Any) -> Any:
    files = write_coco(root, [{"id": 1, "file_name": "a.jpg", "width": 100, "height": 50}])
    path = files.images / "a.jpg"
    path.write_bytes(path.read_bytes()[:cut])
    return image_member(IMAGE, open_images(files.images), findings, **{"verify": False, "smaller": None, **options})


def test_an_image_stays_byte_for_byte(tmp_path: Path) -> None:
    image, content, extension = member(tmp_path, Findings("fail"), verify=True)
    assert (image, extension) == (IMAGE, "jpg")
    assert content == (tmp_path / "train" / "a.jpg").read_bytes()


def test_a_copy_comes_with_its_own_size(tmp_path: Path) -> None:
    image, content, extension = member(tmp_path, Findings("fail"), smaller=Smaller(40, 90))
    assert (image.width, image.height, image.original, extension) == (40, 20, (100, 50), "jpg")
    assert content != (tmp_path / "train" / "a.jpg").read_bytes()
    told = json.loads(json_member(image))
    assert (told["width"], told["original_width"], told["original_height"]) == (40, 100, 50)


def test_what_cannot_be_used_is_left_out_and_counted(tmp_path: Path) -> None:
    findings = Findings("skip")
    assert member(tmp_path, findings, cut=-20) is None
    assert findings.counts == {"image_truncated": 1}
    with pytest.raises(UserError, match=r"a\.jpg: image 1: the JPEG file is cut off"):
        member(tmp_path, Findings("fail"), cut=-20)


def test_the_json_member_of_an_image_that_is_no_copy() -> None:
    told = {"annotations": [], "file_name": "a.jpg", "height": 50, "image_id": 1, "width": 100}
    assert json.loads(json_member(IMAGE)) == told
