"""The one error that says what a table lacks."""


class TableError(ValueError):
    """A table, or what is asked of it, has no density; the message says why and what to do.

    Example:
        >>> import pandas as pd
        >>> from pyro_flowkit.tables import TableDensity, TableError
        >>> try:
        ...     TableDensity(pd.DataFrame({"name": ["a", "b"]}))
        ... except TableError as error:
        ...     print(error)
        Expected columns of numbers in the table, got text ...
    """
