"""The model that training begins with."""

from pathlib import Path

import pytest

from pipeline.config.sections import InitSection
from pipeline.errors import UserError
from pipeline.train.initial import check_init


@pytest.mark.parametrize("key", ["backbone", "weights"])
def test_weights_that_are_not_there_are_told_unless_training_has_begun(key: str, tmp_path: Path) -> None:
    missing = InitSection.model_validate({key: "none.pth"})
    with pytest.raises(UserError, match=rf"train\.init\.{key}: none\.pth: there is no such file or folder"):
        check_init(missing, tmp_path)
    state = tmp_path / "checkpoint-5" / "state.json"
    state.parent.mkdir(parents=True)
    state.touch()
    check_init(missing, tmp_path)


@pytest.mark.parametrize("source", ["imagenet", "https://example.org/resnet.pth"])
def test_a_download_is_no_path(source: str, tmp_path: Path) -> None:
    check_init(InitSection(backbone=source), tmp_path)
