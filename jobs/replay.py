"""`raydetr replay`: one step of a run once more, in this process, to see what it did."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.options import ConfigFile, Overrides

if TYPE_CHECKING:
    from pipeline.checkpoint.state import State
    from pipeline.config.sections import Config
    from pipeline.data.labels import LabelMap
    from pipeline.run_folder import RunFolder
    from pipeline.train.replay import Replayed

GRADIENTS = 5
"""Parameters whose gradients are told."""


def replay(
    step: Annotated[int, typer.Argument(help="Number of the step, from 0: that of an error, one less than a curve's.")],
    config: ConfigFile,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the step's images as the network saw them, with their boxes.")
    ] = None,
) -> None:
    """Do a step of a run once more, here, and tell its images, losses and gradients; the run is left as it is."""
    from pipeline.config.load import load_config

    done = replay_step(load_config(config, overrides or ()), step)
    typer.echo("\n".join(lines(done)))
    if out is not None:
        typer.echo(f"{draw(done, out)} pictures in {out}")


@dataclass(frozen=True)
class Done:
    """A step, what it began with, what the run wrote down of it, if it did, and the names of its labels."""

    replayed: "Replayed"
    checkpoint: str | None
    recorded: dict[str, float]
    labels: "LabelMap"


def replay_step(config: "Config", number: int) -> Done:
    """Do a step of a run once more, from the newest checkpoint before it.

    Raises:
        UserError: there is no such step, the shards are not there, or the checkpoint is damaged or of another run.
    """
    from jobs.console import ProgressDisplay, make_console
    from jobs.train import make_job
    from pipeline.data.cache import cache_of
    from pipeline.data.manifest import read_manifest
    from pipeline.distributed import close, init_world
    from pipeline.train.replay import replay
    from pipeline.train.run import check_same_run

    manifest = read_manifest(config.shards_folder / "train", cache_of(config.shards))
    job = make_job(config, manifest)
    with _newest_until(config.folder, number) as found:
        if found is not None:
            check_same_run(job, manifest, found[1], found[0])
        world = init_world(config.cluster.device)
        try:
            with ProgressDisplay(make_console(), "replay: step", number) as shown:
                replayed = replay(job, world, number, found, lambda step: shown.update(step + 1))
        finally:
            close(world)
    return Done(replayed, found[0].name if found else None, _recorded(config.folder, number + 1), manifest.labels)


@contextmanager
def _newest_until(run: "RunFolder", number: int) -> "Iterator[tuple[Path, State] | None]":
    """The newest checkpoint after `number` steps at most, in the block."""
    from pipeline.checkpoint.state import NAME, checkpoints, read_state
    from pipeline.mirror import checkpoint_here, checkpoints_in_store

    there = checkpoints(run.checkpoints) if run.store is None else checkpoints_in_store(run)
    early = [path for path in there if (match := NAME.fullmatch(path.name)) and int(match[1]) <= number]
    if not early:
        yield None
        return
    with checkpoint_here(run, early[-1]) as path:
        yield path, read_state(path)


def _recorded(run: "RunFolder", done: int) -> dict[str, float]:
    """The curves' point after so many steps; empty where there is none, or where the run lies in a store."""
    from pipeline.tracking.spool import SpoolReader

    points = [record.metrics for record in SpoolReader(run.train_spool).read() if record.step == done]
    return {name.removeprefix("train/"): value for name, value in points[-1].items()} if points else {}


def lines(done: Done) -> list[str]:
    """What is told of a step."""
    step = done.replayed
    begin = done.checkpoint or "the start of training"
    told = [f"step {step.step}, {step.redone} steps after {begin}", ""]
    for part in step.parts:
        height, width = part.micro.batch.mask.shape[1:]
        images = ", ".join(map(str, part.micro.image_ids)) or "none that can be read"
        boxes = sum(len(target["labels"]) for target in part.micro.targets)
        told.append(
            f"micro-batch {part.micro.index}  loss {part.losses['loss']:.5g}  {boxes} boxes  {width} x {height}  "
            f"images {images}"
        )
    told += ["", f"{'':<24} {'here':>12} {'recorded':>12}"]
    for name, value in {**step.losses, "grad_norm": step.grad_norm}.items():
        recorded = f"{done.recorded[name]:12.6g}" if name in done.recorded else f"{'-':>12}"
        told.append(f"{name:<24} {value:12.6g} {recorded}")
    told += ["", "the greatest gradients"]
    told += [f"{norm:12.6g}  {name}" for name, norm in list(step.gradients.items())[:GRADIENTS]]
    if step.not_finite:
        told += ["", f"the first output that is not finite: {step.not_finite[0]} (of {len(step.not_finite)})"]
    return told


def draw(done: Done, out: Path) -> int:
    """Write the images as the network saw them with the boxes that it was to find; returns their number.

    Raises:
        UserError: the folder cannot be written.
    """
    from pipeline.errors import UserError
    from pipeline.predict.draw import draw_boxes

    count = 0
    try:
        out.mkdir(parents=True, exist_ok=True)
        for part in done.replayed.parts:
            micro = part.micro
            for image_id, pixels, mask, target in zip(
                micro.image_ids, micro.batch.pixels, micro.batch.mask, micro.targets, strict=False
            ):
                height, width = (~mask).any(1).sum(), (~mask).any(0).sum()
                content = pixels[:, :height, :width].permute(1, 2, 0).contiguous().cpu().numpy()
                entries = [
                    _entry(box, done.labels.category(int(label)), int(width), int(height))
                    for box, label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True)
                ]
                draw_boxes(content, entries, done.labels.names).save(out / f"{done.replayed.step}-{image_id}.png")
                count += 1
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from error
    return count


def _entry(box: list[float], category: int | None, width: int, height: int) -> dict[str, Any]:
    x, y, w, h = box
    return {
        "bbox": [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height],
        "category_id": category,
        "iscrowd": 0,
    }
