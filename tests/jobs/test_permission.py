"""Where nothing can be written, the message names what to set."""

from pathlib import Path

import pytest

from jobs.run import Pipeline
from pipeline.config.sections import Config, SyntheticSection
from pipeline.errors import UserError
from pipeline.shard.synthetic import draw_dataset


def test_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = Config.model_validate({"name": "test", "runs": str(tmp_path / "file" / "runs")})
    with pytest.raises(UserError, match=r"cannot be made a folder .*; set runs"), Pipeline(config):
        pass


@pytest.mark.parametrize("key", ["OUT", "dataset.root"])
def test_synth(tmp_path: Path, key: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=rf"cannot be written .*; set {key}"):
        draw_dataset(tmp_path / "file" / "shapes", SyntheticSection(), key)
