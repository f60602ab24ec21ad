"""Manifests and JSON members that somebody else has written or changed: refused when read, nothing else."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.manifest import Manifest, UnreadableSampleError, ground_truth, read_annotations, read_manifest
from pipeline.errors import UserError
from tests.builders import make_annotation, make_manifest

Change = Callable[[dict[str, Any]], Any]


def shard(content: dict[str, Any]) -> dict[str, Any]:
    return content["shards"][0]


def sample(content: dict[str, Any]) -> dict[str, Any]:
    return shard(content)["index"][0]


CHANGES: list[Any] = [
    pytest.param(lambda c: shard(c).update(name="../../etc/passwd"), "shard name", id="name leads out"),
    pytest.param(lambda c: shard(c).update(name="/etc/passwd"), "shard name", id="absolute name"),
    pytest.param(lambda c: shard(c).update(name=".."), "shard name", id="parent as name"),
    pytest.param(lambda c: shard(c).update(name="a\x1b[31m\n.tar"), "shard name", id="name with escapes"),
    pytest.param(lambda c: shard(c).update(bytes=-1), "-1 is not a whole number", id="negative size of a shard"),
    pytest.param(lambda c: shard(c).update(bytes=True), "True is not a whole number", id="true as size"),
    pytest.param(lambda c: shard(c).update(bytes=10**15), "the manifest says 1000000000000000", id="shard too large"),
    pytest.param(lambda c: sample(c)["members"].update(jpg=[512, 10**12]), "lies beyond", id="huge member"),
    pytest.param(lambda c: sample(c)["members"].update(jpg=[-5, 10]), "-5 is not a whole number", id="negative offset"),
    pytest.param(lambda c: sample(c)["members"].update(jpg=[1.5, 10]), "1.5 is not a whole", id="half an offset"),
    pytest.param(lambda c: sample(c)["members"].update(jpg=[1]), "not a manifest", id="offset alone"),
    pytest.param(lambda c: sample(c)["members"].update(png=[0, 1]), "not an image and json", id="two images"),
    pytest.param(lambda c: sample(c)["members"].pop("json"), "not an image and json", id="no json"),
    pytest.param(lambda c: sample(c)["members"].pop("jpg"), "not an image and json", id="no image"),
    pytest.param(lambda c: sample(c).update(width=0), "0 is not a whole number of at least 1", id="no width"),
    pytest.param(lambda c: sample(c).update(height="24"), "'24' is not a whole number", id="height as text"),
    pytest.param(lambda c: sample(c).update(key=7), "7 is not of the type str", id="key a number"),
    pytest.param(lambda c: c.update(shards=[]), "it has no shards", id="no shards"),
    pytest.param(lambda c: c.update(shards=None), "not a manifest", id="null for shards"),
    pytest.param(lambda c: c.update(problems=[1]), "not a manifest", id="problems a list"),
    pytest.param(lambda c: c["label_map"].update(kind="other"), "of the kind 'other'", id="other label map"),
    pytest.param(lambda c: c["label_map"].update(categories=[7]), "not a manifest", id="category a number"),
]


@pytest.mark.parametrize(("change", "told"), CHANGES)
def test_a_foreign_manifest_is_refused_when_it_is_read(tmp_path: Path, change: Change, told: str) -> None:
    path = make_manifest(tmp_path, annotations=[make_annotation(1, 1)]).folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=told) as caught:
        read_manifest(path.parent)
    assert str(path.parent) in str(caught.value)


def changed(manifest: Manifest, change: Callable[[str], str]) -> Manifest:
    """The manifest after the text of its first JSON member was changed in place."""
    path = manifest.folder / manifest.shards[0].name
    offset, size = manifest.samples[0].members["json"]
    content = bytearray(path.read_bytes())
    text = change(content[offset : offset + size].decode()).encode()
    assert len(text) == size
    content[offset : offset + size] = text
    path.write_bytes(content)
    return manifest


MEMBERS: list[Any] = [
    pytest.param('"category_id":1', '"category_id":2', id="unknown category"),
    pytest.param('"category_id"', '"kategory_id"', id="category key"),
    pytest.param('"bbox"', '"bbix"', id="box key"),
    pytest.param('"bbox":[2,', '"bbox":{2:', id="not JSON"),
    pytest.param("[2,3,10,8]", "[2,3,1000]", id="three numbers"),
    pytest.param('"iscrowd":0', '"iscrowd":7', id="crowd"),
    pytest.param('"area":80', '"area":[]', id="area a list"),
    pytest.param('"width":32', '"width":31', id="width"),
    pytest.param('"file_name"', '"file_mane"', id="name key"),
]


@pytest.mark.parametrize(("before", "after"), MEMBERS)
def test_a_changed_member_is_unreadable(tmp_path: Path, before: str, after: str) -> None:
    manifest = make_manifest(tmp_path, annotations=[make_annotation(1, 1)])
    changed(manifest, lambda text: text.replace(before, after))
    first = manifest.samples[0]
    told = r"sample 000000000001 \(image id 1\): its JSON member is damaged"
    with pytest.raises(UnreadableSampleError, match=told):
        read_annotations(manifest, first)
    with pytest.raises(UserError, match=told):
        ground_truth(manifest)
