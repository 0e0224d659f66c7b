"""What the scripts of this folder share: the command for the record, errors, and files of results."""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cdkd_edge.core.errors import CdkdEdgeError
from cdkd_edge.core.files import write_text


def shown_command(script: str) -> str:
    """The command line without the path of the interpreter, and with only the names of absolute paths."""
    shown = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return shlex.join(["python", f"benchmarks/{script}", *shown])


def run_reporting_errors(work: Callable[[], int]) -> int:
    """Run the work of a script; an error becomes a message and exit code 1, Ctrl-C exit code 130."""
    try:
        return work()
    except CdkdEdgeError as error:
        print(f"error: {error.message}" + (f"\nhint: {error.hint}" if error.hint else ""), file=sys.stderr)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 1


def read_record(path: Path | None, schema: int) -> dict[str, Any]:
    """The runs recorded so far in a JSON file; an empty record without a file.

    Raises:
        ValueError: the file is something else.
    """
    if path is None or not path.exists():
        return {"schema": schema, "runs": []}
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(record, dict) or record.get("schema") != schema:
        raise ValueError(f"{path} is not a record of version {schema}")
    return record


def cpu_slug(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor in a file's name: ``amd-epyc-25-17``, its family and model after the name that it gives itself.

    Virtual machines give one name to processors of different kinds.
    """
    from cdkd_edge.core.machine import describe_machine

    found = dict(re.findall(r"^(cpu family|model|model name|CPU part)\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE))
    parts = [found.get("model name") or describe_machine().cpu]
    parts += [found[name] for name in ("cpu family", "model", "CPU part") if name in found]
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")


def machine_of_run() -> dict[str, Any]:
    """The machine, for a record."""
    import rasterio

    return {
        "cpus": os.cpu_count(),
        "processor": platform.machine(),
        "python": platform.python_version(),
        "gdal": rasterio.__gdal_version__,
    }


def write_results(output: Path | None, results: dict[str, Any], markdown: str) -> None:
    """Write ``output.json`` and ``output.md``, or print the Markdown if there is no output."""
    if output is None:
        print(markdown)
        return
    write_text(output.with_suffix(".json"), json.dumps(results, indent=2) + "\n")
    write_text(output.with_suffix(".md"), markdown)


def run_cdkd_edge(words: Sequence[object], log: Path) -> tuple[dict[str, Any], float]:
    """Run a command of cdkd-edge with ``--json``.

    Args:
        words: the command and its arguments.
        log: where the command and what it says on stderr are appended.

    Returns:
        What it prints, and the processor time that it took, s.

    Raises:
        RuntimeError: it fails; the message is its last line.
    """
    line = [sys.executable, "-m", "cdkd_edge", *map(str, words), "--json"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with log.open("a+", encoding="utf-8") as said:
        print("$", *line[2:], file=said, flush=True)
        start = said.tell()
        done = subprocess.run(line, stdout=subprocess.PIPE, stderr=said, text=True, check=False)
        if done.returncode:
            said.seek(start)
            lines = said.read().strip().splitlines() or [f"exit code {done.returncode}"]
            raise RuntimeError(lines[-1].removeprefix("error: "))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found: dict[str, Any] = json.loads(done.stdout)
    return found, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
