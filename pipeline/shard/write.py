"""Writes a split as WebDataset tars with a manifest, on a disk or into a store.

A sample is `<image id, 12 digits>.<jpg|png|webp|bmp|tif>`, the source's bytes untouched unless a smaller copy is wanted
(`shards.max_side`), followed by `<same key>.json`.
What stands in which shard is planned from the annotation file and the files' sizes, so the bytes do not depend on who
writes them; each shard is one task. The manifest is written last: a folder that has it is finished. A finished shard
leaves a record, with which the next command goes on where this one was ended.
"""

import base64
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from pipeline.config.sections import DatasetSection, OnError, ShardsSection
from pipeline.data.cache import DEFAULT_CACHE, Cache, cache_of
from pipeline.data.images import BadImageError, decode_image
from pipeline.data.index import INDEX_NAME, Sample, to_rows, write_rows
from pipeline.data.labels import LabelMap
from pipeline.data.manifest import (
    FORMAT,
    MANIFEST_NAME,
    SUM_NAME,
    Manifest,
    Shard,
    UnreadableSampleError,
    describe,
    read_annotations,
    read_image_bytes,
    read_manifest,
    write_manifest,
)
from pipeline.errors import FullDiskError, StoreError, UserError, shown
from pipeline.files import disk_error, sha256_of, sync, write_whole
from pipeline.log import get_logger, outcome
from pipeline.shard.coco import CocoImage, CocoSplit, Source, clean
from pipeline.shard.destination import (
    alone,
    begin,
    clear,
    is_still,
    move,
    names_in,
    publish,
    remove,
    scratch,
    unfinished_of,
)
from pipeline.shard.findings import NOTES, PROBLEMS_NAME, Findings, unpacked
from pipeline.shard.member import image_member, json_member
from pipeline.shard.origin import Images
from pipeline.shard.smaller import Smaller, smaller_of
from pipeline.shard.tar import ShardTar, tar_size
from pipeline.store import Place

JOB = "job.json"
"""File of an unfinished folder: what is written there. Another source or other settings begin anew."""

logger = get_logger(__name__)


@dataclass(frozen=True)
class ShardPlan:
    """The images of one shard, in order."""

    number: int
    images: tuple[CocoImage, ...]

    @property
    def name(self) -> str:
        """File name of the shard."""
        return f"shard-{self.number:06d}.tar"


@dataclass(frozen=True)
class WrittenShard:
    """What came of a plan: the shard (without samples, and no file, when every image was left out), what was cleaned.

    The rows of its index lie beside the tar until `finish` gathers them; `rows_sha256` is that of their file.
    """

    number: int
    shard: Shard
    problems: dict[str, int]
    packed_problems: str
    """In base64."""
    rows_sha256: str | None


WriteTask = Callable[[ShardPlan], WrittenShard]
WriteAll = Callable[[list[ShardPlan], WriteTask], Iterable[WrittenShard]]
"""Runs the task for every plan and gives the results in any order: here in a row, in `jobs/` as Ray tasks."""


def write_in_a_row(plans: list[ShardPlan], task: WriteTask) -> Iterator[WrittenShard]:
    """Writes the shards one after the other in this process."""
    return map(task, plans)


def shard_split(
    source: Source,
    split: str,
    out: Place,
    dataset: DatasetSection,
    shards: ShardsSection,
    *,
    verify: bool = False,
    needs_objects: bool = False,
    write_all: WriteAll = write_in_a_row,
) -> Manifest:
    """Writes `<out>/<split>` unless it is there already.

    Args:
        source: the opened annotation file.
        split: name of the split's folder.
        out: folder of the dataset's shards, seen by whoever writes shards.
        dataset: for `labels` and `on_error`.
        shards: for the sizes, `segmentations` and smaller copies.
        verify: decode every image fully before it is written.
        needs_objects: refuse a split without an object to train on.
        write_all: runs the tasks.

    Returns:
        The manifest, new or found.

    Raises:
        UserError: bad input, another dataset or other settings in the folder, no space.
    """
    folder, cache = out / split, cache_of(shards)
    settings, smaller = _settings(dataset, shards), smaller_of(shards)
    key = "shards.out" if shards.out else "runs or shards.out"
    if (folder / MANIFEST_NAME).exists():  # nothing is written: a disk that is only read will do
        return _found(folder, cache, source, settings, dataset.on_error)
    try:
        with alone(out, split):
            if (folder / MANIFEST_NAME).exists():
                return _found(folder, cache, source, settings, dataset.on_error)
            _refuse_foreign(folder)
            cleaned = clean(source, dataset.on_error, segmentations=shards.segmentations)
            if needs_objects:
                _refuse_no_objects(cleaned)
            return _write_split(cleaned, folder, LabelMap(dataset.labels, cleaned.categories), settings,
                                dataset.on_error, verify, smaller, write_all, key, cache)  # fmt: skip
    except OSError as error:
        raise disk_error(out, error, key) from error


