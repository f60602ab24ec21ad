"""Finding whole checkpoints: one that is damaged is set aside, and the one before it is used."""

from collections.abc import Callable
from pathlib import Path

from pipeline.checkpoint.state import DamagedError, State, checked_sum, checkpoints, read_state
from pipeline.errors import UserError
from pipeline.files import sync
from pipeline.log import get_logger

logger = get_logger(__name__)


def newest_whole(folder: Path, bring: Callable[[str], object] = lambda name: None) -> tuple[Path, State] | None:
    """The newest checkpoint below a `checkpoints` folder whose files are all as they were written, or None.

    Every file is read. Damaged ones that are newer are set aside, so one process at a time may call this.

    Args:
        folder: the `checkpoints` folder.
        bring: called with the name of each before its files are read, where they may be somewhere else.

    Raises:
        UserError: a checkpoint is of another format, cannot be read, or cannot be set aside.
    """
    for path in reversed(checkpoints(folder)):
        bring(path.name)
        state = _whole(path)
        if state is not None:
            return path, state
    return None


def all_whole(folder: Path) -> list[Path]:
    """The checkpoints below a `checkpoints` folder, oldest first, without damaged ones; otherwise as `newest_whole`."""
    return [path for path in checkpoints(folder) if _whole(path) is not None]


def _whole(path: Path) -> State | None:
    """The state of a checkpoint, or None where it is damaged and was set aside."""
    try:
        state = read_state(path)
        for name in state.names:
            checked_sum(path, state, name)
    except DamagedError as error:
        set_aside(path, str(error))
        return None
    return state


def set_aside(path: Path, why: str) -> None:
    """Rename a folder that is no whole checkpoint to `<name>.damaged`, with a number if that is taken, and say why.

    Raises:
        UserError: it cannot be renamed.
    """
    number, aside = 1, path.with_name(f"{path.name}.damaged")
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.damaged-{number}")
    try:
        path.rename(aside)
        sync(path.parent)
    except OSError as error:
        raise UserError(f"{why}; {path} cannot be renamed ({error.strerror}): move it away") from error
    logger.warning("%s; the folder is kept as %s, and the checkpoint before it is used", why, aside)
