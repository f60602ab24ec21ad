"""Writes a split as WebDataset tars with a manifest.

A sample is `<image id, 12 digits>.<jpg|png|webp|bmp|tif>`, the source's bytes untouched, followed by `<same key>.json`.
What stands in which shard is planned from the annotation file and the files' sizes, so the bytes do not depend on who
writes them; each shard is one task. All is written into a hidden folder beside the final one, the manifest last, then
renamed.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import webdataset

from pipeline.config.sections import DatasetSection, OnError, ShardsSection
from pipeline.data.images import BadImageError, decode_image, inspect_image, read_image_file
from pipeline.data.labels import LabelMap
from pipeline.data.manifest import (
    MANIFEST_NAME,
    Manifest,
    Sample,
    Shard,
    UnreadableSampleError,
    describe,
    read_annotations,
    read_image_bytes,
    read_manifest,
    write_manifest,
)
from pipeline.errors import UserError, shown
from pipeline.files import disk_error, locked, sync
from pipeline.log import get_logger, outcome
from pipeline.shard.coco import NOTES, CocoImage, CocoSplit, Findings, Source, clean

TAR_BLOCK = 512

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
    """What came of a plan: the shard with its index (none when every image was left out) and what was cleaned."""

    number: int
    shard: Shard
    problems: dict[str, int] = field(default_factory=dict)


WriteTask = Callable[[ShardPlan], WrittenShard]
WriteAll = Callable[[list[ShardPlan], WriteTask], Iterable[WrittenShard]]
"""Runs the task for every plan and gives the results in any order: here in a row, in `jobs/` as Ray tasks."""


def write_in_a_row(plans: list[ShardPlan], task: WriteTask) -> Iterator[WrittenShard]:
    """Writes the shards one after the other in this process."""
    return map(task, plans)


def shard_split(
    source: Source,
    split: str,
    out: Path,
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
        shards: for the sizes and `segmentations`.
        verify: decode every image fully before it is written.
        needs_objects: refuse a split without an object to train on.
        write_all: runs the tasks.

    Returns:
        The manifest, new or found.

    Raises:
        UserError: bad input, another dataset or other settings in the folder, no space.
    """
    folder = out / split
    settings = _settings(dataset, shards)
    if (folder / MANIFEST_NAME).exists():  # nothing is written: a disk that is only read will do
        return _found(folder, source, settings, dataset.on_error)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with locked(out / f".{split}.lock"):
            if (folder / MANIFEST_NAME).exists():
                return _found(folder, source, settings, dataset.on_error)
            _refuse_foreign(folder)
            cleaned = clean(source, dataset.on_error)
            if needs_objects:
                _refuse_no_objects(cleaned)
            return _write_split(cleaned, folder, LabelMap(dataset.labels, cleaned.categories), settings,
                                dataset.on_error, verify, write_all)  # fmt: skip
    except OSError as error:
        raise disk_error(out, error, "shards.out" if shards.out else "runs or shards.out") from error


def plan_shards(split: CocoSplit, max_samples: int, max_bytes: int, *, segmentations: bool = False) -> list[ShardPlan]:
    """Cuts a split, in the order of the image ids, into shards of at most `max_samples` and `max_bytes`."""
    plans: list[ShardPlan] = []
    images: list[CocoImage] = []
    size = 0
    for original in split.images:
        image = original if segmentations else _without_segmentations(original)
        sample_size = _tar_size(image.bytes) + _tar_size(len(_json_member(image)))
        if images and (len(images) == max_samples or size + sample_size > max_bytes):
            plans.append(ShardPlan(len(plans), tuple(images)))
            images, size = [], 0
        images.append(image)
        size += sample_size
    plans.append(ShardPlan(len(plans), tuple(images)))
    return plans


def write_shard(plan: ShardPlan, folder: Path, on_error: OnError, verify: bool) -> WrittenShard:
    """Writes one shard: to a temporary name, then renamed. Nothing is left when it fails.

    Raises:
        UserError: a bad image when `on_error` is "fail", or no space.
    """
    path = folder / plan.name
    temporary = folder / f".{plan.name}.tmp"
    findings = Findings(on_error)
    try:
        with temporary.open("wb") as file:
            sink = _HashingFile(file)
            samples = _write_samples(plan, sink, findings, verify)
            file.flush()
            os.fsync(file.fileno())
        shard = Shard(plan.name, sink.size, sink.digest.hexdigest(), tuple(samples))
        if samples:
            temporary.replace(path)
        else:
            temporary.unlink()
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise disk_error(path, error, "shards.out") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return WrittenShard(plan.number, shard, dict(findings.counts))


def finish(
    folder: Path, split: str, labels: LabelMap, source: CocoSplit, settings: dict[str, Any],
    written: Iterable[WrittenShard],
) -> Manifest:  # fmt: skip
    """Writes the manifest of a folder whose shards are all written.

    Raises:
        UserError: every image was left out.
    """
    problems = Counter(source.problems)
    shards: list[Shard] = []
    for result in sorted(written, key=lambda result: result.number):
        problems.update(result.problems)
        if result.shard.samples:
            samples = tuple(replace(sample, shard=len(shards)) for sample in result.shard.samples)
            shards.append(replace(result.shard, samples=samples))
    if not shards:
        raise UserError(f"{source.source}: none of its images can be used: {_told(problems)}")
    manifest = Manifest(folder, split, labels, source.digest, settings, tuple(shards), dict(sorted(problems.items())))
    write_manifest(manifest)
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
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {mend}") from error
    if digest != shard.sha256:
        raise UserError(f"{path}: its sha256 is not the manifest's: the file has changed; {mend}")
    for sample in shard.samples:
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


