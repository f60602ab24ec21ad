"""Whatever a document of annotations or detections holds, its readers give a result or one `UserError`.

More examples by hand: RAYDETR_EXAMPLES=10000 python -m pytest tests/pipeline/shard/test_document.py
"""

import copy
import gc
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.config.sections import ShardsSection
from pipeline.data.labels import LabelMap
from pipeline.errors import UserError
from pipeline.evaluate.report import metrics_table, write_category_table
from pipeline.evaluate.score import score
from pipeline.shard.coco import clean, open_source
from pipeline.shard.document import read_document
from pipeline.shard.member import json_member
from pipeline.shard.write import plan_shards, shard_split
from tests.builders import make_annotation, make_dataset_section, write_coco, write_image

EXAMPLES = int(os.environ.get("RAYDETR_EXAMPLES", "200"))
SETTINGS = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES <= 200,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

DOCUMENT: dict[str, Any] = {
    "info": {"year": 2026},
    "licenses": None,
    "images": [
        {"id": number, "file_name": f"{number:012d}.jpg", "width": 32, "height": 24, "license": None}
        for number in (1, 2, 3)
    ],
    "annotations": [
        make_annotation(1, 1),
        make_annotation(2, 1, (5, 5, 9, 9), 3, iscrowd=1, segmentation={"counts": [0, 4, 764], "size": [24, 32]}),
        make_annotation(3, 3, (0.25, 1.5, 7.125, 8), 3, segmentation=[[1, 1, 5, 1, 5, 5]]),
    ],
    "categories": [{"id": 1, "name": "cat", "supercategory": "none"}, {"id": 3, "name": "dog"}],
}
SHARDS = ShardsSection(segmentations=True)
DETECTIONS = [
    {"image_id": 1, "category_id": 1, "bbox": [2, 3, 10, 8], "score": 0.9},
    {"image_id": 3, "category_id": 3, "bbox": [0.5, 1.5, 7, 8], "score": 0.4},
]

ODD = [
    None, True, False, 0, 1, 2, -1, 7, 1.0, 0.5, -0.0, 2**31, 2**53, 2**63, 2**64, -(2**63), 10**12, 10**30, 10**400,
    -(10**400), 1e-320, 1e100, 1e308, -1e308, math.nan, math.inf, -math.inf, "", "0", "1", "true",
    "one", "caf\udce9.jpg",
    "a\0b", "\x1b[31m\n", "../x.jpg", "/dev/zero", "/etc/passwd", ".",
    "..", "x" * 5000, "[/]", "$\\frac$", "000000000002.jpg",
    [], [[]], {}, [None] * 4, [1, 2, 3], [1, 2, 3, 4], [0, 0, 10**400, 1], [0, 0, 1e308, 1e308], [1, 1, "2", 2],
    [True, 1, 2, 3], [0.1, 0.1, 0.4, 0.4], {"id": 1}, [[1]],
]  # fmt: skip
VALUES = st.sampled_from(ODD) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) below a value."""
    keys: list[Any] = list(value) if isinstance(value, dict) else list(range(len(value)))
    here = [(value, key) for key in keys]
    return here + [place for key in keys if isinstance(value[key], dict | list) for place in places(value[key])]


def fields(value: Any, most: int = 3) -> list[tuple[Any, Any]]:
    """The (container, key) of what is read: the keys of each list's first entries, and the numbers of their boxes."""
    lists = [value] if isinstance(value, list) else [value[name] for name in ("images", "annotations", "categories")]
    entries = [entry for own in lists for entry in own[:most]]
    boxes = [entry["bbox"] for entry in entries if "bbox" in entry]
    return [(entry, key) for entry in entries for key in entry] + [(box, index) for box in boxes for index in range(4)]


