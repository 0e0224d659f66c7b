"""Every error that a user can meet: one base class, an exit code and a next step.

A :class:`CdkdEdgeError` is an answer, not a bug: the command line prints its message and hint on one
line and exits with its code (``--debug`` shows the traceback instead and exits with 1). Any other
exception is a bug: the command line prints the path of a log file with the traceback.

====  ==================================================================================
code  meaning
====  ==================================================================================
0     success
1     an installed package is incomplete; under --debug any failure, with its traceback
2     wrong usage of the command line
3     the checkpoint cannot be used
4     the label schema cannot be used
5     the workspace holds nothing to work on, or more than one candidate
6     a manifest is missing, damaged or does not fit its artefact
7     the graph cannot be built
8     a numerical check failed
9     the engine cannot be built, loaded or run
10    the scene cannot be read or its label map cannot be written
11    an optional package is not installed
12    the operating system refused (disk full, read-only, no access)
13    the dataset cannot be used
14    parity: the candidate exceeds the tolerance
15    doctor: something that is needed here does not work
16    power cannot be measured from the requested source
17    the board's power mode or clocks cannot be changed, or were not restored
18    segment: some of several scenes failed; the others are finished
19    bench: the run is invalid; or a run's folder cannot be used
20    compare: the runs cannot be compared, or one is slower than allowed
70    a fault of cdkd-edge itself; a log file has the traceback
130   interrupted (128 + signal: 129 hang-up, 143 terminated)
====  ==================================================================================
"""

from __future__ import annotations

from typing import ClassVar


def printable(text: str, limit: int | None = None) -> str:
    """Text of unknown origin on one line, safe for a terminal and for XML.

    What is not printable becomes a space: control characters (which begin escape sequences), surrogates (undecodable
    file names), characters that reverse the writing direction, and code points without a character (U+FFFE).

    Args:
        text: from a file, a file name, or another program.
        limit: characters to keep.
    """
    return "".join(char if char.isprintable() else " " for char in text).strip()[:limit]


class CdkdEdgeError(Exception):
    """An error with a sentence for the user and, if there is one, the next step."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message


class UsageError(CdkdEdgeError):
    """The command line was used wrongly."""

    exit_code = 2


class CheckpointError(CdkdEdgeError, ValueError):
    """The checkpoint is not readable, not safe to read, or does not hold a network we know."""

    exit_code = 3


class EncoderOnlyError(CheckpointError):
    """The checkpoint holds an encoder but no segmentation head."""


class SchemaError(CdkdEdgeError, ValueError):
    """The label schema is malformed or does not fit the data."""

    exit_code = 4


class WorkspaceError(CdkdEdgeError, LookupError):
    """The workspace holds nothing that the command could mean, or more than one candidate."""

    exit_code = 5


class ManifestError(CdkdEdgeError, ValueError):
    """A manifest is missing, damaged, or does not describe the file beside it."""

    exit_code = 6


class GraphError(CdkdEdgeError, ValueError):
    """The ONNX graph cannot be built or is not one of ours."""

    exit_code = 7


class NumericalCheckError(CdkdEdgeError, ArithmeticError):
    """A derived artefact does not compute what its parent computes."""

    exit_code = 8


class EngineError(CdkdEdgeError, RuntimeError):
    """The engine cannot be built, loaded or run."""

    exit_code = 9


class SceneError(CdkdEdgeError, ValueError):
    """The scene cannot be read or its label map cannot be written."""

    exit_code = 10


class MissingExtraError(CdkdEdgeError, ImportError):
    """A command needs an optional package that is not installed."""

    exit_code = 11

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs {package}, which is not installed",
            hint=f"pip install 'cdkd-edge[{extra}]'",
        )


class SystemRefusalError(CdkdEdgeError, OSError):
    """The operating system refused to read or write a file."""

    exit_code = 12


class DatasetError(CdkdEdgeError, ValueError):
    """Images and masks do not match, cannot be read, or leave nothing to train, calibrate or evaluate on."""

    exit_code = 13


class ParityError(CdkdEdgeError):
    """Two artefacts were compared, and the candidate exceeds the tolerance."""

    exit_code = 14


class DoctorError(CdkdEdgeError):
    """Something that is needed on this machine does not work."""

    exit_code = 15


class PowerError(CdkdEdgeError, RuntimeError):
    """No power source answers, or not the requested one."""

    exit_code = 16


class BoardError(CdkdEdgeError, RuntimeError):
    """The board's power mode or clocks cannot be changed, or could not be restored."""

    exit_code = 17


class FleetError(CdkdEdgeError, RuntimeError):
    """Some of several scenes failed; the others are finished, and kept when the command is run again."""

    exit_code = 18


class BenchError(CdkdEdgeError):
    """A benchmark run is not valid, or its folder cannot be used."""

    exit_code = 19


def as_answer(error: Exception) -> CdkdEdgeError | None:
    """An exception as the error that a user is told; None for one that nobody foresaw."""
    if isinstance(error, CdkdEdgeError):
        return error
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return SystemRefusalError(f"{where}{error.strerror or error}")
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "allocate memory" in str(error)):  # torch
        return SystemRefusalError("out of memory")
    return None


class InternalError(CdkdEdgeError):
    """A bug of cdkd-edge."""

    exit_code = 70


class CompareError(CdkdEdgeError):
    """Runs cannot be compared, or one is slower than allowed."""

    exit_code = 20
