"""The command line: parse, call one function, print. Results go to stdout, progress and notes to stderr.

A command's file holds its options and what it shows. Nothing heavy is imported until a command runs, so that ``--help``
and completion answer at once.
"""

from importlib import import_module

from cdkd_edge.cli.app import app, main
from cdkd_edge.cli.options import grouped

__all__ = ["app", "main"]

COMMANDS = (
    *("info", "convert", "distill", "finetune", "export", "calibrate", "build", "inspect", "segment", "bench"),
    *("sweep", "compare", "power", "roofline", "evaluate", "parity", "demo", "doctor"),
)  # in the order of the help: as they are used

for _name in COMMANDS:
    app.command()(grouped(getattr(import_module(f"cdkd_edge.cli.{_name}"), _name)))
