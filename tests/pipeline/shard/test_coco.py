import gzip
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import webdataset
from PIL import Image

from pipeline.config.sections import METRICS, ShardsSection
from pipeline.data.manifest import Manifest, read_manifest
from pipeline.data.truth import ground_truth
from pipeline.errors import UserError
from pipeline.evaluate.results import evaluate_files
from pipeline.evaluate.score import score
from pipeline.shard.coco import open_source
from pipeline.shard.write import shard_split, verify_shard
from tests.builders import (
    CocoFiles,
    make_annotation,
    make_dataset_section,
    make_manifest,
    read_coco,
    write_coco,
    write_image,
)

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
        with pytest.raises(UserError, match=r"000000000002\.jpg: image 2: it is missing"):
            read_coco(*files, "fail")
        split = read_coco(*files, "skip")
        assert [image.id for image in split.images] == [1, 3]
        assert split.problems == {"image_missing": 1}

    def test_duplicate_id(self, tmp_path: Path) -> None:
        files = write_coco(tmp_path, [1, {"id": 1, "file_name": "other.jpg"}])
        with pytest.raises(UserError, match=r"image 1: its id is given twice \(000000000001\.jpg, other\.jpg\)"):
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


def shard_here(files: CocoFiles, on_error: Any = "fail", **more: Any) -> Manifest:
    root = files.images.parent
    source = open_source(files.annotations, files.images)
    return shard_split(source, "train", root / "shards", make_dataset_section(root, on_error), ShardsSection(), **more)


CROWDS = [(0, 0), (1, 1), (True, 1), (False, 0), (None, 0), ("0", 0), ("1", 1), (1.0, 1)]


class TestCrowd:
    @pytest.mark.parametrize(("value", "meant"), CROWDS)
    def test_is_read_as_meant(self, tmp_path: Path, value: Any, meant: int) -> None:
        split = read_coco(*write_coco(tmp_path, annotations=[make_annotation(1, 1, iscrowd=value)]), "fail")
        assert split.images[0].annotations[0]["iscrowd"] == meant

    @pytest.mark.parametrize(("value", "meant"), CROWDS)
    def test_means_the_same_in_a_score(self, value: Any, meant: int) -> None:
        box = {"image_id": 1, "category_id": 1, "bbox": [2, 3, 10, 8]}
        truth = {"images": [{"id": 1}], "categories": [{"id": 1}], "annotations": [{**box, "id": 1, "iscrowd": value}]}
        assert score(truth, [{**box, "score": 0.9}])["AP"] == pytest.approx(-1.0 if meant else 1.0)

    @pytest.mark.parametrize("value", ["no", 2, -1, [], {}, "true", 0.5])
    def test_anything_else_is_told(self, tmp_path: Path, value: Any) -> None:
        files = write_coco(tmp_path, annotations=[make_annotation(1, 1, iscrowd=value)])
        with pytest.raises(UserError, match=r"annotation 1 of image 1 .*iscrowd is"):
            read_coco(*files, "fail")
        assert read_coco(*files, "skip").problems == {"crowd_unclear": 1}
        with pytest.raises(UserError, match=r"annotation 1 .*iscrowd is"):
            score(files.annotations, [])


