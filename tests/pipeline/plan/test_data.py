"""pipeline/plan/data.py: the data that a plan is for, and its canvases."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config.load import load_config
from pipeline.config.sections import AugmentSection, Config, TrainSection
from pipeline.data.order import SampleOrder
from pipeline.data.samples import plan_step
from pipeline.errors import UserError
from pipeline.plan.data import BYTES_PER_PIXEL, COCO_SIZES, draw_canvases, planned_data
from tests.builders import make_annotation, make_manifest, make_varied_manifest, write_coco

CONFIGS = Path(__file__).resolve().parents[3] / "jobs" / "configs"


def config_of(root: Path, *overrides: str) -> Config:
    sections = ("train={annotations: annotations/train.json, images: train}", "synthetic=null", f"root={root}")
    own = [f"dataset.{section}" for section in sections]
    return load_config(CONFIGS / "demo.yaml", [*own, f"shards.out={root / 'shards'}", *overrides])


def test_shards_tell_all(tmp_path: Path) -> None:
    manifest = make_manifest(tmp_path, [1, {"id": 2, "width": 48}], [make_annotation(1, 1)])
    data = planned_data(config_of(tmp_path))
    assert (data.images, data.classes, data.whole_shards) == (2, 3, False)
    assert data.bytes == sum(path.stat().st_size for path in (tmp_path / "shards" / "train").glob("*.tar"))
    assert sorted(data.sizes.tolist()) == [[32, 24], [48, 24]]
    assert data.source == str(manifest.folder)


def test_an_annotation_file_tells_what_is_in_it(tmp_path: Path) -> None:
    write_coco(tmp_path, [1, 2, 3], draw=False)
    data = planned_data(config_of(tmp_path))
    assert (data.images, data.classes) == (3, 3)
    assert data.bytes == round(3 * 32 * 24 * BYTES_PER_PIXEL)
    assert planned_data(config_of(tmp_path, "dataset.labels=coco91")).classes == 91


def test_what_will_be_drawn(tmp_path: Path) -> None:
    data = planned_data(load_config(CONFIGS / "demo.yaml", [f"runs={tmp_path}"]))
    assert (data.images, data.classes, data.sizes.tolist()) == (1200, 6, [[128, 128]])


def test_a_number_of_images_is_enough() -> None:
    data = planned_data(load_config(CONFIGS / "coco_r50.yaml"), 118_287)
    assert (data.images, data.classes) == (118_287, 91)
    assert data.bytes == pytest.approx(19.3e9, rel=0.05), "as train2017"


def test_machines_fetch_whole_shards_from_a_store() -> None:
    config = load_config(CONFIGS / "coco_r50.yaml", ["shards.out=s3://bucket/shards"])
    assert planned_data(config, 10).whole_shards


def test_without_data_the_number_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.json: cannot read .*; give --images to plan without it"):
        planned_data(config_of(tmp_path))


@pytest.mark.parametrize(
    "images",
    ['[{"id": 1}]', '[{"id": 1, "width": 0, "height": 3}]', "[]", "7"],
    ids=["size", "zero", "none", "no list"],
)
def test_a_damaged_annotation_file_is_told(tmp_path: Path, images: str) -> None:
    path = tmp_path / "annotations" / "train.json"
    path.parent.mkdir()
    path.write_text(f'{{"images": {images}, "categories": []}}')
    with pytest.raises(UserError, match=r"train\.json: not a COCO annotation file \(.*inspect --data"):
        planned_data(config_of(tmp_path))


@pytest.mark.parametrize(
    "jitter", [{}, {"jitter": (0.5, 1.5), "jitter_side": 192, "plain_after": 40}], ids=["published", "jitter"]
)
def test_canvases_are_those_of_training(tmp_path: Path, jitter: dict[str, Any]) -> None:
    manifest = make_varied_manifest(tmp_path, 30)
    augment = AugmentSection(short_sides=(64, 96), max_side=160, crop_short_sides=(64,), crop_min=40, crop_max=64)
    augment = augment.model_copy(update=jitter)
    train = TrainSection(epochs=66, global_batch=10, micro_batch=5, augment=augment)
    order = SampleOrder(manifest.digest, manifest.shard_sizes, 0, 8)
    sizes = np.concatenate([plan_step(manifest, order, step, train).plans.size for step in range(200)])
    real = -(-sizes.reshape(-1, 5, 2).max(axis=1) // 32) * 32
    drawn = draw_canvases(manifest.samples.sizes(np.arange(30)), train)
    assert drawn.prod(axis=1).mean() == pytest.approx(real.prod(axis=1).mean(), rel=0.03)
    assert drawn.max() == real.max()


def test_heights_come_first() -> None:
    train = TrainSection(global_batch=4, micro_batch=4, augment=AugmentSection(crop=0, short_sides=(480,)))
    assert draw_canvases(np.array([[640, 480]]), train)[0].tolist() == [480, 640]
    assert draw_canvases(COCO_SIZES, train).min() >= 480
