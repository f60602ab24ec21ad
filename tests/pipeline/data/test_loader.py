import json
import pickle
import time
from collections import Counter
from itertools import islice
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.sections import AugmentSection, EvaluateSection, ShardsSection, TrainSection
from pipeline.data.augment import plan_eval
from pipeline.data.cache import Cache
from pipeline.data.index import INDEX_NAME, Sample, to_rows
from pipeline.data.labels import Category, LabelMap
from pipeline.data.loader import (
    PLACEHOLDER_SIDE,
    EvalLoader,
    MicroBatch,
    Step,
    TrainLoader,
    eval_batches,
    prepare_workers,
)
from pipeline.data.manifest import Manifest, Shard, read_manifest, write_manifest
from pipeline.data.order import SampleOrder
from pipeline.data.samples import load_image, plan_step
from pipeline.errors import UserError
from pipeline.shard.coco import open_source
from pipeline.shard.tar import ShardTar
from pipeline.shard.write import shard_split
from pipeline.store import StorePath
from tests.builders import make_annotation, make_dataset_section, make_manifest, spoil, write_coco, write_image
from tests.stores import S3Server

AUGMENT = AugmentSection(short_sides=(32, 40), max_side=64, crop_short_sides=(30, 36), crop_min=20, crop_max=30)


def train_section(**more: Any) -> TrainSection:
    values = {"global_batch": 12, "micro_batch": 2, "loader_workers": 0, "seed": 5, "augment": AUGMENT, "window": 2}
    return TrainSection.model_validate({**values, **more})


def loader(
    manifest: Manifest, start: int, stop: int, rank: int = 0, world: int = 1, on_error: Any = "fail", **more: Any
) -> TrainLoader:
    train = train_section(**more)
    order = SampleOrder(manifest.digest, manifest.shard_sizes, train.seed, train.window)
    return TrainLoader(manifest, order, train, rank, world, start, stop, on_error)


def assert_same(one: MicroBatch, other: MicroBatch) -> None:
    assert (one.index, one.image_ids, one.skipped) == (other.index, other.image_ids, other.skipped)
    assert torch.equal(one.batch.pixels, other.batch.pixels)
    assert torch.equal(one.batch.mask, other.batch.mask)
    for target, other_target in zip(one.targets, other.targets, strict=True):
        assert torch.equal(target["labels"], other_target["labels"])
        assert torch.equal(target["boxes"], other_target["boxes"])


@pytest.fixture(scope="module")
def straight(manifest: Manifest) -> list[Step]:
    return list(loader(manifest, 0, 8))


