"""The command line in this process or another, and what its answers must look like."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cdkd_edge import cli
from cdkd_edge.core.errors import CheckpointError


def run(*arguments: object) -> Any:
    """The command line in this process."""
    runner = CliRunner()
    return runner.invoke(cli.app, [str(argument) for argument in arguments])


def start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    """The command line in a process of its own."""
    root = str(Path(cli.__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(
        [sys.executable, "-m", "cdkd_edge", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def assert_answer(result: Any, code: int, pattern: str) -> None:
    """One line that begins with ``error:``, the documented exit code, and nothing else."""
    assert result.exit_code == code, (result.exception, result.stdout, result.stderr)
    assert isinstance(result.exception, SystemExit), "an answer, not a traceback"
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert re.search(pattern, lines[0]), lines[0]
    assert result.stdout == ""


def assert_wrong_usage(result: Any, pattern: str) -> None:
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.stderr).split())
    assert re.search(pattern, text), text
    assert "Traceback" not in text
    assert result.stdout == ""


def loading_refused(load: Callable[..., Any], path: Path, **options: Any) -> CheckpointError:
    """The error that loading a checkpoint gives, after checking that its words fit one line each."""
    with pytest.raises(CheckpointError) as caught:
        load(path, **options)
    error: CheckpointError = caught.value
    for text in filter(None, (error.message, error.hint)):
        assert "\n" not in text
        assert not re.search(r"[.!?]\s+[A-Z]", text), f"more than one sentence: {text}"
        assert "Weights only load failed" not in text  # torch's own advice, which names the unsafe way out
    return error
