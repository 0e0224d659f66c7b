"""jtop's service, through which a Jetson's power is read."""

from __future__ import annotations

import os
import pwd
from dataclasses import dataclass
from pathlib import Path

from cdkd_edge.board.doctor.finding import OK, WARN, Finding
from cdkd_edge.board.doctor.software import Software
from cdkd_edge.board.jetson import MODEL, is_jetson, jetson_linux
from cdkd_edge.board.tree import read, resolve
from cdkd_edge.core.errors import printable

SOCKET = "/run/jtop.sock"
_MANAGED = 38
"""Jetson Linux from which on the system is Ubuntu 24.04, whose pip refuses to install into the system's Python without
``--break-system-packages`` (PEP 668). That of JetPack 6 does not know the option."""


@dataclass(frozen=True)
class User:
    """Who asks."""

    name: str
    uid: int
    groups: frozenset[int]
    """Numbers of the groups that this process has."""


def current_user() -> User:
    """The user of this process."""
    uid = os.geteuid()
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = str(uid)
    return User(name, uid, frozenset((*os.getgroups(), os.getegid())))


def socket_exists(root: Path) -> bool:
    """Whether jtop's service has opened its socket."""
    try:
        return resolve(root, SOCKET).exists()
    except OSError:
        return False


def probe_jtop_service(root: Path, software: Software) -> Finding:
    """Client, service, and whether the service answers with a measured rail."""
    name, version = "jtop service", software.packages.get("jetson-stats")
    data = {"client": version, "socket": socket_exists(root), **software.jtop}
    if not is_jetson(root):
        return Finding(name, OK, "not a Jetson: not needed", data=data)
    if not socket_exists(root):
        mend = "sudo systemctl restart jtop.service" if version else _install(root)
        missing = "" if version else ", jetson-stats is not installed in this Python"
        return Finding(name, WARN, f"does not run ({SOCKET} is not there){missing}", mend, data)
    if version is None:
        return Finding(
            name,
            WARN,
            "runs, but jetson-stats is not installed in this Python",
            "pip install 'cdkd-edge[jetson]'",
            data,
        )
    if "error" in software.jtop or not software.jtop:
        said = printable(str(software.jtop.get("error", "was not asked")))
        return Finding(name, WARN, f"jetson-stats {version} does not get an answer: {said}", _install(root), data)
    rail = software.jtop.get("rail")
    if rail != "VDD_IN" and "AGX Orin" in (read(root, MODEL).text or ""):
        text = f"jetson-stats {version} answers; an AGX Orin has no VDD_IN, its power is read from its INA3221 chips"
        return Finding(name, OK, text, data=data)
    if rail != "VDD_IN":
        total = printable(str(rail)) if rail else "missing"
        text = f"answers, but its total is {total} and not VDD_IN, the module's input"
        return Finding(name, WARN, text, _install(root), data)
    return Finding(name, OK, f"jetson-stats {version} answers, VDD_IN is measured", data=data)


def probe_jtop_group(root: Path, user: User) -> Finding:
    """Whether the user may talk to the service."""
    name = "jtop group"
    if not is_jetson(root):
        return Finding(name, OK, "not a Jetson: not needed")
    if user.uid == 0:
        return Finding(name, OK, "root needs none")
    groups = read(root, "/etc/group")
    entry = _group(groups.text or "", "jtop")
    if entry is None:
        said = f"/etc/group: {groups.reason}" if groups.reason else "there is no group jtop"
        mend = f"sudo groupadd -f jtop && sudo usermod -aG jtop {user.name} && sudo systemctl restart jtop.service"
        return Finding(name, WARN, said, mend)
    number, members = entry
    if number in user.groups:
        return Finding(name, OK, f"{user.name} is a member", data={"gid": number})
    if user.name in members:
        text = f"{user.name} is a member since after logging in"
        return Finding(name, WARN, text, "log out and in again, or: newgrp jtop", {"gid": number})
    return Finding(name, WARN, f"{user.name} is not a member", f"sudo usermod -aG jtop {user.name}", {"gid": number})


def _install(root: Path) -> str:
    release = jetson_linux(root)
    option = "--break-system-packages " if release and release[0] >= _MANAGED else ""
    return f"sudo pip3 install {option}-U jetson-stats && sudo systemctl restart jtop.service"


def _group(text: str, name: str) -> tuple[int, frozenset[str]] | None:
    for line in text.splitlines():
        fields = line.split(":")
        if len(fields) == 4 and fields[0] == name and fields[2].isdigit():
            return int(fields[2]), frozenset(filter(None, fields[3].split(",")))
    return None