class TestOrderContract:
    def test_every_image_exactly_once_an_epoch(self, manifest: Manifest, straight: list[Step]) -> None:
        # 8 steps of 12 are the 93 samples of three epochs and 3 samples of the fourth.
        seen = Counter(image_id for step in straight for batch in step.micro_batches for image_id in batch.image_ids)
        assert set(seen) == {sample.image_id for sample in manifest.samples}
        assert sum(seen.values()) == 96
        assert set(seen.values()) == {3, 4}

    def test_a_step_takes_its_positions_of_the_stream(self, manifest: Manifest, straight: list[Step]) -> None:
        order = SampleOrder(manifest.digest, manifest.shard_sizes, 5, 2)
        for step in straight:
            expected = manifest.samples.rows["image_id"][order.step_samples(step.step, 12)[1]].tolist()
            found = [image_id for batch in step.micro_batches for image_id in batch.image_ids]
            assert sorted(found) == sorted(expected)
        assert [step.epoch for step in straight] == [0, 0, 0, 1, 1, 1, 2, 2]

    @pytest.mark.parametrize("world", [2, 3, 6])
    def test_the_stream_does_not_depend_on_the_ranks(
        self, manifest: Manifest, straight: list[Step], world: int
    ) -> None:
        ranks = [list(loader(manifest, 0, 3, rank, world)) for rank in range(world)]
        for step in range(3):
            for rank in range(world):
                share = ranks[rank][step].micro_batches
                assert [batch.index for batch in share] == list(range(rank, 6, world))
                for batch in share:
                    assert_same(batch, straight[step].micro_batches[batch.index])

    def test_resuming_equals_going_straight(self, manifest: Manifest, straight: list[Step]) -> None:
        resumed = list(loader(manifest, 5, 8))
        assert [step.step for step in resumed] == [5, 6, 7]
        for step in resumed:
            for one, other in zip(step.micro_batches, straight[step.step].micro_batches, strict=True):
                assert_same(one, other)

    def test_worker_processes_change_nothing(self, manifest: Manifest, straight: list[Step]) -> None:
        steps = list(loader(manifest, 0, 4, loader_workers=2))
        assert len(steps) == 4
        for step in steps:
            for one, other in zip(step.micro_batches, straight[step.step].micro_batches, strict=True):
                assert_same(one, other)

    def test_plain_epochs_follow_jitter_at_any_world_size(self, manifest: Manifest) -> None:
        augment = AUGMENT.model_copy(update={"jitter": (0.5, 1.5), "jitter_side": 64, "plain_after": 1})
        straight = list(loader(manifest, 0, 5, augment=augment))
        canvases = [{batch.batch.pixels.shape[2:] for batch in step.micro_batches} for step in straight]
        assert canvases[:2] == [{(64, 64)}] * 2
        for step in straight[:2]:
            assert not any(batch.batch.mask.any() for batch in step.micro_batches)
        # 31 images an epoch: the third step has 7 that are jittered and 5 that are not.
        for step in loader(manifest, 3, 5, augment=AUGMENT.model_copy(update={"crop": 0.0})):
            for batch in step.micro_batches:
                assert_same(batch, straight[step.step].micro_batches[batch.index])
        for rank in range(2):
            for step in loader(manifest, 2, 4, rank, 2, augment=augment):
                for batch in step.micro_batches:
                    assert_same(batch, straight[step.step].micro_batches[batch.index])

    def test_worker_processes_are_forked_from_what_was_prepared(self, manifest: Manifest) -> None:
        prepare_workers(0)
        prepare_workers(1)
        server = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
        assert server is not None
        assert len(list(loader(manifest, 0, 1, loader_workers=1))) == 1
        assert forkserver._forkserver._forkserver_pid == server  # type: ignore[attr-defined]

    def test_far_steps_cost_no_more(self, manifest: Manifest) -> None:
        (step,) = loader(manifest, 10**9, 10**9 + 1)
        assert step.epoch == 10**9 * 12 // 31
        assert [batch.index for batch in step.micro_batches] == list(range(6))

    def test_the_global_random_state_is_left_alone(self, manifest: Manifest) -> None:
        before = torch.get_rng_state()
        list(loader(manifest, 0, 1))
        assert torch.equal(torch.get_rng_state(), before)

    def test_more_shared_memory_than_there_is_is_refused(self, manifest: Manifest) -> None:
        huge = AUGMENT.model_copy(update={"max_side": 10**7})
        canvas = AUGMENT.model_copy(update={"jitter": (1e-5, 1e-5), "jitter_side": 10**7})
        for augment in (huge, canvas):
            with pytest.raises(UserError, match=r"/dev/shm on .* MiB free, .* share \d+ MiB: .*loader_workers: 0"):
                list(loader(manifest, 0, 1, loader_workers=1, augment=augment))
        assert len(list(loader(manifest, 0, 1, augment=huge))) == 1, "a loader without processes shares none"

    def test_nothing_to_do(self, manifest: Manifest) -> None:
        assert list(loader(manifest, 3, 3)) == []
        assert len(loader(manifest, 3, 5)) == 2


