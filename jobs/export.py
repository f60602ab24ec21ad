"""`raydetr export`: a detector as one file that runs without this project."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from jobs.models import TrackingUri, registry_uri
from jobs.options import Overrides
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.config.sections import Config


def export(
    out: Annotated[Path, typer.Option(help="The file to write: .onnx, or .pt2 for torch; nothing may be there.")],
    to: Annotated[Literal["onnx", "torch"], typer.Option(help="An ONNX model, or a program of torch.export.")],
    checkpoint: Annotated[
        str | None,
        typer.Option(help="models:/NAME@ALIAS, models:/NAME/VERSION or a folder; else the newest checkpoint of -c."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="The pipeline's YAML file; its `evaluate` has the sizes.")
    ] = None,
    overrides: Overrides = None,
    size: Annotated[
        str | None, typer.Option(metavar="HxW", help="Height and width of the one image that the file takes at once.")
    ] = None,
    dynamic: Annotated[bool, typer.Option("--dynamic", help="The file takes batches of images of any size.")] = False,
    attach: Annotated[
        bool, typer.Option("--attach", help="Add the file to those of the version, in the folder exports.")
    ] = False,
    tracking_uri: TrackingUri = None,
) -> None:
    """Write a detector as one file that runs without this project, and compare what it finds with the detector."""
    if checkpoint is None and config is None:
        raise UserError("give a detector with --checkpoint, or a run with -c, whose newest checkpoint is meant")
    if overrides and config is None:
        raise UserError("--set changes a configuration: give one with -c")
    if (size is None) != dynamic:
        raise UserError("give one of --size HxW, such as --size 800x1344, and --dynamic")
    if attach and not (checkpoint or "").startswith("models:/"):
        raise UserError("--attach adds the file to a registered version: give one with --checkpoint models:/NAME@ALIAS")
    sides = read_size(size) if size is not None else None
    settings = None
    if config is not None:
        from pipeline.config.load import load_config

        settings = load_config(config, overrides or ())
    registry = registry_uri(config, tracking_uri)
    if checkpoint is not None and attach:
        from pipeline.registry.versions import attach_file, check_attachment, open_registry, resolve

        with open_registry(registry) as client:
            version = resolve(client, checkpoint)
            check_attachment(version, out.name)
            source, what = write(f"models:/{version.name}/{version.version}", settings, out, to, sides, registry)
            attach_file(client, version, out, what)
    else:
        source, what = write(checkpoint, settings, out, to, sides, registry)
    typer.echo(f"{source} to {out}: {what}")


def read_size(size: str) -> tuple[int, int]:
    """Height and width of `HxW`.

    Raises:
        UserError: it is none.
    """
    sides = re.fullmatch(r"(\d{1,5})x(\d{1,5})", size)
    if sides is None:
        raise UserError(f"--size {size}: must be HEIGHTxWIDTH in pixels, such as 800x1344")
    return int(sides[1]), int(sides[2])


def write(
    checkpoint: str | None,
    config: "Config | None",
    out: Path,
    to: Literal["onnx", "torch"],
    size: tuple[int, int] | None,
    tracking_uri: str,
) -> tuple[str, str]:
    """Write a detector as an ONNX model or a program of `torch.export`, compared with the detector.

    Args:
        checkpoint: `models:/name@alias`, `models:/name/version`, or a folder: a checkpoint or a registered detector's;
            the newest checkpoint of the run when None.
        config: the run, whose `evaluate` has the sizes and the number of detections; where it is None, they are those
            that the detector was trained or saved with.
        out: the file.
        to: its format.
        size: height and width of the images; any when None.
        tracking_uri: MLflow server of the registry.

    Returns:
        The detector, and what was written of it, for a person.

    Raises:
        UserError: as of `export_detector`, or there is no such detector.
    """
    from pipeline.checkpoint.state import latest
    from pipeline.mirror import checkpoint_here, checkpoints_in_store
    from pipeline.predict.export import check_export, export_detector
    from pipeline.registry.versions import open_detector

    check_export(out, to, size)
    if checkpoint is None:
        assert config is not None, "one of them is given"
        run = config.folder
        newest = next(reversed(checkpoints_in_store(run)), None) if run.store else latest(run.checkpoints)
        if newest is None:
            raise UserError(f"{run.place(run.checkpoints)}: no checkpoint yet; train first, or give a --checkpoint")
        checkpoint = str(run.place(newest))
        with checkpoint_here(run, newest) as folder:
            detector = open_detector(str(folder), tracking_uri)
    else:
        detector = open_detector(checkpoint, tracking_uri)
    if config is not None:
        detector.evaluate = config.evaluate
    exported = export_detector(detector, out, to, size)
    takes = f"one image of {size[0]}x{size[1]}" if size else "batches of images of any size"
    return checkpoint, (
        f"{to}, {out.stat().st_size / 1e6:.1f} MB, takes {takes}; finds what the detector finds, boxes within "
        f"{exported.boxes:.0e} of the image, scores within {exported.scores:.0e}"
    )
