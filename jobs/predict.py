"""Draws a registered model's detections on pictures."""

from collections.abc import Sequence
from pathlib import Path

import torch

from pipeline.errors import UserError
from pipeline.predict.answers import THRESHOLD
from pipeline.predict.draw import Drawn, draw_pictures, find_pictures
from pipeline.registry.versions import open_detector


def predict(
    model: str,
    images: Sequence[Path],
    out: Path,
    *,
    tracking_uri: str,
    score_threshold: float = THRESHOLD,
    show_attention: int = 0,
    queries: Sequence[int] = (),
    table: Path | None = None,
    root: Path | None = None,
    device: str | None = None,
) -> Drawn:
    """Draw a model's detections on pictures, and write them to `<out>/detections.json`.

    Args:
        model: `models:/name@alias`, `models:/name/version`, or a folder: a checkpoint or a registered detector's.
        images: pictures, folders, patterns and COCO files, as of `find_pictures`.
        out: folder of the drawn pictures (PNG).
        tracking_uri: MLflow server of the registry.
        score_threshold: least score.
        show_attention: for how many of the best detections, whatever their score, to draw what they looked at as well.
        queries: the queries to draw that for instead.
        table: a CSV file to write, too.
        root: folder that the names in COCO files begin in; each file's own when None.
        device: where the network runs; a GPU where there is one when None.

    Returns:
        How many pictures were drawn, with how many detections, and the pictures that could not be used.

    Raises:
        UserError: naming the model that cannot be used, `out` if it cannot be made or is the pictures' folder, or a
            picture if none can be used.
    """
    paths = find_pictures(images, root)
    if table is not None and not table.absolute().parent.is_dir():
        raise UserError(f"{table}: its folder does not exist; make it first, or choose another --csv")
    if any(path.is_dir() and out.exists() and path.samefile(out) for path in images):
        raise UserError(f"{out}: is the folder of the pictures; give another --out")
    detector = open_detector(model, tracking_uri, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return draw_pictures(
        detector, paths, out, score_threshold=score_threshold, show_attention=show_attention, queries=queries,
        table=table,
    )  # fmt: skip
