"""A spool on a disk that is full or may not be written."""

from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.tracking.spool import Spool, SpoolReader
from tests.builders import disk_of


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
