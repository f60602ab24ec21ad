import errno
import gzip
import hashlib
import json
import os
import pickle
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from pipeline.config.sections import DatasetSection, ShardsSection, SplitSection
from pipeline.data.cache import Cache
from pipeline.data.images import read_image_file
from pipeline.data.manifest import Manifest, read_image_bytes, read_manifest
from pipeline.errors import StoreError, UserError
from pipeline.shard import origin
from pipeline.shard.coco import CocoSplit, open_source, open_split
from pipeline.shard.write import (
    ShardPlan,
    WriteAll,
    WriteTask,
    WrittenShard,
    check_same_categories,
    plan_shards,
    shard_split,
    verify_shard,
    write_in_a_row,
    write_shard,
)
from pipeline.store import Place, StorePath
from tests.builders import (
    CocoFiles,
    disk_of,
    make_annotation,
    make_dataset_section,
    make_manifest,
    read_coco,
    write_coco,
    write_image,
)

ANNOTATIONS = [
    make_annotation(1, 1),
    make_annotation(2, 1, (5, 5, 9, 9), 90, iscrowd=1),
    make_annotation(3, 3, (0.25, 1.5, 7.125, 8), 3, segmentation=[[1, 1, 5, 1, 5, 5]]),
]


def shard_files(files: CocoFiles, **settings: Any) -> Manifest:
    root = files.images.parent
    on_error = settings.pop("on_error", "fail")
    labels = settings.pop("labels", "contiguous")
    verify = settings.pop("verify", False)
    dataset = make_dataset_section(root, on_error, labels=labels)
    shards = ShardsSection(**settings)
    return shard_split(open_source(*files), "train", root / "shards", dataset, shards, verify=verify)


