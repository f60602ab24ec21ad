"""What `raydetr plan` shows: what a schedule costs at several numbers of GPUs, before anything starts."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import typer

from jobs.console import make_console, print_table
from model.ops.operator import compiled
from pipeline.config.sections import ClusterSection, Config
from pipeline.errors import UserError
from pipeline.files import disk_told, make_folder, write_json
from pipeline.plan.data import planned_data
from pipeline.plan.memory import STAGES, Memory
from pipeline.plan.profile import Profile, measure_profile, profile_settings, read_profile
from pipeline.plan.table import GPUS_OF_NODE, LATENCY, Plan, Row, profile_canvases
from pipeline.train.cards import Card, card_of_device, find_card
from pipeline.train.flops import micro_batch
from pipeline.train.run import TrainJob

COUNTS = (1, 8, 64, 256)
"""GPUs of the table where none are given."""
CARD = "H100"
UTILISATION = 0.3
"""What the published 325 GPU-hours of a V100 for `coco_r50` come to by this count."""
GIB, GB = 2**30, 1e9


def make_plan(
    config: Config,
    *,
    images: int | None = None,
    classes: int | None = None,
    gpu: str | None = None,
    bandwidth: float | None = None,
    price: float | None = None,
    utilisation: float = UTILISATION,
    profile: Path | None = None,
) -> Plan:
    """The plan of a pipeline's training.

    Args:
        config: the pipeline.
        images: images of an epoch like COCO's, in place of the data's.
        classes: number of classes, where the data does not tell it.
        gpu: name of the card; None is that of the profile, or `CARD`.
        bandwidth: GB a second that a GPU sends to the next.
        price: of an hour of a GPU.
        utilisation: part of the card's most that is reached.
        profile: file of measured times, in place of it.

    Raises:
        UserError: the data does not tell enough, the card is unknown, or the profile is of something else.
    """
    data = planned_data(config, images)
    classes = classes or data.classes
    if classes is None:
        raise UserError(f"{data.source}: does not tell how many classes there are; say it with --classes")
    model = config.model_for(classes)
    measured = read_profile(profile, profile_settings(model, config.train)) if profile else None
    rate = None if bandwidth is None else bandwidth * GB
    return Plan(model, config.train, data, _card(gpu, measured), utilisation, measured, rate, price)


def _card(gpu: str | None, profile: Profile | None) -> Card | None:
    if profile is None:
        return find_card(gpu or CARD)
    own = card_of_device(profile.device)
    if gpu is not None and find_card(gpu) != own:
        raise UserError(f"--gpu {gpu}: the profile was measured on {profile.device}; leave --gpu out, or measure there")
    return own


def measure(config: Config, plan: Plan, out: Path) -> None:
    """Measure a profile of the planned network on this machine, on a GPU where there is one, and write it.

    Raises:
        UserError: there is no GPU and one is configured, or the file cannot be written.
    """
    device = _device(config.cluster)
    make_folder(out.parent, "give another --measure")
    torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
    job = TrainJob(plan.model, config.train, config.shards_folder / "train", config.folder)
    profile = measure_profile(job, profile_canvases(plan), device)
    with disk_told(out, "another --measure"):
        write_json(out, asdict(profile))
    rows = (
        [
            f"{point.images} x {point.height} x {point.width}",
            _short(point.flops / 1e9),
            _short(point.seconds),
            _short(point.activations / 2**20),
            _short(micro_batch(plan.model, config.train, (point.height, point.width)).memory()[0] / 2**20),
        ]
        for point in profile.points
    )
    make_console().print(f"on {profile.device}; the optimizer's step {_short(profile.optimizer)} s")
    print_table(["images", "GFLOP", "s", "MiB of activations", "as counted"], rows)


def _device(cluster: ClusterSection) -> torch.device:
    is_there = torch.cuda.is_available()
    if cluster.device == "cuda" and not is_there:
        raise UserError(
            "cluster.device is cuda, but torch finds no GPU here: measure on a machine with one, or set cpu"
        )
    return torch.device("cuda" if is_there and cluster.device != "cpu" else "cpu")


def show_plan(config: Config, plan: Plan, nodes: int | None, gpus: int | None, *, as_json: bool) -> None:
    """Print a plan.

    Args:
        config: the pipeline.
        plan: of its training.
        nodes: machines; with one of these two given, the table has one row.
        gpus: GPUs of a machine.
        as_json: as JSON.
    """
    shapes = [(nodes or 1, gpus or GPUS_OF_NODE)] if nodes or gpus else [_machines(count) for count in COUNTS]
    cases = [Case(*shape, plan.problem(math.prod(shape)) or plan.row(*shape)) for shape in shapes]
    if as_json:
        typer.echo(json.dumps(_content(config, plan, cases), indent=1))
        return
    console = make_console()
    for line in _head(config, plan):
        console.print(line)
    console.print()
    columns = [
        "GPUs",
        "machines",
        "images a GPU",
        "s a step",
        "waiting",
        "hours",
        "GPU-hours",
        "cost",
        "GB read",
        "GiB",
    ]
    print_table(columns, (_cells(plan, case) for case in cases))
    rows = [case.outcome for case in cases if isinstance(case.outcome, Row)]
    if rows:
        console.print(f"\nGiB of a GPU, of {rows[-1].gpus}:")
        print_table(["ZeRO", *asdict(rows[-1].memory[0]), "total"], _memory_rows(plan, rows[-1]))
    console.print()
    for case in cases:
        if isinstance(case.outcome, str):
            console.print(f"{case.nodes * case.gpus} GPUs: {case.outcome}")
    for line in _assumptions(plan):
        console.print(f"Assumed: {line}")


class Case(NamedTuple):
    """So many machines."""

    nodes: int
    gpus: int
    """GPUs of a machine."""
    outcome: Row | str
    """The schedule on them, or why there is none."""


def _machines(gpus: int) -> tuple[int, int]:
    """Machines, and GPUs of each."""
    return max(1, gpus // GPUS_OF_NODE), min(gpus, GPUS_OF_NODE)


def _head(config: Config, plan: Plan) -> Iterator[str]:
    train, data, checkpoints = plan.train, plan.data, plan.checkpoints
    flops = plan.work.flops
    (height, width), greatest, _ = plan.canvases
    yield f"{config.name}: {plan.model.arch}, {plan.model.backbone}, {plan.layout.parameters / 1e6:.1f} M parameters"
    yield f"data         {data.images:,} images, {_short(data.bytes / GB)} GB ({data.source})"
    yield f"steps        {plan.steps:,}, {train.epochs} epochs of {data.images / train.global_batch:,.0f}"
    yield (
        f"batch        {train.global_batch} images at every number of GPUs ({train.micro_batches} micro-batches of "
        f"{train.micro_batch}), learning rate {train.lr * train.lr_scale:.3g} (scale_lr: {train.scale_lr}): "
        "the result is the same"
    )
    yield (
        f"computation  {_short(flops / train.micro_batch / 1e9)} GFLOP an image, "
        f"{_short(flops * train.micro_batches / 1e12)} TFLOP a step: forward and backward, two for a multiply-add, "
        f"on a mean canvas of {height} x {width}"
    )
    yield f"activations  of {train.micro_batch} images on the greatest canvas, {greatest[0]} x {greatest[1]}"
    yield (
        f"checkpoints  {_short(checkpoints.bytes / GB)} GB each; {checkpoints.written} written, "
        f"{_short(checkpoints.written * checkpoints.bytes / GB)} GB, and {checkpoints.kept} kept at most, "
        f"{_short(checkpoints.kept * checkpoints.bytes / GB)} GB"
    )


def _assumptions(plan: Plan) -> Iterator[str]:
    card, profile = plan.card, plan.profile
    if profile is not None:
        yield f"the times are those measured on {profile.device}, and grow with the operations as they did there"
    elif card is not None:
        yield (
            f"{plan.utilisation:g} of what a {card.name} computes ({plan.train.precision}) and then moves at most by "
            "its data sheet is reached; --profile takes measured times, --utilisation another part"
        )
    rates = " and ".join(
        f"{plan.link(nodes).bandwidth / GB:g} GB/s {where}" for nodes, where in ((1, "within a machine"), (2, "beyond"))
    )
    yield f"a GPU sends {rates} (--bandwidth), {LATENCY * 1e6:g} us a message, in rings"
    yield "the loader keeps up; evaluation, starting and restarts are not counted"
    if not compiled():
        yield "activations are those of plain torch: the compiled operator, which keeps fewer, is missing here"


def _cells(plan: Plan, case: Case) -> list[str | int | None]:
    row = case.outcome
    if isinstance(row, str):
        return [case.nodes * case.gpus, case.nodes, "does not divide, see below", *[None] * 7]
    return [
        row.gpus,
        row.nodes,
        f"{row.micro_batches} x {plan.train.micro_batch}",
        _short(row.step),
        f"{row.communication / row.step:.0%}",
        _short(row.hours),
        _short(row.gpu_hours),
        None if row.cost is None else _short(row.cost),
        _short(row.node_bytes / GB),
        _total(plan, row.memory[plan.train.zero_stage]),
    ]


def _short(number: float) -> str:
    """A number with three digits, or to the next whole one."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _total(plan: Plan, memory: Memory) -> str:
    """GiB, and whether the card has them."""
    lacks = plan.card is not None and memory.total > plan.card.memory
    return f"{_short(memory.total / GIB)}{', too much' if lacks else ''}"


