"""What all tests of this folder share."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _do_not_wait_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of small files are written; none needs to survive a power cut."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
