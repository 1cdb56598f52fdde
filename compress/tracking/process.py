"""Which process a run belongs to, so that another one can tell whether it is still at work."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_MACHINE = Path("/etc/machine-id")
_NAMESPACE = Path("/proc/self/ns/pid")
_KEYS = ("process.machine", "process.boot", "process.space", "process.id", "process.started")


def process_tags() -> dict[str, str]:
    """Return tags that name this process: its machine, since when that runs, the process' number and start."""
    values = (_machine(), _read(_BOOT), _space(), str(os.getpid()), _started(os.getpid()) or "")
    return dict(zip(_KEYS, values, strict=True))


def has_ended(tags: Mapping[str, str]) -> bool:
    """Say whether the process that these tags name has ended for sure: False also where nobody can tell."""
    if not all(key in tags for key in _KEYS):
        return False
    machine, boot, space, number, started = (tags[key] for key in _KEYS)
    if machine != _machine() or not number.isdecimal():
        return False
    if boot != _read(_BOOT):
        # The machine was started anew since. Without a machine's own id, another machine may have the name, too.
        return bool(boot) and _MACHINE.is_file()
    if space != _space():
        # A process of another container, whose numbers mean others here.
        return False
    now = _started(int(number))
    return now != started if now is not None and started else now is None


def _machine() -> str:
    return f"{platform.node()} {_read(_MACHINE)}".strip()


def _space() -> str:
    try:
        return str(_NAMESPACE.readlink())
    except OSError:
        return ""


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def _started(number: int) -> str | None:
    """Return when a process was started, in the system's own terms; None if there is none, or it is done."""
    try:
        # The name, in brackets, may hold anything.
        fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
    except OSError:
        return None
    answer = subprocess.run(["ps", "-o", "lstart=", "-p", str(number)], capture_output=True, text=True, check=False)
    return answer.stdout.strip() or None
