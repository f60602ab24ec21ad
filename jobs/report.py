"""Writes the reports that people open: of an evaluation, of a file of detections, or of two against each other.

The bootstrap of many detections is one long call of hotcoco, in which Python hears no signal: it has a thread.
"""

from functools import partial
from pathlib import Path

from jobs.interrupt import in_thread
from pipeline.config.load import load_config
from pipeline.evaluate.comparison import write_comparison
from pipeline.evaluate.evaluated import Evaluated, evaluation_folder, read_evaluated, read_files
from pipeline.evaluate.page import REPORT_FILE, write_report
from pipeline.files import disk_told, make_folder
from pipeline.mirror import results_here
from pipeline.run_folder import RunFolder


def report(folder: Path, out: Path | None) -> Path:
    """Write the report of a run's or another evaluation, beside it unless `out` says where, and return its path."""
    folder = evaluation_folder(folder)
    page = out or folder / REPORT_FILE
    _write(read_evaluated(folder), page)
    return page


def report_run(run: RunFolder, out: Path | None) -> Path:
    """The same of a run; for one in a store the page is here unless `out` says where."""
    with results_here(run) as folder:
        return report(folder, out or (Path(REPORT_FILE) if run.store else None))


def report_files(annotations: Path, detections: Path, images: Path | None, out: Path) -> None:
    """Write the report of a file of detections."""
    _write(read_files(annotations, detections, images), out)


def report_comparison(first: Path, second: Path, out: Path) -> None:
    """Write what is different between two evaluations, each the folder or the configuration of a run."""
    evaluated = []
    for path in (first, second):
        with results_here(RunFolder(path) if path.is_dir() else load_config(path).folder) as folder:
            evaluated.append(read_evaluated(evaluation_folder(folder)))
    make_folder(out.parent, "give another --out")
    with disk_told(out, "another --out"):
        in_thread(partial(write_comparison, out, *evaluated), "report").result()


def _write(evaluated: Evaluated, out: Path) -> None:
    make_folder(out.parent, "give another --out")
    with disk_told(out, "another --out"):
        in_thread(partial(write_report, out, evaluated), "report").result()
