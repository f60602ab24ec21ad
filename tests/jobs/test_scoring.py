"""Scoring in Ray's processes, one by one and as a pool; tests/jobs/test_beside.py runs them beside training."""

import os
import pickle
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from jobs.cluster import connected
from jobs.scoring import Scorer, ScorerPool, Scoring
from pipeline.checkpoint.state import MODEL
from pipeline.config.sections import ClusterSection, EvaluateSection
from pipeline.data.loader import eval_batches
from pipeline.data.manifest import Manifest
from pipeline.errors import UserError
from pipeline.evaluate.detect import detect, sort_detections
from pipeline.run_folder import RunFolder
from tests.builders import make_varied_manifest, write_checkpoint

SECTION = EvaluateSection(batch_size=2, short_side=48, max_side=64, max_detections=10)
SCORING = Scoring(RunFolder(Path("runs/a")), SECTION, "cpu", 0.5, 0, {}, 0, "fail")


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_varied_manifest(tmp_path_factory.mktemp("split"), 12)


@pytest.fixture(scope="module")
def checkpoint(split: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("run"), split.labels)


def test_what_is_set_aside() -> None:
    assert SCORING.resources == {"CPU": 0.5}
    assert replace(SCORING, device="cuda", gpus=0.25).resources == {"CPU": 0.5, "GPU": 0.25}
    assert pickle.loads(pickle.dumps(SCORING)) == SCORING


class TestScorer:
    def test_it_has_its_threads_and_keeps_the_network(self, split: Manifest, checkpoint: Path, tmp_path: Path) -> None:
        threads = torch.get_num_threads()
        try:
            scorer = Scorer(replace(SCORING, cpus=2.5))
            assert torch.get_num_threads() == 2
        finally:
            torch.set_num_threads(threads)
        other, batches = write_checkpoint(tmp_path, split.labels, seed=7), eval_batches(split, 2)
        first = scorer.detect(other, split, batches)
        assert first == detect(other, split, batches, SECTION, "cpu")
        (other / MODEL).unlink()
        assert scorer.detect(other, split, batches[:1]) == detect_part(first, split, batches[:1])
        assert scorer.detect(checkpoint, split, batches) == detect(checkpoint, split, batches, SECTION, "cpu")

    def test_a_call_that_scores_reads_the_checkpoint_again(self, split: Manifest, tmp_path: Path) -> None:
        scorer, scores = Scorer(SCORING), []
        for seed in (1, 2):
            path = write_checkpoint(tmp_path, split.labels, 5, seed=seed)
            metrics, content = scorer.evaluate(split, None, path)
            shutil.rmtree(path)
            scores.append((metrics["inputs"]["weights"], content))
        assert scores[0] != scores[1]

    def test_processes_that_decode(self, split: Manifest, checkpoint: Path) -> None:
        batches = eval_batches(split, 2)
        found = Scorer(replace(SCORING, loader_workers=2)).detect(checkpoint, split, batches)
        assert found == Scorer(SCORING).detect(checkpoint, split, batches)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_a_host_without_the_device_is_named(self, split: Manifest, checkpoint: Path) -> None:
        with pytest.raises(UserError, match="torch finds no GPU there to score on"):
            Scorer(replace(SCORING, device="cuda")).detect(checkpoint, split, [[0]])


def detect_part(found: list[dict[str, object]], split: Manifest, batches: list[list[int]]) -> list[dict[str, object]]:
    """Those of some batches."""
    ids = {split.samples[index].image_id for batch in batches for index in batch}
    return [entry for entry in found if entry["image_id"] in ids]


class TestPool:
    @pytest.fixture(scope="class", autouse=True)
    def ray_here(self) -> Iterator[None]:
        with connected(ClusterSection(workers=2, device="cpu", cpus_per_worker=0.5)):
            yield

    @pytest.mark.parametrize("at_once", [2, 50])
    def test_the_same_for_any_number(self, at_once: int, split: Manifest, checkpoint: Path) -> None:
        """Fifty have no room on this Ray: those that have do it all, and other calls, too."""
        batches = eval_batches(split, 1)
        wanted = detect(checkpoint, split, batches, SECTION, "cpu")
        with ScorerPool(SCORING, at_once) as pool:
            for _ in range(2):
                ended = list(pool.detect(checkpoint, split, [[batch] for batch in batches]))
                assert sorted(share for share, _ in ended) == sorted([batch] for batch in batches)
                assert sort_detections([entry for _, part in ended for entry in part]) == wanted
            begun = len(scorers())
        assert begun <= at_once
        end = time.monotonic() + 60
        while scorers() and time.monotonic() < end:
            time.sleep(0.1)
        assert not scorers()

    def test_a_lost_one_is_done_again(self, split: Manifest, checkpoint: Path) -> None:
        batches = eval_batches(split, 1) * 40
        shares = [batches[index::6] for index in range(6)]
        killed: list[int] = []

        def kill() -> None:
            while not killed:
                for process in scorers("detect"):
                    os.kill(process.pid, signal.SIGKILL)
                    killed.append(process.pid)
                    return
                time.sleep(0.01)

        thread = threading.Thread(target=kill, daemon=True)
        with ScorerPool(SCORING, 2) as pool:
            thread.start()
            ended = list(pool.detect(checkpoint, split, shares))
        assert killed
        assert sorted(map(str, (share for share, _ in ended))) == sorted(map(str, shares))
        found = sort_detections([entry for _, part in ended for entry in part])
        assert found == sort_detections(detect(checkpoint, split, batches, SECTION, "cpu"))

    def test_one_without_work_gives_its_room_to_another(
        self, split: Manifest, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("jobs.scoring.LOOK_SECONDS", 0.2)
        batches, counts = eval_batches(split, 1), []
        with ScorerPool(SCORING, 2) as pool:
            for _ in pool.detect(checkpoint, split, [[batches[0]]] * 4):  # both have begun, and have the network
                counts.append(len(scorers()))
            for _ in pool.detect(checkpoint, split, [batches * 30, [batches[0]]]):
                counts.append(len(scorers()))
        assert (max(counts), counts[-1]) == (2, 1)

    def test_a_users_error_ends_all(self, split: Manifest, checkpoint: Path, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="neither a checkpoint"), ScorerPool(SCORING, 2) as pool:
            list(pool.detect(tmp_path, split, [[[0]], [[1]]]))


def scorers(call: str = "") -> list[psutil.Process]:
    """The processes of scorers below this one, which Ray names by what they do."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended
            if " ".join(process.cmdline()).startswith(f"ray::Scorer.{call}" if call else "ray::Scorer"):
                found.append(process)
    return found
