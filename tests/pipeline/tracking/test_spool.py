"""The spool: lines on disk that survive a killed process."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.tracking.spool import Spool, SpoolReader
from tests.builders import disk_of


class TestSpool:
    def test_reader_sees_new_whole_lines_only(self, tmp_path: Path, clock: Callable[[], float]) -> None:
        spool, reader = Spool(tmp_path / "a" / "spool.jsonl", clock), SpoolReader(tmp_path / "a" / "spool.jsonl")
        spool.write(1, {"loss": 2.5})
        assert [(r.step, r.metrics, r.time, r.kind) for r in reader.read()] == [(1, {"loss": 2.5}, 1.7e9, "metrics")]
        spool.path.open("a").write('{"time": 1')
        assert reader.read() == []

    def test_missing_file_is_empty(self, tmp_path: Path) -> None:
        assert SpoolReader(tmp_path / "none").read() == []

    def test_a_torn_last_line_is_cut_when_writing_goes_on(self, tmp_path: Path) -> None:
        path = tmp_path / "spool"
        Spool(path).write(1, {"loss": 1.0})
        with path.open("a") as file:
            file.write('{"time": 17, "step": 2, "met')
        Spool(path).write(2, {"loss": 0.5})
        assert [record.step for record in SpoolReader(path).read()] == [1, 2]

    def test_a_line_that_is_no_record_is_left_out(self, tmp_path: Path) -> None:
        path = tmp_path / "spool"
        path.write_text('nonsense\n{"step": 3}\n')
        Spool(path).write(4, {"loss": 1.0})
        assert [record.step for record in SpoolReader(path).read()] == [4]

    def test_limit_and_offset(self, tmp_path: Path) -> None:
        spool = Spool(tmp_path / "spool")
        for step in range(5):
            spool.write(step, {"a": 1.0, "b": 2.0})
        reader = SpoolReader(spool.path)
        assert [record.step for record in reader.read(limit=3)] == [0, 1]
        assert [record.step for record in SpoolReader(spool.path, reader.offset).read()] == [2, 3, 4]

    def test_lines_of_a_killed_process_are_there(self, tmp_path: Path) -> None:
        code = (
            "import os, signal, sys; from pathlib import Path; from pipeline.tracking import Spool\n"
            "Spool(Path(sys.argv[1])).write(7, {'loss': 1.0}); os.kill(os.getpid(), signal.SIGKILL)"
        )
        assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "spool")]).returncode == -9
        assert [record.step for record in SpoolReader(tmp_path / "spool").read()] == [7]

    @pytest.mark.parametrize(
        ("step", "metrics", "written"),
        [
            pytest.param(2, {"loss": 0.5}, True, id="another step"),
            pytest.param(1, {"loss": 1.0, "rate": 7.0}, False, id="the same"),
            pytest.param(1, {"loss": 1.0005}, False, id="the same but for rounding"),
            pytest.param(1, {"loss": 1.01}, True, id="another value"),
        ],
    )
    def test_what_a_restart_repeats_is_written_once(
        self, tmp_path: Path, step: int, metrics: dict[str, float], written: bool
    ) -> None:
        with Spool(tmp_path / "spool") as spool:
            spool.write(1, {"loss": 1.0, "rate": 3.0})
        with Spool(tmp_path / "spool") as spool:
            spool.write_once(step, metrics, "loss")
        records = SpoolReader(tmp_path / "spool").read()
        assert records[0].metrics == {"loss": 1.0, "rate": 3.0}
        assert [(record.step, record.metrics) for record in records[1:]] == ([(step, metrics)] if written else [])


def test_another_curve_of_the_same_step_is_no_repetition(tmp_path: Path) -> None:
    with Spool(tmp_path / "spool") as spool:
        spool.write(1, {"val_subset/AP": 0.0})
    for _ in range(2):
        with Spool(tmp_path / "spool") as spool:
            spool.write_once(1, {"val/AP": 0.0}, "val/AP")
            spool.write_once(1, {"val_subset/AP": 0.0}, "val_subset/AP")
    written = [record.metrics for record in SpoolReader(tmp_path / "spool").read()]
    assert written == [{"val_subset/AP": 0.0}, {"val/AP": 0.0}]


def test_a_full_disk_is_told_once_and_the_points_before_stay(tmp_path: Path) -> None:
    path = tmp_path / "spool" / "evaluate.jsonl"
    with Spool(path) as spool:
        spool.write(1, {"val/AP": 0.5})
    with (
        pytest.raises(UserError, match=r"evaluate\.jsonl: no space left .*write elsewhere with runs"),
        disk_of(path.stat().st_size + 5),
        Spool(path) as spool,
    ):
        spool.write(2, {"val/AP": 0.5})
    with Spool(path) as spool:
        spool.write(3, {"val/AP": 0.5})
    assert [record.step for record in SpoolReader(path).read()] == [1, 3]


def test_a_folder_that_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "spool").touch()
    with pytest.raises(UserError, match=r"spool: cannot be written .*set runs"):
        Spool(tmp_path / "spool" / "train.jsonl")
