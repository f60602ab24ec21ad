"""Errors that explain themselves: the command line prints their message and nothing else."""


class UserError(Exception):
    """The input is wrong; the message says what, where and how to mend it. The command line exits with 2."""


class TrackingError(Exception):
    """The work is done, and uploads wait on the disk for the tracking server. The command line exits with 3."""
