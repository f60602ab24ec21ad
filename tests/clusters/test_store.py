"""The whole pipeline with its dataset and its shards in S3, behind a network that fails."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.fs
import pytest

from pipeline.config.load import load_config
from pipeline.config.sections import SyntheticSection
from pipeline.files import sha256_of
from pipeline.shard.coco import open_split
from pipeline.shard.synthetic import draw_dataset
from pipeline.shard.write import shard_split
from pipeline.store import StorePath
from tests.clusters.test_interrupts import Started
from tests.end_to_end.test_pipeline import PROJECT
from tests.hosts import CAN_HAVE_HOSTS, NEEDS, hosts
from tests.stores import FaultyNetwork, S3Server

WAIT_SECONDS = 300
SPLITS = {
    "dataset.train": "{annotations: annotations/instances_train2017.json, images: train2017}",
    "dataset.val": "{annotations: annotations/instances_val2017.json, images: val2017}",
}


def command(name: str, out: Path, root: object, shards: object, *more: str) -> list[str]:
    settings = {
        "name": "run",
        "runs": out / name,
        "dataset.root": root,
        "dataset.synthetic": "null",
        **SPLITS,
        "shards.out": shards,
        "shards.max_samples": 10,
        "shards.cache": out / f"{name}-cache",
        "train.max_steps": 12,
        "train.global_batch": 8,
        "train.window": 2,
        "train.loader_workers": 1,
    }
    arguments = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return [sys.executable, "-m", "jobs", "run", "-c", "jobs/configs/demo.yaml", *arguments, *more]


def run(words: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(
        words, cwd=PROJECT, env=os.environ | environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr + done.stdout


def weights(out: Path) -> dict[str, str]:
    files = (out / "run" / "checkpoints").glob("checkpoint-*/model.safetensors")
    return {path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def content(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "drawn"
    return draw_dataset(root, SyntheticSection(train_images=60, val_images=20, image_size=96))


@pytest.fixture(scope="module")
def local(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a local disk."""
    out = tmp_path_factory.mktemp("local")
    run(command("local", out, dataset, out / "shards"), {})
    return out


@pytest.fixture
def uploaded(dataset: Path, s3_folder: StorePath) -> StorePath:
    for name in content(dataset):
        (s3_folder / "data" / name).upload(dataset / name)
    return s3_folder


def test_a_failing_network_changes_nothing(
    s3: S3Server, uploaded: StorePath, local: Path, tmp_path: Path, subtests: pytest.Subtests
) -> None:
    """The dataset and the shards in a store whose connections stall, are cut and are answered 500 and 503."""
    network = FaultyNetwork(s3.port, rate=0.2, seed=5)
    remote = command("remote", tmp_path, f"{uploaded}/data", f"{uploaded}/shards")
    run(remote, s3.environment(network.port))
    with subtests.test("faults came"):
        assert all(network.failed.values()), network.failed
    shards = uploaded / "shards"
    with subtests.test("the same shards"):
        assert {name: (shards / name).read_bytes() for name in shards.list()} == content(local / "shards")
    with subtests.test("the same weights"):
        assert weights(tmp_path / "remote") == weights(local / "local")
    with subtests.test("the same scores"):
        scores = [json.loads(next(out.rglob("metrics.json")).read_text()) for out in (tmp_path, local)]
        assert scores[0]["AP"] == scores[1]["AP"]
    with subtests.test("the secret stays in the environment"):
        kept = [path for path in tmp_path.rglob("*") if path.is_file() and b"planted-secret" in path.read_bytes()]
        assert not kept
    with subtests.test("a second command reads nothing but the manifests"):
        network.close()
        again = run(remote, s3.environment())
        assert again.count("already done") >= 3, again


def test_a_killed_command_goes_on(dataset: Path, uploaded: StorePath, tmp_path: Path) -> None:
    """SIGKILL while shards go into the store: the next command finishes, and what was finished is not sent again."""
    words = command("killed", tmp_path, f"{uploaded}/data", f"{uploaded}/shards", "--set", "shards.max_samples=1")
    words[words.index("run")] = "shard"
    train = uploaded / "shards" / "train"
    started = Started(words, f"store-{tmp_path.name}")
    end = time.monotonic() + WAIT_SECONDS
    while len(finished(train)) < 10 and time.monotonic() < end:
        assert started.process.poll() is None
        time.sleep(0.5)  # the store has other things to do
    started.end(signal.SIGKILL)
    before = finished(train)
    assert 10 <= len(before) < 60
    assert "manifest.json" not in train.list()
    told = run(words, {})
    assert re.search(rf"going on with ({'|'.join(str(len(before) + more) for more in range(4))}) shards", told), told
    times = {name: time for name, time in modified(train).items() if name in before}
    assert times == before
    config = load_config(words[words.index("-c") + 1], words[words.index("-c") + 3 :: 2])
    local = config.dataset.model_copy(update={"root": str(dataset)})
    for split in ("train", "val"):
        source = open_split(local, getattr(local, split))
        settings = config.shards.model_copy(update={"out": None})
        expected = content(shard_split(source, split, tmp_path / "local", local, settings).folder)
        stored = uploaded / "shards" / split
        assert {name: sha256_of(stored / name) for name in stored.list()} == {
            name: hashlib.sha256(file).hexdigest() for name, file in expected.items()
        }


def modified(folder: StorePath) -> dict[str, int]:
    """When the tars of a folder were written; a store tells it to the second."""
    files, path = pyarrow.fs.FileSystem.from_uri(str(folder))
    found = files.get_file_info(pyarrow.fs.FileSelector(path, allow_not_found=True))
    return {info.base_name: info.mtime_ns for info in found if info.extension == "tar"}


def finished(folder: StorePath) -> dict[str, int]:
    """Those of them whose record is there, too."""
    records = {name.removesuffix(".json") for name in folder.list() if name.endswith(".json")}
    return {name: time for name, time in modified(folder).items() if name.removesuffix(".tar") in records}


@pytest.mark.skipif(not CAN_HAVE_HOSTS, reason=f"needs {NEEDS}")
def test_two_hosts_share_only_the_store(s3: S3Server, uploaded: StorePath, local: Path, tmp_path: Path) -> None:
    """One shards, the other trains with nothing on its disk, and a cache with room for little."""
    with hosts(2, tmp_path) as (here, (first, second)):
        shard = command("one", tmp_path, f"{uploaded}/data", f"{uploaded}/shards")
        shard[shard.index("run")] = "shard"
        run(first.command(shard, PROJECT), s3.environment(host=here))
        largest = max(size for name, size in (uploaded / "shards").list().items() if name.endswith(".tar"))
        small = ("--set", f"shards.cache_bytes={3 * largest}")
        train = command("two", tmp_path, f"{uploaded}/data", f"{uploaded}/shards", *small)
        run(second.command(train, PROJECT), s3.environment(host=here))
        disk = second.outside(tmp_path)
    assert weights(disk / "two") == weights(local / "local")
    assert sum(path.stat().st_size for path in (disk / "two-cache").iterdir()) <= 4 * largest
    assert not list(tmp_path.glob("one*")), "the hosts wrote on this machine's disk"
    assert not first.outside(tmp_path / "two").exists()
