"""pipeline/shard/foreign.py: every image and box of YOLO, VOC and CVAT folders, and what cannot be read."""

import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.shard.foreign import Format, Split, read_foreign
from tests.builders import write_image
from tests.foreign import NAMES, TRAIN, VAL, boxes_of, copy, draw, write_cvat, write_voc, write_yolo

Layout = Callable[[Path], None]


def yolo_ultralytics(root: Path) -> None:
    for split, document in (("train", TRAIN), ("val", VAL)):
        draw(document, root / "images" / split)
        write_yolo(document, root / "labels" / split)
    names = "".join(f"  {number}: '{name}'  # a class\n" for number, name in enumerate(NAMES))
    (root / "data.yaml").write_text(f"path: ../somewhere\ntrain: images/train\nval: images/val\nnames:\n{names}")


def yolo_roboflow(root: Path) -> None:
    for split, document in (("train", TRAIN), ("valid", VAL)):
        draw(document, root / split / "images")
        write_yolo(document, root / split / "labels")
    (root / "data.yaml").write_text(f"train: ../train/images\nval: ../valid/images\n\nnc: 3\nnames: {NAMES}\n")


def yolo_elsewhere(root: Path) -> None:
    """Folders that data.yaml alone tells, and labels beside the images."""
    for split, document in (("one", TRAIN), ("two", VAL)):
        draw(document, root / "all" / split)
        write_yolo(document, root / "all" / split)
    (root / "cells.yml").write_text(json.dumps({"path": "all", "train": "one", "val": "two", "names": NAMES}))


def voc_kit(root: Path) -> None:
    for split, document in (("train", TRAIN), ("val", VAL)):
        draw(document, root / "JPEGImages")
        write_voc(document, root / "Annotations")
        lists = root / "ImageSets" / "Main"
        lists.mkdir(parents=True, exist_ok=True)
        stems = [Path(image["file_name"]).stem for image in document["images"]]
        (lists / f"{split}.txt").write_text("".join(f"{stem}  1\n" for stem in stems))


def voc_roboflow(root: Path) -> None:
    for split, document in (("train", TRAIN), ("valid", VAL)):
        draw(document, root / split)
        write_voc(document, root / split)


def cvat_folders(root: Path) -> None:
    for split, document in (("train", TRAIN), ("val", VAL)):
        draw(document, root / split / "images")
        write_cvat(document, root / split / "annotations.xml")


def cvat_subset(root: Path) -> None:
    """The images of a subset lie in a folder that their names leave out."""
    for split, document in (("train", TRAIN), ("val", VAL)):
        draw(document, root / split / "images" / "Subset")
        write_cvat(document, root / split / "annotations.xml")


def assert_same_boxes(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-4) -> None:
    """The same images, and the same objects in the same order."""
    ours, theirs = boxes_of(found), boxes_of(expected)
    ours = {Path(name).name: boxes for name, boxes in ours.items()}
    theirs = {Path(name).name: boxes for name, boxes in theirs.items()}
    assert ours.keys() == theirs.keys()
    for name, boxes in theirs.items():
        assert [label for label, _ in ours[name]] == [label for label, _ in boxes]
        for (_, box), (_, other) in zip(ours[name], boxes, strict=True):
            assert box == pytest.approx(other, abs=tolerance)


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("yolo", yolo_ultralytics), ("yolo", yolo_roboflow), ("yolo", yolo_elsewhere),
        ("voc", voc_kit), ("voc", voc_roboflow), ("cvat", cvat_folders), ("cvat", cvat_subset),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_layouts(kind: Format, layout: Layout, tmp_path: Path) -> None:
    layout(tmp_path)
    splits = read_foreign(kind, tmp_path)
    assert splits.keys() == {"train", "val"}
    for split, expected in (("train", TRAIN), ("val", VAL)):
        document = splits[split].document
        assert_same_boxes(document, expected)
        sizes = {Path(image["file_name"]).name: (image["width"], image["height"]) for image in document["images"]}
        assert sizes == {Path(i["file_name"]).name: (i["width"], i["height"]) for i in expected["images"]}
        assert splits[split].files.keys() == {image["file_name"] for image in document["images"]}
        assert all(file.is_file() for file in splits[split].files.values())