class TestStore:
    @pytest.fixture
    def stored(self, manifest: Manifest, s3: S3Server, tmp_path: Path) -> Manifest:
        """The same shards in a store, with a cache that is empty and holds few of them.

        Worker processes have the environment of the first test that had any: all stands in the address.
        """
        options = f"scheme=http&endpoint_override=127.0.0.1:{s3.port}&region=us-east-1"
        folder = StorePath(f"s3://user:planted-secret@{s3.bucket()}/folder?{options}")
        assert isinstance(manifest.folder, Path)
        for path in manifest.folder.iterdir():
            (folder / path.name).upload(path)
        return read_manifest(folder, Cache(tmp_path, 4 * max(shard.bytes for shard in manifest.shards)))

    @pytest.mark.parametrize("workers", [0, 2])
    def test_nothing_changes(self, straight: list[Step], stored: Manifest, workers: int) -> None:
        for step, other in zip(straight, loader(stored, 0, 8, loader_workers=workers), strict=True):
            for micro, other_micro in zip(step.micro_batches, other.micro_batches, strict=True):
                assert_same(micro, other_micro)

    def test_the_next_window_is_fetched_while_one_is_read(self, stored: Manifest, tmp_path: Path) -> None:
        steps = iter(loader(stored, 0, 8, global_batch=2))
        next(steps)
        order = SampleOrder(stored.digest, stored.shard_sizes, 5, 2)
        ahead = [tmp_path / stored.shards[number].sha256 for number in order.shards_ahead(0, 2)]
        assert len(ahead) > order.window
        for _ in range(200):
            if all(path.exists() for path in ahead):
                break
            time.sleep(0.05)
        else:
            raise AssertionError([path.exists() for path in ahead])

    @pytest.mark.parametrize("workers", [0, 1])
    def test_a_shard_that_has_gone_ends_it_with_one_error(self, stored: Manifest, workers: int) -> None:
        for shard in stored.shards:
            (stored.folder / shard.name).unlink()
        with pytest.raises(UserError, match=r"shard-\d+.tar: it is not in its store; shard again$"):
            list(loader(stored, 0, 1, loader_workers=workers, on_error="skip"))
        with pytest.raises(UserError, match="it is not in its store"):
            list(EvalLoader(stored, eval_batches(stored, 4), EvaluateSection(), workers))


class Case(NamedTuple):
    """Shards, the batches that are made of them, and a run that is interrupted: (steps, ranks) of each of its parts."""

    shard_sizes: list[int]
    window: int
    micro_batch: int
    micro_batches: int
    parts: list[tuple[int, int]]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    shard_sizes = draw(st.lists(st.integers(1, 7), min_size=1, max_size=6))
    micro_batches = draw(st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 12]))
    worlds = [world for world in range(1, 9) if micro_batches % world == 0]
    parts = draw(st.lists(st.tuples(st.integers(1, 3), st.sampled_from(worlds)), min_size=1, max_size=3))
    return Case(shard_sizes, draw(st.integers(1, 7)), draw(st.integers(1, 2)), micro_batches, parts)


