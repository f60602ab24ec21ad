import hashlib
import json
import os
import pickle
import random
import subprocess
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.index import Member, Sample
from pipeline.data.manifest import (
    OPEN_FILES,
    Manifest,
    ShardReader,
    UnreadableSampleError,
    read_annotations,
    read_image_bytes,
    read_manifest,
)
from pipeline.data.samples import load_image
from pipeline.errors import UserError
from pipeline.shard.write import verify_shard
from tests.builders import make_annotation, make_manifest, make_varied_manifest, write_coco

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
        assert content["format"] == 2
        assert content["split"] == "train"
        assert [category["id"] for category in content["categories"]] == [1, 3, 90]
        assert content["label_map"]["kind"] == "contiguous"
        assert len(content["source_digest"]) == 64
        (shard,) = content["shards"]
        assert set(shard) == {"name", "samples", "bytes", "sha256"}
        assert shard["samples"] == 2
        assert set(content["index"]) == {"name", "sha256"}
        assert manifest.digest == hashlib.sha256((manifest.folder / "manifest.json").read_bytes()).hexdigest()

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
            pytest.param('{"format": 2}', "not a manifest", id="keys missing"),
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
        folder = make_manifest(tmp_path).folder
        names = {path.name for path in folder.iterdir()}
        assert names == {"index.npy", "manifest.json", "manifest.sha256", "shard-000000.tar"}

    def test_the_sum_is_one_that_sha256sum_checks(self, tmp_path: Path) -> None:
        folder = make_manifest(tmp_path).folder
        subprocess.run(["sha256sum", "--check", "--quiet", "manifest.sha256"], cwd=folder, check=True)

    def test_shards_without_a_sum_are_read(self, tmp_path: Path) -> None:
        manifest = make_manifest(tmp_path)
        (manifest.folder / "manifest.sha256").unlink()
        assert read_manifest(manifest.folder) == manifest


class TestDamage:
    def test_a_shard_that_ends_early(self, tmp_path: Path) -> None:
        manifest = make_manifest(tmp_path)
        path = manifest.folder / "shard-000000.tar"
        os.truncate(path, manifest.samples[2].image.offset + 10)
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
        offset, size, _ = first.json
        other, other_size, _ = second.json
        assert size == other_size
        content[offset : offset + size] = content[other : other + size]
        path.write_bytes(content)
        with pytest.raises(UnreadableSampleError, match="the bytes of its json member have changed"):
            read_annotations(manifest, first)

    def test_a_member_beyond_its_shard(self, tmp_path: Path) -> None:
        manifest = make_manifest(tmp_path)
        sample = manifest.samples[0]
        for image in (Member(0, 10**12, 0), Member(10**12, 1, 0), Member(-5, 10, 0)):
            with pytest.raises(UnreadableSampleError, match="its jpg member lies beyond the 10240 bytes"):
                read_image_bytes(manifest, sample._replace(image=image))

    @pytest.mark.parametrize("change", ["a byte", "cut", "gone", "text", "of another split"])
    def test_an_index_that_is_not_the_one_written(self, tmp_path: Path, change: str) -> None:
        folder = make_manifest(tmp_path).folder
        path = folder / "index.npy"
        content = bytearray(path.read_bytes())
        if change == "a byte":
            content[-9] ^= 1
        if change == "text":
            content = bytearray(b"<html>not found</html>")
        path.write_bytes(content[:-10] if change == "cut" else content)
        if change == "gone":
            path.unlink()
        if change == "of another split":
            path.write_bytes((make_manifest(tmp_path / "b", [1, 2]).folder / "index.npy").read_bytes())
        with pytest.raises(UserError, match=r"index\.npy: .*; delete .* and shard again$"):
            read_manifest(folder)


class TestOneChangedByte:
    """Of any file of a split: it is told, or no reader uses it. Nothing is trained on or scored silently."""

    def split(self, root: Path) -> Manifest:
        """Two tars of JPEG and JSON members."""
        return make_varied_manifest(root, 8, max_samples=5)

    def all_samples(self, manifest: Manifest) -> list[Any]:
        return [
            (sample, read_annotations(manifest, sample), load_image(manifest, sample).tobytes())
            for sample in manifest.samples
        ]

    @pytest.mark.parametrize("name", ["index.npy", "manifest.json", "manifest.sha256"])
    def test_of_what_describes_the_shards_is_told_when_it_is_read(self, tmp_path: Path, name: str) -> None:
        path = self.split(tmp_path).folder / name
        for _ in changed_bytes(path, 40):
            with pytest.raises(UserError, match=r"again$"):
                read_manifest(path.parent)

    @pytest.mark.parametrize("number", [0, 1])
    def test_of_a_tar_is_told_or_in_no_member(self, tmp_path: Path, number: int) -> None:
        before = self.split(tmp_path)
        whole = self.all_samples(before)
        path = before.folder / before.shards[number].name
        unused = 0
        for position in changed_bytes(path, 40):
            manifest = read_manifest(before.folder)
            hit = [
                sample
                for sample in manifest.samples
                for offset, size, _ in (sample.image, sample.json)
                if sample.shard == number and offset <= position < offset + size
            ]
            if hit:
                with pytest.raises(UnreadableSampleError, match=rf"image id {hit[0].image_id}\).* have changed"):
                    self.all_samples(manifest)
            else:  # a member's header, which only other readers use, or what fills its last block or ends the tar
                unused += 1
                assert self.all_samples(manifest) == whole
                assert manifest.digest == before.digest
            with pytest.raises(UserError, match="its sha256 is not the manifest's"):
                verify_shard(manifest, number)
        assert 0 < unused < 40, "both kinds are met"