def left_in(folder: Path) -> set[str]:
    """Every path below a folder except the lock."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.name.endswith(".lock")}


class TestFormat:
    def test_webdataset_reads_it(self, tmp_path: Path) -> None:
        files = write_coco(tmp_path, [1, {"id": 2, "file_name": "b.png"}, 3], ANNOTATIONS)
        manifest = shard_files(files, segmentations=True)
        path = manifest.folder / "shard-000000.tar"
        samples = list(webdataset.WebDataset(str(path), shardshuffle=False).decode("pil"))
        assert [sample["__key__"] for sample in samples] == ["000000000001", "000000000002", "000000000003"]
        assert ["png" in sample for sample in samples] == [False, True, False]
        with Image.open(files.images / "b.png") as image:
            np.testing.assert_array_equal(np.array(samples[1]["png"]), np.array(image))
        assert samples[0]["json"] == {
            "image_id": 1,
            "file_name": "000000000001.jpg",
            "width": 32,
            "height": 24,
            "annotations": ANNOTATIONS[:2],
        }
        assert samples[1]["json"]["annotations"] == []
        assert samples[2]["json"]["annotations"] == ANNOTATIONS[2:]

    def test_members_are_adjacent_image_first_and_untouched(self, tmp_path: Path) -> None:
        files = write_coco(tmp_path, [1, {"id": 2, "file_name": "b.png"}], ANNOTATIONS[:1])
        manifest = shard_files(files)
        with tarfile.open(manifest.folder / "shard-000000.tar") as tar:
            names = tar.getnames()
            content = tar.extractfile("000000000002.png")
            assert content is not None
            assert content.read() == (files.images / "b.png").read_bytes()
        assert names == ["000000000001.jpg", "000000000001.json", "000000000002.png", "000000000002.json"]

    def test_the_index_points_at_the_members(self, tmp_path: Path) -> None:
        manifest = make_manifest(tmp_path, range(1, 8), ANNOTATIONS, max_samples=3)
        for shard in manifest.shards:
            content = (manifest.folder / shard.name).read_bytes()
            assert len(content) == shard.bytes
            assert hashlib.sha256(content).hexdigest() == shard.sha256
            with tarfile.open(manifest.folder / shard.name) as tar:
                places = {member.name: (member.offset_data, member.size) for member in tar}
            own = [sample for sample in manifest.samples if manifest.shards[sample.shard] == shard]
            assert len(own) == shard.samples
            members = {f"{sample.key}.{sample.extension}": sample.image for sample in own}
            members |= {f"{sample.key}.json": sample.json for sample in own}
            assert {name: (offset, size) for name, (offset, size, _) in members.items()} == places
            for offset, size, crc32 in members.values():
                assert zlib.crc32(content[offset : offset + size]) == crc32

    def test_the_extension_follows_the_content(self, tmp_path: Path) -> None:
        files = write_coco(tmp_path, [1])
        png = write_image(tmp_path / "really.png")
        png.replace(files.images / "000000000001.jpg")
        assert shard_files(files).samples[0].extension == "png"

    def test_segmentations_are_kept_only_when_wanted(self, tmp_path: Path) -> None:
        manifest = make_manifest(tmp_path, [1, 2, 3], ANNOTATIONS)
        assert b"segmentation" not in (manifest.folder / "shard-000000.tar").read_bytes()

    def test_modes_and_rotations_are_kept_as_they_are(self, tmp_path: Path) -> None:
        files = write_coco(tmp_path, [1, {"id": 2, "file_name": "b.png"}, 3, 4], draw=False)
        write_image(files.images / "000000000001.jpg", mode="L")
        write_image(files.images / "b.png", mode="RGBA")
        write_image(files.images / "000000000003.jpg", mode="CMYK")
        write_image(files.images / "000000000004.jpg", 24, 32, orientation=6)
        manifest = shard_files(files, verify=True)
        assert [(sample.width, sample.height) for sample in manifest.samples] == [(32, 24)] * 4


class TestPlan:
    def split(self, root: Path, count: int) -> CocoSplit:
        return read_coco(*write_coco(root, range(1, count + 1)), "fail")

    def test_by_samples(self, tmp_path: Path) -> None:
        plans = plan_shards(self.split(tmp_path, 7), 3, 10**9)
        assert [[image.id for image in plan.images] for plan in plans] == [[1, 2, 3], [4, 5, 6], [7]]
        assert [plan.name for plan in plans] == ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]

    def test_by_bytes(self, tmp_path: Path) -> None:
        split = self.split(tmp_path, 6)
        size = 4096
        plans = plan_shards(split, 100, size)
        assert len(plans) > 1
        for plan in plans:
            shard = write_shard(plan, split.files, tmp_path, "fail", verify=False).shard
            assert shard.bytes <= size + 10240  # a tar is padded to its record size
        assert [image.id for plan in plans for image in plan.images] == list(range(1, 7))

    def test_a_sample_may_exceed_the_bytes(self, tmp_path: Path) -> None:
        assert [len(plan.images) for plan in plan_shards(self.split(tmp_path, 3), 100, 1)] == [1, 1, 1]


class TestSameInput:
    @pytest.mark.parametrize("settings", [{}, {"max_side": 32}], ids=["as they are", "smaller"])
    def test_same_bytes_in_any_order_of_writing(self, tmp_path: Path, settings: dict[str, Any]) -> None:
        images = [{"id": number, "width": 24 + 4 * number} for number in range(1, 9)]
        first = shard_files(write_coco(tmp_path / "a", images, ANNOTATIONS), max_samples=2, **settings)
        files = write_coco(tmp_path / "b", images, ANNOTATIONS)
        os.utime(files.images / "000000000001.jpg", (0, 0))
        with ProcessPoolExecutor(2) as pool:
            second = shard_split(
                open_source(*files),
                "train",
                tmp_path / "b" / "shards",
                make_dataset_section(tmp_path / "b"),
                ShardsSection(max_samples=2, **settings),
                write_all=lambda plans, task: pool.map(task, reversed(plans)),
            )
        assert second.digest == first.digest
        for path in first.folder.iterdir():
            assert path.read_bytes() == (second.folder / path.name).read_bytes()

    def test_is_not_sharded_again(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        files = write_coco(tmp_path, annotations=ANNOTATIONS)
        first = shard_files(files)
        stamps = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
        with caplog.at_level("INFO", logger="raydetr"):
            again = shard_files(files)
        assert again == first
        assert {path: path.stat().st_mtime_ns for path in first.folder.iterdir()} == stamps
        assert "shard: already done, train has 3 samples" in caplog.text


class TestOtherInput:
    @pytest.mark.parametrize(
        ("settings", "told"),
        [
            ({"max_samples": 2}, "shards.max_samples was 1000, now 2"),
            ({"max_bytes": 4096}, "shards.max_bytes was 268435456, now 4096"),
            ({"segmentations": True}, "shards.segmentations was False, now True"),
            ({"labels": "coco91"}, "dataset.labels was 'contiguous', now 'coco91'"),
            ({"max_side": 64}, "shards.max_side was None, now 64; shards.quality was None, now 90"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_other_settings_are_refused(self, tmp_path: Path, settings: dict[str, Any], told: str) -> None:
        files = write_coco(tmp_path)
        shard_files(files)
        with pytest.raises(UserError) as caught:
            shard_files(files, **settings)
        assert told in str(caught.value)
        assert "Set another shards.out, or delete that folder." in str(caught.value)

    def test_other_copies_are_refused(self, tmp_path: Path) -> None:
        files = write_coco(tmp_path)
        first = shard_files(files, max_side=64)
        assert shard_files(files, max_side=64, quality=90) == first
        with pytest.raises(UserError, match=r"shards\.quality was 90, now 80"):
            shard_files(files, max_side=64, quality=80)
        with pytest.raises(UserError, match=r"shards\.max_side was 64, now None"):
            shard_files(files)

    def test_another_source_is_refused(self, tmp_path: Path) -> None:
        files = write_coco(tmp_path)
        shard_files(files)
        write_coco(tmp_path, annotations=ANNOTATIONS)
        with pytest.raises(UserError, match=r"the source \(.*train\.json, or its images\) was"):
            shard_files(files)

    def test_on_error_matters_only_where_something_was_cleaned(self, tmp_path: Path) -> None:
        clean = write_coco(tmp_path / "clean")
        assert shard_files(clean, on_error="skip") == shard_files(clean, on_error="fail")
        bad = write_coco(tmp_path / "bad", annotations=[make_annotation(1, 1, (0, 0, 0, 0))])
        shard_files(bad, on_error="skip")
        with pytest.raises(UserError, match="on_error was 'skip' and cleaned 1 box_without_area, now 'fail'"):
            shard_files(bad, on_error="fail")

    def test_a_folder_of_something_else_is_refused(self, tmp_path: Path) -> None:
        files = write_coco(tmp_path)
        precious = tmp_path / "shards" / "train" / "thesis.txt"
        precious.parent.mkdir(parents=True)
        precious.write_text("x")
        with pytest.raises(UserError, match=r"no manifest\.json and is not empty"):
            shard_files(files)
        assert precious.read_text() == "x"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def replace_by_text(path: Path) -> None:
    path.write_text("<html>not found</html>")


def make_other_size(path: Path) -> None:
    write_image(path, 20, 20)


BAD_IMAGES = [
    pytest.param(cut, "image_truncated", "cut off", id="truncated"),
    pytest.param(replace_by_text, "image_unreadable", "not a JPEG or PNG", id="no image"),
    pytest.param(make_other_size, "image_size_mismatch", "20x20 pixels, the annotation file says 32x24", id="size"),
]


class TestBadImages:
    @pytest.mark.parametrize(("spoil", "rule", "told"), BAD_IMAGES)
    def test_fail_names_the_image_and_leaves_nothing(self, tmp_path: Path, spoil: Any, rule: str, told: str) -> None:
        files = write_coco(tmp_path, annotations=ANNOTATIONS)
        spoil(files.images / "000000000003.jpg")
        with pytest.raises(UserError) as caught:
            shard_files(files, max_samples=1)
        assert f"{files.images / '000000000003.jpg'}: image 3" in str(caught.value)
        assert told in str(caught.value)
        assert "dataset.on_error: skip to leave the image out" in str(caught.value)
        assert left_in(tmp_path / "shards") == set()

    @pytest.mark.parametrize(("spoil", "rule", "told"), BAD_IMAGES)
    def test_skip_leaves_it_out_and_counts(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, spoil: Any, rule: str, told: str
    ) -> None:
        files = write_coco(tmp_path, annotations=ANNOTATIONS)
        spoil(files.images / "000000000001.jpg")
        with caplog.at_level("INFO", logger="raydetr"):
            manifest = shard_files(files, max_samples=1, on_error="skip")
        assert [sample.image_id for sample in manifest.samples] == [2, 3]
        assert [sample.shard for sample in manifest.samples] == [0, 1]
        assert manifest.problems == {rule: 1}
        assert f"train: cleaned: 1 {rule}" in caplog.text
        metadata = {"index.npy", "manifest.json", "manifest.sha256", "problems.jsonl"}
        assert left_in(manifest.folder) == {*metadata, "shard-000001.tar", "shard-000002.tar"}
        assert read_manifest(manifest.folder) == manifest

    def test_nothing_left(self, tmp_path: Path) -> None:
        files = write_coco(tmp_path)
        for path in files.images.iterdir():
            cut(path)
        with pytest.raises(UserError, match="none of its images can be used: 3 image_truncated"):
            shard_files(files, on_error="skip")
        assert left_in(tmp_path / "shards") == set()

    def test_damage_inside_is_found_by_verify(self, tmp_path: Path) -> None:
        files = write_coco(tmp_path, [1, {"id": 2, "file_name": "b.png", "width": 64, "height": 64}])
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(files.images / "b.png")
        content = bytearray((files.images / "b.png").read_bytes())
        content[2000:2064] = bytes(64)
        (files.images / "b.png").write_bytes(content)
        with pytest.raises(UserError, match=r"b\.png: image 2: it cannot be decoded"):
            shard_files(files, verify=True)
        assert shard_files(files, verify=True, on_error="skip").problems == {"image_unreadable": 1}


class TestFullDisk:
    @pytest.mark.parametrize("size", [0, 3000, 12000], ids=["at once", "in a sample", "between shards"])
    def test_one_clear_error_and_no_half_shard(self, tmp_path: Path, size: int) -> None:
        files = write_coco(tmp_path, range(1, 40))
        with disk_of(size), pytest.raises(UserError, match=r"no space left .*; free some, or write elsewhere"):
            shard_files(files, max_samples=20)
        assert left_in(tmp_path / "shards") <= {".train.partial", ".train.partial/job.json"}
        assert len(shard_files(files, max_samples=20).samples) == 39

    @pytest.mark.parametrize(("settings", "key"), [({}, "runs or shards.out"), ({"out": "elsewhere"}, "shards.out")])
    def test_names_the_key_that_decides(self, tmp_path: Path, settings: dict[str, Any], key: str) -> None:
        files = write_coco(tmp_path)
        with disk_of(3000), pytest.raises(UserError, match=f"write elsewhere with {key}$"):
            shard_files(files, **settings)

    def test_no_manifest_without_space(self, tmp_path: Path) -> None:
        files = write_coco(tmp_path, range(1, 200))
        # Every shard is one tar record of 10240 bytes; the manifest is larger.
        with disk_of(10240), pytest.raises(UserError, match="no space left"):
            shard_files(files, max_samples=2)
        partial = tmp_path / "shards" / ".train.partial"
        before = {path.name: path.stat().st_ino for path in partial.glob("*.tar")}
        assert len(before) == 100
        manifest = shard_files(files, max_samples=2)
        assert {path.name: path.stat().st_ino for path in manifest.folder.glob("*.tar")} == before

    def test_leftovers_of_a_killed_process_are_removed(self, tmp_path: Path) -> None:
        files = write_coco(tmp_path)
        partial = tmp_path / "shards" / ".train.partial"
        partial.mkdir(parents=True)
        (partial / "shard-000000.tar").write_bytes(b"half")
        manifest = shard_files(files)
        assert not partial.exists()
        verify_shard(manifest, 0)


class StoppedError(Exception):
    """Ends a command where nothing is the user's fault."""


