"""Experiments: `python -m experiments.NAME`, one readable script each; `python -m experiments` lists them.

A module whose name has no leading underscore is an experiment.  The first line of its docstring says what it does,
a line that starts with "Run time:" how long that takes, and `main(arguments)` runs it.
"""
