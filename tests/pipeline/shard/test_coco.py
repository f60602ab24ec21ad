import json
import math
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.shard.coco import open_source
from tests.builders import CocoFiles, make_annotation, read_coco, write_coco

NAN, INF = math.nan, math.inf

RULES_OF_ANNOTATIONS = [
    pytest.param({"bbox": [NAN, 1, 5, 5]}, "box_not_finite", "not finite", id="nan"),
    pytest.param({"bbox": [1, 1, INF, 5]}, "box_not_finite", "not finite", id="infinite"),
    pytest.param({"bbox": [1, 1, 0, 5]}, "box_without_area", "no area", id="zero width"),
    pytest.param({"bbox": [1, 1, 5, -2]}, "box_without_area", "no area", id="negative height"),
    pytest.param({"bbox": [40, 1, 5, 5]}, "box_outside_image", "outside the image of 32x24", id="right of the image"),
    pytest.param({"bbox": [-9, 1, 9, 5]}, "box_outside_image", "outside", id="ends at the left border"),
    pytest.param({"bbox": [1, 2, 3]}, "box_malformed", "is not [x, y, width, height]", id="three numbers"),
    pytest.param({"bbox": "1,2,3,4"}, "box_malformed", "is not [x, y, width, height]", id="text"),
    pytest.param({"bbox": [1, 2, "3", 4]}, "box_malformed", "is not [x, y, width, height]", id="text among numbers"),
    pytest.param({"image_id": 77}, "annotation_of_unknown_image", "no image with this id", id="unknown image"),
    pytest.param({"category_id": 2}, "annotation_of_unknown_category", "no category 2", id="unknown category"),
    pytest.param({"iscrowd": "no"}, "crowd_unclear", "iscrowd is 'no'", id="crowd as text"),
]


def with_bad_annotation(root: Path, bad: dict[str, Any]) -> CocoFiles:
    return write_coco(root, annotations=[make_annotation(1, 1), {**make_annotation(2, 2), **bad}])


@pytest.mark.parametrize(("bad", "rule", "told"), RULES_OF_ANNOTATIONS)
class TestBadAnnotations:
    def test_fail_names_everything(self, tmp_path: Path, bad: dict[str, Any], rule: str, told: str) -> None:
        files = with_bad_annotation(tmp_path, bad)
        with pytest.raises(UserError) as caught:
            read_coco(*files, "fail")
        message = str(caught.value)
        annotation = {**make_annotation(2, 2), **bad}
        assert str(files.annotations) in message
        assert f"annotation {annotation['id']} of image {annotation['image_id']}" in message
        assert told in message
        assert "dataset.on_error: skip" in message
        assert "\n" not in message

    def test_skip_leaves_it_out_and_counts(self, tmp_path: Path, bad: dict[str, Any], rule: str, told: str) -> None:
        split = read_coco(*with_bad_annotation(tmp_path, bad), "skip")
        assert split.problems == {rule: 1}
        assert [annotation["id"] for image in split.images for annotation in image.annotations] == [1]
        assert [image.id for image in split.images] == [1, 2, 3]


class TestBoxesAtTheBorder:
    def test_sticking_out_fails(self, tmp_path: Path) -> None:
        files = write_coco(tmp_path, annotations=[make_annotation(5, 2, (20, 10, 20, 8))])
        with pytest.raises(
            UserError, match=r"annotation 5 of image 2 .*sticks out of the image of 32x24.*clip the box"
        ):
            read_coco(*files, "fail")

    @pytest.mark.parametrize(
        ("box", "clipped"),
        [
            pytest.param((20, 10, 20, 8), [20, 10, 12, 8], id="right"),
            pytest.param((-5, -6, 10, 10), [0, 0, 5, 4], id="left and top"),
            pytest.param((-5, -5, 100, 100), [0, 0, 32, 24], id="all around"),
        ],
    )
    def test_skip_clips(self, tmp_path: Path, box: tuple[int, ...], clipped: list[int]) -> None:
        split = read_coco(*write_coco(tmp_path, annotations=[make_annotation(5, 2, box)]), "skip")
        (annotation,) = split.images[1].annotations
        assert annotation["bbox"] == clipped
        assert annotation["area"] == clipped[2] * clipped[3]
        assert split.problems == {"box_partly_outside_image": 1}

    def test_rounding_is_no_problem_and_stays_as_it_is(self, tmp_path: Path) -> None:
        box = [-0.4, 3.07, 33.2, 20.99]
        split = read_coco(*write_coco(tmp_path, annotations=[make_annotation(5, 2, box, area=77.25)]), "fail")
        assert split.images[1].annotations[0]["bbox"] == box
        assert split.images[1].annotations[0]["area"] == 77.25


