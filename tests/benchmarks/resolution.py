"""What one training step costs against the side of the image: DETR's attention to every cell, and ours to sampled ones.

    python tests/benchmarks/resolution.py [--sides 256 384 512 768 1024] [--device cuda]

Batch 1, resnet_tiny, 2 encoder and 2 decoder layers of width 128. DETR-DC5 and one-scale Deformable DETR-DC5 have one
map of stride 16, multi-scale has four of strides 8 to 64. Measured are the whole step (forward, losses, backward) and
the encoder's share of it (its forward and backward on the inputs that the step gave it): shortest time, and most memory
held above what was held before. On a CPU these are seconds of one core, so that other load counts little, and resident
memory; on a GPU wall time and torch's memory.

DETR comes twice: "matrix" computes attention as the original does, with the matrix of all cells by all cells in memory,
"fused" as torch does where it can, in tiles that never are the whole matrix: memory linear, arithmetic the same.
The exponents are the slopes of straight lines through the three greatest sides, log of cost against log of pixels.
"""

import argparse
import ctypes
import gc
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.batch import ImageBatch
from model.build import build_model
from model.config import CriterionConfig, DetrConfig
from model.losses.criterion import Criterion
from model.losses.groups import groups_of
from model.ops import compiled

SMALL: dict[str, Any] = {
    "backbone": "resnet_tiny", "backbone_norm": "group_norm", "hidden_dim": 128, "ffn_dim": 256, "encoder_layers": 2,
    "decoder_layers": 2, "num_queries": 100, "dropout": 0.0,
}  # fmt: skip
DETR = DetrConfig(**SMALL, arch="detr", feature_levels=1, dilation=True, class_loss="softmax")
MODELS = {
    "DETR-DC5, matrix": DETR,
    "DETR-DC5, fused": DETR,
    "deformable, one scale DC5": DetrConfig(**SMALL, feature_levels=1, dilation=True),
    "deformable, multi-scale": DetrConfig(**SMALL, feature_levels=4),
}
OBJECTS = 7
"""Of an image; COCO has 7.3 on average."""
FITTED = 3
"""Greatest sides that the exponents are fitted to."""
LEAST_OF_DETR, MOST_OF_OURS = 1.5, 1.25
"""Bounds on the exponents: 2 and 1 but for the linear layers and whatever costs the same at any size."""


class Cost(NamedTuple):
    """Of the whole step and of the encoder alone: seconds, and bytes above what was held before."""

    step_seconds: float
    step_bytes: int
    encoder_seconds: float
    encoder_bytes: int


def measure_call(call: Callable[[], object], device: torch.device, repeats: int) -> tuple[float, int]:
    """Shortest time of some calls, and the most memory that one of them held above what was held before it."""
    times, peaks = [], []
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    for _ in range(repeats):
        before = _forget_peak(device)
        begun = clock()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - begun)
        most = torch.cuda.max_memory_allocated() if device.type == "cuda" else _resident("VmHWM")
        peaks.append(most - before)
    return min(times), max(peaks)


