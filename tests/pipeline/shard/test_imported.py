"""pipeline/shard/imported.py: the folder that an import writes, whole or not at all."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config.load import load_config
from pipeline.config.sections import ShardsSection
from pipeline.data.truth import ground_truth
from pipeline.errors import UserError
from pipeline.shard.coco import open_split
from pipeline.shard.imported import import_dataset
from pipeline.shard.write import check_same_categories, shard_split
from tests.builders import disk_of
from tests.foreign import TRAIN, VAL, draw, write_cvat, write_yolo
from tests.pipeline.shard.test_foreign import assert_same_boxes, one_image, voc_roboflow, yolo_ultralytics


def document_of(out: Path, split: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((out / "annotations" / f"instances_{split}2017.json").read_text())
    return document


def test_what_is_printed_is_a_configuration_of_what_is_written(tmp_path: Path) -> None:
    yolo_ultralytics(tmp_path / "yolo")
    out = tmp_path / "made" / "my cells"
    imported = import_dataset("yolo", tmp_path / "yolo", out)
    assert imported.counts == {"train": (3, 3), "val": (1, 1)}
    assert imported.categories == 3
    assert yaml.safe_load(imported.config) == {"name": "my-cells", "dataset": {"root": str(out)}}
    (tmp_path / "my.yaml").write_text(imported.config)
    dataset = load_config(tmp_path / "my.yaml").dataset
    sources = {"train": open_split(dataset, dataset.train), "val": open_split(dataset, dataset.val)}
    check_same_categories(*sources.values())
    for (split, source), expected in zip(sources.items(), (TRAIN, VAL), strict=True):
        manifest = shard_split(source, split, tmp_path / "shards", dataset, ShardsSection())
        assert not manifest.problems
        assert_same_boxes(ground_truth(manifest), expected)


def test_images_are_hard_links(tmp_path: Path) -> None:
    yolo_ultralytics(tmp_path / "yolo")
    import_dataset("yolo", tmp_path / "yolo", tmp_path / "out")
    source, written = tmp_path / "yolo/images/train/sub/b.c.jpeg", tmp_path / "out/train2017/sub/b.c.jpeg"
    assert written.samefile(source)


def test_images_are_copied_where_there_can_be_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("another disk")

    monkeypatch.setattr("os.link", refuse)
    yolo_ultralytics(tmp_path / "yolo")
    import_dataset("yolo", tmp_path / "yolo", tmp_path / "out")
    source, written = tmp_path / "yolo/images/val/v.jpg", tmp_path / "out/val2017/v.jpg"
    assert written.read_bytes() == source.read_bytes()
    assert not written.samefile(source)


def test_splits_that_lack_classes_have_the_same_list(tmp_path: Path) -> None:
    voc_roboflow(tmp_path / "voc")
    import_dataset("voc", tmp_path / "voc", tmp_path / "out")
    train, val = document_of(tmp_path / "out", "train"), document_of(tmp_path / "out", "val")
    assert train["categories"] == val["categories"]
    assert len(train["categories"]) == 3
    assert_same_boxes(train, TRAIN)
    assert_same_boxes(val, VAL)


class TestValidation:
    def cvat(self, root: Path) -> Path:
        draw(TRAIN, root / "images")
        write_cvat(TRAIN, root / "annotations.xml")
        return root

    def test_is_drawn_from_the_images_where_it_is_wanted(self, tmp_path: Path) -> None:
        source = self.cvat(tmp_path / "cvat")
        for out in ("one", "two"):
            imported = import_dataset("cvat", source, tmp_path / out, val_share=0.3)
            assert [images for images, _ in imported.counts.values()] == [2, 1]
        assert document_of(tmp_path / "one", "val") == document_of(tmp_path / "two", "val")
        documents = [document_of(tmp_path / "one", split) for split in ("train", "val")]
        assert_same_boxes({key: [*documents[0][key], *documents[1][key]] for key in documents[0]}, TRAIN)

    def test_is_needed(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"no validation split; .* --val-share"):
            import_dataset("cvat", self.cvat(tmp_path / "cvat"), tmp_path / "out")

    def test_needs_images_for_both(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="3 images cannot be split"):
            import_dataset("cvat", self.cvat(tmp_path / "cvat"), tmp_path / "out", val_share=0.9)

    def test_is_not_drawn_beside_one(self, tmp_path: Path) -> None:
        yolo_ultralytics(tmp_path / "yolo")
        with pytest.raises(UserError, match="leave --val-share out"):
            import_dataset("yolo", tmp_path / "yolo", tmp_path / "out", val_share=0.1)


def test_images_of_both_splits_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    yolo_ultralytics(tmp_path / "yolo")
    (tmp_path / "yolo/data.yaml").write_text("train: images/train\nval: images/train\nnames: [a, b, c]\n")
    with caplog.at_level(logging.WARNING):
        assert import_dataset("yolo", tmp_path / "yolo", tmp_path / "out").counts == {"train": (3, 3), "val": (3, 3)}
    assert "3 images are both in train and in val" in caplog.text


def test_boxes_that_are_wrong_are_told_with_what_to_set(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    yolo_ultralytics(tmp_path / "yolo")
    with (tmp_path / "yolo/labels/train/a.txt").open("a") as file:
        file.write("0 nan 0.5 0.2 0.2\n")
    with caplog.at_level(logging.WARNING):
        imported = import_dataset("yolo", tmp_path / "yolo", tmp_path / "out")
    assert yaml.safe_load(imported.config)["dataset"]["on_error"] == "skip"
    assert f"train: 1 times box_not_finite, as {tmp_path}/out/annotations/instances_train2017.json" in caplog.text


def test_categories_are_named_for_tars_alone(tmp_path: Path) -> None:
    yolo_ultralytics(tmp_path / "yolo")
    with pytest.raises(UserError, match="yolo names its own classes; leave it out"):
        import_dataset("yolo", tmp_path / "yolo", tmp_path / "out", categories=tmp_path / "names.json")


class TestNothingIsHalfWritten:
    def test_what_is_there_is_kept(self, tmp_path: Path) -> None:
        yolo_ultralytics(tmp_path / "yolo")
        (tmp_path / "out").mkdir()
        with pytest.raises(UserError, match="out: is there already; delete it, or choose another --out"):
            import_dataset("yolo", tmp_path / "yolo", tmp_path / "out")

    def test_a_full_disk(self, tmp_path: Path) -> None:
        yolo_ultralytics(tmp_path / "yolo")
        with disk_of(100), pytest.raises(UserError, match="no space left"):
            import_dataset("yolo", tmp_path / "yolo", tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["yolo"]

    def test_a_dataset_that_coco_refuses(self, tmp_path: Path) -> None:
        one_image(tmp_path / "yolo", "0 0.5 0.5 0.001 0.001\n")
        write_yolo(VAL, tmp_path / "yolo/labels")
        draw(VAL, tmp_path / "yolo/images")
        (tmp_path / "yolo/data.yaml").write_text("names: [a, b, c]\n")
        (tmp_path / "yolo/labels/v.txt").write_text("0 0.5 0.5 0.001 0.001\n")
        with pytest.raises(UserError, match=rf"^{tmp_path}/out/annotations/.* smaller than a pixel"):
            import_dataset("yolo", tmp_path / "yolo", tmp_path / "out", val_share=0.5)
        assert [path.name for path in tmp_path.iterdir()] == ["yolo"]
