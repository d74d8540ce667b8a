"""Densities of tables from the command line: ``python -m pyro_flowkit --help``. What they are is in tables/.

reading.py   from a file to a frame
runs.py      the run folder: plain files, written whole or not at all
report.py    results in words
commands.py  fit, score, sample, compare, diagnose
"""