class TestScoredFiles:
    def scores(self, folder: Path, out: Path) -> dict[str, Any]:
        return evaluate_files(folder / "gt.json", folder / "dt.json", out)

    @pytest.mark.parametrize(
        ("name", "told"),
        [("evaluate_ann_null", "`annotations` is null"), ("evaluate_cat_ids_mixed", "ids of numbers and of text")],
    )
    def test_refused(self, shared_data: Path, tmp_path: Path, name: str, told: str) -> None:
        with pytest.raises(UserError, match=told):
            self.scores(shared_data / "dirty" / name, tmp_path)

    @pytest.mark.parametrize("name", ["evaluate_iscrowd_null", "evaluate_cat_markup_close"])
    def test_scored(self, shared_data: Path, tmp_path: Path, name: str) -> None:
        assert self.scores(shared_data / "dirty" / name, tmp_path)["AP"] == pytest.approx(1)

    def test_id_0_keeps_the_number_of_pycocotools_and_is_told(
        self, shared_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level("WARNING", logger="raydetr"):
            assert self.scores(shared_data / "dirty" / "evaluate_ann0_single", tmp_path)["AP"] == 0
        assert [record.message.count("annotation id 0") for record in caplog.records] == [1]

    def test_own_validation_numbers_anew(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        truth = ground_truth(make_manifest(tmp_path, annotations=[make_annotation(0, 1)]))
        found = [{"image_id": 1, "category_id": 1, "bbox": [2, 3, 10, 8], "score": 0.9}]
        assert score(truth, found)["AP"] == pytest.approx(1.0)
        assert "annotation id 0" not in caplog.text

    def test_text_ids_as_pycocotools_takes_them(self) -> None:
        box = {"image_id": "a.jpg", "category_id": "cat", "bbox": [2, 3, 10, 8]}
        truth = {"images": [{"id": "a.jpg"}], "categories": [{"id": "cat"}], "annotations": [{**box, "id": 1}]}
        assert score(truth, [{**box, "score": 0.9}])["AP"] == pytest.approx(1.0)

    @pytest.mark.parametrize("value", [10**400, 1e308, True, "1", None])
    @pytest.mark.parametrize("key", ["image_id", "category_id", "score"])
    def test_odd_detections(self, key: str, value: Any) -> None:
        detection = {"image_id": 1, "category_id": 1, "bbox": [2, 3, 10, 8], "score": 0.9, key: value}
        with pytest.raises(UserError, match=f"entry 0.*{key}"):
            score({"images": [{"id": 1}], "categories": [{"id": 1}]}, [detection])


class TestNothingToTrainOn:
    @pytest.mark.parametrize(
        ("annotations", "told"),
        [
            pytest.param([], "no object to train on: it has none", id="no annotation"),
            pytest.param([make_annotation(1, 1, iscrowd=1)], "its 1 annotations are crowd regions", id="crowds"),
        ],
    )
    def test_is_an_error(self, tmp_path: Path, annotations: Any, told: str) -> None:
        files = write_coco(tmp_path, annotations=annotations)
        with pytest.raises(UserError, match=told):
            shard_here(files, needs_objects=True)
        assert len(shard_here(files).samples) == 3

    @pytest.mark.parametrize("on_error", ["fail", "skip"])
    def test_boxes_in_fractions(self, tmp_path: Path, on_error: Any) -> None:
        boxes = [(0.1, 0.2, 0.3, 0.4), (0.5, 0.5, 0.25, 0.5), (3, 3, 8, 8)]
        annotations = [make_annotation(number, number, box) for number, box in enumerate(boxes, start=1)]
        with pytest.raises(UserError, match=r"2 of its 3 boxes are smaller than a pixel.*fractions"):
            read_coco(*write_coco(tmp_path, annotations=annotations), on_error)

    def test_a_few_tiny_boxes_are_objects(self, tmp_path: Path) -> None:
        annotations = [make_annotation(1, 1), make_annotation(2, 2), make_annotation(3, 3, (4, 4, 0.5, 0.5))]
        assert read_coco(*write_coco(tmp_path, annotations=annotations), "fail").problems == {}


def test_one_picture_under_two_ids(tmp_path: Path) -> None:
    images = [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "./a.jpg"}]
    files = write_coco(tmp_path, images, [make_annotation(1, 1), make_annotation(2, 2)])
    with pytest.raises(UserError, match=r"\./a\.jpg is given under the image ids 1 and 2"):
        read_coco(*files, "fail")
    (image,) = read_coco(*files, "skip").images
    assert [(entry["id"], entry["image_id"]) for entry in image.annotations] == [(1, 1), (2, 1)]


class TestFileNames:
    def outside(self, tmp_path: Path, name: str) -> CocoFiles:
        write_image(tmp_path / "secret.jpg")
        files = write_coco(tmp_path, [{"id": 1, "file_name": "a.jpg"}, 2], [make_annotation(1, 1)])
        document = json.loads(files.annotations.read_text())
        document["images"][0]["file_name"] = name
        files.annotations.write_text(json.dumps(document))
        return files

    def refuse(self, files: CocoFiles, name: str) -> None:
        with pytest.raises(UserError, match=r"leads out of .*dataset\.allow_outside: true") as caught:
            open_source(*files)
        assert name in str(caught.value)
        assert open_source(*files, allow_outside=True).sizes[name]

    @pytest.mark.parametrize("name", ["../secret.jpg", "b/../../secret.jpg"])
    def test_parents(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "train" / "b").mkdir(parents=True)
        self.refuse(self.outside(tmp_path, name), name)

    def test_absolute(self, tmp_path: Path) -> None:
        name = str(tmp_path / "secret.jpg")
        self.refuse(self.outside(tmp_path, name), name)

    @pytest.mark.parametrize("name", ["link.jpg", "link/secret.jpg"])
    def test_symbolic_links(self, tmp_path: Path, name: str) -> None:
        files = self.outside(tmp_path, name)
        (files.images / "link.jpg").symlink_to(tmp_path / "secret.jpg")
        (files.images / "link").symlink_to(tmp_path)
        self.refuse(files, name)

    def test_a_linked_folder_of_images_and_links_inside_are_fine(self, tmp_path: Path) -> None:
        files = write_coco(tmp_path)
        (files.images / "b.jpg").symlink_to("000000000001.jpg")
        (tmp_path / "linked").symlink_to(files.images)
        assert len(read_coco(files.annotations, tmp_path / "linked", "fail").images) == 3
        document = json.loads(files.annotations.read_text())
        document["images"][0]["file_name"] = "b.jpg"
        files.annotations.write_text(json.dumps(document))
        assert len(read_coco(*files, "fail").images) == 3

    @pytest.mark.parametrize("kind", ["pipe", "folder", "huge"])
    def test_what_is_no_file_of_an_image(self, tmp_path: Path, kind: str) -> None:
        files = write_coco(tmp_path, annotations=[make_annotation(1, 2)])
        path = files.images / "000000000001.jpg"
        if kind == "huge":
            os.truncate(path, 2**31)
        else:
            path.unlink()
            os.mkfifo(path) if kind == "pipe" else path.mkdir()
        with pytest.raises(UserError, match=r"000000000001\.jpg: image 1: it cannot be read"):
            read_coco(*files, "fail")
        assert read_coco(*files, "skip").problems == {"image_unreadable": 1}

    def test_a_device(self, tmp_path: Path) -> None:
        files = self.outside(tmp_path, "/dev/zero")
        with pytest.raises(UserError, match="leads out of"):
            open_source(*files)
        write_all = open_source(*files, allow_outside=True)
        assert write_all.sizes["/dev/zero"] is None
        with pytest.raises(UserError, match="it is a device"):
            score(Path("/dev/zero"), [])

    @pytest.mark.parametrize("name", ["caf\udce9.jpg", "a\0b.jpg"])
    def test_what_is_not_utf8(self, tmp_path: Path, name: str) -> None:
        files = self.outside(tmp_path, name)
        with pytest.raises(UserError, match=r"train\.json: .*images\[0\] has `file_name` .*UTF-8") as caught:
            open_source(*files)
        assert str(caught.value).isprintable()

    def test_names_do_not_steer_the_terminal_nor_fill_it(self, tmp_path: Path) -> None:
        for name in ("\x1b[31mred\n.jpg", "x" * 5000 + ".jpg"):
            with pytest.raises(UserError, match="is missing") as caught:
                read_coco(*self.outside(tmp_path, name), "fail")
            assert str(caught.value).isprintable()
            assert len(str(caught.value)) < 1000


class TestFormats:
    @pytest.mark.parametrize(("suffix", "extension"), [("webp", "webp"), ("bmp", "bmp"), ("tiff", "tif")])
    def test_are_stored_untouched(self, tmp_path: Path, suffix: str, extension: str) -> None:
        files = write_coco(tmp_path, [{"id": 1, "file_name": f"a.{suffix}"}], [make_annotation(1, 1)])
        manifest = shard_here(files, verify=True)
        verify_shard(manifest, 0)
        assert manifest.samples[0].extension == extension
        path = str(manifest.folder / "shard-000000.tar")
        (raw,) = webdataset.WebDataset(path, shardshuffle=False)
        assert raw[extension] == (files.images / f"a.{suffix}").read_bytes()
        (sample,) = webdataset.WebDataset(path, shardshuffle=False).decode("pil")
        assert sample[extension].size == (32, 24)

    def test_packed_annotations_are_the_same_data(self, tmp_path: Path) -> None:
        files = write_coco(tmp_path, annotations=[make_annotation(1, 1)])
        packed = tmp_path / "train.json.gz"
        packed.write_bytes(gzip.compress(files.annotations.read_bytes()))
        assert open_source(packed, files.images).digest == open_source(*files).digest
        assert score(packed, []) == score(files.annotations, [])
        packed.write_bytes(packed.read_bytes()[:-12])
        with pytest.raises(UserError, match=r"train\.json\.gz: cannot unpack the annotation file"):
            open_source(packed, files.images)

    def test_damage_and_exif_of_the_reported_files(
        self, shared_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        folder = shared_data / "dirty"
        with Image.open(folder / "pictures" / "zeroed_middle.jpg") as image:
            width, height = image.size
        bad = {"id": 1, "file_name": "zeroed_middle.jpg", "width": width, "height": height}
        files = write_coco(tmp_path / "a", [bad], draw=False)
        source = open_source(files.annotations, folder / "pictures")
        dataset = make_dataset_section(tmp_path / "a")
        with pytest.raises(UserError, match=r"zeroed_middle\.jpg: image 1: it is damaged"):
            shard_split(source, "train", tmp_path / "a" / "shards", dataset, ShardsSection(), verify=True)
        images = [
            {"id": number, "file_name": f"exif{number}_stored.jpg", "width": 64, "height": 48} for number in (3, 6)
        ]
        files = write_coco(tmp_path / "b", images, draw=False)
        source = open_source(files.annotations, folder / "exif")
        for on_error in ("fail", "fail"):  # what is only noted is no reason to refuse the shards that are there
            dataset = make_dataset_section(tmp_path / "b", on_error)
            manifest = shard_split(source, "train", tmp_path / "b" / "shards", dataset, ShardsSection())
        assert manifest.problems == {"exif_rotation_assumed": 1, "exif_rotation_ignored": 1}
        assert caplog.text.count("EXIF turns them") == 2


EXPORTED = {
    "cvat": (
        {"license": 0, "flickr_url": "", "coco_url": "", "date_captured": 0},
        {"attributes": {"occluded": False, "rotation": 0.0}, "segmentation": []},
        {"supercategory": ""},
    ),
    "label studio": ({}, {"ignore": 0, "segmentation": []}, {}),
    "roboflow": ({"license": 1, "date_captured": "2026-11-01T00:00:00+00:00"}, {}, {"supercategory": "none"}),
    "labelme": ({"license": None, "url": None, "date_captured": None}, {"group_id": None}, {"supercategory": None}),
}


@pytest.mark.parametrize("tool", EXPORTED)
@pytest.mark.parametrize("first", [0, 1])
def test_what_annotation_tools_write(tmp_path: Path, tool: str, first: int) -> None:
    """Numbered from 0 or 1, with their own keys, without `iscrowd` and `area`."""
    of_image, of_annotation, of_category = EXPORTED[tool]
    images = [{"id": first + number, **of_image} for number in range(2)]
    annotation = {**make_annotation(first, first, category_id=first), **of_annotation}
    del annotation["iscrowd"], annotation["area"]
    categories = [{"id": first + number, "name": f"kind {number}", **of_category} for number in range(2)]
    files = write_coco(tmp_path, images, [annotation], categories=categories)
    manifest = shard_here(files, needs_objects=True)
    (entry,) = ground_truth(manifest)["annotations"]
    assert (entry["area"], entry["iscrowd"]) == (80, 0)
    found = [{"image_id": first, "category_id": first, "bbox": [2, 3, 10, 8], "score": 0.5}]
    assert score(ground_truth(manifest), found)["AP"] == pytest.approx(1.0)
    assert set(METRICS) <= set(score(files.annotations, found))


def test_text_ids_of_via_are_one_line(tmp_path: Path) -> None:
    files = write_coco(tmp_path, [1], [{**make_annotation(1, 1), "image_id": "1"}])
    with pytest.raises(UserError, match=r"annotations\[0\] has `image_id` '1', it must be a whole number"):
        read_coco(*files, "fail")


class TestShardsThatAreThere:
    @pytest.mark.parametrize("damage", ["missing", "truncated"])
    def test_are_looked_at_before_they_count_as_done(self, tmp_path: Path, damage: str) -> None:
        files = write_coco(tmp_path, annotations=[make_annotation(1, 1)])
        path = shard_here(files).folder / "shard-000000.tar"
        path.unlink() if damage == "missing" else os.truncate(path, 700)
        for use in (lambda: shard_here(files), lambda: read_manifest(path.parent)):
            with pytest.raises(UserError, match=r"shard-000000\.tar: this shard .*delete .* and shard again"):
                use()

    def test_need_no_lock(self, tmp_path: Path) -> None:
        files = write_coco(tmp_path, annotations=[make_annotation(1, 1)])
        manifest = shard_here(files)
        lock = tmp_path / "shards" / ".train.lock"
        lock.unlink()
        assert shard_here(files) == manifest
        assert not lock.exists()
