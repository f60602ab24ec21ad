"""Compiles the CUDA kernels and fails on warnings, on spilled registers and on kernels that grew.

    python tests/check_cuda.py [--verbose]

Needs neither a GPU nor a CUDA build of torch; where there is no nvcc it says so and passes. The instructions of the
common kernels are counted where nvdisasm is there (CUDA_HOME, the path or NVDISASM).
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

PROJECT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ("80", "90", "100", "120")
POINTS = 16
"""L * P of the common case, which has 32 channels."""
NAMES = {"f": "fp32", "6__half": "fp16", "13__nv_bfloat16": "bf16"}


class Kernel(NamedTuple):
    """One kernel of ours that was compiled."""

    symbol: str
    registers: int
    spilled: int


class Hot(NamedTuple):
    """A kernel of the common case whose instructions count, and the most warp-instructions of a (query, head)."""

    title: str
    pattern: str
    most: int


# The sm_90 counts when this was written, and a few more. The original's: forward 1546, backward about 4600.
HOT = [
    Hot("forward", r"forward_kernelINS0_6LayoutI(\w+?)Li32ELi(\d)ELi(\d)EEE", 250),
    Hot("backward", r"backward_kernelINS0_6LayoutI(\w+?)Li32ELi(\d)ELi(\d)EEELb1ELb1EEE", 450),
]


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit: named by the environment, in CUDA_HOME or in the path."""
    home = os.environ.get("CUDA_HOME")
    return os.environ.get(name.upper()) or shutil.which(name, path=f"{home}/bin" if home else None)


def compile_for(architecture: str, nvcc: str, folder: Path) -> tuple[Path, str, bool]:
    """The machine code of all kernels for one architecture, what the compiler said, and whether it succeeded."""
    cubin = folder / f"sm_{architecture}.cubin"
    command = [nvcc, "-O3", "-std=c++17", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    # What torch's extensions add.
    command += ["-D__CUDA_NO_HALF_OPERATORS__", "-D__CUDA_NO_HALF_CONVERSIONS__", "-D__CUDA_NO_HALF2_OPERATORS__"]
    command += ["-D__CUDA_NO_BFLOAT16_CONVERSIONS__", "--expt-relaxed-constexpr"]
    command += [f"-gencode=arch=compute_{architecture},code=sm_{architecture}", "-Xptxas=-v", "--Werror=all-warnings"]
    command += ["-isystem", str(Path(torch.__file__).parent / "include"), "-cubin", "-o", str(cubin)]
    command += [str(PROJECT / "csrc/cuda/ms_deform_attn.cu")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return cubin, done.stdout + done.stderr, done.returncode == 0


def kernels_of(report: str) -> list[Kernel]:
    """Our kernels in what ptxas reports; those of CUB are not ours to mend."""
    found = re.findall(
        r"Compiling entry function '(\w*7raydetr\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers", report, re.S
    )
    return [Kernel(symbol, int(registers), int(spilled)) for symbol, spilled, registers in found]


def instructions(disassembler: str, cubin: Path) -> dict[str, tuple[int, int]]:
    """Of every kernel the instructions outside of its last loop, that over the points, and those inside of it."""
    text = subprocess.run([disassembler, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    counts = {}
    for section in re.split(r"^\s*\.section\s+\.text\.", text, flags=re.M)[1:]:
        code: list[str] = []
        labels: dict[str, int] = {}
        for line in section.splitlines():
            if label := re.match(r"(\.L_x_\d+):", line):
                labels[label[1]] = len(code)
            elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
                code.append(instruction[1])
        jumps = [(index, re.search(r"BRA.*`\((\.L_x_\d+)\)", line)) for index, line in enumerate(code)]
        back = [(index, labels[jump[1]]) for index, jump in jumps if jump and labels.get(jump[1], index) < index]
        inside = back[-1][0] - back[-1][1] + 1 if back else 0
        padding = sum(line.strip() == "NOP" for line in code)
        counts[section.split(",")[0]] = (len(code) - padding - inside, inside)
    return counts


def count_hot(disassembler: str, cubin: Path) -> tuple[list[str], bool]:
    """Lines on the common kernels, and whether all stay below their most.

    A warp holds 32 / lanes groups, and its loop runs POINTS / lanes times: both sides of every branch count, so a run
    takes fewer.
    """
    lines, small = [], True
    for symbol, (outside, inside) in sorted(instructions(disassembler, cubin).items()):
        for hot in HOT:
            if match := re.search(hot.pattern, symbol):
                lanes = int(match[3])
                count = (outside + inside * POINTS // lanes) * lanes / 32
                small &= count <= hot.most or "sm_90" not in cubin.name
                lines.append(f"{hot.title} {NAMES[match[1]]}: {count:.0f} instructions a (query, head)")
    return lines, small


def main() -> int:
    """The exit code is 1 if any architecture has a complaint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verbose", action="store_true", help="the registers of every kernel")
    options = parser.parse_args()
    nvcc, disassembler = tool("nvcc"), tool("nvdisasm")
    if nvcc is None:
        print("check_cuda: no nvcc here, the CUDA kernels are not compiled")
        return 0
    failed = False
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        builds = [pool.submit(compile_for, name, nvcc, Path(folder)) for name in ARCHITECTURES]
        for architecture, build in zip(ARCHITECTURES, builds, strict=True):
            cubin, report, compiled = build.result()
            kernels = kernels_of(report)
            spilled = [f"{kernel.spilled} bytes spilled by {kernel.symbol}" for kernel in kernels if kernel.spilled]
            lines = spilled if compiled else [line for line in report.splitlines() if re.search("error|warning", line)]
            bad = bool(spilled) or not compiled or not kernels
            if compiled and disassembler:
                counted, small = count_hot(disassembler, cubin)
                lines += counted
                bad |= not small or len(counted) != 6
            if options.verbose:
                lines += [f"{kernel.registers} registers: {kernel.symbol}" for kernel in kernels]
            most = max((kernel.registers for kernel in kernels), default=0)
            state = "FAILED" if bad else "ok"
            print(
                f"check_cuda: sm_{architecture} {state}, {len(kernels)} kernels, at most {most} registers", flush=True
            )
            print(*(f"  {line}" for line in lines), sep="\n", end="\n" if lines else "")
            failed |= bad
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
