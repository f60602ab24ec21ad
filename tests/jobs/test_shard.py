from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.cluster import connected
from jobs.shard import shard
from pipeline.config.sections import ClusterSection, Config
from pipeline.data.loader import eval_batches
from pipeline.data.manifest import read_manifest
from pipeline.errors import UserError
from tests.builders import make_annotation, make_dataset_section, write_coco


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with connected(ClusterSection(workers=2)):
        yield


def make_config(root: Path, runs: Path, *, on_error: Any = "fail", **shards: Any) -> Config:
    values = {"name": "test", "runs": str(runs), "dataset": make_dataset_section(root, on_error), "shards": shards}
    return Config.model_validate(values)


def write_splits(root: Path) -> None:
    annotations = [make_annotation(k, k) for k in range(1, 9, 2)]
    write_coco(root, range(1, 10), annotations)
    write_coco(root, [11, 12], split="val")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestSharding:
    def test_one_split_needs_nothing_of_the_other(self, tmp_path: Path) -> None:
        write_coco(tmp_path / "pets", [11, 12], split="val")
        manifests = shard(make_config(tmp_path / "pets", tmp_path / "runs"), splits=["val"])
        assert [(split, len(manifest.samples)) for split, manifest in manifests.items()] == [("val", 2)]

    def test_same_bytes_with_any_number_of_workers(self, tmp_path: Path) -> None:
        write_splits(tmp_path / "pets")
        manifests = [
            shard(make_config(tmp_path / "pets", tmp_path / f"runs{workers}", workers=workers, max_samples=2))
            for workers in (1, 2)
        ]
        assert manifests[0]["train"].digest == manifests[1]["train"].digest
        one, two = (content(tmp_path / f"runs{workers}" / "shards" / "pets") for workers in (1, 2))
        assert one == two
        assert sorted(name for name in one if name.endswith(".tar")) == [
            *(f"train/shard-00000{number}.tar" for number in range(5)),
            "val/shard-000000.tar",
        ]
        assert len(manifests[0]["train"].samples) == 9
        assert eval_batches(manifests[0]["val"], 2) == [[0, 1]]

    def test_is_done_once_and_says_so(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        write_splits(tmp_path / "pets")
        config = make_config(tmp_path / "pets", tmp_path / "runs")
        first = shard(config)
        before = content(tmp_path / "runs")
        with caplog.at_level("INFO", logger="raydetr"):
            assert shard(config) == first
        assert content(tmp_path / "runs") == before
        assert "shard: already done, train has" in caplog.text
        assert "shard: already done, val has" in caplog.text
        assert {split: read_manifest(config.shards_folder / split) for split in first} == first

    def test_out_folder(self, tmp_path: Path) -> None:
        write_splits(tmp_path / "pets")
        manifests = shard(make_config(tmp_path / "pets", tmp_path / "runs", out=str(tmp_path / "elsewhere")))
        assert manifests["val"].folder == tmp_path / "elsewhere" / "val"

    def test_draws_the_synthetic_dataset_first(self, tmp_path: Path) -> None:
        config = Config.model_validate(
            {
                "name": "test",
                "runs": str(tmp_path / "runs"),
                "dataset": {"root": str(tmp_path / "shapes"), "synthetic": {"train_images": 6, "val_images": 3}},
            }
        )
        manifests = shard(config)
        assert {name: len(manifest.samples) for name, manifest in manifests.items()} == {"train": 6, "val": 3}
        assert shard(config) == manifests


class TestBadInput:
    def test_an_error_in_a_task_is_the_user_s(self, tmp_path: Path) -> None:
        write_splits(tmp_path / "pets")
        image = tmp_path / "pets" / "train" / "000000000006.jpg"
        image.write_bytes(image.read_bytes()[:-30])
        with pytest.raises(UserError) as caught:
            shard(make_config(tmp_path / "pets", tmp_path / "runs", max_samples=2))
        assert f"{image}: image 6: the JPEG file is cut off" in str(caught.value)
        assert "\n" not in str(caught.value)
        left = [path.name for path in (tmp_path / "runs" / "shards" / "pets").iterdir()]
        assert left == [".train.lock"]

    def test_skip_counts(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        write_splits(tmp_path / "pets")
        image = tmp_path / "pets" / "train" / "000000000006.jpg"
        image.write_bytes(image.read_bytes()[:-30])
        with caplog.at_level("INFO", logger="raydetr"):
            manifests = shard(make_config(tmp_path / "pets", tmp_path / "runs", max_samples=2, on_error="skip"))
        assert manifests["train"].problems == {"image_truncated": 1}
        assert len(manifests["train"].samples) == 8
        assert "train: cleaned: 1 image_truncated" in caplog.text
        (problem,) = (manifests["train"].folder / "problems.jsonl").read_text().splitlines()
        assert '"image": "000000000006.jpg", "image_id": 6' in problem

    def test_splits_of_different_categories(self, tmp_path: Path) -> None:
        write_splits(tmp_path / "pets")
        write_coco(tmp_path / "pets", [11], split="val", categories=[{"id": 1, "name": "cat"}])
        with pytest.raises(UserError, match="differ in their categories"):
            shard(make_config(tmp_path / "pets", tmp_path / "runs"))


def test_verify_reads_existing_shards_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_splits(tmp_path / "pets")
    config = make_config(tmp_path / "pets", tmp_path / "runs", max_samples=4)
    manifest = shard(config, verify=True)["train"]
    with caplog.at_level("INFO", logger="raydetr"):
        shard(config, verify=True)
    assert "train: all 9 samples decode" in caplog.text
    path = manifest.folder / "shard-000001.tar"
    damaged = bytearray(path.read_bytes())
    damaged[600] ^= 255
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=r"shard-000001\.tar: its sha256"):
        shard(config, verify=True)
