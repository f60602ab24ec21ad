"""pipeline/shard/webdataset.py: tars that have no manifest."""

import io
import json
import logging
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import webdataset

from pipeline.config.load import load_config
from pipeline.config.sections import ShardsSection
from pipeline.data.manifest import Manifest
from pipeline.errors import UserError
from pipeline.shard.coco import open_source, open_split
from pipeline.shard.imported import import_dataset
from pipeline.shard.webdataset import read_webdataset
from pipeline.shard.write import shard_split
from tests.builders import CATEGORIES, make_annotation, make_dataset_section, write_coco, write_image

ANNOTATIONS = [
    make_annotation(11, 1),
    make_annotation(12, 1, (5, 5, 9, 9), 90, iscrowd=1),
    make_annotation(13, 3, (0.25, 1.5, 7.125, 8), 3, segmentation=[[1, 1, 5, 1, 5, 5]]),
]
NAMED = [{"id": 1, "name": "cat"}]


def picture(path: Path, **more: Any) -> bytes:
    return write_image(path, **more).read_bytes()


def member(number: int, *boxes: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A JSON member of the variant that names its categories."""
    return {"image_id": number, "annotations": list(boxes), "categories": NAMED, **more}


def write_tar(path: Path, samples: dict[str, Any], tmp_path: Path) -> Path:
    """Tars as webdataset writes them, of keys and JSON members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as tar:
        for number, (key, content) in enumerate(samples.items()):
            image = picture(tmp_path / "drawn" / f"{number}.jpg", seed=number)
            tar.write({"__key__": key, "jpg": image, "json": content})
    return path


class TestOurShards:
    """The JSON member says all of a sample: the tars alone give the same samples again."""

    @pytest.fixture
    def shards(self, tmp_path: Path) -> dict[str, Manifest]:
        root = tmp_path / "coco"
        large = {"id": 3, "file_name": "sub/large.png", "width": 96, "height": 64}
        write_coco(root, [1, {"id": 2, "file_name": "b.PNG"}, large, 4, 5], ANNOTATIONS)
        write_image(root / "train" / "really.png").replace(root / "train" / "000000000004.jpg")
        write_coco(root, [5, 9], [make_annotation(1, 9)], split="val")
        return {split: self.shard(root, split, tmp_path / "shards") for split in ("train", "val")}

    def shard(self, root: Path, split: str, out: Path) -> Manifest:
        settings = ShardsSection(max_samples=2, segmentations=True, max_side=64)
        source = open_source(root / f"annotations/{split}.json", root / split)
        return shard_split(source, split, out, make_dataset_section(root), settings)

    @pytest.mark.parametrize("names", ["annotation file", "manifest", "none"])
    def test_are_the_same_again(
        self, tmp_path: Path, shards: dict[str, Manifest], names: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        kept = tmp_path / "manifest.json"
        (tmp_path / "shards/val/manifest.json").rename(kept)
        for path in tmp_path.glob("shards/*/*"):
            if path.suffix != ".tar":
                path.unlink()
        files = {"annotation file": tmp_path / "coco/annotations/val.json", "manifest": kept, "none": None}
        with caplog.at_level(logging.WARNING):
            imported = import_dataset("webdataset", tmp_path / "shards", tmp_path / "out", categories=files[names])
        assert ("do not name the categories" in caplog.text) == (names == "none")
        assert imported.counts == {"train": (5, 3), "val": (2, 1)}
        (tmp_path / "my.yaml").write_text(imported.config)
        dataset = load_config(tmp_path / "my.yaml").dataset
        for split, before in shards.items():
            section = getattr(dataset, split)
            # A copy is an image like others now: no side is too large.
            settings = ShardsSection(max_samples=2, segmentations=True)
            again = shard_split(open_split(dataset, section), split, tmp_path / "again", dataset, settings)
            if split == "val":
                assert again.shards == before.shards
            else:
                assert self.without_original(again) == self.without_original(before)
            assert (again.labels == before.labels) == (names != "none")

    def without_original(self, manifest: Manifest) -> list[dict[str, Any]]:
        found = []
        for shard in manifest.shards:
            path = manifest.folder / shard.name
            for sample in webdataset.WebDataset(str(path), shardshuffle=False):
                content = json.loads(sample["json"])
                content = {key: value for key, value in content.items() if not key.startswith("original")}
                members = {key: value for key, value in sample.items() if key[:2] != "__" and key != "json"}
                found.append({"key": sample["__key__"], "json": content, **members})
        return found


class TestOthers:
    def test_a_member_needs_little(self, tmp_path: Path) -> None:
        """The image's size comes from its header, its name from the key, and the boxes are numbered."""
        box = {"bbox": [2, 3, 10, 8], "category_id": 1}
        samples = {"a/one": member(7, box, box), "two": member(8), "three": member(9, {**box, "id": 5, "image_id": 9})}
        write_tar(tmp_path / "tars" / "000.tar", samples, tmp_path)
        (split,) = read_webdataset(tmp_path / "tars").values()
        assert split.document["images"] == [
            {"id": number, "file_name": name, "width": 32, "height": 24}
            for number, name in ((7, "a/one.jpg"), (8, "two.jpg"), (9, "three.jpg"))
        ]
        assert [(entry["id"], entry["image_id"]) for entry in split.document["annotations"]] == [(1, 7), (2, 7), (3, 9)]
        assert split.document["categories"] == NAMED

    def test_validation_is_drawn(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "tars" / "0.tar", {f"{number}": member(number) for number in range(1, 9)}, tmp_path)
        imported = import_dataset("webdataset", tmp_path / "tars", tmp_path / "out", val_share=0.25)
        assert imported.counts == {"train": (6, 0), "val": (2, 0)}

    def test_splits_by_the_names_of_the_tars(self, tmp_path: Path) -> None:
        for number, name in enumerate(("train-0.tar", "train2017_1.tar", "val-0.tar", "test.tar"), start=1):
            write_tar(tmp_path / "tars" / name, {name[:-4]: member(number)}, tmp_path)
        found = read_webdataset(tmp_path / "tars")
        ids = {split: [image["id"] for image in own.document["images"]] for split, own in found.items()}
        assert ids == {"train": [1, 2], "val": [3], "test": [4]}

    def test_an_image_that_exif_turns_has_the_size_that_is_shown(self, tmp_path: Path) -> None:
        content = picture(tmp_path / "turned.jpg", orientation=6)
        (tmp_path / "tars").mkdir()
        with webdataset.TarWriter(str(tmp_path / "tars/0.tar")) as tar:
            tar.write({"__key__": "a", "jpg": content, "json": member(1)})
        (image,) = read_webdataset(tmp_path / "tars")["train"].document["images"]
        assert (image["width"], image["height"]) == (24, 32)

    def test_categories_are_those_of_all_members(self, tmp_path: Path) -> None:
        samples = {
            "a": member(1, categories=[{"id": 5, "name": "dog"}]),
            "b": member(2, categories=[{"id": 1, "name": "cat"}, {"id": 5, "name": "dog"}]),
        }
        write_tar(tmp_path / "tars/train-0.tar", {"a": samples["a"]}, tmp_path)
        write_tar(tmp_path / "tars/val-0.tar", {"b": samples["b"]}, tmp_path)
        found = read_webdataset(tmp_path / "tars")
        expected = [{"id": 1, "name": "cat"}, {"id": 5, "name": "dog"}]
        assert [split.document["categories"] for split in found.values()] == [expected, expected]

    def test_a_file_names_more_than_the_tars_use(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "tars/0.tar", {"a": {"image_id": 1, "annotations": []}}, tmp_path)
        (tmp_path / "names.json").write_text(json.dumps(CATEGORIES))
        split = read_webdataset(tmp_path / "tars", tmp_path / "names.json")["train"]
        assert split.document["categories"] == list(CATEGORIES)


def rename(name: str) -> Callable[[tarfile.TarInfo], None]:
    return lambda info: setattr(info, "name", name)


def as_link(info: tarfile.TarInfo) -> None:
    info.type, info.linkname, info.size = tarfile.SYMTYPE, "/etc/passwd", 0


def as_hard_link(info: tarfile.TarInfo) -> None:
    info.type, info.linkname, info.size = tarfile.LNKTYPE, "../x", 0


def as_pipe(info: tarfile.TarInfo) -> None:
    info.type, info.size = tarfile.FIFOTYPE, 0


class TestBadTars:
    def tars(self, root: Path, change: Callable[[tarfile.TarInfo], None], name: str = "a.json") -> Path:
        """A tar with a sample of which a member is another one."""
        folder = root / "tars"
        folder.mkdir()
        with tarfile.open(folder / "0.tar", "w") as tar:
            for own, content in (("a.jpg", picture(root / "a.jpg")), ("a.json", json.dumps(member(1)).encode())):
                info = tarfile.TarInfo(own)
                info.size = len(content)
                if own == name:
                    change(info)
                tar.addfile(info, io.BytesIO(content) if info.size else None)
        return folder

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            pytest.param(rename("../a.json"), r"the name '\.\./a\.json' leads out of it", id="above"),
            pytest.param(rename("b/../../a.json"), "leads out of it", id="above in the middle"),
            pytest.param(rename("/etc/a.json"), "leads out of it", id="absolute"),
            pytest.param(as_link, "is a link or a device", id="link"),
            pytest.param(as_hard_link, "is a link or a device", id="hard link"),
            pytest.param(as_pipe, "is a link or a device", id="pipe"),
            pytest.param(rename("b.json"), r"sample a has 0 JSON members \(jpg\)", id="another key"),
            pytest.param(rename("a.jpg"), r"it has a\.jpg twice", id="the same name"),
            pytest.param(rename("a.png"), r"sample a has 2 images \(jpg, png\)", id="two images"),
            pytest.param(rename("a.cls"), r"sample a has 0 JSON members \(jpg, cls\)", id="no JSON"),
        ],
    )
    def test_a_member_that_is_none(self, tmp_path: Path, change: Callable[[tarfile.TarInfo], None], told: str) -> None:
        folder = self.tars(tmp_path, change)
        with pytest.raises(UserError, match=f"^{folder / '0.tar'}: .*{told}"):
            read_webdataset(folder)

    def test_every_cut_is_found(self, tmp_path: Path) -> None:
        path = write_tar(tmp_path / "tars/0.tar", {"a": member(1), "b": member(2)}, tmp_path)
        content = path.read_bytes()
        end = len(content.rstrip(b"\0")) // 512 * 512 + 512  # of the last member
        for size in (0, 1, 511, 512, 513, 1024, 2048, end - 512, end - 1, end, end + 511):
            path.write_bytes(content[:size])
            with pytest.raises(UserError, match=r"0\.tar: .*(this tar|each sample needs)"):
                read_webdataset(tmp_path / "tars")

    def test_a_damaged_header_is_not_taken_for_the_end(self, tmp_path: Path) -> None:
        path = write_tar(tmp_path / "tars/0.tar", {"a": member(1), "b": member(2)}, tmp_path)
        with tarfile.open(path) as tar:
            offset = tar.getmembers()[2].offset
        content = bytearray(path.read_bytes())
        content[offset] ^= 1
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"0\.tar: this tar is damaged or cut off at byte {offset}; copy it again"):
            read_webdataset(tmp_path / "tars")

    def test_no_byte_that_changes_ends_in_another_error(self, tmp_path: Path) -> None:
        path = write_tar(tmp_path / "tars/0.tar", {"a": member(1), "b": member(2)}, tmp_path)
        content = path.read_bytes()
        draw = random.Random(0)
        refused = 0
        for _ in range(300):
            damaged = bytearray(content)
            damaged[draw.randrange(len(content))] = draw.randrange(256)
            path.write_bytes(damaged)
            try:
                read_webdataset(tmp_path / "tars")
            except UserError:
                refused += 1
        assert refused > 30