class TestAnnotationIds:
    @pytest.mark.parametrize(
        ("bad", "rule", "told"),
        [
            pytest.param({"id": 1}, "duplicate_annotation_id", "annotation 1 of image 2 .*given twice", id="duplicate"),
            pytest.param({"id": None}, "annotation_id_missing", r"annotations\[1\] of image 2 .*has no id", id="null"),
            pytest.param({"id": "a7"}, "annotation_id_missing", "its id is 'a7', not a whole number", id="text"),
        ],
    )
    def test_the_object_is_kept_under_a_new_id(self, tmp_path: Path, bad: Any, rule: str, told: str) -> None:
        files = with_bad_annotation(tmp_path, bad)
        with pytest.raises(UserError, match=told):
            read_coco(*files, "fail")
        split = read_coco(*files, "skip")
        assert split.problems == {rule: 1}
        assert [annotation["id"] for image in split.images for annotation in image.annotations] == [1, 2]

    def test_new_ids_are_those_of_no_other(self, tmp_path: Path) -> None:
        missing = make_annotation(0, 1)
        del missing["id"]
        files = write_coco(tmp_path, annotations=[missing, make_annotation(1, 2), make_annotation(9, 3), missing])
        split = read_coco(*files, "skip")
        assert [[entry["id"] for entry in image.annotations] for image in split.images] == [[10, 11], [1], [9]]


class TestAnnotationValues:
    def test_missing_area_and_crowd_are_filled_in(self, tmp_path: Path) -> None:
        annotation = make_annotation(1, 1, (0, 0, 4, 5))
        del annotation["area"], annotation["iscrowd"]
        split = read_coco(*write_coco(tmp_path, annotations=[annotation]), "fail")
        assert split.images[0].annotations[0]["area"] == 20
        assert split.images[0].annotations[0]["iscrowd"] == 0

    def test_area_that_is_not_finite(self, tmp_path: Path) -> None:
        files = write_coco(tmp_path, annotations=[make_annotation(1, 1, (0, 0, 4, 5), area=NAN)])
        with pytest.raises(UserError, match="area is nan"):
            read_coco(*files, "fail")
        split = read_coco(*files, "skip")
        assert split.images[0].annotations[0]["area"] == 20
        assert split.problems == {"area_not_finite": 1}

    def test_crowd_and_segmentation_stay(self, tmp_path: Path) -> None:
        segmentation = {"counts": [0, 4, 764], "size": [24, 32]}
        crowd = make_annotation(1, 1, iscrowd=1, segmentation=segmentation, attributes={"x": 1})
        split = read_coco(*write_coco(tmp_path, annotations=[crowd]), "fail")
        (annotation,) = split.images[0].annotations
        assert annotation["iscrowd"] == 1
        assert annotation["segmentation"] == segmentation
        assert "attributes" not in annotation


class TestImages:
    def test_missing_file(self, tmp_path: Path) -> None:
        files = write_coco(tmp_path, annotations=[make_annotation(1, 2), make_annotation(2, 3)])
        (files.images / "000000000002.jpg").unlink()
        with pytest.raises(UserError, match=r"000000000002\.jpg: image 2 of .* is missing"):
            read_coco(*files, "fail")
        split = read_coco(*files, "skip")
        assert [image.id for image in split.images] == [1, 3]
        assert split.problems == {"image_missing": 1}

    def test_duplicate_id(self, tmp_path: Path) -> None:
        files = write_coco(tmp_path, [1, {"id": 1, "file_name": "other.jpg"}])
        with pytest.raises(UserError, match=r"image id 1 is given twice \(000000000001\.jpg, other\.jpg\)"):
            read_coco(*files, "fail")
        split = read_coco(*files, "skip")
        assert [image.file_name for image in split.images] == ["000000000001.jpg"]
        assert split.problems == {"duplicate_image_id": 1}

    def test_are_sorted_by_id_and_kept_without_objects(self, tmp_path: Path) -> None:
        split = read_coco(*write_coco(tmp_path, [30, 2, 11], [make_annotation(1, 11)]), "fail")
        assert [(image.id, len(image.annotations)) for image in split.images] == [(2, 0), (11, 1), (30, 0)]

    def test_none_left(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="none of its 3 images is in"):
            read_coco(*write_coco(tmp_path, draw=False), "skip")

    def test_missing_folder(self, tmp_path: Path) -> None:
        files = write_coco(tmp_path)
        with pytest.raises(UserError, match="no such folder of images"):
            read_coco(files.annotations, tmp_path / "nowhere", "skip")


IMAGE = {"id": 1, "file_name": "000000000001.jpg", "width": 32, "height": 24}
CATEGORY = {"id": 1, "name": "cat"}

