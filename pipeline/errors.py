"""Errors that explain themselves: the command line prints their message and nothing else."""


class UserError(Exception):
    """The input is wrong; the message says what, where and how to mend it. The command line exits with 2."""


class TrackingError(Exception):
    """The tracking server cannot be reached or refuses; what was to be uploaded is still on disk. Exit code 1."""
