"""Training while its checkpoints are scored beside it, against training alone, in the same run.

    python tests/benchmarks/beside.py [--epochs 4] [--repeats 2]

The demo by one worker with one thread, on a machine with room for the scoring on another core; a validation split as
large as an epoch keeps that one busy. Both take turns. Then when each checkpoint's AP was known.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from pipeline.run_folder import RunFolder

PROJECT = Path(__file__).resolve().parents[2]
IMAGES, BATCH = 600, 8
STEPS = IMAGES // BATCH
"""Of an epoch."""
MOST = 1.05
"""Times that a step may take as long."""


def run(runs: Path, name: str, epochs: int, beside: bool) -> RunFolder:
    settings = [f"name={name}", f"runs={runs}", f"dataset.root={runs}/data", f"tracking.uri=sqlite:///{runs}/mlflow.db",
                f"dataset.synthetic.train_images={IMAGES}", f"dataset.synthetic.val_images={IMAGES}",
                f"train.epochs={epochs}", "train.lr_drop_epochs=[]", "train.checkpoint_epochs=1", "train.log_steps=5",
                f"train.global_batch={BATCH}",
                "cluster.workers=1", "cluster.cpus_per_worker=1", f"evaluate.beside={str(beside).lower()}"]  # fmt: skip
    words = [word for setting in settings for word in ("--set", setting)]
    command = [sys.executable, "-m", "jobs", "run", "--until", "train", "-c", "jobs/configs/demo.yaml", *words]
    subprocess.run(command, check=True, cwd=PROJECT, stdout=subprocess.DEVNULL)
    return RunFolder(runs / name)


def points(spool: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in spool.read_text(encoding="utf-8").splitlines()]


def seconds_of_a_step(run: RunFolder) -> float:
    """After the first checkpoint: before it there is nothing to score."""
    later = [point["metrics"] for point in points(run.train_spool) if point["step"] > STEPS]
    return BATCH / statistics.median(m["train/images_per_second"] for m in later if "train/images_per_second" in m)


def known(run: RunFolder) -> list[str]:
    """How long after each checkpoint its AP was there, in epochs."""
    trained = {point["step"]: point["time"] for point in points(run.train_spool)}
    scored = {p["step"]: p["time"] for p in points(run.evaluate_spool) if "val/AP" in p["metrics"]}
    epoch = trained[2 * STEPS] - trained[STEPS]
    return [f"{(time - trained[step]) / epoch:.2f}" for step, time in sorted(scored.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    ratios = []
    with tempfile.TemporaryDirectory() as name:
        for repeat in range(options.repeats):
            alone, beside = (
                run(Path(name), f"{kind}{repeat}", options.epochs, kind == "beside") for kind in ("alone", "beside")
            )
            ratios.append(seconds_of_a_step(beside) / seconds_of_a_step(alone))
            print(
                f"a step alone {1e3 * seconds_of_a_step(alone):.0f} ms, with scoring beside it {ratios[-1]:.3f} times"
            )
            print("  a checkpoint's AP was known", ", ".join(known(beside)), "epochs after it was written")
    print(f"median {statistics.median(ratios):.3f}, at most {MOST}")
    raise SystemExit(statistics.median(ratios) > MOST)


if __name__ == "__main__":
    main()
