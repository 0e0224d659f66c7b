"""The ``cdkd-edge`` command, and ``python -m cdkd_edge``."""

import sys

from cdkd_edge.core import signals as interrupts


def main() -> None:
    """Run the command line.

    Signals are ours before anything else is imported. A command that got one never ends with 0, nor with the traceback
    of what it was doing.
    """
    interrupts.end_on_signals()
    code: str | int | None = 0
    try:
        from cdkd_edge.cli import main as run

        run()
    except SystemExit as leaving:
        code = leaving.code
    except BaseException:
        if interrupts.received() is None:  # else an import that was interrupted, which may fail with any error
            raise
    interrupts.end_at_once()
    number = interrupts.received()
    sys.exit(code if number is None else 128 + number)


if __name__ == "__main__":
    main()
