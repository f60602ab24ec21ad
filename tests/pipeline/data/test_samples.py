"""The samples of a step: their augmentation, their images and targets."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config.sections import AugmentSection
from pipeline.data.augment import Plan
from pipeline.data.manifest import Manifest, UnreadableSampleError
from pipeline.data.order import SampleOrder
from pipeline.data.samples import load_image, load_train_sample, plan_step, sample_plan
from tests.builders import make_annotation, make_manifest, spoil


class TestPlans:
    def test_a_step_is_sorted_by_aspect(self, manifest: Manifest) -> None:
        order = SampleOrder(manifest.digest, manifest.shard_sizes, 5, 2)
        planned = plan_step(manifest, order, 1, 12, 5, AugmentSection())
        aspects = [sample.plan.aspect for sample in planned]
        assert aspects == sorted(aspects)
        assert sorted((sample.epoch, sample.index) for sample in planned) == sorted(order.step_samples(1, 12))

    def test_augmentation_is_seeded_by_seed_epoch_data_and_image(self, manifest: Manifest) -> None:
        sample = manifest.samples[0]
        other = replace(sample, image_id=sample.image_id + 1)
        augment = AugmentSection()

        def drawn(digest: str = manifest.digest, seed: int = 0, image: Any = sample) -> tuple[Plan, ...]:
            return tuple(sample_plan(digest, seed, epoch, image, augment) for epoch in range(8))

        assert drawn() == drawn()
        assert len(set(drawn())) > 1
        assert len({drawn(), drawn(seed=1), drawn(digest="0" * 64), drawn(image=other)}) == 4


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
        plan = Plan((32, 24), (16, 24), before_crop=(32, 24), crop=(16, 0, 16, 24))
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
