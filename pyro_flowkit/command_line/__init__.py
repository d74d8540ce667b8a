"""Densities of tables from the command line: ``python -m pyro_flowkit --help``. What they are is in tables/.

reading.py   from a file or a pipe to a frame; dialect.py: how a text holds its table
runs.py      the run folder: plain files, written whole or not at all
places.py    where files go, and what they may replace
report.py    results in words
commands.py  fit, score, sample, compare, diagnose
"""