def plan_shards(split: CocoSplit, max_samples: int, max_bytes: int, smaller: Smaller | None = None) -> list[ShardPlan]:
    """Cuts a split, in the order of the image ids, into shards of at most `max_samples` and `max_bytes`."""
    plans: list[ShardPlan] = []
    images: list[CocoImage] = []
    size = 0
    for image in split.images:
        image_size = image.size if smaller is None else smaller.planned_bytes(image)
        sample_size = tar_size(image_size) + tar_size(len(json_member(image)))
        if images and (len(images) == max_samples or size + sample_size > max_bytes):
            plans.append(ShardPlan(len(plans), tuple(images)))
            images, size = [], 0
        images.append(image)
        size += sample_size
    plans.append(ShardPlan(len(plans), tuple(images)))
    return plans


def write_shard(
    plan: ShardPlan, files: Images, folder: Place, on_error: OnError, verify: bool, smaller: Smaller | None = None,
    key: str = "shards.out",
) -> WrittenShard:  # fmt: skip
    """Writes one shard, the rows of its index and its record, unless all of it is there already.

    Each is written to a temporary name, then renamed or copied into the store, the record last.

    Args:
        plan: what is in it.
        files: where the images lie.
        folder: where it goes.
        on_error: what is done about a bad image.
        verify: decode every image fully.
        smaller: which images are copied smaller, and how.
        key: names, in messages, the setting that has it written elsewhere.

    Raises:
        UserError: a bad image when `on_error` is "fail", or no space.
    """
    recorded = _recorded(plan, folder)
    if recorded is not None:
        return recorded
    path = folder / plan.name
    findings = Findings(on_error)
    try:
        with scratch(path) as temporary:
            with temporary.open("wb") as file:
                with ShardTar(file) as tar:
                    samples = list(_write_samples(plan, files, tar, findings, verify, smaller))
                file.flush()
                os.fsync(file.fileno())
            if samples:
                move(temporary, path)
        rows_sha256 = _write_rows(_rows_path(path), samples) if samples else None
        shard = Shard(plan.name, len(samples), tar.size, tar.sha256)
        packed = base64.b64encode(findings.packed).decode()
        written = WrittenShard(plan.number, shard, dict(findings.counts), packed, rows_sha256)
        write_whole(_record_path(path), json.dumps(asdict(written)).encode())
    except OSError as error:
        raise disk_error(path, error, key) from error
    return written


def finish(
    folder: Place, split: str, labels: LabelMap, source: CocoSplit, settings: dict[str, Any],
    written: Iterable[WrittenShard], cache: Cache = DEFAULT_CACHE,
) -> Manifest:  # fmt: skip
    """Writes the index, the list of problems and the manifest of a folder whose shards are all written.

    What led to them is removed.

    Raises:
        UserError: every image was left out.
    """
    problems = Counter(source.problems)
    listed = [source.packed]
    shards: list[Shard] = []
    for result in sorted(written, key=lambda result: result.number):
        problems.update(result.problems)
        listed.append(base64.b64decode(result.packed_problems))
        if result.shard.samples:
            shards.append(result.shard)
    if not shards:
        raise UserError(f"{source.source}: none of its images can be used: {_told(problems)}")
    parts = [_rows_path(folder / shard.name) for shard in shards]
    with scratch(folder / INDEX_NAME) as temporary:
        write_rows(temporary, parts, sum(shard.samples for shard in shards))
        sync(temporary)
        move(temporary, folder / INDEX_NAME)
    kept = {MANIFEST_NAME, SUM_NAME, INDEX_NAME, *(shard.name for shard in shards)}
    if problems:
        _write_problems(folder / PROBLEMS_NAME, listed)
        kept.add(PROBLEMS_NAME)
    manifest = write_manifest(folder, split, labels, source.digest, settings, shards, problems, cache)
    remove(folder, [name for name in names_in(folder) if name not in kept])
    return manifest


