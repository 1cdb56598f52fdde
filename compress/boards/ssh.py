"""Any machine that answers to SSH and has Python and LiteRT: a Raspberry Pi, a Jetson, a server.

The files and the program that times them go over the connection into a folder there, which is removed in the end. The
project itself is not needed there: ``pip install ai-edge-litert`` is. Here it takes ``pip install 'compress[ssh]'``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shlex
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from annotated_types import Ge, Gt, Le, MinLen
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from compress.boards.board import Board
from compress.boards.command import LONGEST_ANSWER, BoardFailure, measure_readable
from compress.boards.timing import Timing, read_times, with_next_step
from compress.candidate import Artifact, Measurement

if TYPE_CHECKING:
    import asyncssh

_TIMER = Path(__file__).with_name("host_worker.py")
_REMOTE = Path(__file__).with_name("ssh_worker.py")
_START = "import sys;s=sys.stdin.buffer;exec(compile(s.read(int(s.readline())),'ssh_worker','exec'))"
"""What the remote Python is started with: it reads the program's length, and the program."""
_FOLDER = re.compile(r"(/[\w.-]+)*/compress-\w+")
_CHUNK = 1 << 16
_CLEAN_UP_SECONDS = 15.0


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Ssh(Timing, Board):
    """Times files over SSH, in turns; more fields in Timing.

    The host's key must be in ``known_hosts``. You are let in by a key, of the agent or of a file; none is stored here,
    and no password is asked for.

    Attributes:
        host: name or address.
        user: null: your own name.
        port: of the SSH server; null: 22, or what ~/.ssh/config says of the host, as for the user.
        key: file of the private key; null: the agent's, and those in ~/.ssh.
        known_hosts: file with the keys of hosts.
        python: the Python there that has LiteRT.
        folder: where the temporary folder is made there; null: where the system makes them.
        connect_timeout: seconds until a host that does not answer is given up.
    """

    host: Annotated[str, MinLen(1), Field(pattern=r"^[^-\s][^\s]*$")] = ""
    user: Annotated[str, MinLen(1)] | None = None
    port: Annotated[int, Ge(1), Le(65535)] | None = None
    key: Annotated[str, MinLen(1)] | None = None
    known_hosts: Annotated[str, MinLen(1)] = "~/.ssh/known_hosts"
    python: Annotated[str, MinLen(1)] = "python3"
    folder: Annotated[str, MinLen(1)] | None = None
    connect_timeout: Annotated[float, Gt(0), Le(3600)] = 20.0

    name: ClassVar[str] = "ssh"

    def unreachable(self) -> str | None:
        """Say why the machine lets nobody in, if it does not."""
        try:
            self._require_client()
            asyncio.run(self._meet())
        except BoardFailure as failure:
            return str(failure)
        return None

    def measure(self, artifact: Artifact) -> Measurement:
        """Return the latency of one sample there."""
        return self.measure_all([artifact])[0]

    def measure_all(self, artifacts: Sequence[Artifact]) -> list[Measurement]:
        """Return the latency of one sample of each, taken in turns there."""
        return measure_readable(self.name, artifacts, self._measure_there)

    def _measure_there(self, artifacts: Sequence[Artifact]) -> list[Measurement]:
        self._require_client()
        printed = asyncio.run(self._time([artifact.path for artifact in artifacts]))
        return read_times(self.name, printed, len(artifacts))

    def _require_client(self) -> None:
        if find_spec("asyncssh") is None:
            raise BoardFailure("asyncssh is not installed; pip install 'compress[ssh]'")

    async def _meet(self) -> None:
        async with await self._connect():
            pass

    async def _time(self, files: Sequence[Path]) -> str:
        """Return what the timing program prints there."""
        seconds = self.timeout * len(files)
        parts = [_REMOTE.read_bytes(), _TIMER.read_bytes(), *(file.read_bytes() for file in files)]
        header = {
            "folder": self.folder,
            "options": {**json.loads(self.worker_options()), "attached": True},
            "program": len(parts[1]),
            "files": [len(part) for part in parts[2:]],
        }
        sent = b"%d\n%s%s\n" % (len(parts[0]), parts[0], json.dumps(header).encode()) + b"".join(parts[1:])
        answer = _RemoteAnswer()
        async with await self._connect() as connection:
            try:
                await asyncio.wait_for(self._run(connection, sent, answer), seconds)
            except TimeoutError:
                answer.broken = f"no answer within {seconds:g} s"
        if answer.code == 0 and answer.broken is None:
            return answer.text.partition("\n")[2]
        await self._clean_up(answer)
        raise BoardFailure(self._reason(answer))

    async def _connect(self) -> asyncssh.SSHClientConnection:
        import asyncssh

        hosts = Path(self.known_hosts).expanduser()
        if not hosts.is_file():
            raise BoardFailure(f"{hosts}, the file with the hosts' keys, is not there; ssh {self.host} once to make it")
        options: dict[str, object] = {"known_hosts": str(hosts), "preferred_auth": "publickey"}
        options |= {"connect_timeout": self.connect_timeout, "login_timeout": self.connect_timeout}
        options |= {"keepalive_interval": 5, "keepalive_count_max": 6}
        if self.port is not None:
            options["port"] = self.port
        if self.user is not None:
            options["username"] = self.user
        if self.key is not None:
            key = Path(self.key).expanduser()
            if not key.is_file():
                raise BoardFailure(f"{key}, your key, is not there; correct board.key")
            options["client_keys"] = [str(key)]
        place = self.host if self.port is None else f"{self.host}, port {self.port},"
        scan = "ssh-keyscan" if self.port is None else f"ssh-keyscan -p {self.port}"
        try:
            return await asyncssh.connect(self.host, **options)
        except asyncssh.HostKeyNotVerifiable as error:
            raise BoardFailure(
                f"the key of {place} is not the one in {hosts}, or none is there: make sure that it is the right "
                f"machine, then {scan} {self.host} >> {hosts}"
            ) from error
        except asyncssh.PermissionDenied as error:
            raise BoardFailure(
                f"{place} accepts none of your keys; ssh-copy-id it there, or name it: board.key"
            ) from error
        except asyncssh.KeyImportError as error:
            raise BoardFailure(
                f"your key cannot be used ({error}); unlock it with ssh-add, without board.key"
            ) from error
        except (OSError, asyncssh.Error, ValueError) as error:
            reason = str(error)[:200] or type(error).__name__
            raise BoardFailure(f"{place} cannot be reached ({reason}); is it on, and is board.port right?") from error

    async def _run(self, connection: asyncssh.SSHClientConnection, sent: bytes, answer: _RemoteAnswer) -> None:
        import asyncssh

        command = f"{shlex.quote(self.python)} -c {shlex.quote(_START)}"
        try:
            # Closing the process's standard input early would tell the other side to stop.
            async with connection.create_process(command, encoding=None) as process:
                await asyncio.gather(
                    _send(process.stdin, sent),
                    answer.take(process.stdout, "output", LONGEST_ANSWER, process),
                    answer.take(process.stderr, "errors", LONGEST_ANSWER, process),
                )
                done = await process.wait(check=False)
                answer.code = done.exit_status
        except (OSError, asyncssh.Error) as error:
            answer.broken = f"the connection broke off ({str(error)[:200] or type(error).__name__})"

    async def _clean_up(self, answer: _RemoteAnswer) -> None:
        """Remove the folder there, should the program there not have come to it."""
        import asyncssh

        folder = answer.folder
        if folder is None:
            return
        try:
            async with await self._connect() as connection:
                # What it says to that is of no interest, however long it is.
                command = f"rm -rf -- {shlex.quote(folder)}"
                removing = connection.run(command, stdout=asyncssh.DEVNULL, stderr=asyncssh.DEVNULL)
                await asyncio.wait_for(removing, _CLEAN_UP_SECONDS)
        except Exception as error:
            answer.left = f"; {folder} may be left there ({str(error)[:100] or type(error).__name__})"

    def _reason(self, answer: _RemoteAnswer) -> str:
        errors = [line for line in answer.errors.decode(errors="replace").splitlines() if line.strip()]
        last = errors[-1].strip()[:300] if errors else ""
        said = answer.error
        if answer.broken is not None:
            reason = answer.broken
        elif said is not None:
            reason = f"{said}; make room there, or name another board.folder"
        elif answer.code in (126, 127):
            reason = f"{self.python} does not run there ({last}); name one that does: board.python"
        elif answer.code is None:
            reason = "the program there was killed"
        else:
            reason = with_next_step(f"the program there ended with code {answer.code}: {last}".rstrip(": "))
        return reason + answer.left