def _forget_peak(device: torch.device) -> int:
    """Let the peak of memory begin anew; the bytes that are held now."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)  # free memory that the allocator keeps would hide what a call takes
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def _resident(key: str) -> int:
    """VmRSS, what is held now, or VmHWM, the most since it was reset; bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def measure(name: str, side: int, device: torch.device, repeats: int) -> Cost:
    """One architecture at one size."""
    config, generator = MODELS[name], torch.Generator().manual_seed(0)
    model = build_model(config, generator).to(device).train()
    criterion = Criterion(CriterionConfig(), config.class_loss)
    pixels = torch.randn(1, 3, side, side, generator=generator)
    batch = ImageBatch(pixels.to(device), torch.zeros(1, side, side, dtype=torch.bool, device=device))
    boxes = 0.1 + 0.3 * torch.rand(OBJECTS, 4, generator=generator)
    labels = torch.randint(config.num_classes, (OBJECTS,), generator=generator)
    targets = [{"labels": labels.to(device), "boxes": boxes.to(device)}]
    inputs: tuple[Any, ...] = ()

    def keep(_module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        nonlocal inputs
        inputs = tuple(value.detach() if isinstance(value, Tensor) else value for value in arguments)

    def step() -> None:
        model.zero_grad()
        criterion(groups_of(model(batch), targets), OBJECTS).total().backward()

    def encoder_step() -> None:
        model.zero_grad()
        source, *others = inputs
        memory = model.transformer.encoder(source.requires_grad_(), *others)
        torch.autograd.backward(memory, torch.ones_like(memory))

    hook = model.transformer.encoder.register_forward_pre_hook(keep)
    with sdpa_kernel(SDPBackend.MATH) if name.endswith("matrix") else nullcontext():
        step()  # the first one warms up
        hook.remove()
        return Cost(*measure_call(step, device, repeats), *measure_call(encoder_step, device, repeats))


def exponents(costs: dict[int, Cost]) -> list[float]:
    """Power of the number of pixels that each cost grows with."""
    sides = sorted(costs)[-FITTED:]
    pixels = np.log([side**2 for side in sides])
    return [float(np.polyfit(pixels, np.log(values), 1)[0]) for values in zip(*(costs[s] for s in sides), strict=True)]


def plot(costs: dict[str, dict[int, Cost]], path: Path) -> None:
    """The four costs against the side, both axes logarithmic."""
    figure = Figure(figsize=(10, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    titles = ("step, seconds", "step, MiB", "encoder, seconds", "encoder, MiB")
    for index, (axes, title) in enumerate(zip(figure.subplots(2, 2).flat, titles, strict=True)):
        for name, rows in costs.items():
            values = [cost[index] / (2**20 if index % 2 else 1) for cost in rows.values()]
            axes.loglog(list(rows), values, marker=".", linestyle="--" if "DETR" in name else "-", label=name)
        axes.set_xticks(sorted(rows), [str(side) for side in sorted(rows)])
        axes.minorticks_off()
        axes.set_xlabel("side of the image, pixels")
        axes.set_title(title)
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def claims(powers: dict[str, list[float]]) -> dict[str, bool]:
    """What the paper says of the encoder, by whether it shows."""
    shown = {}
    for name, (_, _, seconds, memory) in powers.items():
        if name.startswith("DETR"):
            shown[f"{name}: time grows faster than pixels^{LEAST_OF_DETR}"] = seconds > LEAST_OF_DETR
        else:
            shown[f"{name}: time grows slower than pixels^{MOST_OF_OURS}"] = seconds < MOST_OF_OURS
        if name.endswith("matrix"):
            shown[f"{name}: memory grows faster than pixels^{LEAST_OF_DETR}"] = memory > LEAST_OF_DETR
        else:
            shown[f"{name}: memory grows slower than pixels^{MOST_OF_OURS}"] = memory < MOST_OF_OURS
    return shown


def main() -> int:
    """Print the table; the exit code is 1 if a claim does not show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 384, 512, 768, 1024], help="multiples of 64 px")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--repeats", type=int, default=2, help="measured steps, of which the shortest counts")
    parser.add_argument("--out", type=Path, default=Path("runs/resolution.png"), help="file of the plot")
    options = parser.parse_args()
    if len(set(options.sides)) < FITTED:
        parser.error(f"--sides must name at least {FITTED} sizes: the exponents are fitted to them")
    torch.set_num_threads(1)
    print(f"operator: {'compiled' if compiled(options.device.type) else 'plain torch'}; device: {options.device}")
    print(f"{'':27}{'side':>5}{'step s':>9}{'step MiB':>10}{'encoder s':>11}{'encoder MiB':>13}")
    costs: dict[str, dict[int, Cost]] = {}
    powers = {}
    for name in MODELS:
        costs[name] = {}
        for side in sorted(options.sides):
            cost = costs[name][side] = measure(name, side, options.device, options.repeats)
            print(f"{name:27}{side:5}{cost.step_seconds:9.3f}{cost.step_bytes / 2**20:10.0f}"
                  f"{cost.encoder_seconds:11.3f}{cost.encoder_bytes / 2**20:13.0f}", flush=True)  # fmt: skip
        powers[name] = exponents(costs[name])
        print("{:27}{:>5}{:9.2f}{:10.2f}{:11.2f}{:13.2f}".format("", "^", *powers[name]), flush=True)
    plot(costs, options.out)
    shown = claims(powers)
    for claim, shows in shown.items():
        print(f"{'yes' if shows else 'NO':3}  {claim}")
    print(options.out)
    return 0 if all(shown.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
