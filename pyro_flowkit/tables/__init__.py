"""Exact densities of tables: ``TableDensity(frame).fit()``.

density.py      the front door
columns.py      choosing and checking columns
missing.py      rows that lack values
split.py        which rows train, choose and test
preparation.py  between the rows as they came and what a flow sees, with the log-det; covariance.py: for few rows,
                heavy_tails.py: for columns without a variance
flow.py         the flow for tables; order.py: which column it transforms first
atoms.py        columns with values that many rows share
rows.py         the density of rows that both make
training.py     the recipe: train it, and keep it only if it beats the Gaussian that it started from
metrics.py      how good it is, in numbers and in words
"""

from pyro_flowkit.tables.density import TableDensity
from pyro_flowkit.tables.errors import TableError
from pyro_flowkit.tables.flow import FlowSettings

__all__ = ["FlowSettings", "TableDensity", "TableError"]
