"""The command line: parse, call one function, print. Results go to stdout, progress to stderr.

Nothing heavy is imported until a command runs, so that ``--help`` and completion answer at once.
"""

from cdkd_edge.cli import accuracy, calibrate, chain, engines, parity, power  # each command registers itself
from cdkd_edge.cli.app import app, main

__all__ = ["accuracy", "app", "calibrate", "chain", "engines", "main", "parity", "power"]