class TestRealImages:
    """COCO's own pictures and objects: 80 classes with gaps in their ids, images without objects, crowds."""

    def real(self, shared_data: Path, split: str) -> dict[str, Any]:
        path = shared_data / "tiny_coco" / "annotations" / f"instances_{split}2017.json"
        document: dict[str, Any] = json.loads(path.read_text())
        return document

    def test_yolo(self, shared_data: Path, tmp_path: Path) -> None:
        for split in ("train", "val"):
            document = self.real(shared_data, split)
            copy(document, shared_data / "tiny_coco" / f"{split}2017", tmp_path / "images" / split)
            write_yolo(document, tmp_path / "labels" / split)
        names = [category["name"] for category in document["categories"]]
        (tmp_path / "data.yaml").write_text(json.dumps({"names": names}))
        for split, read in read_foreign("yolo", tmp_path).items():
            expected = self.real(shared_data, split)
            side = max(max(image["width"], image["height"]) for image in expected["images"])
            assert_same_boxes(read.document, expected, tolerance=1e-6 * side)
            assert [category["name"] for category in read.document["categories"]] == names

    def test_voc(self, shared_data: Path, tmp_path: Path) -> None:
        document = self.real(shared_data, "val")
        copy(document, shared_data / "tiny_coco" / "val2017", tmp_path / "JPEGImages")
        write_voc(document, tmp_path / "Annotations")
        read = read_foreign("voc", tmp_path)["train"].document
        assert_same_boxes(read, document)
        crowds = [entry["iscrowd"] for entry in read["annotations"]]
        assert sum(crowds) == sum(entry["iscrowd"] for entry in document["annotations"]) == 5

    def test_cvat(self, shared_data: Path, tmp_path: Path) -> None:
        document = self.real(shared_data, "val")
        copy(document, shared_data / "tiny_coco" / "val2017", tmp_path / "images")
        write_cvat(document, tmp_path / "annotations.xml")
        assert_same_boxes(read_foreign("cvat", tmp_path)["train"].document, document)


def one_image(root: Path, label: str | None = "0 0.5 0.5 0.25 0.5\n", orientation: int | None = None) -> Split:
    """A YOLO folder of an image of 64 x 48, read."""
    write_image(root / "images" / "a.jpg", 64, 48, orientation=orientation)
    (root / "labels").mkdir()
    if label is not None:
        (root / "labels" / "a.txt").write_text(label)
    (root / "data.yaml").write_text("names: [cell]\n")
    return read_foreign("yolo", root)["train"]


