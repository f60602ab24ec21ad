"""pipeline/shard/smaller.py: copies of images, and what follows them into a shard."""

import io
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask

from pipeline.config.sections import ShardsSection
from pipeline.data.images import EXIF_ASSUMED, Pixels, decode_image
from pipeline.data.manifest import Manifest, read_annotations, read_image_bytes
from pipeline.data.samples import load_image
from pipeline.errors import UserError
from pipeline.shard.coco import CocoImage, open_source, to_json
from pipeline.shard.smaller import Smaller, smaller_of
from pipeline.shard.write import plan_shards, shard_split, verify_shard
from tests.builders import make_annotation, make_dataset_section, read_coco, write_coco, write_image

POLYGON = [[10, 20, 30, 20, 30.5, 44]]


def make_coco_image(width: int, height: int, *annotations: dict[str, Any], size: int = 5000) -> CocoImage:
    return CocoImage(1, "a.jpg", width, height, size, b"[%b]" % b",".join(map(to_json, annotations)))


def copied(image: CocoImage, max_side: int) -> CocoImage:
    """The copy of an image without a segmentation that is none."""
    pixels = np.zeros((image.height, image.width, 3), np.uint8)
    return Smaller(max_side, 90).copy(image, pixels, pytest.fail)[0]


def make_noise(width: int, height: int) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_none_is_wanted_by_default() -> None:
    assert smaller_of(ShardsSection()) is None
    assert smaller_of(ShardsSection(max_side=800)) == Smaller(800, 90)
    assert smaller_of(ShardsSection(max_side=800, quality=75)) == Smaller(800, 75)


@pytest.mark.parametrize(
    ("width", "height", "size"),
    [(200, 100, (64, 32)), (100, 200, (32, 64)), (65, 65, (64, 64)), (640, 427, (64, 43)), (10_000, 3, (64, 1))],
    ids=["wide", "tall", "by a pixel", "rounded", "strip"],
)
def test_the_longer_side_is_the_most_there_may_be(width: int, height: int, size: tuple[int, int]) -> None:
    image = make_coco_image(width, height)
    assert Smaller(64, 90).takes(image)
    assert Smaller(64, 90).size(image) == size
    assert not Smaller(max(width, height), 90).takes(image)


class TestAnnotations:
    def test_boxes_and_areas_follow_each_side(self) -> None:
        copy = copied(make_coco_image(640, 427, make_annotation(7, 1, (64, 42.7, 320, 213.5), iscrowd=1)), 64)
        (entry,) = copy.annotations
        assert (copy.width, copy.height, copy.original) == (64, 43, (640, 427))
        assert entry["bbox"] == pytest.approx([6.4, 4.3, 32, 21.5])
        assert entry["area"] == pytest.approx(32 * 21.5)
        assert {key: entry[key] for key in ("id", "image_id", "category_id", "iscrowd")} == {
            **{"id": 7, "image_id": 1, "category_id": 1, "iscrowd": 1}
        }

    def test_polygons_follow(self) -> None:
        copy = copied(make_coco_image(200, 100, make_annotation(1, 1, segmentation=POLYGON)), 50)
        assert copy.annotations[0]["segmentation"] == [[2.5, 5, 7.5, 5, 7.625, 11]]

    @pytest.mark.parametrize("packed", [False, True], ids=["counts", "packed"])
    def test_run_lengths_follow(self, packed: bool) -> None:
        covered = np.zeros((100, 200), np.uint8)
        covered[20:60, 40:120] = 1
        runs = mask.encode(np.asfortranarray(covered))
        counts: Any = runs["counts"].decode()
        if not packed:
            flat = covered.T.reshape(-1)
            changes = np.flatnonzero(np.diff(flat)) + 1
            counts = np.diff([0, *changes, flat.size]).tolist()
        segmentation = {"size": [100, 200], "counts": counts}
        copy = copied(make_coco_image(200, 100, make_annotation(1, 1, segmentation=segmentation)), 50)
        smaller = mask.decode(copy.annotations[0]["segmentation"])
        np.testing.assert_array_equal(smaller, cv2.resize(covered, (50, 25), interpolation=cv2.INTER_NEAREST))
        assert smaller.sum() == 10 * 20

    @pytest.mark.parametrize(
        "segmentation",
        [
            pytest.param([[1, 2, 3]], id="half a point"),
            pytest.param([[1, "2"]], id="text"),
            pytest.param("all", id="word"),
            pytest.param({"counts": [1]}, id="no size"),
            pytest.param({"size": [100, 200]}, id="no counts"),
            pytest.param({"size": [10, 20], "counts": [1, 199]}, id="another size"),
            pytest.param({"size": [100, 200], "counts": [1, 99999]}, id="beyond the image"),
            pytest.param({"size": [100, 200], "counts": [-1, 20001]}, id="negative"),
            pytest.param({"size": [100, 200], "counts": "\u00e9"}, id="packed badly"),
            pytest.param({"size": [100, 200], "counts": 5}, id="a number"),
        ],
    )
    def test_a_segmentation_that_is_none_is_told_and_left_out(self, segmentation: Any) -> None:
        told: list[str] = []
        image = make_coco_image(200, 100, make_annotation(3, 1, segmentation=segmentation))
        copy, _ = Smaller(50, 90).copy(image, make_noise(200, 100), told.append)
        assert "segmentation" not in copy.annotations[0]
        assert len(told) == 1
        assert told[0].startswith("the segmentation of its annotation 3 is none of COCO's")


