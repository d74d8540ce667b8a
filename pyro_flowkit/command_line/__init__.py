"""Densities of tables from the command line: ``python -m pyro_flowkit --help``.

tables.py       reading a file, choosing and checking columns, splitting rows
preparation.py  between the rows as they came and what a flow sees, with the log-det
flow.py         the flow for tables
density.py      the recipe: train it, and keep it only if it beats the Gaussian that it started from
runs.py         the run folder: plain files, written whole or not at all
report.py       results in words
commands.py     fit, score, sample, compare, diagnose
"""
