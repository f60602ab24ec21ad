"""pipeline/data/truth.py: what is scored, in the pixels of the original images."""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config.sections import ShardsSection
from pipeline.data.index import Member, Sample
from pipeline.data.manifest import Manifest, UnreadableSampleError, read_annotations
from pipeline.data.truth import ground_truth, original_size, scaled_box
from pipeline.errors import UserError
from pipeline.evaluate.score import score
from pipeline.shard.coco import open_source
from pipeline.shard.write import shard_split
from tests.builders import make_annotation, make_dataset_section, make_manifest, write_coco

ANNOTATIONS = [make_annotation(1, 1), make_annotation(2, 3, (1, 1, 4, 4), 90, iscrowd=1, area=7.5)]


def replace_in_member(manifest: Manifest, before: str, after: str) -> Sample:
    """The first sample, as if its JSON member had been written with another text of the same length."""
    path = manifest.folder / manifest.shards[0].name
    assert isinstance(path, Path)
    content = bytearray(path.read_bytes())
    offset, size, _ = manifest.samples[0].json
    text = bytes(content[offset : offset + size]).replace(before.encode(), after.encode())
    assert len(text) == size
    content[offset : offset + size] = text
    path.write_bytes(content)
    return manifest.samples[0]._replace(json=Member(offset, size, zlib.crc32(text)))


def test_ground_truth_is_the_coco_document(tmp_path: Path) -> None:
    files = write_coco(tmp_path, [1, 2, 3], ANNOTATIONS)
    document = json.loads(files.annotations.read_text())
    assert ground_truth(make_manifest(tmp_path, [1, 2, 3], ANNOTATIONS)) == document


def test_a_changed_member_is_not_scored_with(tmp_path: Path) -> None:
    manifest = make_manifest(tmp_path, annotations=[make_annotation(1, 1)])
    replace_in_member(manifest, '"bbox":[2,', '"bbox":[3,')
    with pytest.raises(UserError, match=r"image id 1\): the bytes of its json member have changed; delete .* again"):
        ground_truth(manifest)


class TestSmallerCopies:
    def photos(self, root: Path) -> dict[str, Any]:
        """The document of a split of large photographs, with objects of all of COCO's sizes."""
        generator = np.random.default_rng(0)
        images = [{"id": number, "width": 300 + 37 * number, "height": 411} for number in range(1, 5)]
        annotations = []
        for number in range(1, 61):
            left, top = (round(float(value), 2) for value in generator.uniform(0, 100, 2))
            width, height = (round(float(value), 2) for value in generator.uniform(1, 200, 2))
            box = (left, top, width, height)
            annotations.append(
                make_annotation(number, 1 + number % 4, box, (1, 3, 90)[number % 3], iscrowd=number % 7 == 0)
            )
        annotations.append(make_annotation(61, 1, (10, 10, 32, 32), area=1024))
        document: dict[str, Any] = json.loads(write_coco(root, images, annotations).annotations.read_text())
        return document

    def shards(self, root: Path) -> Manifest:
        source = open_source(root / "annotations/train.json", root / "train")
        section = ShardsSection(max_side=100, segmentations=True)
        return shard_split(source, "train", root / "shards", make_dataset_section(root), section)

    def test_are_scored_as_their_originals(self, tmp_path: Path) -> None:
        """The same twelve numbers come from the shards and from the annotation file."""
        document = self.photos(tmp_path)
        manifest = self.shards(tmp_path)
        assert {max(sample.width, sample.height) for sample in manifest.samples} == {100}
        truth = ground_truth(manifest)
        assert truth["images"] == document["images"]
        by_id = sorted(document["annotations"], key=lambda entry: (entry["image_id"], entry["id"]))
        for entry, original in zip(truth["annotations"], by_id, strict=True):
            assert entry["bbox"] == original["bbox"]
            assert entry["area"] == pytest.approx(original["area"], rel=1e-12)
        generator = np.random.default_rng(1)
        detections = [
            {
                "image_id": entry["image_id"],
                "category_id": entry["category_id"],
                "bbox": [value + float(generator.uniform(0, 9)) for value in entry["bbox"]],
                "score": float(generator.uniform()),
            }
            for entry in document["annotations"]
        ]
        scores = score(truth, detections)
        assert scores == score(document, detections)
        assert 0 < scores["AP"] < 1

    def test_know_their_originals(self, tmp_path: Path) -> None:
        self.photos(tmp_path)
        manifest = self.shards(tmp_path)
        sizes = [original_size(manifest, sample) for sample in manifest.samples]
        assert sizes == [(337, 411), (374, 411), (411, 411), (448, 411)]

    def test_images_that_are_none_are_their_own(self, tmp_path: Path) -> None:
        manifest = make_manifest(tmp_path)
        assert original_size(manifest, manifest.samples[0]) == (32, 24)

    @pytest.mark.parametrize(
        ("before", "after"),
        [('"original_width"', '"original_with_"'), (":337", ":-37"), (":337", ":3.5")],
        ids=["half a size", "negative", "a fraction"],
    )
    def test_an_original_of_no_size(self, tmp_path: Path, before: str, after: str) -> None:
        self.photos(tmp_path)
        manifest = self.shards(tmp_path)
        sample = replace_in_member(manifest, before, after)
        with pytest.raises(UnreadableSampleError, match="its JSON member is damaged"):
            read_annotations(manifest, sample)


def test_a_box_is_scaled_on_each_side() -> None:
    assert scaled_box([1, 2, 3, 4], 2, 0.5) == [2, 1, 6, 2]
