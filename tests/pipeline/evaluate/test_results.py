"""Results on disk: scored once, and told apart by what was scored."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.sections import EvaluateSection
from pipeline.data.manifest import Manifest
from pipeline.data.truth import ground_truth
from pipeline.errors import UserError
from pipeline.evaluate.detect import detect
from pipeline.evaluate.results import evaluate_checkpoint, evaluate_files
from pipeline.evaluate.score import score
from tests.builders import write_checkpoint
from tests.pipeline.evaluate.scenes import EMPTY, make_scene

SECTION = EvaluateSection(batch_size=2, short_side=48, max_side=64, max_detections=10)


class TestEvaluateCheckpoint:
    def test_done_once(self, split: Manifest, checkpoint: Path, tmp_path: Path) -> None:
        calls: list[Path] = []

        def detect_all(path: Path, batches: list[list[int]]) -> list[list[dict[str, Any]]]:
            calls.append(path)
            return [detect(path, split, [batch], SECTION, "cpu") for batch in batches]

        metrics, new = evaluate_checkpoint(checkpoint, split, SECTION, tmp_path, detect_all)
        again, new_again = evaluate_checkpoint(checkpoint, split, SECTION, tmp_path, detect_all)
        assert (new, new_again, len(calls)) == (True, False, 1)
        assert again == metrics
        assert metrics["step"] == 5
        assert metrics["inputs"]["val_digest"] == split.digest
        assert set(metrics["per_category"]) == {"cat", "dog", "toothbrush"}
        assert len(json.loads((tmp_path / "detections.json").read_text())) == 50

    def test_the_arbiter_is_asked_once(self, split: Manifest, checkpoint: Path, tmp_path: Path) -> None:
        calls: list[Path] = []

        def detect_all(path: Path, batches: list[list[int]]) -> list[list[dict[str, Any]]]:
            calls.append(path)
            return []

        plain, _ = evaluate_checkpoint(checkpoint, split, SECTION, tmp_path, detect_all)
        verified, new = evaluate_checkpoint(checkpoint, split, SECTION, tmp_path, detect_all, verify=True)
        assert (plain["verified"], verified["verified"], new, len(calls)) == (False, True, False, 1)
        assert verified == {**plain, "verified": True}
        (tmp_path / "detections.json").unlink()
        assert evaluate_checkpoint(checkpoint, split, SECTION, tmp_path, detect_all, verify=True)[0] == verified

    def test_a_sample_of_the_training_split_is_scored_too(
        self, split: Manifest, checkpoint: Path, tmp_path: Path
    ) -> None:
        asked: list[list[list[int]]] = []

        def detect_train(path: Path, batches: list[list[int]]) -> list[list[dict[str, Any]]]:
            asked.append(batches)
            return [detect(path, split, batches, SECTION, "cpu")]

        section = SECTION.model_copy(update={"train_sample": 3})
        metrics, _ = evaluate_checkpoint(
            checkpoint, split, section, tmp_path, lambda path, batches: [], train=(split, detect_train)
        )
        last = len(split.samples) - 1
        assert sorted(index for batch in asked[0] for index in batch) == [0, last // 2, last]
        truth, found = ground_truth(split, [0, last // 2, last]), detect(checkpoint, split, asked[0], SECTION, "cpu")
        assert metrics["train_sample"]["images"] == len(truth["images"]) == 3
        assert metrics["train_sample"]["AR100"] == score(truth, found)["AR100"]
        assert metrics["AR100"] == 0

    def test_a_subset_is_scored_as_such(self, split: Manifest, checkpoint: Path, tmp_path: Path) -> None:
        asked: list[list[list[int]]] = []

        def detect_all(path: Path, batches: list[list[int]]) -> list[list[dict[str, Any]]]:
            asked.append(batches)
            return [detect(path, split, batches, SECTION, "cpu")]

        folders = [tmp_path / "a", tmp_path / "b", tmp_path / "a"]
        part, again, whole = (
            evaluate_checkpoint(checkpoint, split, SECTION, folder, detect_all, subset=subset)[0]
            for folder, subset in zip(folders, (2, 2, 0), strict=True)
        )
        assert part == again
        assert (part["inputs"]["subset"], "subset" in whole["inputs"]) == (2, False)
        last = len(split.samples) - 1
        assert asked[0] == asked[1]
        assert [sorted(index for batch in batches for index in batch) for batches in asked[1:]] == [
            [0, last],
            list(range(last + 1)),
        ]
        truth, found = ground_truth(split, [0, last]), detect(checkpoint, split, asked[0], SECTION, "cpu")
        assert score(truth, found).items() <= part.items()

    def test_other_settings_are_refused(self, split: Manifest, checkpoint: Path, tmp_path: Path) -> None:
        evaluate_checkpoint(checkpoint, split, SECTION, tmp_path, lambda path, batches: [])
        other = SECTION.model_copy(update={"short_side": 40, "pictures": 1})
        with pytest.raises(UserError, match=r"short_side: 48 -> 40\)"):
            evaluate_checkpoint(checkpoint, split, other, tmp_path, lambda path, batches: [])

    def test_settings_that_are_newer_than_the_scores_had_their_default(
        self, split: Manifest, checkpoint: Path, tmp_path: Path
    ) -> None:
        evaluate_checkpoint(checkpoint, split, SECTION, tmp_path, lambda path, batches: [])
        file = tmp_path / "metrics.json"
        metrics = json.loads(file.read_text())
        assert metrics["inputs"]["settings"].pop("precision") == "fp32"
        file.write_text(json.dumps(metrics))
        assert not evaluate_checkpoint(checkpoint, split, SECTION, tmp_path, lambda path, batches: [])[1]
        other = SECTION.model_copy(update={"precision": "bf16"})
        with pytest.raises(UserError, match=r"precision: fp32 -> bf16\)"):
            evaluate_checkpoint(checkpoint, split, other, tmp_path, lambda path, batches: [])

    def test_other_weights_are_scored_anew(self, split: Manifest, checkpoint: Path, tmp_path: Path) -> None:
        evaluate_checkpoint(checkpoint, split, SECTION, tmp_path / "out", lambda path, batches: [])
        other = write_checkpoint(tmp_path, split.labels, seed=1)
        assert evaluate_checkpoint(other, split, SECTION, tmp_path / "out", lambda path, batches: [])[1]


class TestEvaluateFiles:
    def test_the_score_is_written(self, tmp_path: Path) -> None:
        document, detections = make_scene(0)
        (tmp_path / "truth.json").write_text(json.dumps(document))
        (tmp_path / "found.json").write_text(json.dumps(detections))
        metrics = evaluate_files(tmp_path / "truth.json", tmp_path / "found.json", tmp_path / "out" / "deep")
        assert metrics == score(document, detections)
        assert json.loads((tmp_path / "out" / "deep" / "metrics.json").read_text()) == metrics

    def test_wrong_input_makes_no_folder(self, tmp_path: Path) -> None:
        (tmp_path / "truth.json").write_text(json.dumps(EMPTY))
        (tmp_path / "found.json").write_text("{}")
        with pytest.raises(UserError, match=r"found\.json: must be a list"):
            evaluate_files(tmp_path / "truth.json", tmp_path / "found.json", tmp_path / "out")
        assert not (tmp_path / "out").exists()
