"""Every error that a user can meet: one base class, an exit code and a next step.

A :class:`CdkdEdgeError` is an answer, not a bug: the command line prints its message and hint on one line and exits
with its code (``--debug`` shows the traceback instead and exits with 1). Any other exception is a bug: the command line
prints the path of a log file with the traceback. docs/troubleshooting.md explains every code.
"""

from __future__ import annotations

from typing import Any, ClassVar


def printable(text: str, limit: int | None = None) -> str:
    """Text of unknown origin on one line, safe for a terminal and for XML; at most ``limit`` characters.

    What is not printable becomes a space: control characters (which begin escape sequences), surrogates (undecodable
    file names), characters that reverse the writing direction, and code points without a character (U+FFFE).
    """
    return "".join(char if char.isprintable() else " " for char in text).strip()[:limit]


class CdkdEdgeError(Exception):
    """An error with a sentence for the user and, if there is one, the next step."""

    exit_code: ClassVar[int] = 1

    def __init_subclass__(cls, *, code: int | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        if code is not None:
            cls.exit_code = code

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message


class UsageError(CdkdEdgeError, code=2):
    """The command line was used wrongly."""


class CheckpointError(CdkdEdgeError, ValueError, code=3):
    """The checkpoint is not readable, not safe to read, or does not hold a network we know."""


class EncoderOnlyError(CheckpointError):
    """The checkpoint holds an encoder but no segmentation head."""


class SchemaError(CdkdEdgeError, ValueError, code=4):
    """The label schema is malformed or does not fit the data."""


class WorkspaceError(CdkdEdgeError, LookupError, code=5):
    """The workspace holds nothing that the command could mean, or more than one candidate."""


class ManifestError(CdkdEdgeError, ValueError, code=6):
    """A manifest is missing, damaged, or does not describe the file beside it."""


class GraphError(CdkdEdgeError, ValueError, code=7):
    """The ONNX graph cannot be built or is not one of ours."""


class NumericalCheckError(CdkdEdgeError, ArithmeticError, code=8):
    """A derived artefact does not compute what its parent computes."""


class EngineError(CdkdEdgeError, RuntimeError, code=9):
    """The engine cannot be built, loaded or run."""


class SceneError(CdkdEdgeError, ValueError, code=10):
    """The scene cannot be read or its label map cannot be written."""


class MissingExtraError(CdkdEdgeError, ImportError, code=11):
    """A command needs an optional package that is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        text = f"{purpose} needs {package}, which is not installed"
        super().__init__(text, hint=f"pip install 'cdkd-edge[{extra}]'")


class SystemRefusalError(CdkdEdgeError, OSError, code=12):
    """The operating system refused to read or write a file."""


class DatasetError(CdkdEdgeError, ValueError, code=13):
    """Images and masks do not match, cannot be read, or leave nothing to train, calibrate or evaluate on."""


class ParityError(CdkdEdgeError, code=14):
    """Two artefacts were compared, and the candidate exceeds the tolerance."""


class DoctorError(CdkdEdgeError, code=15):
    """Something that is needed on this machine does not work."""


class PowerError(CdkdEdgeError, RuntimeError, code=16):
    """No power source answers, or not the requested one."""


class BoardError(CdkdEdgeError, RuntimeError, code=17):
    """The board's power mode or clocks cannot be changed, or could not be restored."""


class FleetError(CdkdEdgeError, RuntimeError, code=18):
    """Some of several scenes failed; the others are finished, and kept when the command is run again."""


class BenchError(CdkdEdgeError, code=19):
    """A benchmark run is not valid, or its folder cannot be used."""


class CompareError(CdkdEdgeError, code=20):
    """Runs cannot be compared, or one is slower than allowed."""


class CommandError(CdkdEdgeError, OSError, code=127):
    """The command that was to be measured cannot be started."""


class InternalError(CdkdEdgeError, code=70):
    """A bug of cdkd-edge."""


def as_answer(error: Exception) -> CdkdEdgeError | None:
    """The error to show to the user for an exception; None for one that nobody foresaw."""
    if isinstance(error, CdkdEdgeError):
        return error
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return SystemRefusalError(f"{where}{error.strerror or error}")
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "allocate memory" in str(error)):  # torch
        return SystemRefusalError("out of memory")
    return None