class _RemoteAnswer:
    """What has come back so far."""

    def __init__(self) -> None:
        self.output, self.errors = bytearray(), bytearray()
        self.code: int | None = None
        self.broken: str | None = None
        self.left = ""

    async def take(
        self, stream: asyncssh.SSHReader[bytes], name: str, most: int, process: asyncssh.SSHClientProcess[bytes]
    ) -> None:
        """Read a stream to its end, or until it has said more than it may."""
        read = getattr(self, name)
        while part := await stream.read(_CHUNK):
            read += part
            if len(read) > most:
                self.broken = f"an answer of more than {most:,} bytes"
                process.close()
                return

    @property
    def text(self) -> str:
        return self.output.decode(errors="replace")

    def _lines(self) -> list[dict[str, object]]:
        found = []
        for line in self.text.splitlines():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                continue
            found += [value] if isinstance(value, dict) else []
        return found

    @property
    def folder(self) -> str | None:
        """The folder made there; None if none was, or if what is said of it cannot be one of ours."""
        folders = [line["folder"] for line in self._lines() if set(line) == {"folder"}]
        first = folders[0] if folders else None
        return first if isinstance(first, str) and _FOLDER.fullmatch(first) and ".." not in first else None

    @property
    def error(self) -> str | None:
        """What the program there says went wrong."""
        errors = [line["error"] for line in self._lines() if set(line) == {"error"}]
        return str(errors[0])[:300] if errors else None


async def _send(stream: asyncssh.SSHWriter[bytes], sent: bytes) -> None:
    # A program there that has ended reads nothing more; its exit code says why.
    with contextlib.suppress(OSError):
        for start in range(0, len(sent), _CHUNK):
            stream.write(sent[start : start + _CHUNK])
            await stream.drain()
