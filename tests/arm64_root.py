"""A root file system of Debian for arm64 with what a board installs, and commands inside it under qemu's user mode.

Debian's Python stands in for JetPack's: the wheels are those of ``locks/jetpack6.txt`` (``locks/jetpack7.txt`` from
Python 3.12 on), checked by their hashes; only the part of their names that is for the Python differs. Packages are
unpacked and nothing is installed, so no privileges are needed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
QEMU = "qemu-aarch64"
CPU = "cortex-a76"
"""The qemu CPU nearest to the Cortex-A78AE of an Orin: ARMv8.2 with dot product and FP16, without I8MM, BF16, SVE."""
DEBIAN = ["base-files", "bash", "coreutils", "dash", "grep", "sed", "python3", "libstdc++6", "libgomp1"]
TESTS = ["pytest", "hypothesis"]
LIMIT = 900
"""Seconds for a download."""

# The kernel hands every arm64 program to qemu. Since Linux 6.7 a user namespace has a table of its own for that; on
# older kernels the machine's own table has to name qemu. qemu may need the x86-64 libraries of this machine.
_ENTER = r"""
set -e
qemu=$1 root=$2 repository=$3; shift 3
if mount -t binfmt_misc none /proc/sys/fs/binfmt_misc 2>/dev/null; then
    printf '%s' ':arm64:M::\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00:\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff:'"$qemu:F" \
        > /proc/sys/fs/binfmt_misc/register
fi
for folder in /proc /sys /dev; do mount --rbind $folder "$root$folder"; done
mount --bind "$root/../cpuinfo" "$root/proc/cpuinfo"
mount --bind "$repository" "$root/repository"
for folder in /usr/lib64 /usr/lib/x86_64-linux-gnu; do mount --bind $folder "$root$folder"; done
exec chroot "$root" /usr/bin/env PATH=/usr/bin "$@"
"""  # noqa: E501 - one line for the kernel


def why_not() -> str | None:
    """What is missing here to emulate arm64, and how to get it."""
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        return "this is no x86-64 Linux"
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        return "this is no Debian: no apt-get"
    return None if shutil.which(QEMU) else f"no {QEMU} here (apt-get install qemu-user)"


def make_root(folder: Path) -> Path:
    """Make the root file system in ``folder/root`` unless it is there, complete.

    Raises:
        OSError: a package could not be had; the text says which command failed and why.
    """
    folder = folder.resolve()
    root, whole = folder / "root", folder / "whole"
    locks = {board: REPOSITORY / "locks" / f"jetpack{board}.txt" for board in (6, 7)}
    parts = [" ".join((*DEBIAN, *TESTS)).encode(), *(path.read_bytes() for path in locks.values())]
    state = hashlib.sha256(b"".join(parts)).hexdigest()
    if whole.exists() and whole.read_text() == state:
        return root
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("usr/bin", "usr/lib", "usr/sbin", "usr/lib64", "usr/lib/x86_64-linux-gnu", "proc", "repository"):
        (root / name).mkdir(parents=True)
    for name in ("bin", "lib", "sbin", "lib64"):
        (root / name).symlink_to(f"usr/{name}")
    _unpack_debian(folder / "apt", root)
    python = (root / "usr/bin/python3").readlink().name.removeprefix("python")
    platforms = [f"--platform=manylinux{tag}_aarch64" for tag in ("2014", "_2_27", "_2_28")]
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--quiet", "--only-binary=:all:", *platforms]
    install += [f"--target={packages(root)}", f"--python-version={python}", "--implementation=cp"]
    if python != "{}.{}".format(*sys.version_info):
        install += ["--no-compile", "--ignore-requires-python"]  # pip would ask the Python that runs it
    newest = tuple(map(int, python.split("."))) >= (3, 12)
    _quietly(*install, "--no-deps", "--require-hashes", "-r", str(locks[7 if newest else 6]))
    _quietly(*install, "-c", str(REPOSITORY / "constraints.txt"), *TESTS)
    # The library by which ONNX Runtime knows CPUs crashes on this machine's cpuinfo. For any CPU of qemu's -L the facts
    # of a Cortex-A57, otherwise those of an Orin: lscpu in github.com/KavrakiLab/vamp/issues/20.
    _write_cpuinfo(root / "proc/cpuinfo", "0xd07", "fp asimd")
    more = "evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
    _write_cpuinfo(folder / "cpuinfo", "0xd42", f"fp asimd {more}")
    shutil.rmtree(folder / "apt")
    whole.write_text(state)
    return root


def packages(root: Path) -> Path:
    """Where Debian's Python of a root file system finds what pip installed."""
    return root / "usr/local/lib" / (root / "usr/bin/python3").readlink().name / "dist-packages"


def inside(root: Path, *command: str) -> list[str]:
    """A command line that runs a command in the root file system, with the repository as ``/repository``."""
    qemu = shutil.which(QEMU) or QEMU
    enter = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", _ENTER, "sh"]
    return [*enter, qemu, str(root), str(REPOSITORY), *command]


def environment() -> dict[str, str]:
    """Variables for commands inside."""
    kept = {name: os.environ[name] for name in ("OMP_NUM_THREADS",) if name in os.environ}
    outside = {"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}  # of chroot
    return kept | outside | {"HOME": "/root", "QEMU_CPU": CPU, "PYTHONPATH": "/repository", "LANG": "C.UTF-8"}


def _unpack_debian(apt: Path, root: Path) -> None:
    for empty in (apt / "lists/partial", apt / "cache/archives/partial"):
        empty.mkdir(parents=True)
    (apt / "status").touch()
    where = {
        "Dir::State": apt,
        "Dir::State::status": apt / "status",
        "Dir::Cache": apt / "cache",
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Sandbox::User": "root",
    }
    get = ["apt-get", "-qq", *(part for key, value in where.items() for part in ("-o", f"{key}={value}"))]
    _quietly(*get, "update")
    _quietly(*get, "--no-install-recommends", "-y", "-d", "install", *DEBIAN)
    for package in (apt / "cache/archives").glob("*.deb"):
        _quietly("sh", "-c", f"dpkg-deb --fsys-tarfile '{package}' | tar -x --keep-directory-symlink -C '{root}'")


def _write_cpuinfo(path: Path, part: str, features: str) -> None:
    facts = f"Features: {features}\nCPU implementer: 0x41\nCPU architecture: 8\nCPU variant: 0x0\nCPU part: {part}\n"
    cores = [f"processor: {number}\n{facts}CPU revision: 1\n\n" for number in range(os.cpu_count() or 1)]
    path.write_text("".join(cores))


def _quietly(*command: str) -> None:
    run = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    if run.returncode:
        raise OSError(f"{command[0]} failed: {run.stderr.strip()[-300:]}")
