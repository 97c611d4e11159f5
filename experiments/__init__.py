"""Experiments: `python -m experiments.NAME`, one readable script each; `python -m experiments` lists them.

A module whose name has no leading underscore is an experiment.  The first line of its docstring says what it does,
a line that starts with "Run time:" how long that takes.  It has `Options`, a frozen dataclass with a field `out`,
`main(arguments)`, which opens its run with `_run.start(Options, arguments)`, and `TINY`, the arguments that run it
within seconds.  What a run writes and how one is resumed: `experiments/_run.py`.
"""