NOT_COCO = [
    pytest.param("{", "not JSON", id="broken JSON"),
    pytest.param(b"\xff\xd8\xff\xe0", "not JSON", id="an image"),
    pytest.param([], "the top is a list", id="a list"),
    pytest.param({"images": [IMAGE], "categories": [CATEGORY]}, "`annotations` is missing", id="no annotations"),
    pytest.param({"images": {}, "annotations": [], "categories": []}, "`images` is not a list", id="images an object"),
    pytest.param({"images": [], "annotations": [], "categories": [CATEGORY]}, "`images` is empty", id="no images"),
    pytest.param({"images": [IMAGE], "annotations": [], "categories": []}, "`categories` is empty", id="no categories"),
    pytest.param(
        {"images": [{"id": 1}], "annotations": [], "categories": [CATEGORY]},
        "images[0] has no `file_name`",
        id="image without a file name",
    ),
    pytest.param(
        {"images": [{**IMAGE, "id": "x"}], "annotations": [], "categories": [CATEGORY]},
        "images[0] has `id` 'x', it must be a whole number",
        id="image id is text",
    ),
    pytest.param(
        {"images": [{**IMAGE, "id": 10**12}], "annotations": [], "categories": [CATEGORY]},
        "12 digits",
        id="image id of 13 digits",
    ),
    pytest.param(
        {"images": [{**IMAGE, "width": 0}], "annotations": [], "categories": [CATEGORY]},
        "images[0] has `width` 0",
        id="image without width",
    ),
    pytest.param(
        {"images": [IMAGE], "annotations": [{"id": 1, "image_id": 1, "category_id": 1}], "categories": [CATEGORY]},
        "annotations[0] has no `bbox`",
        id="annotation without a box",
    ),
    pytest.param(
        {"images": [IMAGE], "annotations": [7], "categories": [CATEGORY]},
        "annotations[0] is a int",
        id="annotation is a number",
    ),
    pytest.param(
        {"images": [IMAGE], "annotations": [], "categories": [CATEGORY, {"id": 1, "name": "dog"}]},
        "category id 1 is given twice (cat, dog)",
        id="duplicate category",
    ),
]


@pytest.mark.parametrize("on_error", ["fail", "skip"])
@pytest.mark.parametrize(("content", "told"), NOT_COCO)
def test_what_is_not_coco_is_always_refused(tmp_path: Path, content: Any, told: str, on_error: Any) -> None:
    files = write_coco(tmp_path, [1])
    raw = content if isinstance(content, bytes | str) else json.dumps(content)
    files.annotations.write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    with pytest.raises(UserError) as caught:
        read_coco(*files, on_error)
    assert str(files.annotations) in str(caught.value)
    assert told in str(caught.value)


def test_missing_annotation_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such annotation file"):
        read_coco(tmp_path / "none.json", tmp_path, "fail")


class TestDigest:
    def test_follows_annotations_names_and_sizes(self, tmp_path: Path) -> None:
        files = write_coco(tmp_path / "a", annotations=[make_annotation(1, 1)])
        same = write_coco(tmp_path / "b", annotations=[make_annotation(1, 1)])
        digest = open_source(*files).digest
        assert open_source(*same).digest == digest

        image = files.images / "000000000001.jpg"
        image.write_bytes(image.read_bytes() + b"\0")
        grown = open_source(*files).digest
        assert grown != digest
        files.annotations.write_text(files.annotations.read_text() + " ")
        assert open_source(*files).digest not in (digest, grown)

    def test_counts_missing_images(self, tmp_path: Path) -> None:
        files = write_coco(tmp_path)
        digest = open_source(*files).digest
        (files.images / "000000000001.jpg").unlink()
        assert open_source(*files).digest != digest


@pytest.mark.parametrize(
    ("annotations", "images", "count", "objects"),
    [
        ("tiny_coco/annotations/instances_train2017.json", "tiny_coco/train2017", 50, 470),
        ("tiny_coco/annotations/instances_val2017.json", "tiny_coco/val2017", 50, 382),
        ("bccd/annotations/instances_train.json", "bccd/images", 205, 2804),
        ("bccd/annotations/instances_val.json", "bccd/images", 87, 1137),
        ("bccd/annotations/instances_test.json", "bccd/images", 72, 945),
    ],
)
def test_real_data_passes_the_rules(shared_data: Path, annotations: str, images: str, count: int, objects: int) -> None:
    split = read_coco(shared_data / annotations, shared_data / images, "fail")
    assert len(split.images) == count
    assert sum(len(image.annotations) for image in split.images) == objects
    assert split.problems == {}