SHARDS = 5


def stopping_after(count: int) -> WriteAll:
    """Writes so many shards, then is stopped."""

    def write_all(plans: list[ShardPlan], task: WriteTask) -> Iterator[WrittenShard]:
        yield from map(task, plans[:count])
        raise StoppedError

    return write_all


def write_some(root: Path, write_all: WriteAll = write_in_a_row, out: Place | None = None, **settings: Any) -> Manifest:
    """Ten images in five shards."""
    files = CocoFiles(root / "annotations" / "train.json", root / "train")
    if not files.annotations.exists():
        write_coco(root, range(1, 2 * SHARDS + 1), ANNOTATIONS)
    shards = ShardsSection(**{"max_samples": 2, **settings})
    source = open_source(*files)
    dataset = make_dataset_section(root)
    return shard_split(source, "train", out or root / "shards", dataset, shards, write_all=write_all)


def stop_after(root: Path, count: int, **settings: Any) -> Path:
    """The unfinished folder of a write that was stopped."""
    with pytest.raises(StoppedError):
        write_some(root, stopping_after(count), **settings)
    return root / "shards" / ".train.partial"


def inodes(folder: Path) -> dict[str, tuple[int, int]]:
    stats = {path.name: path.stat() for path in folder.glob("shard-*.tar")}
    return {name: (status.st_ino, status.st_mtime_ns) for name, status in stats.items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


class TestStopped:
    @pytest.fixture(scope="class")
    def unbroken(self, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
        return contents(write_some(tmp_path_factory.mktemp("unbroken")).folder)

    @pytest.mark.parametrize("count", range(SHARDS + 1))
    def test_the_next_goes_on(self, tmp_path: Path, unbroken: dict[str, bytes], count: int) -> None:
        done = inodes(stop_after(tmp_path, count))
        assert len(done) == count
        folder = write_some(tmp_path).folder
        assert {name: inodes(folder)[name] for name in done} == done
        assert contents(folder) == unbroken
        assert left_in(tmp_path / "shards") == {"train", *(f"train/{name}" for name in unbroken)}

    @pytest.mark.parametrize("in_task", [False, True], ids=["driver", "task"])
    def test_a_fault_of_the_disk_keeps_what_is_finished(
        self, tmp_path: Path, unbroken: dict[str, bytes], in_task: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*arguments: object) -> None:
            raise OSError(errno.EIO, "Input/output error")

        def write_all(plans: list[ShardPlan], task: WriteTask) -> Iterator[WrittenShard]:
            yield from map(task, plans[:3])
            if in_task:
                with monkeypatch.context() as patch:
                    patch.setattr("os.fsync", fail)
                    yield task(plans[3])
            fail()

        with pytest.raises(OSError, match="Input/output error"):
            write_some(tmp_path, write_all)
        done = inodes(tmp_path / "shards" / ".train.partial")
        assert len(done) == 3
        folder = write_some(tmp_path).folder
        assert {name: inodes(folder)[name] for name in done} == done
        assert contents(folder) == unbroken

    def test_a_store_that_fails_keeps_what_is_finished(self, tmp_path: Path, unbroken: dict[str, bytes]) -> None:
        def write_all(plans: list[ShardPlan], task: WriteTask) -> Iterator[WrittenShard]:
            yield from map(task, plans[:3])
            raise StoreError("s3://bucket/train: cannot be read in its store")

        with pytest.raises(StoreError):
            write_some(tmp_path, write_all)
        done = inodes(tmp_path / "shards" / ".train.partial")
        assert len(done) == 3
        folder = write_some(tmp_path).folder
        assert {name: inodes(folder)[name] for name in done} == done
        assert contents(folder) == unbroken

    @pytest.mark.parametrize("damage", [flip, shorten, empty, Path.unlink], ids=lambda value: value.__name__)
    @pytest.mark.parametrize("suffix", ["tar", "npy", "json"])
    def test_what_is_damaged_is_done_again(
        self, tmp_path: Path, unbroken: dict[str, bytes], suffix: str, damage: Callable[[Path], None]
    ) -> None:
        partial = stop_after(tmp_path, 3)
        done = inodes(partial)
        damage(partial / f"shard-000001.{suffix}")
        folder = write_some(tmp_path).folder
        assert contents(folder) == unbroken
        assert {name for name in done if inodes(folder)[name] == done[name]} == {
            "shard-000000.tar",
            "shard-000002.tar",
        }

    def test_a_record_of_another_shard_is_not_taken(self, tmp_path: Path, unbroken: dict[str, bytes]) -> None:
        partial = stop_after(tmp_path, 3)
        for suffix in ("tar", "npy", "json"):
            (partial / f"shard-000002.{suffix}").write_bytes((partial / f"shard-000001.{suffix}").read_bytes())
        assert contents(write_some(tmp_path).folder) == unbroken

    @pytest.mark.parametrize("damage", [shorten, empty, Path.unlink], ids=lambda value: value.__name__)
    def test_a_torn_job_begins_anew(
        self, tmp_path: Path, unbroken: dict[str, bytes], damage: Callable[[Path], None]
    ) -> None:
        partial = stop_after(tmp_path, 3)
        done = inodes(partial)
        damage(partial / "job.json")
        folder = write_some(tmp_path).folder
        assert contents(folder) == unbroken
        assert not set(inodes(folder).items()) & set(done.items())

    def test_other_settings_begin_anew(self, tmp_path: Path, unbroken: dict[str, bytes]) -> None:
        stop_after(tmp_path, 2, max_samples=4)
        assert contents(write_some(tmp_path).folder) == unbroken

    def test_another_source_begins_anew(self, tmp_path: Path) -> None:
        stop_after(tmp_path, 3)
        write_coco(tmp_path, range(1, 2 * SHARDS + 1), ANNOTATIONS[:1])
        folder = write_some(tmp_path).folder
        write_coco(tmp_path / "other", range(1, 2 * SHARDS + 1), ANNOTATIONS[:1])
        assert contents(folder) == contents(write_some(tmp_path / "other").folder)

    def test_a_task_of_a_killed_command_does_no_harm(self, tmp_path: Path, unbroken: dict[str, bytes]) -> None:
        """Two write the same shard at the same time: here one within the other."""
        write_coco(tmp_path, range(1, 2 * SHARDS + 1), ANNOTATIONS)

        def write_all(plans: list[ShardPlan], task: WriteTask) -> Iterator[WrittenShard]:
            for plan in plans:
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(origin, "read_image_file", reading_after(lambda plan=plan: task(plan)))
                    yield task(plan)

        assert contents(write_some(tmp_path, write_all).folder) == unbroken


class TestStore:
    @pytest.fixture(autouse=True)
    def _own_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def stored(self, folder: StorePath) -> dict[str, bytes]:
        return {name: (folder / name).read_bytes() for name in folder.list()}

    @pytest.mark.parametrize("count", [0, 3, SHARDS])
    def test_the_same_bytes_as_on_a_disk(self, tmp_path: Path, s3_folder: StorePath, count: int) -> None:
        """After a command that was stopped, too, whose shards are not written again."""
        with pytest.raises(StoppedError):
            write_some(tmp_path, stopping_after(count), s3_folder)
        uploaded: list[str] = []
        upload = StorePath.upload
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StorePath, "upload", lambda self, path: (uploaded.append(self.name), upload(self, path)))
            manifest = write_some(tmp_path, out=s3_folder)
        assert uploaded == [*(f"shard-{number:06d}.tar" for number in range(count, SHARDS)), "index.npy"]
        local = write_some(tmp_path)
        assert self.stored(s3_folder / "train") == contents(local.folder)
        assert manifest == local == read_manifest(s3_folder / "train") == write_some(tmp_path, out=s3_folder)
        assert not list(tmp_path.glob(".*.tmp"))
        for sample in local.samples:
            assert read_image_bytes(manifest, sample) == read_image_bytes(local, sample)
        for number in range(SHARDS):
            verify_shard(manifest, number)

    def test_a_manifest_travels_to_a_process_with_an_empty_cache(self, tmp_path: Path, s3_folder: StorePath) -> None:
        manifest = write_some(tmp_path, out=s3_folder, cache=str(tmp_path / "one"))
        copy = pickle.loads(pickle.dumps(replace(manifest, cache=Cache(tmp_path / "other"))))
        assert read_image_bytes(copy, copy.samples[7]) == read_image_bytes(manifest, manifest.samples[7])
        assert len(list((tmp_path / "other").iterdir())) == 3  # the manifest, the index, and the shard

    def test_a_shard_of_another_size_and_a_missing_one(self, tmp_path: Path, s3_folder: StorePath) -> None:
        write_some(tmp_path, out=s3_folder)
        shard = s3_folder / "train" / "shard-000001.tar"
        shard.write_bytes(shard.read_bytes()[:-512])
        with pytest.raises(UserError, match=r"shard-000001.tar: this shard has \d+ bytes, the manifest says"):
            read_manifest(s3_folder / "train")
        shard.unlink()
        with pytest.raises(UserError, match=r"shard-000001.tar: this shard is missing"):
            read_manifest(s3_folder / "train")

    def test_a_shard_that_has_changed_is_not_used(self, tmp_path: Path, s3_folder: StorePath) -> None:
        write_some(tmp_path, out=s3_folder)
        shard = s3_folder / "train" / "shard-000001.tar"
        content = bytearray(shard.read_bytes())
        content[600] ^= 1
        shard.write_bytes(bytes(content))
        manifest = read_manifest(s3_folder / "train", Cache(tmp_path / "empty"))
        with pytest.raises(UserError, match="the file has changed"):
            verify_shard(manifest, 1)
        with pytest.raises(UserError, match="the file has changed in its store"):
            read_image_bytes(manifest, manifest.samples[2])

    def test_a_copy_of_the_index_that_has_changed_is_not_used(self, tmp_path: Path, s3_folder: StorePath) -> None:
        cache = Cache(tmp_path / "cache")
        write_some(tmp_path, out=s3_folder, cache=str(cache.folder))
        (copy,) = (path for path in (tmp_path / "cache").iterdir() if path.read_bytes().startswith(b"\x93NUMPY"))
        flip(copy)
        with pytest.raises(UserError, match=f"{copy}: its sha256 is not the manifest's: .*; delete this copy of it"):
            read_manifest(s3_folder / "train", cache)
        copy.unlink()
        assert len(read_manifest(s3_folder / "train", cache).samples) == 2 * SHARDS

    def test_a_manifest_cannot_name_files_beside_the_cache(self, tmp_path: Path, s3_folder: StorePath) -> None:
        manifest = write_some(tmp_path, out=s3_folder)
        (tmp_path / "beside").write_bytes(b"x")
        file = s3_folder / "train" / "manifest.json"
        text = file.read_bytes()
        for sha256 in (manifest.shards[0].sha256, json.loads(text)["index"]["sha256"]):
            file.write_bytes(text.replace(sha256.encode(), b"../beside"))
            with pytest.raises(UserError, match=r"not a manifest .*is not a sha256"):
                read_manifest(s3_folder / "train", Cache(tmp_path / "cache"))

    def test_other_files_are_left_alone(self, tmp_path: Path, s3_folder: StorePath) -> None:
        (s3_folder / "train" / "thesis.tex").write_bytes(b"x")
        with pytest.raises(UserError, match="is not empty"):
            write_some(tmp_path, out=s3_folder)
        assert s3_folder.list() == {"train/thesis.tex": 1}

    def test_another_source_begins_anew(self, tmp_path: Path, s3_folder: StorePath) -> None:
        with pytest.raises(StoppedError):
            write_some(tmp_path, stopping_after(3), s3_folder)
        write_coco(tmp_path, range(1, 2 * SHARDS + 1), ANNOTATIONS[:1])
        write_some(tmp_path, out=s3_folder)
        assert self.stored(s3_folder / "train") == contents(write_some(tmp_path).folder)

    @pytest.mark.parametrize("kind", ["folder", "zip", "gzip and tar"])
    def test_a_dataset_in_a_store_gives_the_same_shards(self, tmp_path: Path, s3_folder: StorePath, kind: str) -> None:
        expected = write_some(tmp_path)
        root = tmp_path / "annotations" / "train.json"
        (s3_folder / "annotations" / "train.json").upload(root)
        images, annotations = "train", "annotations/train.json"
        if kind == "folder":
            for path in (tmp_path / "train").iterdir():
                (s3_folder / "train" / path.name).upload(path)
        else:
            images = "train.zip" if kind == "zip" else "train.tar"
            packed = shutil.make_archive(str(tmp_path / "packed"), images[-3:], tmp_path / "train")
            (s3_folder / images).upload(Path(packed))
        if kind == "gzip and tar":
            annotations = "annotations/train.json.gz"
            (s3_folder / annotations).write_bytes(gzip.compress(root.read_bytes()))
        section = SplitSection(annotations=annotations, images=images)
        dataset = DatasetSection(root=str(s3_folder), train=section)
        source = open_split(dataset, section)
        manifest = shard_split(source, "train", tmp_path / "other", dataset, ShardsSection(max_samples=2))
        assert contents(manifest.folder) == contents(expected.folder)


def reading_after(first: Callable[[], object]) -> Callable[[Path], bytes]:
    """Reads images, but calls something before the second one."""
    calls = count()

    def read(path: Path) -> bytes:
        if next(calls) == 1:
            first()
        return read_image_file(path)

    return read


class TestVerify:
    def test_passes_what_was_written(self, tmp_path: Path) -> None:
        manifest = make_manifest(tmp_path, [1, 2, 3], ANNOTATIONS, max_samples=2)
        for number in range(len(manifest.shards)):
            verify_shard(manifest, number)

    def test_finds_a_changed_byte(self, tmp_path: Path) -> None:
        manifest = make_manifest(tmp_path)
        path = manifest.folder / "shard-000000.tar"
        content = bytearray(path.read_bytes())
        content[700] ^= 1
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"shard-000000\.tar: its sha256 is not the manifest's"):
            verify_shard(manifest, 0)

    def test_finds_a_missing_shard(self, tmp_path: Path) -> None:
        manifest = make_manifest(tmp_path)
        (manifest.folder / "shard-000000.tar").unlink()
        with pytest.raises(UserError, match="cannot be read"):
            verify_shard(manifest, 0)


def test_splits_with_other_categories_are_refused(tmp_path: Path) -> None:
    train = open_source(*write_coco(tmp_path))
    check_same_categories(train, open_source(*write_coco(tmp_path, split="val")))
    val = open_source(*write_coco(tmp_path, split="val", categories=[{"id": 1, "name": "cat"}]))
    with pytest.raises(UserError, match=r"differ in their categories .*\(3, 'dog'\)"):
        check_same_categories(train, val)


def test_manifest_does_not_name_its_folder(tmp_path: Path) -> None:
    manifest = make_manifest(tmp_path)
    assert str(tmp_path) not in (manifest.folder / "manifest.json").read_text()