def verify_shard(manifest: Manifest, number: int) -> None:
    """Reads a whole shard again: its checksum, every JSON member, and every image by full decoding.

    Raises:
        UserError: something differs from the manifest.
    """
    shard = manifest.shards[number]
    path = manifest.folder / shard.name
    mend = f"delete {manifest.folder} and shard again"
    try:
        digest = sha256_of(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {mend}") from error
    if digest != shard.sha256:
        raise UserError(f"{path}: its sha256 is not the manifest's: the file has changed; {mend}")
    first = sum(manifest.shard_sizes[:number])
    for sample in manifest.samples[first : first + shard.samples]:
        try:
            read_annotations(manifest, sample)
            decode_image(read_image_bytes(manifest, sample), sample.width, sample.height)
        except (BadImageError, UnreadableSampleError) as error:
            raise UserError(f"{describe(manifest, sample)}: {error}; mend the source, {mend}") from None


def check_same_categories(train: Source, val: Source) -> None:
    """Both splits of a dataset name the same categories: one model is trained and scored on them."""

    def named(source: Source) -> set[tuple[int, str]]:
        return {(int(entry["id"]), entry["name"]) for entry in source.document["categories"]}

    different = sorted(named(train) ^ named(val))
    if different:
        raise UserError(
            f"{train.path} and {val.path} differ in their categories (id, name): "
            f"{shown(different[:5], 400)}; "
            "give both files the same list"
        )


def report_problems(split: str, manifest: Manifest) -> None:
    """Says what was cleaned, and what may be right or wrong, if anything was."""
    cleaned = _cleaned(manifest.problems)
    if cleaned:
        logger.warning("%s: cleaned: %s", split, _told(cleaned))
    for note, meaning in NOTES.items():
        if note in manifest.problems:
            logger.warning("%s: %d images: %s (%s)", split, manifest.problems[note], meaning, note)
    if manifest.problems:
        logger.info("%s: each is a line of %s", split, manifest.folder / PROBLEMS_NAME)


def _write_split(
    split: CocoSplit, folder: Place, labels: LabelMap, settings: dict[str, Any], on_error: OnError, verify: bool,
    smaller: Smaller | None, write_all: WriteAll, key: str, cache: Cache,
) -> Manifest:  # fmt: skip
    unfinished = unfinished_of(folder)
    job = {
        "format": FORMAT,
        "source_digest": split.digest,
        "settings": settings,
        "on_error": on_error,
        "verify": verify,
    }
    try:
        _go_on_with(unfinished, job)
        plans = plan_shards(split, settings["max_samples"], settings["max_bytes"], smaller)
        task = partial(write_shard, files=split.files, folder=unfinished, on_error=on_error, verify=verify,
                       smaller=smaller, key=key)  # fmt: skip
        manifest = finish(unfinished, folder.name, labels, split, settings, write_all(plans, task), cache)
        publish(unfinished, folder)
    except (UserError, OSError) as error:
        # What has to be mended in the data makes another job of it; faults of a disk or a store pass.
        told = disk_error(unfinished, error, key) if isinstance(error, OSError) else error
        if isinstance(told, UserError) and not isinstance(told, StoreError | FullDiskError):
            clear(unfinished)
        raise
    manifest = replace(manifest, folder=folder)
    logger.info(outcome("shard", _summary(manifest), is_new=True))
    report_problems(folder.name, manifest)
    return manifest


def _go_on_with(unfinished: Place, job: dict[str, Any]) -> None:
    """The folder of a job, with what an earlier command finished of the same one."""
    try:
        same = json.loads((unfinished / JOB).read_bytes()) == job
    except (OSError, ValueError):
        same = False
    if same:
        done = sum(name.endswith(".json") for name in names_in(unfinished)) - 1
        logger.info("shard: going on with %d shards in %s", done, unfinished)
        return
    begin(unfinished)
    write_whole(unfinished / JOB, json.dumps(job).encode())


def _recorded(plan: ShardPlan, folder: Place) -> WrittenShard | None:
    """What an earlier command recorded of a shard, if its tar and its rows are still those that it wrote."""
    path = folder / plan.name
    try:
        record = json.loads(_record_path(path).read_bytes())
        written = WrittenShard(**{**record, "shard": Shard(**record["shard"])})
        same = (written.number, written.shard.name) == (plan.number, plan.name)
        if same and written.shard.samples:
            is_tar = is_still(path, written.shard.bytes, written.shard.sha256)
            same = is_tar and sha256_of(_rows_path(path)) == written.rows_sha256
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return written if same else None


def _rows_path(shard: Place) -> Place:
    return shard.with_suffix(".npy")


def _record_path(shard: Place) -> Place:
    return shard.with_suffix(".json")


def _write_rows(path: Place, samples: list[Sample]) -> str:
    """Hex sha256 of the file."""
    content = io.BytesIO()
    np.save(content, to_rows(samples), allow_pickle=False)
    write_whole(path, content.getvalue())
    return hashlib.sha256(content.getvalue()).hexdigest()


def _write_problems(path: Place, listed: list[bytes]) -> None:
    with scratch(path) as temporary:
        with temporary.open("wb") as file:
            for packed in listed:
                file.writelines(unpacked(packed))
        sync(temporary)
        move(temporary, path)


def _write_samples(
    plan: ShardPlan, files: Images, tar: ShardTar, findings: Findings, verify: bool, smaller: Smaller | None
) -> Iterator[Sample]:
    for source in plan.images:
        found = image_member(source, files, findings, verify, smaller)
        if found is None:
            continue
        image, content, extension = found
        key = f"{image.id:012d}"
        members = tar.add(f"{key}.{extension}", content), tar.add(f"{key}.json", json_member(image))
        yield Sample(image.id, image.width, image.height, plan.number, extension, *members)


def _settings(dataset: DatasetSection, shards: ShardsSection) -> dict[str, Any]:
    """The settings that the content of the shards depends on."""
    settings: dict[str, Any] = {
        "labels": dataset.labels,
        "max_samples": shards.max_samples,
        "max_bytes": shards.max_bytes,
        "segmentations": shards.segmentations,
    }
    if shards.max_side is not None:  # shards without smaller copies are those of releases that made none
        settings |= {"max_side": shards.max_side, "quality": shards.jpeg_quality}
    return settings


def _summary(manifest: Manifest) -> str:
    samples, shards = len(manifest.samples), len(manifest.shards)
    return f"{manifest.split} has {samples} samples in {shards} shards in {manifest.folder}"


def _refuse_other(manifest: Manifest, source: Source, settings: dict[str, Any], on_error: OnError) -> None:
    sections = {"labels": "dataset"}
    differences = [
        f"{sections.get(key, 'shards')}.{key} was {manifest.settings.get(key)!r}, now {settings.get(key)!r}"
        for key in settings | manifest.settings
        if manifest.settings.get(key) != settings.get(key)
    ]
    if manifest.source_digest != source.digest:
        differences.insert(
            0, f"the source ({source.path}, or its images) was {manifest.source_digest[:12]}, now {source.digest[:12]}"
        )
    cleaned = _cleaned(manifest.problems)
    if on_error == "fail" and cleaned:
        differences.append(f"dataset.on_error was 'skip' and cleaned {_told(cleaned)}, now 'fail'")
    if differences:
        raise UserError(
            f"{manifest.folder} holds other shards: {'; '.join(differences)}. "
            "Set another shards.out, or delete that folder."
        )


def _found(folder: Place, cache: Cache, source: Source, settings: dict[str, Any], on_error: OnError) -> Manifest:
    """The manifest of a split that is written already, if it is that of this source and these settings."""
    manifest = read_manifest(folder, cache)
    _refuse_other(manifest, source, settings, on_error)
    logger.info(outcome("shard", _summary(manifest), is_new=False))
    return manifest


def _refuse_no_objects(split: CocoSplit) -> None:
    crowds = 0
    for image in split.images:
        entries = image.annotations
        if any(not annotation["iscrowd"] for annotation in entries):
            return
        crowds += len(entries)
    told = f"its {crowds} annotations are crowd regions, which are not trained on" if crowds else "it has none"
    raise UserError(f"{split.source}: there is no object to train on: {told}; check dataset.train.annotations")


def _refuse_foreign(folder: Place) -> None:
    names = names_in(folder)
    is_unfinished = unfinished_of(folder) == folder and JOB in names
    if names and not is_unfinished:
        raise UserError(
            f"{folder}: it has no {MANIFEST_NAME} and is not empty; set another shards.out, or delete that folder"
        )


def _cleaned(problems: dict[str, int]) -> dict[str, int]:
    return {rule: count for rule, count in problems.items() if rule not in NOTES}


def _told(problems: dict[str, int]) -> str:
    return ", ".join(f"{count} {rule}" for rule, count in sorted(problems.items()))
