"""Errors that explain themselves: the command line prints their message and nothing else.

What comes from the user's files (names, values, metadata) enters a message through `shown`, and a message is one line
that cannot steer a terminal, whatever it quotes.
"""

MOST_SHOWN = 120
"""Characters of a name or value that a message quotes."""


def printable(text: str) -> str:
    r"""The text with line breaks, control characters and what UTF-8 cannot write as escapes such as `\x1b`."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(value: object, most: int = MOST_SHOWN) -> str:
    """A value of the user's as a message quotes it: printable, and without its middle where it is longer than `most`.

    Args:
        value: text or a path as it is, anything else by its `str`; give `repr(value)` to have the quotes.
        most: characters.
    """
    text = printable(str(value))
    return text if len(text) <= most else f"{text[: most // 2]}...{text[-(most // 3) :]}"


class _OneLineError(Exception):
    def __init__(self, message: object = "") -> None:
        super().__init__(printable(str(message)))


class UserError(_OneLineError):
    """The input is wrong; the message says what, where and how to mend it. The command line exits with 2."""


class StoreError(UserError):
    """A store, or the way to it, fails for now: what is finished stays, and the same command goes on."""


class FullDiskError(UserError):
    """A disk has no space left: what is finished stays, and the same command goes on when there is some."""


class TrackingError(_OneLineError):
    """The work is done, and uploads wait on the disk for the tracking server. The command line exits with 3."""
