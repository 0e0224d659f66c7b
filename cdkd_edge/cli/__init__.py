"""The command line: parse, call one function, print. Results go to stdout, progress to stderr.

Nothing heavy is imported until a command runs, so that ``--help`` and completion answer at once.
"""

from cdkd_edge.cli import accuracy, bench, calibrate, chain, compare, doctor, engines, parity, power, roofline, segment
from cdkd_edge.cli.app import app, main

__all__ = [
    "accuracy",
    "app",
    "bench",
    "calibrate",
    "chain",
    "compare",
    "doctor",
    "engines",
    "main",
    "parity",
    "power",
    "roofline",
    "segment",
]