@st.composite
def mutated(draw: st.DrawFn, original: Any) -> Any:
    document = [copy.deepcopy(original)]
    if draw(st.integers(0, 9)) < 7:  # one value of one field: what is wrong at once elsewhere does not hide it
        container, key = draw(st.sampled_from(fields(document[0])))
        container[key] = copy.deepcopy(draw(VALUES))
        return document[0]
    for _ in range(draw(st.integers(1, 3))):
        found = places(document)
        container, key = found[draw(st.integers(0, len(found) - 1))]
        kind = draw(st.sampled_from(["set", "set", "set", "remove", "repeat", "copy"]))
        if kind == "set" or container is document:
            container[key] = copy.deepcopy(draw(VALUES))
        elif kind == "remove":
            del container[key]
        elif kind == "repeat" and isinstance(container, list):
            container.append(copy.deepcopy(container[key]))
        else:
            other, other_key = found[draw(st.integers(0, len(found) - 1))]
            container[key] = copy.deepcopy(other[other_key]) if other is not document else None
    return document[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mutations")
    write_coco(root)
    write_image(root / "x.jpg")
    return root


def is_told(task: Callable[[], Any]) -> None:
    """The task gives something, or one error of one line that a terminal and UTF-8 can show."""
    message = ""
    try:
        task()
    except UserError as error:
        message = str(error)
    assert message.isprintable()
    assert len(message) < 2000


def read_shards(folder: Path, document: Any) -> None:
    path = folder / "annotations" / "mutated.json"
    path.write_text(json.dumps(document))

    def read(on_error: Any) -> None:
        split = clean(open_source(path, folder / "train"), on_error)
        (plan,) = plan_shards(split, 1000, 10**9)
        labels = LabelMap("contiguous", split.categories)
        assert json.dumps([labels.to_json(), split.digest, split.problems]).encode()
        root = folder / "train"
        assert all((root / image.file_name).resolve().is_relative_to(root) for image in plan.images)
        for image in plan.images:
            for annotation in json.loads(json_member(image))["annotations"]:
                labels.label(annotation["category_id"])
                assert annotation["iscrowd"] in (0, 1)
                assert all(math.isfinite(value) for value in (*annotation["bbox"], annotation["area"]))

    is_told(lambda: read("fail"))
    is_told(lambda: read("skip"))


def read_scores(folder: Path, document: Any, detections: Any) -> None:
    truth, found = folder / "truth.json", folder / "found.json"
    truth.write_text(json.dumps(document))
    found.write_text(json.dumps(detections))

    def read() -> None:
        metrics = score(truth, found)
        json.dumps(metrics, allow_nan=False)
        assert metrics_table(metrics).encode()
        write_category_table(metrics, folder / "table.csv")

    is_told(read)


@given(document=mutated(DOCUMENT))
@SETTINGS
def test_shards(folder: Path, document: Any) -> None:
    read_shards(folder, document)


@given(document=mutated(DOCUMENT), detections=st.just(DETECTIONS) | mutated(DETECTIONS))
@SETTINGS
def test_scores(folder: Path, document: Any, detections: Any) -> None:
    read_scores(folder, document, detections)


@pytest.mark.parametrize("number", range(len(ODD)))
def test_every_odd_value_in_every_field(folder: Path, number: int) -> None:
    for original in (DOCUMENT, DETECTIONS):
        for place in range(len(fields(original, 1))):
            changed = copy.deepcopy(original)
            container, key = fields(changed, 1)[place]
            container[key] = copy.deepcopy(ODD[number])
            if original is DETECTIONS:
                read_scores(folder, DOCUMENT, changed)
            else:
                read_shards(folder, changed)
                read_scores(folder, changed, DETECTIONS)


@given(detections=mutated(DETECTIONS))
@SETTINGS
def test_detections(folder: Path, detections: Any) -> None:
    found = folder / "found.json"
    found.write_text(json.dumps(detections))
    is_told(lambda: score(DOCUMENT, found))


@given(document=mutated(DOCUMENT))
@settings(SETTINGS, max_examples=max(20, EXAMPLES // 10))
def test_a_split_that_passes_is_written(folder: Path, document: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = folder / "annotations" / "mutated.json"
    path.write_text(json.dumps(document))
    out = tmp_path_factory.mktemp("shards")
    dataset = make_dataset_section(folder, "skip")

    def write() -> None:
        shard_split(open_source(path, folder / "train"), "train", out, dataset, SHARDS, verify=True)

    is_told(write)


@pytest.mark.parametrize("content", ['{"a": "\\ud800"}', "\ufeff[1]", "[" * 300 + "]" * 300, "[NaN, -0, 1e999, 1e5]"])
def test_reads_what_python_reads(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    assert repr(read_document(path, "file")[1]) == repr(json.loads(content.encode()))
    assert gc.isenabled()
