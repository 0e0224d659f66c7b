"""The workspace: three folders in which each command finds what the previous one made.

``export/`` holds graphs, ``engines/`` engines, ``benchmarks/`` one folder per run. A command without an argument takes
the only candidate; if there are none or several, the error lists them and what to type.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import shlex
from pathlib import Path

from cdkd_edge.core.errors import WorkspaceError
from cdkd_edge.core.files import being_made
from cdkd_edge.core.manifest import (
    ARTEFACT_SUFFIXES,
    LABELS,
    fp16_refusal,
    manifest_path,
    output_of,
    precision_of,
    provides,
)


class Workspace:
    """A directory with the three folders, which are made on first use."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.graphs, self.engines, self.benchmarks = root / "export", root / "engines", root / "benchmarks"

    def graphs_of(self, precision: str, output: str = LABELS) -> list[Path]:
        """Exported graphs of a precision and kind of output, and those whose manifest names no precision."""
        return [
            path
            for path in _artefacts(self.graphs, (".onnx",))
            if precision_of(path) in (precision, None) and output_of(path) == output
        ]

    def only_graph(self, precision: str = "fp32", command: str | None = None, output: str = LABELS) -> Path:
        """The only exported graph of a precision and kind of output; a WorkspaceError if there is none or several."""
        what = "exported graph" if precision == "fp32" else f"{precision} graph"
        command = command or ("cdkd-edge build" if precision == "fp32" else f"cdkd-edge build --{precision}")
        return _only(self.graphs_of(precision, output), what, self.graphs, command, "cdkd-edge export CKPT")

    def only_engine(self, command: str, output: str = LABELS, typed: str = "") -> Path:
        """The only engine that gives ``output``; those that give exactly that are preferred to those that give more.

        Args:
            command: what to type before an engine's name, for the error.
            output: one of :data:`cdkd_edge.core.manifest.OUTPUT_KINDS`.
            typed: the whole command, to repeat once there is an engine.

        Raises:
            WorkspaceError: there is none, or more than one.
        """
        found = [path for path in _artefacts(self.engines, ARTEFACT_SUFFIXES) if provides(output_of(path), output)]
        exact = [path for path in found if output_of(path) == output]
        what = "engine" if output == LABELS else f"engine with {output}"
        if not found:
            raise self._no_engine(what, output, typed)
        return _only(exact or found, what, self.engines, command, "")

    def _no_engine(self, what: str, output: str, typed: str) -> WorkspaceError:
        """The error that there is no engine, with the reason if it is known and the commands to type."""
        has = [precision for precision in ("fp32", "fp16", "int8") if self.graphs_of(precision)]
        precision = "" if not has or "fp32" in has else f" --{has[0]}"
        options = precision + ("" if output == LABELS else f" --{output}")
        commands = [*([] if has else ["cdkd-edge export CKPT"]), f"cdkd-edge build{options}", *filter(None, [typed])]
        refused = [(path.name, reason) for path in self.graphs_of("fp32") if (reason := fp16_refusal(path))]
        why = "".join(f"; FP16 was refused for {name}: {reason}" for name, reason in refused[:1])
        return WorkspaceError(f"there is no {what} in {self.engines}{why}", hint=f"make one: {' && '.join(commands)}")

    def new_run(self, label: str) -> Path:
        """A free name ``benchmarks/<UTC time>-<label>``; the folder is not made here.

        Unusual characters of the label become ``_``: it may come from a manifest, and must not lead out of the folder.
        """
        label = re.sub(r"[^\w.-]+", "_", label)
        stamp = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%SZ")
        path, attempt = self.benchmarks / f"{stamp}-{label}", 1
        while path.exists() or being_made(path):
            attempt += 1
            path = self.benchmarks / f"{stamp}-{label}-{attempt}"
        return path

    def hand_over(self, folder: Path) -> None:
        """Give the folder of a run or a sweep to the owner of the workspace, if root made it.

        Otherwise a run under ``sudo``, which clocks need, leaves a ``benchmarks/`` that its user cannot write to.
        """
        owner = self.root.stat()
        if os.geteuid() != 0 or owner.st_uid == 0:
            return
        for path in (self.benchmarks, folder, *folder.rglob("*")):
            with contextlib.suppress(OSError):
                os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)


def _artefacts(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    paths = sorted(folder.glob("[!.]*")) if folder.is_dir() else []
    return [path for path in paths if path.suffix in suffixes and path.is_file() and manifest_path(path).is_file()]


def _only(candidates: list[Path], what: str, folder: Path, command: str, first: str) -> Path:
    if not candidates:
        raise WorkspaceError(f"there is no {what} in {folder}", hint=f"make one: {first}")
    if len(candidates) > 1:
        names = ", ".join(path.name for path in candidates)
        hint = "say which: " + "  or  ".join(f"{command} {shlex.quote(str(path))}" for path in candidates[:4])
        raise WorkspaceError(f"there are {len(candidates)} candidates for the {what} in {folder}: {names}", hint=hint)
    return candidates[0]