class TestExactlyOnce:
    """Whatever the shards, the window, the ranks and their processes are, and wherever a run is interrupted."""

    @given(cases(), st.integers(0, 40))
    @settings(max_examples=30, deadline=None)
    def test_in_the_same_order(self, tmp_path_factory: pytest.TempPathFactory, case: Case, first: int) -> None:
        self.check(write_shards(tmp_path_factory.mktemp("case"), case.shard_sizes), case, first, workers=0)

    @pytest.mark.filterwarnings("ignore:This DataLoader will create")
    @pytest.mark.parametrize("workers", [1, 2, 3, 4])
    def test_in_the_same_order_with_processes(self, tmp_path: Path, workers: int) -> None:
        case = Case([4, 1, 6, 2], window=2, micro_batch=2, micro_batches=6, parts=[(2, 2), (1, 1), (2, 3)])
        self.check(write_shards(tmp_path, case.shard_sizes), case, 0, workers)

    def check(self, manifest: Manifest, case: Case, first: int, workers: int) -> None:
        train = {"micro_batch": case.micro_batch, "global_batch": case.micro_batch * case.micro_batches}
        train |= {"window": case.window}
        total = first + sum(steps for steps, _ in case.parts)
        straight = {step.step: step.micro_batches for step in loader(manifest, first, total, **train)}
        begin = first
        for steps, world in case.parts:
            for rank in range(world):
                # The loader has more to give when it is left: what its processes worked ahead is lost.
                run = iter(loader(manifest, begin, begin + steps + 9, rank, world, loader_workers=workers, **train))
                for step in islice(run, steps):
                    expected = straight[step.step][rank::world]
                    for one, other in zip(step.micro_batches, expected, strict=True):
                        assert_same(one, other)
                run.close()  # type: ignore[attr-defined]
            begin += steps
        # Each of these steps' positions in the stream once, and each image once among the positions of an epoch.
        ids = [image for step in range(first, total) for batch in straight[step] for image in batch.image_ids]
        order = SampleOrder(manifest.digest, manifest.shard_sizes, 5, case.window)
        begin, end = (step * train["global_batch"] for step in (first, total))
        image_ids = manifest.samples.rows["image_id"]
        assert Counter(ids) == Counter(int(image_ids[order.step_samples(n, 1)[1].item()]) for n in range(begin, end))
        images = len(manifest.samples)
        for epoch in range(begin // images, end // images + 1):
            assert sorted(order.step_samples(epoch, images)[1].tolist()) == list(range(images))


def write_shards(folder: Path, sizes: list[int]) -> Manifest:
    """Shards of some numbers of small images, all of one picture."""
    picture = write_image(folder / "picture.jpg").read_bytes()
    shards, samples = [], []
    for number, size in enumerate(sizes):
        name = f"shard-{number:06d}.tar"
        with (folder / name).open("wb") as file, ShardTar(file) as tar:
            for image_id in range(len(samples) + 1, len(samples) + size + 1):
                annotations = [make_annotation(image_id, image_id)]
                told = {"image_id": image_id, "file_name": "", "width": 32, "height": 24, "annotations": annotations}
                members = [tar.add(f"{image_id:012d}.{kind}", content) for kind, content in
                           (("jpg", picture), ("json", json.dumps(told).encode()))]  # fmt: skip
                samples.append(Sample(image_id, 32, 24, number, "jpg", *members))
        shards.append(Shard(name, size, tar.size, tar.sha256))
    np.save(folder / INDEX_NAME, to_rows(samples))
    return write_manifest(folder, "train", LabelMap("contiguous", (Category(1, "thing"),)), "0" * 64, {}, shards, {})


class TestMicroBatches:
    def test_are_cut_as_planned(self, manifest: Manifest) -> None:
        order = SampleOrder(manifest.digest, manifest.shard_sizes, 5, 2)
        planned = plan_step(manifest, order, 1, train_section())
        (step,) = loader(manifest, 1, 2)
        ids = manifest.samples.rows["image_id"][planned.indices].tolist()
        assert [batch.image_ids for batch in step.micro_batches] == [ids[k : k + 2] for k in range(0, 12, 2)]

    def test_have_the_planned_sizes(self, manifest: Manifest) -> None:
        order = SampleOrder(manifest.digest, manifest.shard_sizes, 5, 2)
        planned = plan_step(manifest, order, 0, train_section())
        (step,) = loader(manifest, 0, 1)
        for batch in step.micro_batches:
            sizes = [plan.size for _, plan in planned.part(batch.index, 2)]
            height, width = (-(-max(size[axis] for size in sizes) // 32) * 32 for axis in (1, 0))
            assert batch.batch.pixels.shape == (2, 3, height, width)
            assert batch.batch.pixels.dtype == torch.uint8
            for mask, (w, h) in zip(batch.batch.mask, sizes, strict=True):
                assert int((~mask).sum()) == w * h

    def test_the_loader_travels_to_worker_processes(self, manifest: Manifest) -> None:
        one = loader(manifest, 0, 1)
        next(iter(one))
        assert_same(
            next(iter(pickle.loads(pickle.dumps(one)))).micro_batches[0],
            next(iter(one)).micro_batches[0],
        )

    def test_one_pixel(self, tmp_path: Path) -> None:
        image = {"id": 1, "width": 1, "height": 1, "file_name": "dot.png"}
        manifest = make_manifest(tmp_path, [image], [make_annotation(1, 1, (0, 0, 1, 1))])
        (step,) = loader(manifest, 0, 1, global_batch=1, micro_batch=1)
        assert step.micro_batches[0].targets[0]["boxes"].tolist() == [[0.5, 0.5, 1.0, 1.0]]


class TestUnreadableSamples:
    @pytest.mark.parametrize("workers", [0, 1])
    def test_fail_names_shard_key_and_image(self, tmp_path: Path, workers: int) -> None:
        manifest = make_manifest(tmp_path, range(1, 5), max_samples=2)
        spoil(manifest, 3)
        with pytest.raises(UserError) as caught:
            list(loader(manifest, 0, 1, global_batch=4, loader_workers=workers))
        message = str(caught.value)
        assert "shard-000001.tar: sample 000000000003 (image id 3)" in message
        assert "dataset.on_error: skip" in message
        assert "\n" not in message

    def test_skip_leaves_it_out_of_its_micro_batch_and_counts(self, tmp_path: Path) -> None:
        whole = make_manifest(tmp_path / "whole", range(1, 5))
        manifest = make_manifest(tmp_path / "spoilt", range(1, 5))
        assert whole.digest == manifest.digest
        spoil(manifest, 3)
        (expected,) = loader(whole, 0, 1, global_batch=4)
        (step,) = loader(manifest, 0, 1, on_error="skip", global_batch=4)
        assert sum(batch.skipped for batch in step.micro_batches) == 1
        for batch, other in zip(step.micro_batches, expected.micro_batches, strict=True):
            assert batch.image_ids == [image_id for image_id in other.image_ids if image_id != 3]
            assert len(batch.targets) == len(batch.image_ids) == batch.batch.pixels.shape[0]

    def test_a_micro_batch_of_none_is_a_black_image_without_targets(self, tmp_path: Path) -> None:
        manifest = make_manifest(tmp_path, range(1, 5), [make_annotation(k, k) for k in range(1, 5)])
        spoil(manifest, 1, 2, 3, 4)
        (step,) = loader(manifest, 0, 1, on_error="skip", global_batch=4)
        for batch in step.micro_batches:
            assert batch.skipped == 2
            assert batch.image_ids == []
            assert batch.batch.pixels.shape == (1, 3, PLACEHOLDER_SIDE, PLACEHOLDER_SIDE)
            assert not batch.batch.pixels.any()
            assert not batch.batch.mask.any()
            assert [target["boxes"].shape for target in batch.targets] == [(0, 4)]

    def test_evaluation(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        manifest = make_manifest(tmp_path, range(1, 5))
        spoil(manifest, 1, 2, 4)
        with pytest.raises(UserError, match=r"sample 000000000001 \(image id 1\)"):
            list(EvalLoader(manifest, eval_batches(manifest, 2), EvaluateSection()))
        batches = list(EvalLoader(manifest, eval_batches(manifest, 2), EvaluateSection(), on_error="skip"))
        assert [batch.image_ids for batch in batches] == [[3]]
        assert "image id 4" in caplog.text


class TestEvaluation:
    def test_sizes_are_those_of_the_originals(self, tmp_path: Path) -> None:
        files = write_coco(tmp_path, [1, {"id": 2, "width": 96, "height": 60}])
        shards = ShardsSection(max_side=48)
        manifest = shard_split(open_source(*files), "val", tmp_path / "shards", make_dataset_section(tmp_path), shards)
        (batch,) = EvalLoader(manifest, [[0, 1]], EvaluateSection(short_side=24, max_side=60))
        assert dict(zip(batch.image_ids, batch.sizes.tolist(), strict=True)) == {1: [24, 32], 2: [60, 96]}

    def test_every_image_once_sorted_by_aspect(self, manifest: Manifest) -> None:
        batches = eval_batches(manifest, 4)
        assert sorted(index for batch in batches for index in batch) == list(range(31))
        aspects = [manifest.samples[i].width / manifest.samples[i].height for batch in batches for i in batch]
        assert aspects == sorted(aspects)
        assert [len(batch) for batch in batches] == [4] * 7 + [3]

    @pytest.mark.parametrize("workers", [0, 1])
    def test_batches(self, manifest: Manifest, workers: int) -> None:
        evaluate = EvaluateSection(short_side=40, max_side=60)
        batches = eval_batches(manifest, 4)[:3]
        samples = {sample.image_id: sample for sample in manifest.samples}
        loaded = list(EvalLoader(manifest, batches, evaluate, workers=workers))
        assert [ids for _, ids, _ in loaded] == [[manifest.samples[i].image_id for i in batch] for batch in batches]
        for batch, image_ids, sizes in loaded:
            for row, image_id in enumerate(image_ids):
                sample = samples[image_id]
                assert sizes[row].tolist() == [sample.height, sample.width]
                plan = plan_eval(sample.width, sample.height, 40, 60)
                expected = plan.apply_image(load_image(manifest, sample))
                pixels = batch.pixels[row, :, : plan.size[1], : plan.size[0]].permute(1, 2, 0).numpy()
                np.testing.assert_array_equal(pixels, expected)
                assert not batch.mask[row, : plan.size[1], : plan.size[0]].any()
