import json
import os
import pickle
from pathlib import Path

import pytest

from pipeline.data.manifest import (
    OPEN_FILES,
    ShardReader,
    UnreadableSampleError,
    ground_truth,
    read_annotations,
    read_image_bytes,
    read_manifest,
    write_manifest,
)
from pipeline.errors import UserError
from tests.builders import make_annotation, make_manifest, write_coco

ANNOTATIONS = [make_annotation(1, 1), make_annotation(2, 3, (1, 1, 4, 4), 90, iscrowd=1, area=7.5)]


class TestReading:
    def test_survives_the_disk(self, tmp_path: Path) -> None:
        manifest = make_manifest(tmp_path, [1, 2, 3], ANNOTATIONS, max_samples=2)
        found = read_manifest(manifest.folder)
        assert found == manifest
        assert found.digest == manifest.digest
        assert found.shard_sizes == (2, 1)
        assert [(sample.image_id, sample.shard) for sample in found.samples] == [(1, 0), (2, 0), (3, 1)]

    def test_holds_what_the_contract_names(self, tmp_path: Path) -> None:
        manifest = make_manifest(tmp_path, [1, 2], ANNOTATIONS[:1])
        content = json.loads((manifest.folder / "manifest.json").read_text())
        assert content["format"] == 1
        assert content["split"] == "train"
        assert [category["id"] for category in content["categories"]] == [1, 3, 90]
        assert content["label_map"]["kind"] == "contiguous"
        assert len(content["source_digest"]) == 64
        (shard,) = content["shards"]
        assert set(shard) == {"name", "samples", "bytes", "sha256", "index"}
        assert shard["samples"] == 2
        assert set(shard["index"][0]) == {"key", "image_id", "width", "height", "members"}
        assert set(shard["index"][0]["members"]) == {"jpg", "json"}

    def test_members(self, tmp_path: Path) -> None:
        files = write_coco(tmp_path, [1, 2, 3], ANNOTATIONS)
        manifest = make_manifest(tmp_path, [1, 2, 3], ANNOTATIONS)
        for sample in manifest.samples:
            assert read_image_bytes(manifest, sample) == (files.images / f"{sample.key}.jpg").read_bytes()
        assert read_annotations(manifest, manifest.samples[2])["annotations"] == [ANNOTATIONS[1]]
        assert read_annotations(manifest, manifest.samples[1])["annotations"] == []

    @pytest.mark.parametrize(
        ("content", "told"),
        [
            pytest.param("{", "not JSON", id="half"),
            pytest.param("[]", "its format is None", id="list"),
            pytest.param('{"format": 99}', "its format is 99", id="newer"),
            pytest.param('{"format": 1}', "not a manifest", id="keys missing"),
        ],
    )
    def test_a_file_that_is_no_manifest(self, tmp_path: Path, content: str, told: str) -> None:
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(UserError, match=told):
            read_manifest(tmp_path)

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"no such manifest; write the shards first with `raydetr shard`"):
            read_manifest(tmp_path)


class TestWriting:
    def test_leaves_no_temporary_file(self, tmp_path: Path) -> None:
        manifest = make_manifest(tmp_path)
        write_manifest(manifest)
        assert sorted(path.name for path in manifest.folder.iterdir()) == ["manifest.json", "shard-000000.tar"]


class TestDamage:
    def test_a_shard_that_ends_early(self, tmp_path: Path) -> None:
        manifest = make_manifest(tmp_path)
        path = manifest.folder / "shard-000000.tar"
        os.truncate(path, manifest.samples[2].members["jpg"][0] + 10)
        read_image_bytes(manifest, manifest.samples[1])
        told = r"shard-000000\.tar: sample 000000000003 \(image id 3\): the shard ends before its jpg member"
        with pytest.raises(UnreadableSampleError, match=told):
            read_image_bytes(manifest, manifest.samples[2])

    def test_a_shard_that_is_gone(self, tmp_path: Path) -> None:
        manifest = make_manifest(tmp_path)
        (manifest.folder / "shard-000000.tar").unlink()
        with pytest.raises(UnreadableSampleError, match=r"image id 1\): cannot be read: No such file"):
            read_image_bytes(manifest, manifest.samples[0])

    def test_a_json_member_of_another_image(self, tmp_path: Path) -> None:
        manifest = make_manifest(tmp_path)
        first, second = manifest.samples[:2]
        path = manifest.folder / "shard-000000.tar"
        content = bytearray(path.read_bytes())
        offset, size = first.members["json"]
        other, other_size = second.members["json"]
        assert size == other_size
        content[offset : offset + size] = content[other : other + size]
        path.write_bytes(content)
        with pytest.raises(UnreadableSampleError, match="its JSON member is damaged"):
            read_annotations(manifest, first)


class TestReader:
    def test_keeps_few_files_open(self, tmp_path: Path) -> None:
        paths = [tmp_path / f"{number}" for number in range(OPEN_FILES + 40)]
        for path in paths:
            path.write_text(path.name)
        reader = ShardReader(paths)
        before = len(os.listdir("/proc/self/fd"))
        for number, path in enumerate(paths):
            assert reader.read(number, 0, 10).decode() == path.name
        assert len(os.listdir("/proc/self/fd")) - before <= OPEN_FILES
        assert reader.read(0, 0, 10) == b"0"
        reader.close()
        assert len(os.listdir("/proc/self/fd")) <= before

    def test_a_manifest_travels_without_open_files(self, tmp_path: Path) -> None:
        manifest = make_manifest(tmp_path)
        read_image_bytes(manifest, manifest.samples[0])
        copy = pickle.loads(pickle.dumps(manifest))
        assert copy == manifest
        assert read_image_bytes(copy, copy.samples[0]) == read_image_bytes(manifest, manifest.samples[0])


def test_ground_truth_is_the_coco_document(tmp_path: Path) -> None:
    files = write_coco(tmp_path, [1, 2, 3], ANNOTATIONS)
    document = json.loads(files.annotations.read_text())
    assert ground_truth(make_manifest(tmp_path, [1, 2, 3], ANNOTATIONS)) == document
