"""The one error that says what a table lacks."""


class TableError(ValueError):
    """A table, or what is asked of it, has no density; the message says why and what to do."""
