"""``python -m cdkd_edge.cli.step``: a command as a step of another one, which is told to end when that one ends."""

from __future__ import annotations

import runpy
import signal

from cdkd_edge.core.process import end_with_parent

if __name__ == "__main__":
    end_with_parent(signal.SIGTERM)  # not killed: a benchmark puts the board back
    runpy.run_module("cdkd_edge", run_name="__main__", alter_sys=True)
