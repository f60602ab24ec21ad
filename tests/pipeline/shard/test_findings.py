"""What the rules find, one by one."""

import json
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.sections import ShardsSection
from pipeline.data.images import EXIF_ASSUMED
from pipeline.errors import UserError
from pipeline.shard.coco import open_source
from pipeline.shard.findings import PROBLEMS_NAME, RULES, Findings, Where, unpacked
from pipeline.shard.write import WriteAll, shard_split, write_in_a_row
from tests.builders import CocoFiles, make_annotation, make_dataset_section, write_coco

ANNOTATIONS = [
    make_annotation(1, 1),
    make_annotation(2, 1, (5, 5, 0, 9)),
    make_annotation(3, 2, (20, 5, 30, 9)),
    {**make_annotation(3, 2), "id": "three"},
    make_annotation(4, 9),
]


def lines_of(findings: Findings) -> list[dict[str, Any]]:
    return [json.loads(line) for line in b"".join(unpacked(findings.packed)).splitlines()]


class TestFindings:
    def test_nothing_found_is_nothing(self) -> None:
        findings = Findings("skip")
        findings.note(None, Where("a.json", "a.jpg", 1))
        assert findings.packed == b""

    def test_fail_raises_and_names_the_rule(self) -> None:
        with pytest.raises(UserError, match=r"a\.json: annotation 7 of image 1 \(a\.jpg\): bad\. .* to clip the box"):
            Findings("fail").report("box_partly_outside_image", Where("a.json", "a.jpg", 1, 3, 7), "bad")

    def test_a_fault_and_a_note(self) -> None:
        findings = Findings("skip")
        findings.report("box_without_area", Where("a.json", "a\n.jpg", 1, 3, "x"), "bad")
        findings.note(EXIF_ASSUMED, Where("b.jpg", "b.jpg", 2))
        fault, note = lines_of(findings)
        assert fault == {"kind": "box_without_area", "image": "a\n.jpg", "image_id": 1, "annotation_id": None,
                         "position": 3, "key": "bbox", "told": "bad", "done": "leave the annotation out"}  # fmt: skip
        assert (note["kind"], note["image_id"], note["position"]) == (EXIF_ASSUMED, 2, None)
        assert findings.counts == {"box_without_area": 1, EXIF_ASSUMED: 1}

    def test_many_take_little_memory(self) -> None:
        tracemalloc.start()
        try:
            findings = Findings("skip")
            for number in range(20_000):
                where = Where("annotations.json", f"{number:012d}.jpg", number, number, number)
                findings.report("box_without_area", where, f"its bbox [{number}.5, 2, 0, 4] has no area")
            _, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        text = b"".join(unpacked(findings.packed))
        assert text.count(b"\n") == 20_000
        assert json.loads(text.splitlines()[-1])["annotation_id"] == 19_999
        assert most < len(text) / 3


class TestList:
    """`problems.jsonl` beside the manifest."""

    def write(self, root: Path, write_all: WriteAll = write_in_a_row) -> Path:
        files = CocoFiles(root / "annotations" / "train.json", root / "train")
        if not files.annotations.exists():
            write_coco(root, range(1, 7), ANNOTATIONS)
            for number in (4, 5):  # all of a shard: it leaves no tar
                (files.images / f"{number:012d}.jpg").write_bytes(b"no image")
            (files.images / "000000000006.jpg").unlink()
        dataset, shards = make_dataset_section(root, "skip"), ShardsSection(max_samples=1)
        manifest = shard_split(open_source(*files), "train", root / "shards", dataset, shards, write_all=write_all)
        path = root / "shards" / "train" / PROBLEMS_NAME
        assert Counter(json.loads(line)["kind"] for line in path.read_text().splitlines()) == manifest.problems
        return path

    def test_each_fault_is_a_line(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level("INFO", logger="raydetr"):
            path = self.write(tmp_path)
        assert f"train: each is a line of {path}" in caplog.text
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        first, second, third = (f"{number:012d}.jpg" for number in (1, 2, 6))
        assert [(line["kind"], line["image"], line["annotation_id"], line["position"]) for line in lines] == [
            ("image_missing", third, None, None),
            ("box_without_area", first, 2, 1),
            ("box_partly_outside_image", second, 3, 2),
            ("annotation_id_missing", second, None, 3),
            ("annotation_of_unknown_image", None, 4, 4),
            ("image_unreadable", "000000000004.jpg", None, None),
            ("image_unreadable", "000000000005.jpg", None, None),
        ]
        assert all((line["key"], line["done"]) == RULES[line["kind"]] for line in lines)
        assert not any(str(tmp_path) in line["told"] for line in lines)

    def test_in_any_order_of_writing_and_after_a_stop(self, tmp_path: Path) -> None:
        once = self.write(tmp_path / "a").read_bytes()
        assert self.write(tmp_path / "b", lambda plans, task: map(task, plans[::-1])).read_bytes() == once

        def stopped(plans: Any, task: Any) -> Any:
            yield from map(task, plans[:4])
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            self.write(tmp_path / "c", stopped)
        assert self.write(tmp_path / "c").read_bytes() == once

    def test_none_where_nothing_was_found(self, tmp_path: Path) -> None:
        files = write_coco(tmp_path, annotations=ANNOTATIONS[:1])
        dataset = make_dataset_section(tmp_path, "skip")
        manifest = shard_split(open_source(*files), "train", tmp_path / "shards", dataset, ShardsSection())
        assert not (tmp_path / "shards" / "train" / PROBLEMS_NAME).exists()
        assert manifest.problems == {}
