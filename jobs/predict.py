"""Draws a registered model's detections on pictures."""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from pipeline.errors import UserError, shown
from pipeline.predict.answers import THRESHOLD
from pipeline.predict.draw import Drawn, draw_pictures
from pipeline.predict.pictures import find_pictures
from pipeline.registry.versions import open_detector
from pipeline.store import Place, place


def predict(
    model: str,
    images: Sequence[str],
    out: Path,
    *,
    tracking_uri: str,
    score_threshold: float = THRESHOLD,
    show_attention: int = 0,
    queries: Sequence[int] = (),
    table: Path | None = None,
    root: str | None = None,
    batch_size: int | None = None,
    device: str | None = None,
) -> Drawn:
    """Draw a model's detections on pictures, and write them as `draw_pictures` does.

    Args:
        model: `models:/name@alias`, `models:/name/version`, or a folder: a checkpoint or a registered detector's.
        images: pictures, folders, patterns and COCO files, here or in a store, as of `find_pictures`.
        out: folder of the drawn pictures (PNG).
        tracking_uri: MLflow server of the registry.
        score_threshold: least score.
        show_attention: for how many of the best detections, whatever their score, to draw what they looked at as well.
        queries: the queries to draw that for instead.
        table: a CSV file to write, too.
        root: folder or archive that the names in COCO files begin in; each file's own folder when None.
        batch_size: pictures that go through the network at once; when None 8 on a GPU, and 1 on the CPU, where more
            are not faster.
        device: where the network runs; a GPU where there is one when None.

    Returns:
        How many pictures were drawn, with how many detections, and the pictures that could not be used.

    Raises:
        UserError: naming the model that cannot be used, `out` if it cannot be made or is the pictures' folder, what
            was given and would be written over, or a picture if none can be used.
    """
    if table is not None and not os.path.isdir(table.absolute().parent):
        raise UserError(f"{table}: its folder does not exist; make it first, or choose another --csv")
    if os.path.isdir(out) and _is_given(out, images):
        raise UserError(f"{out}: is the folder of the pictures; give another --out")
    for name in ("images.json", "detections.json"):
        if _is_given(out / name, images):
            raise UserError(f"{out / name}: was given, and would be written over; give another --out")
    pictures = find_pictures(images, _root(root), out)
    if table is not None and _is_given(table, [*images, *(str(picture.path) for picture in pictures if picture.path)]):
        raise UserError(f"{table}: was given, and would be written over; give another --csv")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("torch finds no GPU here; give --device cpu, or install a CUDA build of torch")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    detector = open_detector(model, tracking_uri, device)
    return draw_pictures(
        detector, pictures, out, score_threshold=score_threshold, show_attention=show_attention, queries=queries,
        table=table, batch_size=batch_size or (1 if device == "cpu" else 8),
    )  # fmt: skip


def _root(images_in: str | None) -> Place | None:
    try:
        return place(images_in) if images_in else None
    except ValueError as error:
        raise UserError(f"--images-in {shown(images_in)}: {error}") from None


def _is_given(path: Path, given: Sequence[str]) -> bool:
    """Whether a file or folder that is there already is one of those that were given."""
    if not os.path.exists(path):
        return False
    for name in given:
        with suppress(OSError, ValueError):  # `find_pictures` tells what is wrong with it
            named = place(name)
            if isinstance(named, Path) and named.samefile(path):
                return True
    return False
