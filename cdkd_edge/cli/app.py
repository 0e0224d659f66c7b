"""The application: what every command shares, and how errors become answers."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from cdkd_edge import __version__
from cdkd_edge.core.errors import CdkdEdgeError, InternalError, UsageError, as_answer, printable
from cdkd_edge.core.machine import cache_folder
from cdkd_edge.core.signals import end_on_signals, received

_UsageError: Any = typer.BadParameter.__base__  # the class of all errors in arguments, which Typer does not export
_ClickException: Any = _UsageError.__base__


class _AnsweringGroup(TyperGroup):
    """Turns errors into one line and an exit code; tracebacks only with ``--debug``."""

    def make_context(self, *arguments: Any, **extra: Any) -> Any:
        with _answers():
            return super().make_context(*arguments, **extra)

    def invoke(self, ctx: Any) -> Any:
        with _answers(debug=ctx.params.get("debug", False)):
            return super().invoke(ctx)


@contextlib.contextmanager
def _answers(*, debug: bool = False) -> Iterator[None]:
    """Let a command end with one line and an exit code, whatever went wrong in the block."""
    try:
        yield
    except _UsageError as error:
        _fail_usage(error)
    except (_ClickException, typer.Exit, typer.Abort):
        raise
    except Exception as error:
        # A broken pipe of `| head` ends a command without a word: click does that. So does what a signal brought about.
        if debug or received() is not None or (isinstance(error, BrokenPipeError) and _nobody_reads()):
            raise
        _fail(as_answer(error) or _as_fault(error))


app = typer.Typer(
    cls=_AnsweringGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="A land-cover segmentation network, from a checkpoint to a measured engine.\n\n"
    "`finetune` an encoder, `export` the checkpoint, `build` an engine (for INT8 after `calibrate`), `segment` scenes "
    "with it, `bench` it, `evaluate` any of them, and see with `parity` whether they agree. Each command finds what "
    "the one before left in the workspace (`export/`, `engines/`, "
    "`benchmarks/`).",
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"cdkd-edge {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", help="Print the version and exit.", is_eager=True, callback=_print_version
    ),
    debug: bool = typer.Option(False, "--debug", help="Show tracebacks."),
) -> None:
    pass


def main() -> None:
    """Entry point of the ``cdkd-edge`` command."""
    # So that temporary files are removed when a job scheduler ends the process or a connection is lost.
    end_on_signals()
    _open_closed_streams()
    # Where there is no home it says where its fonts are instead; nobody who asked for a benchmark wants to know.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    with contextlib.suppress(RuntimeError):  # there is no home
        # Its list of fonts belongs into our own cache: nothing else outside the workspace is written to.
        os.environ.setdefault("MPLCONFIGDIR", str(cache_folder() / "matplotlib"))
    app()


def _open_closed_streams() -> None:
    """Streams that were closed by who started this (``>&-``): nothing else may get their numbers, and be written to."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8"))


def _nobody_reads() -> bool:
    """Whether what reads this process's output has ended; other pipes break for other reasons."""
    poll = select.poll()
    poll.register(1, 0)  # stdout
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _as_fault(error: Exception) -> CdkdEdgeError:
    """The answer to an error that nobody foresaw; its traceback is written to a log file in our cache."""
    import datetime
    import platform
    import traceback

    from cdkd_edge.core.files import write_text

    if isinstance(error, ModuleNotFoundError):
        return CdkdEdgeError(f"{error}", hint="an installed package is incomplete; reinstall cdkd-edge")
    reason = f"{type(error).__name__}: {error}"
    about = f"cdkd-edge {__version__}, Python {platform.python_version()}, {platform.platform()}"
    text = "\n".join([about, repr(sys.argv), *traceback.format_exception(error)])
    try:
        log = cache_folder() / "errors" / f"{datetime.datetime.now():%Y%m%dT%H%M%S}-{os.getpid()}.log"
        write_text(log, text.encode("utf-8", "backslashreplace").decode())
        hint = f"please report it; the traceback is in {log}"
    except (OSError, RuntimeError):  # no home, or no room in it
        hint = "please report it, with the traceback that --debug shows"
    return InternalError(f"this is a fault of cdkd-edge: {printable(reason, 300)}", hint=hint)


def _fail(error: CdkdEdgeError) -> NoReturn:
    message = printable(error.message)
    if len(message) > 1500:  # names in a file may be of any length
        message = f"{message[:1500]}..."
    text = f"{message} — {printable(error.hint)}" if error.hint else message
    with contextlib.suppress(OSError):  # where stderr takes nothing, the exit code remains
        typer.echo(f"{typer.style('error:', fg='red', bold=True)} {text}", err=True)
    raise typer.Exit(error.exit_code)


_FAULTS = {
    "greater_than_equal": "must be at least {ge:g}",
    "greater_than": "must be more than {gt:g}",
    "less_than_equal": "must be at most {le:g}",
    "less_than": "must be less than {lt:g}",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_parsing": "must be a number",
}  # what Typer's validation finds, in the words of other errors


def _usage_text(error: Any) -> str:
    """What is wrong with the command line, with the option and its value."""
    faults: list[dict[str, Any]] = getattr(error.__cause__, "errors", list)()
    names = getattr(getattr(error, "param", None), "opts", ())
    if len(faults) == 1 and names and (words := _FAULTS.get(faults[0]["type"])):
        return f"{max(names, key=len)} {words.format(**faults[0].get('ctx', {}))}, got {faults[0]['input']}"
    return str(error.format_message()).rstrip(".").replace("Value error, ", "")


def _fail_usage(error: Any) -> NoReturn:
    if "NoArgsIsHelp" in type(error).__name__:  # its message is the help page
        raise error
    command = error.ctx.command_path if error.ctx else "cdkd-edge"
    _fail(UsageError(_usage_text(error), hint=f"see {command} --help"))
