import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from pipeline.config.sections import DatasetSection, SyntheticSection
from pipeline.errors import UserError
from pipeline.shard.coco import CocoSplit
from pipeline.shard.synthetic import CATEGORIES, GREATEST, SMALLEST, draw_dataset
from tests.builders import disk_of, read_coco

SETTINGS = SyntheticSection(train_images=120, val_images=40, seed=3)


def content(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_dataset(tmp_path_factory.mktemp("drawn") / "shapes", SETTINGS)


@pytest.fixture(scope="module")
def splits(root: Path) -> dict[str, CocoSplit]:
    """Both splits, through the paths that the configuration has by default and the strict rules."""
    dataset = DatasetSection(root=str(root))
    return {
        name: read_coco(root / split.annotations, root / split.images, "fail")
        for name, split in (("train", dataset.train), ("val", dataset.val))
    }


class TestContent:
    def test_counts_and_sizes(self, splits: dict[str, CocoSplit]) -> None:
        assert {name: len(split.images) for name, split in splits.items()} == {"train": 120, "val": 40}
        assert all((image.width, image.height) == (128, 128) for split in splits.values() for image in split.images)
        with Image.open(io.BytesIO(splits["train"].files.read(splits["train"].images[0].file_name))) as image:
            assert image.size == (128, 128)

    def test_categories_have_gaps(self, splits: dict[str, CocoSplit]) -> None:
        ids = [category.id for category in splits["train"].categories]
        assert len(ids) >= 5
        assert ids[-1] > len(ids)
        assert splits["val"].categories == splits["train"].categories

    @pytest.mark.parametrize("name", ["train", "val"])
    def test_objects(self, splits: dict[str, CocoSplit], name: str) -> None:
        counts = [len(image.annotations) for image in splits[name].images]
        assert min(counts) == 0
        assert max(counts) <= 10
        assert counts.count(0) == len(counts) // 20
        objects = [a for image in splits[name].images for a in image.annotations if not a["iscrowd"]]
        assert {a["category_id"] for a in objects} == set(CATEGORIES)
        assert max(max(a["bbox"][2:]) for a in objects) <= GREATEST + 2
        # Hiding may make a box smaller than its shape.
        assert np.mean([max(a["bbox"][2:]) >= SMALLEST - 1 for a in objects]) > 0.98

    @pytest.mark.parametrize("name", ["train", "val"])
    def test_crowd_regions(self, splits: dict[str, CocoSplit], name: str) -> None:
        crowds = [a for image in splits[name].images for a in image.annotations if a["iscrowd"]]
        assert len(crowds) == len([k for k in range(len(splits[name].images)) if k % 25 == 7])
        for crowd in crowds:
            assert crowd["segmentation"]["size"] == [128, 128]
            assert sum(crowd["segmentation"]["counts"]) == 128 * 128

    def test_boxes_overlap(self, splits: dict[str, CocoSplit]) -> None:
        overlaps = 0
        for image in splits["train"].images:
            boxes = [a["bbox"] for a in image.annotations]
            for k, (x, y, w, h) in enumerate(boxes):
                overlaps += any(x < u + p and u < x + w and y < v + q and v < y + h for u, v, p, q in boxes[:k])
        assert overlaps > 20

    def test_areas_and_segmentations_agree_with_the_boxes(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        coco = COCO(str(root / "annotations" / "instances_val2017.json"))
        for annotation in coco.anns.values():
            mask = coco.annToMask(annotation)
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            x, y, width, height = annotation["bbox"]
            found = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            np.testing.assert_allclose(found, [x, y, x + width, y + height], atol=1)
            assert 0 < annotation["area"] <= width * height
            if annotation["iscrowd"]:
                assert mask.sum() == annotation["area"]

    def test_objects_stand_out(self, splits: dict[str, CocoSplit]) -> None:
        """The mean colour inside a square, whose box it fills, is far from that of the border of the image."""
        distances = []
        for image in splits["train"].images:
            pixels = np.asarray(Image.open(io.BytesIO(splits["train"].files.read(image.file_name))), dtype=float)
            background = np.median(pixels.reshape(-1, 3), axis=0)
            for annotation in image.annotations:
                x, y, width, height = annotation["bbox"]
                if annotation["category_id"] == 2 and len(image.annotations) < 4 and not annotation["iscrowd"]:
                    middle = pixels[y + height // 2, x + width // 2]
                    distances.append(np.linalg.norm(middle - background))
        assert len(distances) > 10
        assert np.mean(np.array(distances) > 70) > 0.9


class TestDrawing:
    def test_same_seed_same_bytes(self, tmp_path: Path) -> None:
        settings = SyntheticSection(train_images=12, val_images=9, seed=1)
        first = content(draw_dataset(tmp_path / "a", settings))
        assert content(draw_dataset(tmp_path / "b", settings)) == first
        other = content(draw_dataset(tmp_path / "c", settings.model_copy(update={"seed": 2})))
        assert set(other) == set(first)
        assert other["train2017/000000000001.jpg"] != first["train2017/000000000001.jpg"]

    def test_more_images_keep_the_first(self, tmp_path: Path) -> None:
        few = draw_dataset(tmp_path / "few", SyntheticSection(train_images=3, val_images=1))
        many = draw_dataset(tmp_path / "many", SyntheticSection(train_images=6, val_images=1))
        for number in (1, 2, 3):
            name = f"train2017/{number:012d}.jpg"
            assert (few / name).read_bytes() == (many / name).read_bytes()

    @pytest.mark.parametrize("size", [64, 200])
    def test_other_sizes(self, tmp_path: Path, size: int) -> None:
        root = draw_dataset(tmp_path / "a", SyntheticSection(train_images=9, val_images=1, image_size=size))
        dataset = DatasetSection(root=str(root))
        split = read_coco(root / dataset.train.annotations, root / dataset.train.images, "fail")
        assert {(image.width, image.height) for image in split.images} == {(size, size)}
        assert Counter(len(image.annotations) > 0 for image in split.images)[True] == 8

    def test_is_not_drawn_again(self, root: Path, caplog: pytest.LogCaptureFixture) -> None:
        stamp = (root / "synthetic.json").stat().st_mtime_ns
        with caplog.at_level("INFO", logger="raydetr"):
            assert draw_dataset(root, SETTINGS) == root
        assert (root / "synthetic.json").stat().st_mtime_ns == stamp
        assert "already done" in caplog.text

    def test_other_settings_are_refused(self, root: Path) -> None:
        with pytest.raises(UserError, match=r"other settings \(seed was 3, now 4\); set another dataset.root"):
            draw_dataset(root, SETTINGS.model_copy(update={"seed": 4}))

    def test_a_folder_of_something_else_is_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.txt").write_text("x")
        with pytest.raises(UserError, match="not a synthetic dataset and not empty"):
            draw_dataset(tmp_path, SETTINGS)
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]

    def test_an_empty_folder_is_used(self, tmp_path: Path) -> None:
        (tmp_path / "data").mkdir()
        root = draw_dataset(tmp_path / "data", SyntheticSection(train_images=1, val_images=1))
        assert (root / "synthetic.json").exists()

    @pytest.mark.parametrize("size", [1000, 20_000], ids=["in an image", "in the annotations"])
    def test_full_disk_leaves_nothing(self, tmp_path: Path, size: int) -> None:
        settings = SyntheticSection(train_images=60, val_images=1)
        with disk_of(size), pytest.raises(UserError, match=r"no space left .* with dataset\.root"):
            draw_dataset(tmp_path / "data", settings)
        assert [path.name for path in tmp_path.iterdir()] == [".data.lock"]


def test_annotation_ids_are_unique_over_both_splits(root: Path) -> None:
    documents = [json.loads(path.read_text()) for path in (root / "annotations").iterdir()]
    for name in ("images", "annotations"):
        ids = [entry["id"] for document in documents for entry in document[name]]
        assert len(ids) == len(set(ids))
