"""Reads docker/Dockerfile: its stages and their instructions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

DOCKERFILE = Path(__file__).resolve().parents[2] / "docker" / "Dockerfile"
FINAL = "final"


@dataclass(frozen=True)
class Stage:
    """One FROM and what follows it."""

    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)  # instruction, and the rest of its line

    def of(self, *instructions: str) -> list[str]:
        return [rest for instruction, rest in self.steps if instruction in instructions]


def read_stages(board: str) -> dict[str, Stage]:
    """The stages by name, for ``--build-arg BOARD=board``; the last one, which has no name, is :data:`FINAL`."""
    stages: dict[str, Stage] = {}
    lines = DOCKERFILE.read_text(encoding="utf-8").splitlines()
    joined = re.sub(r"\\\n\s*", " ", "\n".join(line for line in lines if not line.lstrip().startswith("#")))
    for line in filter(None, map(str.strip, joined.splitlines())):
        instruction, _, rest = line.partition(" ")
        if instruction == "FROM":
            base, _, name = rest.partition(" AS ")
            stage = stages[name or FINAL] = Stage(fill(base, {"BOARD": board}))
        elif stages:
            stage.steps.append((instruction, rest.strip()))
        else:
            assert line == "ARG BOARD=cpu", line
    return stages


def fill(text: str, values: Mapping[str, str]) -> str:
    """Put values in the place of ``${NAME}``."""
    return re.sub(r"\$\{(\w+)\}", lambda match: values[match[1]], text)