class TestYolo:
    def test_an_image_that_exif_turns_has_its_boxes_as_it_is_shown(self, tmp_path: Path) -> None:
        document = one_image(tmp_path, orientation=6).document
        assert document["images"] == [{"id": 1, "file_name": "a.jpg", "width": 48, "height": 64}]
        assert document["annotations"][0]["bbox"] == pytest.approx([18, 16, 12, 32])

    def test_names_from_classes_txt(self, tmp_path: Path) -> None:
        one_image(tmp_path)
        (tmp_path / "data.yaml").unlink()
        (tmp_path / "classes.txt").write_text("red cell\nwhite cell\n")
        document = read_foreign("yolo", tmp_path)["train"].document
        assert document["categories"] == [{"id": 1, "name": "red cell"}, {"id": 2, "name": "white cell"}]

    def test_a_label_file_without_an_image_is_told(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        one_image(tmp_path)
        (tmp_path / "labels" / "lost.txt").write_text("0 0.5 0.5 0.5 0.5\n")
        with caplog.at_level(logging.WARNING):
            assert [*read_foreign("yolo", tmp_path)["train"].files] == ["a.jpg"]
        assert "1 label files have no image, as lost.txt: left out" in caplog.text

    @pytest.mark.parametrize(
        ("label", "told"),
        [
            pytest.param("0 0.5 0.5 0.5 0.5\n1 0.5 0.5 0.5 0.5\n", "line 2: class_idx 1 out of range", id="class"),
            pytest.param("0 0.5 0.5 0.5\n", "line 1: expected 5 fields", id="too few"),
            pytest.param("0 .1 .1 .5 .1 .5 .5\n", "line 1: expected 5 fields", id="polygon"),
            pytest.param("0 0.5 ? 0.5 0.5\n", "line 1: ", id="no number"),
            pytest.param("cell 0.5 0.5 0.5 0.5\n", "line 1: ", id="name"),
        ],
    )
    def test_a_wrong_line(self, label: str, told: str, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=rf"^{re.escape(str(tmp_path))}/labels/a\.txt: cannot be read \({told}"):
            one_image(tmp_path, label)

    def test_a_label_file_that_is_no_text(self, tmp_path: Path) -> None:
        one_image(tmp_path)
        (tmp_path / "labels" / "a.txt").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(UserError, match=r"labels/a\.txt: cannot be read \("):
            read_foreign("yolo", tmp_path)

    def test_labels_that_lie_elsewhere(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"images: no image of it has a label file, as .*/labels/a\.txt;"):
            one_image(tmp_path, label=None)

    def test_a_file_that_is_no_image(self, tmp_path: Path) -> None:
        one_image(tmp_path)
        (tmp_path / "images" / "b.jpg").write_text("text")
        with pytest.raises(UserError, match=r"images/b\.jpg: cannot be read as an image"):
            read_foreign("yolo", tmp_path)

    @pytest.mark.parametrize(
        ("text", "told"),
        [
            pytest.param("nc: 3\n", r"data\.yaml: it has no `names`", id="no names"),
            pytest.param("names: {1: a, 2: b}\n", r"data\.yaml: it has no `names`", id="from 1"),
            pytest.param("names: [a\n", r"data\.yaml: not YAML", id="no YAML"),
            pytest.param("names: [a, b, a]\n", r"data\.yaml: two classes have the name a", id="twice"),
            pytest.param(None, r"no data\.yaml and no classes\.txt", id="none"),
        ],
    )
    def test_names_that_are_missing(self, text: str | None, told: str, tmp_path: Path) -> None:
        one_image(tmp_path)
        (tmp_path / "data.yaml").unlink()
        if text:
            (tmp_path / "data.yaml").write_text(text)
        with pytest.raises(UserError, match=told):
            read_foreign("yolo", tmp_path)

    @pytest.mark.parametrize("told", ["[images/train, images/more]", "train.txt"], ids=["folders", "list"])
    def test_images_that_are_named_otherwise_than_by_a_folder(self, told: str, tmp_path: Path) -> None:
        yolo_ultralytics(tmp_path)
        (tmp_path / "data.yaml").write_text(f"train: {told}\nval: images/val\nnames: {NAMES}\n")
        with pytest.raises(UserError, match=r"data\.yaml: its `train` is .*, not a folder"):
            read_foreign("yolo", tmp_path)

    def test_a_folder_that_is_missing_has_no_other_splits_images_in_its_place(self, tmp_path: Path) -> None:
        yolo_ultralytics(tmp_path)
        for kind in ("images", "labels"):
            (tmp_path / kind / "train").rename(tmp_path / kind / "train2017")
            (tmp_path / kind / "val").rename(tmp_path / kind / "val2017")
        (tmp_path / "data.yaml").write_text(f"train: images/nowhere\nval: images/val2017\nnames: {NAMES}\n")
        with pytest.raises(UserError, match="no training images"):
            read_foreign("yolo", tmp_path)

    def test_a_test_split_without_labels_is_left_out(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        yolo_ultralytics(tmp_path)
        draw(VAL, tmp_path / "images" / "test")
        with caplog.at_level(logging.WARNING):
            assert read_foreign("yolo", tmp_path).keys() == {"train", "val"}
        assert "images/test: none of its images has a label file: the split is left out" in caplog.text

    def test_a_val_split_of_background_alone_is_kept(self, tmp_path: Path) -> None:
        yolo_ultralytics(tmp_path)
        (tmp_path / "labels/val/v.txt").write_text("")
        assert [*read_foreign("yolo", tmp_path)["val"].files] == ["v.jpg"]

    def test_names_that_are_no_text(self, tmp_path: Path) -> None:
        one_image(tmp_path)
        (tmp_path / "data.yaml").unlink()
        (tmp_path / "classes.txt").write_bytes("cell".encode("utf-16"))
        with pytest.raises(UserError, match=r"classes\.txt: cannot be read as text .* save it as UTF-8"):
            read_foreign("yolo", tmp_path)

    def test_no_images(self, tmp_path: Path) -> None:
        (tmp_path / "data.yaml").write_text("names: [cell]\n")
        with pytest.raises(UserError, match="no training images"):
            read_foreign("yolo", tmp_path)
        (tmp_path / "images").mkdir()
        with pytest.raises(UserError, match="`train` has no images"):
            read_foreign("yolo", tmp_path)


class TestVoc:
    def test_an_image_without_an_xml_file_is_told(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        voc_kit(tmp_path)
        write_image(tmp_path / "JPEGImages" / "new.jpg")
        with caplog.at_level(logging.WARNING):
            assert len(read_foreign("voc", tmp_path)["train"].files) == 3
        assert "1 images have no XML file, as new.jpg: left out" in caplog.text

    def test_a_size_of_zero_is_the_images_own(self, tmp_path: Path) -> None:
        voc_kit(tmp_path)
        path = tmp_path / "Annotations" / "v.xml"
        path.write_text(path.read_text().replace("<width>48</width><height>36</height>", "<width>0</width>"))
        assert read_foreign("voc", tmp_path)["val"].document["images"][0]["width"] == 48

    def test_the_order_of_labels_txt(self, tmp_path: Path) -> None:
        voc_kit(tmp_path)
        (tmp_path / "labels.txt").write_text("".join(f"{name}\n" for name in NAMES))
        categories = read_foreign("voc", tmp_path)["train"].document["categories"]
        assert [category["name"] for category in categories] == NAMES

    @pytest.mark.parametrize(
        ("old", "new", "told"),
        [
            pytest.param("<xmin>2</xmin>", "<xmin>two</xmin>", "cannot be read .*two", id="no number"),
            pytest.param("<xmin>2</xmin>", "<xmin>40</xmin>", "cannot be read .*inverted", id="inverted"),
            pytest.param("</annotation>", "<object", "cannot be read .*syntax", id="cut off"),
            pytest.param("white: cell", "white &amp; cell", "a name with `&`", id="entity"),
        ],
    )
    def test_a_wrong_file(self, old: str, new: str, told: str, tmp_path: Path) -> None:
        voc_kit(tmp_path)
        path = tmp_path / "Annotations" / "v.xml"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
        with pytest.raises(UserError, match=rf"^{re.escape(str(path))}: .*{told}"):
            read_foreign("voc", tmp_path)

    def test_trainval_is_read_without_what_val_lists(self, tmp_path: Path) -> None:
        voc_kit(tmp_path)
        lists = tmp_path / "ImageSets" / "Main"
        (lists / "trainval.txt").write_text((lists / "train.txt").read_text() + (lists / "val.txt").read_text())
        (lists / "train.txt").unlink()
        splits = read_foreign("voc", tmp_path)
        assert_same_boxes(splits["train"].document, TRAIN)
        assert_same_boxes(splits["val"].document, VAL)

    def test_a_list_that_is_no_text(self, tmp_path: Path) -> None:
        voc_kit(tmp_path)
        (tmp_path / "ImageSets" / "Main" / "val.txt").write_bytes("v\n".encode("utf-16"))
        with pytest.raises(UserError, match=r"Main/val\.txt: cannot be read as text"):
            read_foreign("voc", tmp_path)

    def test_a_list_of_more_than_there_is(self, tmp_path: Path) -> None:
        voc_kit(tmp_path)
        (tmp_path / "Annotations" / "v.xml").unlink()
        with pytest.raises(UserError, match=r"Main/val\.txt: it lists v, which has no XML file"):
            read_foreign("voc", tmp_path)

    def test_an_xml_file_without_an_image(self, tmp_path: Path) -> None:
        voc_kit(tmp_path)
        (tmp_path / "JPEGImages" / "v.jpg").unlink()
        with pytest.raises(UserError, match=r"Annotations/v\.xml: no image of its name is in .*JPEGImages"):
            read_foreign("voc", tmp_path)

    def test_two_images_of_one_name(self, tmp_path: Path) -> None:
        voc_kit(tmp_path)
        write_image(tmp_path / "JPEGImages" / "v.png")
        with pytest.raises(UserError, match=r"v\.xml: .* has v\.jpg and v\.png, one of which must go"):
            read_foreign("voc", tmp_path)

    def test_no_files(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="no XML files"):
            read_foreign("voc", tmp_path)


class TestCvat:
    def change(self, root: Path, old: str, new: str) -> None:
        cvat_folders(root)
        path = root / "train" / "annotations.xml"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    def test_shapes_that_coco_lacks_are_told(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        self.change(tmp_path, "</image>", '<polyline label="platelet" points="1,1;2,2"/></image>')
        with caplog.at_level(logging.WARNING):
            assert_same_boxes(read_foreign("cvat", tmp_path)["train"].document, TRAIN)
        assert "skipped 3 unsupported shape(s)" in caplog.text

    def test_an_image_whose_name_has_an_entity(self, tmp_path: Path) -> None:
        self.change(tmp_path, "a.jpg", "a&amp;b.jpg")
        write_image(tmp_path / "train" / "images" / "a&b.jpg", 64, 48)
        assert "a&b.jpg" in read_foreign("cvat", tmp_path)["train"].files

    @pytest.mark.parametrize(
        ("old", "new", "told"),
        [
            pytest.param("/>", ' rotation="30.0"/>', "rotated boxes", id="rotated"),
            pytest.param("</image>", "", "cannot be read", id="cut off"),
            pytest.param("a.jpg", "z.jpg", r"0 images z\.jpg are beside it", id="no image"),
            pytest.param("white: cell", "white &lt; cell", "a name with `&`", id="entity"),
            pytest.param("<image ", "<track ", "cannot be read", id="video"),
        ],
    )
    def test_a_wrong_file(self, old: str, new: str, told: str, tmp_path: Path) -> None:
        self.change(tmp_path, old, new)
        with pytest.raises(UserError, match=rf"^{re.escape(str(tmp_path))}/train/annotations\.xml: .*{told}"):
            read_foreign("cvat", tmp_path)

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="it holds 0 XML files"):
            read_foreign("cvat", tmp_path)


def test_what_reads_the_files_is_imported_when_it_reads() -> None:
    code = "import sys, pipeline.shard.foreign; assert 'hotcoco' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        read_foreign("yolo", tmp_path / "nowhere")
