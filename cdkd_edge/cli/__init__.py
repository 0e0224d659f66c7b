"""The command line: parse, call one function, print. Results go to stdout, progress and notes to stderr.

A command's file holds its options and what it shows. Nothing heavy is imported until a command runs, so that ``--help``
and completion answer at once.
"""

from cdkd_edge.cli import (
    bench,
    build,
    calibrate,
    compare,
    demo,
    doctor,
    evaluate,
    export,
    finetune,
    info,
    inspect,
    parity,
    power,
    roofline,
    segment,
)
from cdkd_edge.cli.app import app, main
from cdkd_edge.cli.options import grouped

__all__ = ["app", "main"]

for _command in (
    info.info,
    finetune.finetune,
    export.export,
    calibrate.calibrate,
    build.build,
    inspect.inspect,
    segment.segment,
    bench.bench,
    compare.compare,
    power.power,
    roofline.roofline,
    evaluate.evaluate,
    parity.parity,
    demo.demo,
    doctor.doctor,
):  # in the order of the help: as they are used
    app.command()(grouped(_command))
