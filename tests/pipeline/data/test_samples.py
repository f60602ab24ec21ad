"""The samples of a step: their augmentation, their images and targets."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config.sections import TrainSection
from pipeline.data.augment import Plan
from pipeline.data.index import Index
from pipeline.data.manifest import Manifest, UnreadableSampleError
from pipeline.data.order import SampleOrder
from pipeline.data.samples import load_image, load_train_sample, plan_samples, plan_step, plan_steps
from tests.builders import make_annotation, make_manifest, spoil


def drawn(manifest: Manifest, epochs: int = 8, **train: Any) -> list[Plan]:
    """The plans of the first sample in some epochs."""
    section = TrainSection.model_validate(train)
    plans = plan_samples(manifest, np.arange(epochs), np.zeros(epochs, dtype=np.int64), section)
    return [plans[epoch] for epoch in range(epochs)]


class TestPlans:
    def test_a_step_is_its_samples_each_as_planned_alone(self, manifest: Manifest) -> None:
        order = SampleOrder(manifest.digest, manifest.shard_sizes, 5, 2)
        train = TrainSection(global_batch=12, micro_batch=2)
        planned = plan_step(manifest, order, 2, train)  # spans two epochs
        epochs, indices = order.step_samples(2, 12)
        assert len(set(epochs.tolist())) == 2
        alone = [
            (int(index), plan_samples(manifest, epochs[n : n + 1], indices[n : n + 1], train)[0])
            for n, index in enumerate(indices)
        ]
        found = [pair for number in range(6) for pair in planned.part(number, 2)]
        assert sorted(found, key=str) == sorted(alone, key=str)

    def test_steps_planned_together_are_those_planned_alone(self, manifest: Manifest) -> None:
        order = SampleOrder(manifest.digest, manifest.shard_sizes, 5, 2)
        train = TrainSection(global_batch=12, micro_batch=4)
        together = plan_steps(manifest, order, 1, 3, train)
        assert len(together) == 3
        for step, planned in enumerate(together, start=1):
            alone = plan_step(manifest, order, step, train)
            assert [planned.part(number, 4) for number in range(3)] == [alone.part(number, 4) for number in range(3)]

    def test_augmentation_is_seeded_by_seed_epoch_data_and_image(self, manifest: Manifest, tmp_path: Path) -> None:
        assert drawn(manifest) == drawn(manifest)
        assert len(set(drawn(manifest))) > 1
        other_data = replace(manifest, digest="0" * 64)
        rows = manifest.samples.rows.copy()
        rows["image_id"] += 1
        other_images = replace(manifest, samples=Index(rows, manifest.shard_sizes))
        variants = [drawn(manifest), drawn(manifest, seed=1), drawn(other_data), drawn(other_images)]
        assert len({str(variant) for variant in variants}) == 4

    def test_are_fixed_for_all_time(self, manifest: Manifest) -> None:
        """Runs that were begun with an older release must go on with the same augmentation."""
        plans = drawn(replace(manifest, digest="ab" * 32), epochs=2)
        assert plans == [
            Plan((37, 46), (704, 929), flip=True, crop=(5, 1, 29, 39)),
            Plan((37, 46), (800, 874), flip=True, crop=(3, 10, 28, 32)),
        ]


class TestTargets:
    def test_are_normalised_centres_and_sizes(self, tmp_path: Path) -> None:
        manifest = make_manifest(tmp_path, [1], [make_annotation(1, 1, (8, 6, 16, 12), 90)])
        _, target = load_train_sample(manifest, manifest.samples[0], Plan((32, 24), (64, 48)))
        assert target["labels"].tolist() == [2]
        assert target["labels"].dtype == torch.int64
        assert target["boxes"].dtype == torch.float32
        assert target["boxes"].tolist() == [[0.5, 0.5, 0.5, 0.5]]

    def test_crowds_are_left_out(self, tmp_path: Path) -> None:
        crowd = make_annotation(1, 1, iscrowd=1)
        manifest = make_manifest(tmp_path, [1], [crowd, make_annotation(2, 1, (8, 6, 16, 12), 3)])
        _, target = load_train_sample(manifest, manifest.samples[0], Plan((32, 24), (32, 24)))
        assert target["labels"].tolist() == [1]
        assert target["boxes"].shape == (1, 4)

    def test_boxes_outside_a_crop_are_left_out(self, tmp_path: Path) -> None:
        annotations = [make_annotation(1, 1, (0, 0, 8, 8), 1), make_annotation(2, 1, (14, 4, 8, 8), 3)]
        manifest = make_manifest(tmp_path, [1], annotations)
        plan = Plan((32, 24), (16, 24), crop=(16, 0, 16, 24))
        _, target = load_train_sample(manifest, manifest.samples[0], plan)
        assert target["labels"].tolist() == [1]
        torch.testing.assert_close(target["boxes"], torch.tensor([[3 / 16, 8 / 24, 6 / 16, 8 / 24]]))

    def test_image_without_objects(self, tmp_path: Path) -> None:
        manifest = make_manifest(tmp_path, [1])
        _, target = load_train_sample(manifest, manifest.samples[0], Plan((32, 24), (32, 24)))
        assert target["labels"].shape == (0,)
        assert target["boxes"].shape == (0, 4)

    def test_rounding_over_the_border_is_clipped(self, tmp_path: Path) -> None:
        manifest = make_manifest(tmp_path, [1], [make_annotation(1, 1, (-0.5, -0.5, 33, 25))])
        _, target = load_train_sample(manifest, manifest.samples[0], Plan((32, 24), (32, 24)))
        assert target["boxes"].tolist() == [[0.5, 0.5, 1.0, 1.0]]

    def test_four_hundred_objects(self, tmp_path: Path) -> None:
        boxes = [make_annotation(k + 1, 1, (k % 20, k // 20, 4, 4)) for k in range(400)]
        manifest = make_manifest(tmp_path, [1], boxes)
        _, target = load_train_sample(manifest, manifest.samples[0], Plan((32, 24), (64, 48), flip=True))
        assert target["boxes"].shape == (400, 4)

    def test_coco91_labels(self, tmp_path: Path) -> None:
        manifest = make_manifest(tmp_path, [1], [make_annotation(1, 1, category_id=90)], labels="coco91")
        _, target = load_train_sample(manifest, manifest.samples[0], Plan((32, 24), (32, 24)))
        assert target["labels"].tolist() == [90]


def test_an_image_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    manifest = make_manifest(tmp_path, range(1, 5), max_samples=2)
    spoil(manifest, 3)
    assert load_image(manifest, manifest.samples[1]).shape == (24, 32, 3)
    with pytest.raises(UnreadableSampleError, match=r"shard-000001\.tar: sample 000000000003 \(image id 3\): "):
        load_image(manifest, manifest.samples[2])