def _write_split(
    split: CocoSplit, folder: Path, labels: LabelMap, settings: dict[str, Any], on_error: OnError, verify: bool,
    write_all: WriteAll,
) -> Manifest:  # fmt: skip
    unfinished = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        plans = plan_shards(
            split, settings["max_samples"], settings["max_bytes"], segmentations=settings["segmentations"]
        )
        task = partial(write_shard, folder=unfinished, on_error=on_error, verify=verify)
        manifest = finish(unfinished, folder.name, labels, split, settings, write_all(plans, task))
        unfinished.replace(folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    manifest = replace(manifest, folder=folder)
    logger.info(outcome("shard", _summary(manifest), is_new=True))
    report_problems(folder.name, manifest)
    return manifest


class _HashingFile:
    """Passes writes on and keeps their number and sha256.

    After a failed write it swallows the rest: the tar's own destructor would write again and complain.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file: BinaryIO | None = file
        self.size = 0
        self.digest = hashlib.sha256()

    def write(self, content: bytes) -> int:
        if self._file is None:
            return len(content)
        try:
            self._file.write(content)
        except OSError:
            self._file = None
            raise
        self.size += len(content)
        self.digest.update(content)
        return len(content)

    def abandon(self) -> None:
        self._file = None


def _write_samples(plan: ShardPlan, sink: _HashingFile, findings: Findings, verify: bool) -> list[Sample]:
    samples: list[Sample] = []
    try:
        with webdataset.TarWriter(sink, encoder=False, mtime=0, user="raydetr", group="raydetr", mode=0o644) as tar:
            for image in plan.images:
                content, extension = _image_content(image, findings, verify)
                if extension is None:
                    continue
                key = f"{image.id:012d}"
                members: dict[str, tuple[int, int]] = {}
                # One call a member: the writer sorts the members of a call by name, and png would follow json.
                for name, member in ((extension, content), ("json", _json_member(image))):
                    members[name] = (tar.tarstream.offset + TAR_BLOCK, len(member))
                    tar.write({"__key__": key, name: member})
                samples.append(Sample(key, image.id, image.width, image.height, plan.number, members))
    except BaseException:
        sink.abandon()
        raise
    return samples


def _image_content(image: CocoImage, findings: Findings, verify: bool) -> tuple[bytes, str | None]:
    """The file's bytes and the extension of its member; None when the image has to be left out."""
    where = f"{shown(image.path, 400)}: image {image.id}"
    try:
        content = read_image_file(image.path)
        header = inspect_image(content, image.width, image.height)
        if verify:
            decode_image(content, image.width, image.height)
    except FileNotFoundError:
        findings.report("image_missing", f"{where} is missing")
    except OSError as error:
        findings.report("image_unreadable", f"{where} cannot be read: {error.strerror}")
    except BadImageError as error:
        findings.report(error.rule, f"{where}: {error}")
    else:
        findings.note(header.note)
        return content, header.extension
    return b"", None


def _json_member(image: CocoImage) -> bytes:
    content = {
        "image_id": image.id,
        "file_name": image.file_name,
        "width": image.width,
        "height": image.height,
        "annotations": image.annotations,
    }
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def _without_segmentations(image: CocoImage) -> CocoImage:
    return replace(
        image,
        annotations=tuple(
            {key: value for key, value in annotation.items() if key != "segmentation"}
            for annotation in image.annotations
        ),
    )


def _tar_size(content: int) -> int:
    return TAR_BLOCK + -(-content // TAR_BLOCK) * TAR_BLOCK


def _settings(dataset: DatasetSection, shards: ShardsSection) -> dict[str, Any]:
    """The settings that the content of the shards depends on."""
    return {
        "labels": dataset.labels,
        "max_samples": shards.max_samples,
        "max_bytes": shards.max_bytes,
        "segmentations": shards.segmentations,
    }


def _summary(manifest: Manifest) -> str:
    samples, shards = len(manifest.samples), len(manifest.shards)
    return f"{manifest.split} has {samples} samples in {shards} shards in {manifest.folder}"


def _refuse_other(manifest: Manifest, source: Source, settings: dict[str, Any], on_error: OnError) -> None:
    sections = {"labels": "dataset"}
    differences = [
        f"{sections.get(key, 'shards')}.{key} was {manifest.settings.get(key)!r}, now {value!r}"
        for key, value in settings.items()
        if manifest.settings.get(key) != value
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


def _found(folder: Path, source: Source, settings: dict[str, Any], on_error: OnError) -> Manifest:
    """The manifest of a split that is written already, if it is that of this source and these settings."""
    manifest = read_manifest(folder)
    _refuse_other(manifest, source, settings, on_error)
    logger.info(outcome("shard", _summary(manifest), is_new=False))
    return manifest


def _refuse_no_objects(split: CocoSplit) -> None:
    entries = [annotation for image in split.images for annotation in image.annotations]
    if all(annotation["iscrowd"] for annotation in entries):
        crowds = (
            f"its {len(entries)} annotations are crowd regions, which are not trained on" if entries else "it has none"
        )
        raise UserError(f"{split.source}: there is no object to train on: {crowds}; check dataset.train.annotations")


def _refuse_foreign(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        raise UserError(
            f"{folder}: it has no {MANIFEST_NAME} and is not empty; set another shards.out, or delete that folder"
        )


def _cleaned(problems: dict[str, int]) -> dict[str, int]:
    return {rule: count for rule, count in problems.items() if rule not in NOTES}


def _told(problems: dict[str, int]) -> str:
    return ", ".join(f"{count} {rule}" for rule, count in sorted(problems.items()))