def _memory_rows(plan: Plan, row: Row) -> Iterator[list[str]]:
    for stage, memory in zip(STAGES, row.memory, strict=True):
        name = f"{stage}{' (set)' if stage == plan.train.zero_stage else ''}"
        yield [name, *(_short(size / GIB) for size in asdict(memory).values()), _total(plan, memory)]


def _content(config: Config, plan: Plan, cases: Sequence[Case]) -> dict[str, Any]:
    """The plan as plain values: bytes, seconds, hours."""
    train, flops = plan.train, plan.work.flops
    return {
        "name": config.name,
        "data": {"source": plan.data.source, "images": plan.data.images, "bytes": plan.data.bytes},
        "steps": plan.steps,
        "global_batch": train.global_batch,
        "micro_batch": train.micro_batch,
        "zero_stage": train.zero_stage,
        "precision": train.precision,
        "learning_rate": train.lr * train.lr_scale,
        "parameters": plan.layout.parameters,
        "trained": plan.layout.trained,
        "flops_image": flops / train.micro_batch,
        "flops_step": flops * train.micro_batches,
        "canvas_mean": plan.canvases[0],
        "canvas_greatest": plan.canvases[1],
        "checkpoints": asdict(plan.checkpoints),
        "gpu": plan.card.name if plan.card else None,
        "profile": plan.profile.device if plan.profile else None,
        "assumed": list(_assumptions(plan)),
        "rows": [_numbers(case) for case in cases],
    }


def _numbers(case: Case) -> dict[str, Any]:
    row = case.outcome
    if isinstance(row, str):
        return {"gpus": case.nodes * case.gpus, "nodes": case.nodes, "problem": row}
    memory = [asdict(memory) | {"total": memory.total} for memory in row.memory]
    return asdict(row) | {"step": row.step, "gpu_hours": row.gpu_hours, "memory": memory}
