"""The one kind of error that is the user's to mend."""


class UserError(Exception):
    """The input is wrong; the message says what, where and how to mend it. The command line exits with 2."""