ENTRY = make_annotation(1, 1)


class TestBadMembers:
    @pytest.mark.parametrize(
        ("content", "told"),
        [
            pytest.param(b"{not JSON", "its JSON member is not JSON", id="not JSON"),
            pytest.param(b"[" * 100_000, "its JSON member is not JSON", id="deep"),
            pytest.param(b"\xff", "its JSON member is not JSON", id="not UTF-8"),
            pytest.param([ENTRY], "is a list, not an object", id="a list"),
            pytest.param({"annotations": []}, "its JSON member has no `image_id`", id="no id"),
            pytest.param(member(-1), "`image_id` -1, it must be in 0", id="negative id"),
            pytest.param({"image_id": 1}, "has no list `annotations`", id="no annotations"),
            pytest.param(member(1, annotations={}), "has no list `annotations`", id="annotations are an object"),
            pytest.param(member(1, 5), r"annotations\[0\] is a int, not an object", id="a number"),
            pytest.param(member(1, {"bbox": [1, 2, 3, 4]}), r"annotations\[0\] has no `category_id`", id="no category"),
            pytest.param(
                member(1, make_annotation(1, 2)), r"annotations\[0\] is of image 2, not of 1", id="of another"
            ),
            pytest.param(member(1, categories=5), "has no list `categories`", id="categories are a number"),
            pytest.param(member(1, categories=[{"id": 1}]), r"categories\[0\] has no `name`", id="no name"),
            pytest.param(
                member(1, categories=[*NAMED, {"id": 1, "name": "x"}]), "category 1 is x here and cat", id="two names"
            ),
            pytest.param(member(1, width=32), "its JSON member has no `height`", id="half a size"),
            pytest.param(member(1, width=0, height=24), "`width` 0, it must be at least 1", id="no width"),
            pytest.param(member(1, file_name="../x.jpg"), r"file_name '\.\./x\.jpg' leads out", id="above"),
            pytest.param(member(1, file_name="/x.jpg"), "file_name '/x.jpg' leads out", id="absolute"),
            pytest.param(member(1, file_name="a/.."), "leads out", id="the folder"),
            pytest.param(member(1, file_name=5), "`file_name` 5, it must be text", id="no text"),
            pytest.param(member(1, file_name="a\0b"), "`file_name` .* must be text", id="null"),
        ],
    )
    def test_are_told_with_their_sample(self, tmp_path: Path, content: Any, told: str) -> None:
        path = write_tar(tmp_path / "tars/0.tar", {"k": content}, tmp_path)
        with pytest.raises(UserError, match=f"^{path}: sample k.*{told}"):
            read_webdataset(tmp_path / "tars")

    def test_two_samples_of_one_file(self, tmp_path: Path) -> None:
        samples = {"a": member(1, file_name="x.jpg"), "b": member(2, file_name="./x.jpg")}
        write_tar(tmp_path / "tars/0.tar", samples, tmp_path)
        with pytest.raises(UserError, match=r"sample b: another sample has its file_name 'x\.jpg', too"):
            read_webdataset(tmp_path / "tars")

    def test_an_image_that_is_none(self, tmp_path: Path) -> None:
        (tmp_path / "tars").mkdir()
        with webdataset.TarWriter(str(tmp_path / "tars/0.tar")) as tar:
            tar.write({"__key__": "a", "jpg": b"no image", "json": member(1)})
        with pytest.raises(UserError, match="sample a: its image cannot be read"):
            read_webdataset(tmp_path / "tars")


class TestFolders:
    @pytest.mark.parametrize(
        ("names", "told"),
        [
            ([], "tars: no .tar files; unpack what is packed"),
            (["0.tar.gz"], "tars: no .tar files; unpack what is packed"),
            (["train/0.tar", "val/x.txt"], "tars/val: no .tar files"),
            (["val-0.tar"], "no tar whose name begins with train"),
            (["train-0.tar", "more.tar"], "more.tar: its name tells no split"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_without_what_is_needed(self, tmp_path: Path, names: list[str], told: str) -> None:
        (tmp_path / "tars").mkdir()
        for name in names:
            write_tar(tmp_path / "tars" / name, {"a": member(1)}, tmp_path)
        with pytest.raises(UserError, match=told):
            read_webdataset(tmp_path / "tars")

    def test_that_are_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="no such folder"):
            read_webdataset(tmp_path / "tars")

    def test_a_file_of_categories_that_is_none(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "tars/0.tar", {"a": member(1)}, tmp_path)
        (tmp_path / "names.json").write_text('{"names": []}')
        with pytest.raises(UserError, match=r"names\.json: it has no list `categories`"):
            read_webdataset(tmp_path / "tars", tmp_path / "names.json")
