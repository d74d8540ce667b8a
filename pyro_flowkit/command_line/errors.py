"""The one error that a user of the command line is meant to read."""


class CommandError(Exception):
    """Something about the command, its files or its data is wrong; the message is one line that says what."""
