"""What boards need that are not this machine: SSH servers on loopback, and stand-ins for ``adb`` and for QEMU."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncssh

from compress.boards.aarch64_root import DEFAULT_ROOT

STAND_IN = Path(__file__).with_name("stand_in_adb.py")
PHONE_PROGRAM = Path(__file__).with_name("stand_in_benchmark_model.py")
SERVERS = ("asyncssh", *(("openssh",) if shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin") else ()))
"""A server in Python, and OpenSSH's own where the machine has it."""
STAND_IN_QEMU = Path(__file__).with_name("stand_in_qemu.py")
ARM_ROOT = Path(os.environ.get("COMPRESS_AARCH64_ROOT") or DEFAULT_ROOT).expanduser()
EMULATED = shutil.which("qemu-aarch64-static") is not None and (ARM_ROOT / "proc/cpuinfo").is_file()
"""Whether the emulator is here, and a root for it."""
Answer = Callable[[asyncssh.SSHServerProcess], Any]


@dataclass(frozen=True)
class Remote:
    """An SSH server, and what a client needs to be let in."""

    port: int
    key: Path
    known_hosts: Path
    folder: Path
    """Where temporary folders are made there."""

    @property
    def settings(self) -> dict[str, object]:
        return {
            "host": "127.0.0.1",
            "port": self.port,
            "key": str(self.key),
            "known_hosts": str(self.known_hosts),
            "python": sys.executable,
            "folder": str(self.folder),
        }


@contextmanager
def ssh_server(folder: Path, kind: str = "asyncssh", answer: Answer | None = None) -> Iterator[Remote]:
    """Start a server that lets in one key and runs what it is asked to, or (asyncssh) gives an answer of ours."""
    keys = {name: asyncssh.generate_private_key("ssh-ed25519") for name in ("host", "client")}
    for name, key in keys.items():
        key.write_private_key(str(folder / name))
        (folder / name).chmod(0o600)
    (folder / "authorized").write_bytes(keys["client"].export_public_key())
    there = folder / "there"
    there.mkdir()
    with _asyncssh(folder, answer or _run) if kind == "asyncssh" else _openssh(folder) as port:
        public = keys["host"].export_public_key().decode().strip()
        (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {public}\n")
        yield Remote(port, folder / "client", folder / "known_hosts", there)


@contextmanager
def _asyncssh(folder: Path, answer: Answer) -> Iterator[int]:
    loop = asyncio.new_event_loop()

    async def serve() -> asyncssh.SSHAcceptor:
        return await asyncssh.create_server(
            asyncssh.SSHServer,
            "127.0.0.1",
            0,
            server_host_keys=[str(folder / "host")],
            authorized_client_keys=str(folder / "authorized"),
            process_factory=answer,
            encoding=None,
        )

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    server = asyncio.run_coroutine_threadsafe(serve(), loop).result(30)
    try:
        yield server.get_port()
    finally:
        server.close()
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


async def _run(process: asyncssh.SSHServerProcess) -> None:
    """Run a client's command in a shell, as OpenSSH does."""
    child = await asyncio.create_subprocess_exec(
        "sh", "-c", process.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )

    async def forward(source: object, write: Callable[[bytes], None]) -> None:
        with contextlib.suppress(OSError, asyncssh.Error):
            while part := await source.read(1 << 16):
                write(part)

    async def feed() -> None:
        await forward(process.stdin, child.stdin.write)
        child.stdin.close()

    feeding = asyncio.create_task(feed())
    await asyncio.gather(forward(child.stdout, process.stdout.write), forward(child.stderr, process.stderr.write))
    process.exit(await child.wait())
    feeding.cancel()


@contextmanager
def _openssh(folder: Path) -> Iterator[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/authorized\n"
        f"PidFile none\nStrictModes no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    program = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    server = subprocess.Popen([program, "-D", "-e", "-f", str(folder / "sshd_config")], stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.05)
        yield port
    finally:
        server.terminate()
        server.wait()


@dataclass(frozen=True)
class Phone:
    """A stand-in for adb; ``state`` is what it and its device are told to do."""

    adb: Path
    device: Path

    @property
    def settings(self) -> dict[str, object]:
        return {"adb": str(self.adb), "benchmark": str(self.adb.with_name("benchmark_model")), "rounds": 1}

    def set(self, **state: object) -> None:
        self.adb.with_name("state.json").write_text(json.dumps({"devices": [["emulator-5554", "device"]], **state}))

    @property
    def left(self) -> list[Path]:
        """What lies in the device's folder for temporary files."""
        return sorted((self.device / "data/local/tmp").iterdir())


def phone(folder: Path) -> Phone:
    """Make an ``adb`` with one device."""
    for source, name in ((STAND_IN, "adb"), (PHONE_PROGRAM, "benchmark_model")):
        target = folder / name
        target.write_text(f"#!{sys.executable}\n{source.read_text()}")
        target.chmod(target.stat().st_mode | stat.S_IXUSR)
    (folder / "device/data/local/tmp").mkdir(parents=True)
    made = Phone(folder / "adb", folder / "device")
    made.set()
    return made


@dataclass(frozen=True)
class Arm:
    """A stand-in for QEMU with a root of empty files; ``state`` is what it is told to do."""

    emulator: Path
    root: Path

    @property
    def settings(self) -> dict[str, object]:
        return {"emulator": str(self.emulator), "root": str(self.root)}

    def set(self, **state: object) -> None:
        self.emulator.with_name("state.json").write_text(json.dumps(state))


def arm(folder: Path, name: str = "root") -> Arm:
    """Make an emulator that runs this machine's own Python, and says that it is an ARM."""
    emulator = folder / "qemu"
    emulator.write_text(f"#!{sys.executable}\n{STAND_IN_QEMU.read_text()}")
    emulator.chmod(emulator.stat().st_mode | stat.S_IXUSR)
    root = folder / name
    for part in ("usr/bin/python3", "proc/cpuinfo"):
        (root / part).parent.mkdir(parents=True)
        (root / part).touch()
    made = Arm(emulator, root)
    made.set()
    return made
