"""What a report is about, read back."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config.sections import METRICS, ShardsSection
from pipeline.data.images import BadImageError
from pipeline.data.manifest import Manifest
from pipeline.data.samples import load_image
from pipeline.data.truth import ground_truth
from pipeline.errors import UserError
from pipeline.evaluate.evaluated import evaluation_folder, read_curve, read_evaluated, read_files
from pipeline.evaluate.score import score
from pipeline.files import read_json, write_json
from pipeline.shard.coco import open_source
from pipeline.shard.write import shard_split
from tests.builders import make_annotation, make_dataset_section, write_coco
from tests.pipeline.evaluate.evaluations import FOUND, OBJECTS, PERFECT, make_split, write_evaluation


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_split(tmp_path_factory.mktemp("split"))


class TestFolder:
    def test_of_a_run_an_evaluation_or_a_checkpoint(self, split: Manifest, tmp_path: Path) -> None:
        folder = write_evaluation(tmp_path / "run" / "evaluate", split)
        assert [evaluation_folder(path) for path in (folder.parent, folder)] == [folder, folder]
        assert evaluation_folder(folder / "checkpoint-10") == folder / "checkpoint-10"
        with pytest.raises(UserError, match=r": no metrics\.json here or in evaluate below it; `raydetr evaluate`"):
            evaluation_folder(tmp_path)

    def test_what_was_written_is_read(self, split: Manifest, tmp_path: Path) -> None:
        folder = write_evaluation(tmp_path, split)
        write_evaluation(tmp_path / "again", split, PERFECT, step=20)
        (tmp_path / "again" / "checkpoint-20").rename(folder / "checkpoint-20")
        evaluated = read_evaluated(folder)
        assert (evaluated.name, evaluated.least_score, evaluated.code["git_commit"]) == ("run", 0.4, "c0ffee")
        assert evaluated.metrics == read_json(folder / "metrics.json", "")
        assert list(evaluated.found.scores) == [entry["score"] for entry in FOUND]
        assert [(step, numbers["AP"]) for step, numbers in evaluated.curve] == [(10, evaluated.metrics["AP"]), (20, 1)]
        assert evaluated.read is not None
        np.testing.assert_array_equal(evaluated.read(3), load_image(split, split.samples[2]))
        of_checkpoint = read_evaluated(folder / "checkpoint-20")
        assert (of_checkpoint.metrics["AP"], of_checkpoint.curve) == (1, evaluated.curve)
        assert read_curve(folder, "another split's") == []
        write_json(folder / "a file's" / "metrics.json", score(ground_truth(split), []))
        assert read_curve(folder, split.digest) == evaluated.curve

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"config": None}, r"report\.json: an earlier version wrote it; `raydetr evaluate` again"),
            ({"val": "ftp://nowhere"}, r"report\.json: an earlier version wrote it"),
            ({"val": "/nowhere"}, r"/nowhere/manifest\.json: no such manifest"),
            ({"config": {"name": "run", "trian": {}}}, r"report\.json: unknown key `trian`; did you mean `train`"),
        ],
        ids=["no record", "no such store", "no shards", "unknown key"],
    )
    def test_a_record_that_cannot_be_used(
        self, split: Manifest, tmp_path: Path, change: dict[str, Any], message: str
    ) -> None:
        path = write_evaluation(tmp_path, split) / "report.json"
        write_json(path, read_json(path, "") | change)
        with pytest.raises(UserError, match=message):
            read_evaluated(tmp_path)

    def test_no_record_and_other_shards(self, split: Manifest, tmp_path: Path) -> None:
        folder = write_evaluation(tmp_path / "out", split)
        metrics = read_json(folder / "metrics.json", "")
        write_json(folder / "metrics.json", {**metrics, "inputs": {**metrics["inputs"], "val_digest": "other"}})
        with pytest.raises(UserError, match=r"out: was scored on other shards than those in .*; `raydetr evaluate`"):
            read_evaluated(folder)
        (folder / "report.json").unlink()
        with pytest.raises(UserError, match=r"out: no report\.json tells what was evaluated here; `raydetr evaluate`"):
            read_evaluated(folder)

    def test_boxes_of_smaller_copies_are_those_of_the_originals(self, tmp_path: Path) -> None:
        box = (40, 20, 90, 60)
        files = write_coco(tmp_path, [{"id": 1, "width": 200, "height": 100}], [make_annotation(1, 1, box)])
        shards = ShardsSection(max_side=50)
        manifest = shard_split(open_source(*files), "val", tmp_path / "out", make_dataset_section(tmp_path), shards)
        evaluated = read_evaluated(write_evaluation(tmp_path / "scores", manifest, []))
        assert evaluated.truth.sizes == {1: (200, 100)}
        assert evaluated.truth.document["annotations"][0]["bbox"] == list(box)
        assert evaluated.read is not None
        assert evaluated.read(1).shape == (25, 50, 3)


class TestFiles:
    def test_score_and_images(self, tmp_path: Path) -> None:
        files = write_coco(tmp_path, [30, 20], [{**entry, "image_id": 20} for entry in OBJECTS])
        detections = tmp_path / "mine.json"
        detections.write_text(json.dumps([{**FOUND[0], "image_id": 20}]))
        evaluated = read_files(files.annotations, detections, files.images)
        assert (evaluated.name, evaluated.config, evaluated.curve) == ("mine", {}, [])
        assert set(METRICS) <= evaluated.metrics.keys()
        assert evaluated.truth.files == {1: "000000000020.jpg", 2: "000000000030.jpg"}
        assert evaluated.read is not None
        assert evaluated.read(1).shape == (24, 32, 3)
        assert read_files(files.annotations, detections).read is None
        (files.images / "000000000030.jpg").write_bytes(b"text")
        with pytest.raises(BadImageError):
            evaluated.read(2)

    def test_an_annotation_file_without_sizes(self, tmp_path: Path) -> None:
        files = write_coco(tmp_path, [1])
        document = json.loads(files.annotations.read_text())
        document["images"] = [{"id": 1, "file_name": "000000000001.jpg"}]
        files.annotations.write_text(json.dumps(document))
        (tmp_path / "found.json").write_text("[]")
        evaluated = read_files(files.annotations, tmp_path / "found.json", files.images)
        assert evaluated.truth.sizes == {1: None}
        assert evaluated.read is not None
        assert evaluated.read(1).shape == (24, 32, 3)

    def test_names_that_lead_out_of_the_folder(self, tmp_path: Path) -> None:
        files = write_coco(tmp_path, [{"id": 1, "file_name": "../secret.jpg"}])
        (tmp_path / "found.json").write_text("[]")
        with pytest.raises(UserError, match=r"train\.json: the file_name '\.\./secret\.jpg' leads out of"):
            read_files(files.annotations, tmp_path / "found.json", files.images)
