"""Read the mIoU of engines from the files that ``cdkd-edge evaluate -o`` and ``parity -o`` write."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdkd_edge.core.errors import CompareError
from cdkd_edge.core.files import read_json


@dataclass(frozen=True)
class Score:
    """The mIoU of an artefact."""

    sha256: str
    """SHA-256 of the artefact."""
    mean_iou: float
    """0..1."""
    data: tuple[Any, ...]
    """What it was measured on, and how; only scores with the same data are compared."""
    file: str


@dataclass(frozen=True)
class _Subject:
    sha256: str


@dataclass(frozen=True)
class _Class:
    name: str
    truth_pixels: int


@dataclass(frozen=True)
class _Evaluation:
    """The part of ``accuracy.json`` that is needed."""

    subject: _Subject
    mean_iou: float
    classes: tuple[_Class, ...]


@dataclass(frozen=True)
class _Sides:
    reference: float
    candidate: float


@dataclass(frozen=True)
class _Scores:
    mean_iou: _Sides


@dataclass(frozen=True)
class _Parity:
    """The part of ``parity.json`` that is needed."""

    reference: _Subject
    candidate: _Subject
    scores: _Scores
    classes: tuple[_Class, ...]


def read_scores(path: Path) -> list[Score]:
    """The scores in a file or in the folder of ``-o``: one from an evaluation, two from a parity.

    Raises:
        CompareError: it cannot be read, or is neither.
    """
    import msgspec

    within = [path / name for name in ("accuracy.json", "parity.json") if (path / name).is_file()]
    path = within[0] if len(within) == 1 else path
    try:
        document = read_json(path)
    except (OSError, ValueError) as error:
        said = error.strerror or error if isinstance(error, OSError) else error
        raise CompareError(f"{path} cannot be read: {said}", hint=_HINT) from None
    of_two = isinstance(document, dict) and "candidate" in document
    found: _Parity | _Evaluation
    try:
        found = msgspec.convert(document, _Parity) if of_two else msgspec.convert(document, _Evaluation)
    except msgspec.ValidationError as error:
        raise CompareError(f"{path} does not hold the mIoU of an artefact: {error}", hint=_HINT) from None
    truth = tuple((one.name, one.truth_pixels) for one in found.classes)
    # If a class has no truth, evaluate and parity take the mean over different classes.
    data = (*truth, of_two and any(not pixels for _, pixels in truth))
    if isinstance(found, _Evaluation):
        scores = [Score(found.subject.sha256, found.mean_iou, data, str(path))]
    else:
        values = found.scores.mean_iou
        scores = [
            Score(found.reference.sha256, values.reference, data, str(path)),
            Score(found.candidate.sha256, values.candidate, data, str(path)),
        ]
    if not all(0 <= score.mean_iou <= 1 for score in scores):
        raise CompareError(f"{path}: an mIoU must be between 0 and 1", hint=_HINT)
    return scores


_HINT = "name a file that `cdkd-edge evaluate ENGINE --data DATA -o FOLDER` or `cdkd-edge parity` wrote"


def scores_by_engine(files: list[Path], engines: set[str]) -> tuple[dict[str, Score], list[str]]:
    """Scores by SHA-256 of the engine, and the files that are about none of these engines.

    Raises:
        CompareError: a file cannot be read, or two files contradict each other about an engine.
    """
    found: dict[str, Score] = {}
    unmatched = []
    for path in files:
        own = [score for score in read_scores(path) if score.sha256 in engines]
        if not own:
            unmatched.append(str(path))
        for score in own:
            known = found.setdefault(score.sha256, score)
            if known.data != score.data or abs(known.mean_iou - score.mean_iou) > 1e-12:
                raise CompareError(
                    f"{known.file} and {score.file} contradict each other about the same engine",
                    hint="name one of them",
                )
    return found, unmatched