def changed_bytes(path: Path, count: int) -> Iterator[int]:
    """The positions of bytes of a file, each changed in its turn to another value, all drawn from the file's name."""
    content = path.read_bytes()
    draw = random.Random(path.name)
    for _ in range(count):
        position = draw.randrange(len(content))
        damaged = bytearray(content)
        damaged[position] ^= draw.randrange(1, 256)
        path.write_bytes(damaged)
        yield position
    path.write_bytes(content)


class TestReader:
    def test_keeps_few_files_open(self, tmp_path: Path) -> None:
        paths = [tmp_path / f"{number}" for number in range(OPEN_FILES + 40)]
        for path in paths:
            path.write_text(path.name)
        reader = ShardReader(lambda number: os.open(paths[number], os.O_RDONLY))
        before = len(os.listdir("/proc/self/fd"))
        for number, path in enumerate(paths):
            assert reader.read(number, 0, 10).decode() == path.name
        assert len(os.listdir("/proc/self/fd")) - before <= OPEN_FILES
        assert reader.read(0, 0, 10) == b"0"
        reader.close()
        assert len(os.listdir("/proc/self/fd")) <= before

    def test_a_manifest_travels_as_its_path_and_digest(self, tmp_path: Path) -> None:
        manifest = make_manifest(tmp_path, range(1, 100))
        read_image_bytes(manifest, manifest.samples[0])
        packed = pickle.dumps(manifest)
        assert len(packed) < 400
        copy = pickle.loads(packed)
        assert copy == manifest
        assert read_image_bytes(copy, copy.samples[0]) == read_image_bytes(manifest, manifest.samples[0])


Change = Callable[[dict[str, Any]], Any]


def shard(content: dict[str, Any]) -> dict[str, Any]:
    return content["shards"][0]


CHANGES: list[Any] = [
    pytest.param(lambda c: shard(c).update(name="../../etc/passwd"), "shard name", id="name leads out"),
    pytest.param(lambda c: shard(c).update(name="/etc/passwd"), "shard name", id="absolute name"),
    pytest.param(lambda c: shard(c).update(name=".."), "shard name", id="parent as name"),
    pytest.param(lambda c: shard(c).update(name="a\x1b[31m\n.tar"), "shard name", id="name with escapes"),
    pytest.param(lambda c: shard(c).update(bytes=-1), "-1 is not a whole number", id="negative size of a shard"),
    pytest.param(lambda c: shard(c).update(bytes=True), "True is not a whole number", id="true as size"),
    pytest.param(lambda c: shard(c).update(bytes=10**15), "the manifest says 1000000000000000", id="shard too large"),
    pytest.param(lambda c: shard(c).update(samples=0), "0 is not a whole number of at least 1", id="empty shard"),
    pytest.param(lambda c: shard(c).update(samples=10**9), "not the index of these shards", id="more samples"),
    pytest.param(lambda c: c["index"].update(sha256="0" * 64), "its sha256 is not the manifest's", id="other index"),
    pytest.param(lambda c: c.update(index=None), "not a manifest", id="no index"),
    pytest.param(lambda c: c.update(shards=[]), "it has no shards", id="no shards"),
    pytest.param(lambda c: c.update(shards=None), "not a manifest", id="null for shards"),
    pytest.param(lambda c: c.update(problems=[1]), "not a manifest", id="problems a list"),
    pytest.param(lambda c: c["label_map"].update(kind="other"), "of the kind 'other'", id="other label map"),
    pytest.param(lambda c: c["label_map"].update(categories=[7]), "not a manifest", id="category a number"),
]


@pytest.mark.parametrize(("change", "told"), CHANGES)
def test_a_foreign_manifest_is_refused_when_it_is_read(tmp_path: Path, change: Change, told: str) -> None:
    path = make_manifest(tmp_path, annotations=[make_annotation(1, 1)]).folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    (path.parent / "manifest.sha256").unlink()
    with pytest.raises(UserError, match=told) as caught:
        read_manifest(path.parent)
    assert str(path.parent) in str(caught.value)


def changed(manifest: Manifest, change: Callable[[str], str]) -> Sample:
    """The first sample, as if its JSON member had been written with another text."""
    path = manifest.folder / manifest.shards[0].name
    offset, size, _ = manifest.samples[0].json
    content = bytearray(path.read_bytes())
    text = change(content[offset : offset + size].decode()).encode()
    assert len(text) == size
    content[offset : offset + size] = text
    path.write_bytes(content)
    return manifest.samples[0]._replace(json=Member(offset, size, zlib.crc32(text)))


MEMBERS: list[Any] = [
    pytest.param('"category_id":1', '"category_id":2', id="unknown category"),
    pytest.param('"category_id"', '"kategory_id"', id="category key"),
    pytest.param('"bbox"', '"bbix"', id="box key"),
    pytest.param('"bbox":[2,', '"bbox":{2:', id="not JSON"),
    pytest.param("[2,3,10,8]", "[2,3,1000]", id="three numbers"),
    pytest.param('"iscrowd":0', '"iscrowd":7', id="crowd"),
    pytest.param('"area":80', '"area":[]', id="area a list"),
    pytest.param('"width":32', '"width":31', id="width"),
    pytest.param('"file_name"', '"file_mane"', id="name key"),
]


@pytest.mark.parametrize(("before", "after"), MEMBERS)
def test_a_foreign_member_is_unreadable(tmp_path: Path, before: str, after: str) -> None:
    manifest = make_manifest(tmp_path, annotations=[make_annotation(1, 1)])
    sample = changed(manifest, lambda text: text.replace(before, after))
    with pytest.raises(UnreadableSampleError, match=r"000000000001 \(image id 1\): its JSON member is damaged"):
        read_annotations(manifest, sample)
