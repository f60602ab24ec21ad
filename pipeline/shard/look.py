"""A look at a dataset before anything is trained on it: one HTML page that needs nothing beside it.

What is counted is what training would get: the annotation files after the rules of `pipeline.shard.coco`, with what the
rules found. Pictures are shown with their boxes as they are, and as training augments them.
"""

import html
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config.sections import AugmentSection
from pipeline.data.augment import DRAWS, Plan, plan_train
from pipeline.data.images import BadImageError, Pixels, decode_image, inspect_image, jpeg_address
from pipeline.data.samples import xyxy
from pipeline.errors import shown
from pipeline.files import write_whole
from pipeline.shard.coco import CocoImage, CocoSplit, Source, clean
from pipeline.shard.findings import NOTES, RULES, Findings, Where

PICTURES = 12
"""Images of a split that are shown, spread over it."""
VIEWS = 2
"""Augmented views of each."""
CHECKED = 2000
"""Most image files of a split whose headers are read."""
SIDE = 480
"""Longest side in pixels of a picture on the page."""
SIDES = (0, 8, 16, 32, 64, 96, 128, 256, 512, 1024)
"""Bounds of the histogram of box sides: 32 and 96 are COCO's between small, medium and large."""
RATIOS = (0, 1 / 8, 1 / 4, 1 / 2, 0.8, 1.25, 2, 4, 8)
"""Bounds of the histogram of the boxes' width by height."""

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #222; }
h2 { margin-top: 3rem; border-bottom: 1px solid #ccc; } h3 { margin: 2rem 0 .5rem; }
table { border-collapse: collapse; } td, th { padding: .1rem .8rem .1rem 0; text-align: left; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
td.bar { width: 20rem; } td.bar div { background: #4a7fb5; height: .8rem; }
.pictures { display: grid; grid-template-columns: repeat(3, 1fr); gap: .8rem; }
figure { margin: 0; } svg { width: 100%; height: auto; background: #eee; } figcaption { font-size: 12px; color: #555; }
rect { fill: none; stroke-width: 2; vector-effect: non-scaling-stroke; } rect.crowd { stroke-dasharray: 5 4; }
"""


@dataclass(frozen=True)
class _View:
    """A picture, and its boxes: float [n, 4] xyxy pixels, with each box's name and whether it is a crowd region."""

    pixels: Pixels
    boxes: NDArray[np.float64]
    names: list[str]
    crowds: list[bool]
    caption: str


def write_look(path: Path, name: str, sources: Mapping[str, Source], augment: AugmentSection) -> None:
    """Write the page.

    Args:
        path: the HTML file.
        name: of the dataset.
        sources: the opened annotation files by split.
        augment: what the augmented views are drawn with.

    Raises:
        UserError: an annotation file has what no rule can clean.
    """
    parts = [f"<h1>{html.escape(name)}</h1>"]
    parts += [_split(split, source, augment) for split, source in sources.items()]
    page = f"<!doctype html><meta charset=utf-8><title>{html.escape(name)}</title><style>{_STYLE}</style>"
    write_whole(path, (page + "\n".join(parts) + "\n").encode())


def _split(name: str, source: Source, augment: AugmentSection) -> str:
    split = clean(source, "skip")
    names = {category.id: shown(category.name) for category in split.categories}
    objects = [entry for image in split.images for entry in image.annotations if not entry["iscrowd"]]
    boxes = np.asarray([entry["bbox"] for entry in objects], dtype=np.float64).reshape(-1, 4)
    counts = Counter(names[entry["category_id"]] for entry in objects)
    shapes = Counter(f"{image.width} x {image.height}" for image in split.images).most_common(10)
    checked, findings = _check_files(split)
    return "".join(
        [
            f"<h2>{html.escape(name)}</h2><p>{html.escape(shown(split.source, 400))}</p>",
            _table(_facts(split, len(objects))),
            "<h3>Problems</h3>",
            _problems(split, checked, findings),
            "<h3>Objects by category</h3>",
            _bars([(category, counts[category]) for category in sorted(names.values(), key=lambda c: -counts[c])]),
            "<h3>Side of the boxes (square root of the area, pixels)</h3>",
            _bars(_histogram(np.sqrt(boxes[:, 2] * boxes[:, 3]), SIDES)),
            "<h3>Width by height of the boxes</h3>",
            _bars(_histogram(boxes[:, 2] / boxes[:, 3], RATIOS)),
            "<h3>Objects an image</h3>",
            _bars(_histogram(_objects_an_image(split), (0, 1, 2, 3, 5, 10, 20, 50, 100, 300))),
            "<h3>Sizes of the images</h3>",
            _bars(shapes),
            "<h3>Pictures: as they are, and twice as training augments them</h3>",
            _pictures(split, names, augment),
        ]
    )


def _facts(split: CocoSplit, objects: int) -> list[tuple[str, object]]:
    crowds = sum(entry["iscrowd"] for image in split.images for entry in image.annotations)
    empty = int((_objects_an_image(split) == 0).sum())
    return [
        ("images", len(split.images)),
        ("of them without an object", empty),
        ("objects", objects),
        ("crowd regions", crowds),
        ("categories", len(split.categories)),
    ]


def _objects_an_image(split: CocoSplit) -> NDArray[np.int64]:
    return np.asarray([sum(not entry["iscrowd"] for entry in image.annotations) for image in split.images])


def _spread(images: Sequence[CocoImage], most: int) -> list[CocoImage]:
    """At most so many images, evenly over all."""
    return [images[n] for n in np.unique(np.linspace(0, len(images) - 1, most).round().astype(int))]


def _check_files(split: CocoSplit) -> tuple[int, Findings]:
    """The number of files whose headers were read, and what was found."""
    findings = Findings("skip")
    images = _spread(split.images, CHECKED)
    for image in images:
        where = Where(split.files.where(image.file_name), image.file_name, image.id)
        try:
            findings.note(inspect_image(split.files.read(image.file_name), image.width, image.height).note, where)
        except BadImageError as error:
            findings.report(error.rule, where, str(error))
        except OSError as error:
            findings.report("image_unreadable", where, str(error.strerror))
    return len(images), findings


def _problems(split: CocoSplit, checked: int, findings: Findings) -> str:
    rows: list[tuple[object, ...]] = []
    for counts, examples in ((split.problems, split.examples), (findings.counts, findings.examples)):
        for rule, count in counts.items():
            does = f"dataset.on_error: skip would {RULES[rule].does}" if rule in RULES else NOTES[rule]
            rows.append((rule, count, does, " ".join(f"{example}." for example in examples.get(rule, ()))))
    told = f"<p>The headers of {checked} of {len(split.images)} image files were read.</p>"
    return told + (_table(rows) if rows else "<p>None was found.</p>")


def _pictures(split: CocoSplit, names: Mapping[int, str], augment: AugmentSection) -> str:
    figures = [
        _figure(view) for image in _spread(split.images, PICTURES) for view in _views(split, image, names, augment)
    ]
    return f'<div class="pictures">{"".join(figures)}</div>'


def _views(split: CocoSplit, image: CocoImage, names: Mapping[int, str], augment: AugmentSection) -> list[_View]:
    """The picture as it is, and augmented; none where it cannot be read, which is told as a problem."""
    try:
        pixels = decode_image(split.files.read(image.file_name), image.width, image.height)
    except (BadImageError, OSError):
        return []
    boxes = xyxy([entry["bbox"] for entry in image.annotations])
    called = [names[entry["category_id"]] for entry in image.annotations]
    crowds = [bool(entry["iscrowd"]) for entry in image.annotations]
    draws = np.random.default_rng(image.id % 2**63).integers(0, 2**32, (VIEWS, DRAWS), dtype=np.uint64)
    plans = plan_train(np.array([[image.width, image.height]] * VIEWS), draws, augment)
    caption = f"{image.id}: {shown(image.file_name)}, {image.width} x {image.height}"
    views = [_View(pixels, boxes, called, crowds, caption)]
    return views + [_augmented(plans[number], views[0]) for number in range(VIEWS)]


def _augmented(plan: Plan, view: _View) -> _View:
    boxes, keep = plan.apply_boxes(view.boxes)
    kept = [number for number in np.flatnonzero(keep).tolist() if not view.crowds[number]]
    words = ["flipped"] * plan.flip + ["cropped"] * (plan.crop != (0, 0, *plan.source))
    caption = ", ".join([*words, f"{plan.size[0]} x {plan.size[1]}"])
    names = [view.names[number] for number in kept]
    return _View(plan.apply_image(view.pixels), boxes[kept], names, [False] * len(kept), caption)


def _figure(view: _View) -> str:
    height, width = view.pixels.shape[:2]
    boxes = "".join(_box(*shape) for shape in zip(view.boxes.tolist(), view.names, view.crowds, strict=True))
    return (
        f'<figure><svg viewBox="0 0 {width} {height}"><image width="{width}" height="{height}" '
        f'href="{jpeg_address(view.pixels, SIDE)}"/>{boxes}</svg>'
        f"<figcaption>{html.escape(view.caption)}</figcaption></figure>"
    )


def _box(box: Sequence[float], name: str, is_crowd: bool) -> str:
    left, top, right, bottom = box
    hue = sum(name.encode()) * 47 % 360
    return (
        f'<rect x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{bottom - top:.1f}" '
        f'stroke="hsl({hue} 90% 50%)"{" class=crowd" * is_crowd}><title>{html.escape(name)}</title></rect>'
    )


def _histogram(values: NDArray[Any], bounds: Sequence[float]) -> list[tuple[str, int]]:
    """The counts between neighbouring bounds, the upper one not included, and from the last one on."""
    counts = np.bincount(np.searchsorted(bounds, values, side="right"), minlength=len(bounds) + 1)[1:]
    ends = [f"{low:g} to {high:g}" for low, high in pairwise(bounds)]
    return list(zip([*ends, f"{bounds[-1]:g} and more"], counts.tolist(), strict=True))


def _bars(rows: Iterable[tuple[str, int]]) -> str:
    rows = list(rows)
    most = max([count for _, count in rows], default=0) or 1
    cells = "".join(
        f"<tr><td>{html.escape(name)}</td><td class=number>{count}</td>"
        f'<td class=bar><div style="width: {100 * count / most:.1f}%"></div></td></tr>'
        for name, count in rows
    )
    return f"<table>{cells}</table>"


def _table(rows: Iterable[Sequence[object]]) -> str:
    cells = ("".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows)
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"
