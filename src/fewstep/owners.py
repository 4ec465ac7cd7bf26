"""Who a temporary file or folder belongs to, as a part of its name: whether that process still runs can be told later.

A process is known by its machine, that machine's start, its id and its own start: ids are given again, and a cache may
be shared by machines and containers.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import socket
from pathlib import Path

import psutil

_TAG = re.compile(r"([0-9a-f]{8})-([0-9a-f]{8})-(\d+)-(\d+)")
_PROC = Path("/proc")


def tag() -> str:
    """Returns what names this process: ``machine-boot-pid-start``."""
    return _tag_of(os.getpid())


@functools.cache
def _tag_of(pid: int) -> str:
    return f"{_machine()}-{_boot()}-{pid}-{_start(pid) or 0}"


def is_gone(name: str) -> bool:
    """Returns whether the process whose tag is in a name has ended; False where that cannot be known from here."""
    found = _TAG.search(name)
    if found is None or found[1] != _machine():
        return False
    return found[2] != _boot() or _start(int(found[3])) != int(found[4])


def has_tag(name: str) -> bool:
    """Returns whether a name says whose it is."""
    return _TAG.search(name) is not None


@functools.cache
def _machine() -> str:
    """Returns a short hash of the machine, or of the container: each counts its processes from 1."""
    told = [socket.gethostname()]
    for path in (Path("/etc/machine-id"), _PROC / "self" / "ns" / "pid"):
        try:
            told.append(str(path.readlink()) if path.is_symlink() else path.read_text().strip())
        except OSError:
            continue
    return _short("\n".join(told))


@functools.cache
def _boot() -> str:
    try:
        return _short((_PROC / "sys" / "kernel" / "random" / "boot_id").read_text())
    except OSError:
        return "0" * 8  # elsewhere the start of a process is a date, which tells boots apart


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _start(pid: int) -> int | None:
    """Returns when a process started, in clock ticks since the machine did or ms since 1970; None if it has ended."""
    try:
        if (_PROC / "self" / "stat").exists():
            # The name, in brackets, may hold anything; the state is field 3 and the start field 22 (proc_pid_stat(5)).
            state, *fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
            return None if state in "ZX" else int(fields[18])
        return int(psutil.Process(pid).create_time() * 1000)
    except (OSError, psutil.Error):
        return None