class TestPixels:
    def test_are_the_mean_of_the_areas(self) -> None:
        pixels = np.repeat(np.repeat(make_noise(8, 6) // 16 * 16, 32, axis=0), 32, axis=1)
        _, content = Smaller(128, 100).copy(make_coco_image(256, 192), pixels, pytest.fail)
        expected = np.repeat(np.repeat(make_noise(8, 6) // 16 * 16, 16, axis=0), 16, axis=1)
        found = decode_image(content, 128, 96).astype(int)
        assert np.abs(found - expected)[4:12, 4:12].max() <= 4  # within a block, whose colours do not mix

    def test_better_ones_take_more(self) -> None:
        image, pixels = make_coco_image(256, 192), make_noise(256, 192)
        sizes = [len(Smaller(128, quality).copy(image, pixels, pytest.fail)[1]) for quality in (10, 50, 90, 100)]
        assert sizes == sorted(set(sizes))


class TestPlan:
    @pytest.mark.parametrize("quality", [1, 90, 91, 100])
    @pytest.mark.parametrize("side", [32, 640])
    def test_even_noise_takes_no_more_than_is_planned(self, side: int, quality: int) -> None:
        image = make_coco_image(side + 1, side + 1)
        smaller = Smaller(side, quality)
        noise = np.ascontiguousarray(cv2.resize(make_noise(side, side), (side + 1, side + 1), interpolation=0))
        assert len(smaller.copy(image, noise, pytest.fail)[1]) <= smaller.planned_bytes(image)

    def test_an_image_that_stays_takes_its_own_bytes(self) -> None:
        assert Smaller(800, 90).planned_bytes(make_coco_image(640, 480, size=123)) == 123

    def test_large_files_do_not_make_small_shards(self, tmp_path: Path) -> None:
        files = write_coco(tmp_path, [{"id": number, "width": 96, "height": 64} for number in range(1, 5)])
        split = read_coco(*files, "fail")
        split = type(split)(**{**vars(split), "images": tuple(i._replace(size=10**7) for i in split.images)})
        assert len(plan_shards(split, 1000, 10**6)) == 4
        assert len(plan_shards(split, 1000, 10**6, Smaller(48, 90))) == 1


def shard(root: Path, on_error: Any = "fail", verify: bool = False, **settings: Any) -> Manifest:
    source = open_source(root / "annotations/train.json", root / "train")
    section = ShardsSection(**{"max_side": 48, **settings})
    dataset = make_dataset_section(root, on_error)
    return shard_split(source, "train", root / "shards", dataset, section, verify=verify)


class TestShards:
    def test_only_large_images_change(self, tmp_path: Path) -> None:
        large = {"id": 2, "width": 96, "height": 64, "file_name": "large.png"}
        files = write_coco(tmp_path, [1, large, {"id": 3, "width": 48, "height": 24}], [make_annotation(1, 2)])
        manifest = shard(tmp_path)
        small, copy, exact = manifest.samples
        for sample, name in ((small, "000000000001.jpg"), (exact, "000000000003.jpg")):
            assert read_image_bytes(manifest, sample) == (files.images / name).read_bytes()
            assert "original_width" not in read_annotations(manifest, sample)
        assert (copy.width, copy.height, copy.extension) == (48, 32, "jpg")
        member = read_annotations(manifest, copy)
        assert (member["width"], member["height"], member["file_name"]) == (48, 32, "large.png")
        assert (member["original_width"], member["original_height"]) == (96, 64)
        verify_shard(manifest, 0)

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("as_stored", [False, True], ids=["annotated as shown", "annotated as stored"])
    def test_exif_turns_a_copy_once(self, tmp_path: Path, orientation: int, as_stored: bool) -> None:
        """A copy shows what training would have seen of its original."""
        turns = orientation >= 5
        size = (96, 64) if as_stored or not turns else (64, 96)
        files = write_coco(tmp_path, [{"id": 1, "width": size[0], "height": size[1]}], draw=False)
        path = write_image(files.images / "000000000001.jpg", 96, 64, orientation=orientation)
        manifest = shard(tmp_path)
        expected = cv2.resize(
            decode_image(path.read_bytes(), *size), (size[0] // 2, size[1] // 2), interpolation=cv2.INTER_AREA
        )
        (sample,) = manifest.samples
        found = load_image(manifest, sample)
        assert found.shape == expected.shape
        assert np.abs(found.astype(int) - expected).mean() < 4
        with Image.open(io.BytesIO(read_image_bytes(manifest, sample))) as image:
            assert 0x0112 not in image.getexif()
        is_noted = orientation != 1 and not turns
        assert (EXIF_ASSUMED in manifest.problems) == is_noted

    def test_an_image_that_cannot_be_decoded(self, tmp_path: Path) -> None:
        files = write_coco(tmp_path, [{"id": 1, "width": 96, "height": 64}, 2])
        path = files.images / "000000000001.jpg"
        content = bytearray(path.read_bytes())
        content[-200:-100] = bytes(100)
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"000000000001\.jpg: image 1: it is damaged"):
            shard(tmp_path)
        manifest = shard(tmp_path, "skip")
        assert manifest.problems == {"image_unreadable": 1}
        assert [sample.image_id for sample in manifest.samples] == [2]

    def test_a_segmentation_that_is_none(self, tmp_path: Path) -> None:
        bad = make_annotation(5, 1, segmentation=[[1, 2, 3]])
        write_coco(tmp_path, [{"id": 1, "width": 96, "height": 64}], [bad])
        told = r"image 1: the segmentation of its annotation 5 .*on_error: skip to leave the segmentation out"
        with pytest.raises(UserError, match=told):
            shard(tmp_path, segmentations=True)
        assert shard(tmp_path, "skip", segmentations=True).problems == {"segmentation_malformed": 1}
