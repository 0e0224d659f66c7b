"""Files of the system below a root, so that a test can give a tree of its own in the place of ``/``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Text:
    """A file's text, or why there is none."""

    text: str | None
    reason: str = ""
    """Empty where the file does not exist."""

    @property
    def number(self) -> int | None:
        """The text as a number, if it is one."""
        try:
            return int((self.text or "").split()[0])
        except (ValueError, IndexError):
            return None


def read(root: Path, path: str) -> Text:
    """A text file below a root, without the zero bytes of the device tree. Absolute links stay below the root."""
    place = resolve(root, path)
    try:
        return Text(place.read_bytes().decode("utf-8", errors="replace").replace("\0", "\n").strip())
    except (FileNotFoundError, NotADirectoryError):
        return Text(None)
    except OSError as error:
        return Text(None, error.strerror or str(error))


def resolve(root: Path, path: str) -> Path:
    """Where a path of the system lies below a root; links are followed there."""
    place = root / path.lstrip("/")
    for _ in range(8):
        if not place.is_symlink():
            break
        target = place.readlink()
        place = root / str(target).lstrip("/") if target.is_absolute() else place.parent / target
    return place
