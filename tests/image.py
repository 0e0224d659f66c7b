"""Builds the plain CPU's image without Docker, and runs it: `make test-image`, as root, where there is debootstrap.

The instructions are those of docker/Dockerfile: each RUN in a root file system of its own, as Docker would.
What is not Docker's: the base comes from debootstrap, and this machine's list of certificates is used.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "helpers"))
from dockerfile import FINAL, fill, read_stages

ROOT = Path(__file__).resolve().parents[1]
STAGES = read_stages("cpu")
BASES = {"debian:12-slim": "bookworm"}
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
LIMIT = 1200
"""Seconds for one instruction."""


@dataclass
class Image:
    """A root file system, and what Docker would keep beside it."""

    root: Path
    variables: dict[str, str] = field(default_factory=lambda: {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"})
    folder: str = "/"
    user: str = "0"
    health: list[str] = field(default_factory=list)
    entry: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)

    def run(self, *command: str, **more: str) -> subprocess.CompletedProcess[str]:
        """Run a command inside, alone with its processes; what it prints is kept."""
        inside = ["unshare", "--mount", "--pid", "--fork", "--kill-child", f"--root={self.root}", f"--wd={self.folder}"]
        return subprocess.run(
            [*inside, "--mount-proc", f"--setgid={self.user}", f"--setuid={self.user}", *command],
            env={**self.variables, "HOME": "/tmp", **more}, capture_output=True, text=True, timeout=LIMIT, check=False,
        )  # fmt: skip


def main() -> int:
    missing = [name for name in ("debootstrap", "unshare") if not shutil.which(name)]
    if os.geteuid() != 0 or missing:
        why = f"there is no {missing[0]} here (apt-get install {missing[0]})" if missing else "root is needed"
        print(f"IMAGE NOT TESTED: {why}")
        return 0
    with tempfile.TemporaryDirectory(prefix="cdkd-edge-image-") as folder:
        started = time.monotonic()
        image = build(FINAL, Path(folder))
        size = sum(file.lstat().st_size for file in image.root.rglob("*") if file.is_file() and not file.is_symlink())
        print(f"built in {time.monotonic() - started:.0f} s, {size / 1e6:.0f} MB", flush=True)
        helped = checked(image, *image.entry, *image.command)
        assert "segment" in helped, helped
        assert checked(image, "id", "-u").strip() == image.user != "0"
        doctor = json.loads(checked(image, *image.health, "--json"))
        assert {finding["status"] for finding in doctor["findings"]} <= {"ok", "warn"}, doctor
        print(checked(image, *image.health))
        print(checked(image, *image.entry, "demo"))
        made = image.root / "workspace" / "cdkd-edge-demo" / "demo_scene_labels.tif"
        assert str(made.stat().st_uid) == image.user
    print(f"the image works: doctor and demo, as user {image.user}")
    return 0


def checked(image: Image, *command: str, **more: str) -> str:
    """What a command inside answers, which must not fail."""
    run = image.run(*command, **more)
    if run.returncode:
        sys.exit(f"FAILED: {shlex.join(command)}\n{run.stdout}{run.stderr}")
    return run.stdout


def build(name: str, folder: Path) -> Image:
    """A stage and those that it needs, each in a folder of its own."""
    stage, root = STAGES[name], folder / name
    if stage.base in STAGES:
        below = folder / stage.base
        image = Image(below) if below.exists() else build(stage.base, folder)
        subprocess.run(["cp", "-a", "--reflink=auto", str(image.root), str(root)], check=True)
        image = Image(root, dict(image.variables))
    else:
        print(f"debootstrap {BASES[stage.base]}, for {stage.base}", flush=True)
        command = ["debootstrap", "--variant=minbase", BASES[stage.base], str(root)]
        made = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
        if made.returncode:
            sys.exit(f"FAILED: {shlex.join(command)}\n{made.stdout}{made.stderr}")
        image = Image(root)
        shutil.copy("/etc/resolv.conf", root / "etc" / "resolv.conf")
        shutil.copy(CERTIFICATES, root / "tmp" / "certificates.crt")
    arguments: dict[str, str] = {}
    for instruction, rest in stage.steps:
        print(f"{name}: {instruction} {rest}", flush=True)
        follow(image, arguments, folder, instruction, rest)
    return image


def follow(image: Image, arguments: dict[str, str], folder: Path, instruction: str, rest: str) -> None:
    """Do what an instruction says."""
    known = {**arguments, **image.variables}
    if instruction == "ARG":
        name, _, default = rest.partition("=")
        arguments[name] = default or {"BOARD": "cpu"}.get(name, "")
    elif instruction == "ENV":
        image.variables |= dict(part.split("=", 1) for part in shlex.split(fill(rest, known)))
    elif instruction == "RUN":
        checked(image, "/bin/sh", "-c", rest, **arguments, PIP_CERT="/tmp/certificates.crt")
    elif instruction == "WORKDIR":
        image.folder = rest
        (image.root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
    elif instruction == "COPY":
        copy(image, folder, rest.split())
    elif instruction == "USER":
        image.user = fill(rest, known)
    elif instruction == "HEALTHCHECK":
        image.health = json.loads(rest.partition("CMD ")[2])
    elif instruction == "ENTRYPOINT":
        image.entry = json.loads(rest)
    elif instruction == "CMD":
        image.command = json.loads(rest)
    else:
        sys.exit(f"docker/Dockerfile has {instruction}, which is not known here")


def copy(image: Image, folder: Path, words: list[str]) -> None:
    """COPY: a folder's content goes into the target, as Docker does it."""
    source = ROOT
    if words[0].startswith("--from="):
        source = build(words.pop(0).removeprefix("--from="), folder).root
    target = image.root / str(Path(image.folder) / words[-1]).lstrip("/")
    for name in words[:-1]:
        place = source / name.lstrip("/")
        if place.is_dir():
            shutil.copytree(place, target, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(place, target)


if __name__ == "__main__":
    sys.exit(main())
