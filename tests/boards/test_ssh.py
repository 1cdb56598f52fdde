"""The ssh board against real SSH servers on loopback: what it says, and that nothing is left there."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import asyncssh
import pytest

from compress.boards import ssh as module
from compress.boards.ssh import Ssh
from compress.candidate import Artifact
from tests.boards.files import convolutions
from tests.boards.places import SERVERS, Remote, ssh_server

QUICK = {"runs": 100, "warmup": 1, "precision": None, "timeout": 60.0}


@pytest.fixture(scope="module", params=SERVERS)
def remote(request, tmp_path_factory) -> Remote:
    with ssh_server(tmp_path_factory.mktemp(request.param), request.param) as running:
        yield running


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Artifact:
    return convolutions(tmp_path_factory.mktemp("files") / "small.tflite")


@pytest.fixture(autouse=True)
def left(request):
    """Nothing stays behind on the other side."""
    if "remote" not in request.fixturenames:
        yield
        return
    remote = request.getfixturevalue("remote")
    yield
    deadline = time.monotonic() + 20
    while list(remote.folder.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(remote.folder.iterdir()) == []


def board(remote: Remote, **fields) -> Ssh:
    return Ssh(**{**QUICK, **remote.settings, **fields})


def failure_of(found: Ssh, made: Artifact) -> str:
    measurement = found.measure(made)
    assert measurement.board == "ssh"
    assert measurement.latency_ms is None
    return measurement.failure


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Put a program of ours in the place of the one that takes times there."""

    def place(code: str) -> None:
        (tmp_path / "timing.py").write_text(code)
        monkeypatch.setattr(module, "_TIMER", tmp_path / "timing.py")

    return place


def test_files_are_timed_there(remote, tmp_path):
    small, large = (convolutions(tmp_path / f"{n}.tflite", n) for n in (1, 64))
    one, other = board(remote).measure_all([small, large])
    assert (one.failure, other.failure) == (None, None)
    assert other.latency_ms.p50 > 3 * one.latency_ms.p50
    assert one.latency_ms.runs >= 100
    assert one.values["load_ms"] > 0


def test_names_never_reach_a_shell(remote, tmp_path):
    evil = tmp_path / "a; touch hacked; $(touch hacked) `touch hacked` '\".tflite"
    made = convolutions(evil)
    assert board(remote).measure(made).failure is None
    strange = remote.folder / "a b; touch hacked '$(id)'"
    strange.mkdir()
    try:
        assert board(remote, folder=str(strange)).measure(made).failure is None
        assert "does not run" in failure_of(board(remote, python="no python; touch hacked"), made)
    finally:
        strange.rmdir()
    assert not [*Path.cwd().glob("hacked"), *Path.home().glob("hacked"), *tmp_path.rglob("hacked")]


@pytest.mark.parametrize("host", ["", "-oProxyCommand=touch hacked", "a b", " "])
def test_a_host_that_is_none_is_refused(host):
    with pytest.raises(ValueError, match="host"):
        Ssh(host=host)


def test_a_wrong_host_key_is_refused_before_anything_is_sent(remote, made, tmp_path):
    other = asyncssh.generate_private_key("ssh-ed25519").export_public_key().decode().strip()
    (tmp_path / "known").write_text(f"[127.0.0.1]:{remote.port} {other}\n")
    failure = failure_of(board(remote, known_hosts=str(tmp_path / "known")), made)
    assert "key of 127.0.0.1" in failure
    assert "ssh-keyscan" in failure
    (tmp_path / "known").write_text("")
    assert "ssh-keyscan" in failure_of(board(remote, known_hosts=str(tmp_path / "known")), made)
    assert "not there" in failure_of(board(remote, known_hosts=str(tmp_path / "absent")), made)


def test_a_key_that_is_not_let_in(remote, made, tmp_path):
    asyncssh.generate_private_key("ssh-ed25519").write_private_key(str(tmp_path / "other"))
    assert "accepts none of your keys" in failure_of(board(remote, key=str(tmp_path / "other")), made)
    assert "board.key" in failure_of(board(remote, key=str(tmp_path / "absent")), made)
    locked = asyncssh.generate_private_key("ssh-ed25519").export_private_key("pkcs8-pem", passphrase="secret")
    (tmp_path / "locked").write_bytes(locked)
    assert "ssh-add" in failure_of(board(remote, key=str(tmp_path / "locked")), made)


def test_an_unreachable_host(remote, made):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert "cannot be reached" in failure_of(board(remote, port=port), made)
    assert "cannot be reached" in board(remote, port=port).unreachable()
    assert board(remote).unreachable() is None


def test_a_host_that_never_answers(remote, made, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        found = board(remote, port=silent.getsockname()[1], connect_timeout=0.5)
        assert "cannot be reached" in failure_of(found, made)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os, signal; os.kill(os.getppid(), signal.SIGKILL)", "killed|ended with code|broke off"),
        ("import os; os.abort()", "ended with code"),
        ("print('garbage')", "unreadable"),
        ("import sys; sys.stdout.buffer.write(bytes(range(256)) * 100)", "unreadable"),
        ("print('x' * 3_000_000)", "more than"),
        ("import time; time.sleep(600)", "no answer within 3"),
        ("import ai_edge_litert_is_not_here", "pip install ai-edge-litert"),
    ],
    ids=["end-killed", "crash", "garbage", "bytes", "endless", "hangs", "no-runtime"],
)
def test_what_goes_wrong_there_is_said(remote, made, program, code, said):
    program(code)
    assert re.search(said, failure_of(board(remote, timeout=3.0 if "sleep" in code else 60.0), made))


def test_too_long_an_answer_of_a_program_that_ends_well_is_no_answer(remote, made, program, monkeypatch):
    # The program has ended before it can be told to stop.
    monkeypatch.setattr("asyncssh.SSHClientProcess.close", lambda process: None)
    program("print('x' * 3_000_000)")
    assert "more than" in failure_of(board(remote), made)


def test_a_full_disk_there(remote, made, monkeypatch, tmp_path):
    # No file may become larger than 512 bytes there: as on a full disk, writing fails in the middle.
    limited = "import resource, signal\nresource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))\n"
    code = (
        limited
        + "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        + module._REMOTE.read_text().replace("from __future__ import annotations\n", "")
    )
    (tmp_path / "remote.py").write_text(f"from __future__ import annotations\n{code}")
    monkeypatch.setattr(module, "_REMOTE", tmp_path / "remote.py")
    failure = failure_of(board(remote), made)
    assert "File too large" in failure
    assert "make room there" in failure


def test_a_folder_that_is_not_there(remote, made):
    assert "board.folder" in failure_of(board(remote, folder=str(remote.folder / "absent")), made)


def test_when_this_side_is_killed_the_other_ends_and_cleans_up(remote, made, tmp_path):
    (tmp_path / "timing.py").write_text(
        f"import time\nwhile True:\n    time.sleep(0.01)\n    open({str(tmp_path / 'beat')!r}, 'a').write('x')\n"
    )
    code = (
        "import sys; from pathlib import Path; from compress.boards import ssh; from compress.candidate import *\n"
        f"ssh._TIMER = Path({str(tmp_path / 'timing.py')!r})\n"
        f"ssh.Ssh(**{ {**QUICK, **remote.settings}!r}).measure(Artifact(Path({str(made.path)!r}), Storage()))\n"
    )
    client = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while not (tmp_path / "beat").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    client.kill()
    client.wait()
    deadline = time.monotonic() + 20
    while list(remote.folder.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    size = (tmp_path / "beat").stat().st_size
    time.sleep(0.3)
    assert (tmp_path / "beat").stat().st_size == size


@pytest.mark.parametrize(
    ("said", "code", "failure"),
    [
        (b'{"folder": "/home"}\n{"files": [{"p50": -1}]}\n', 0, "unreadable"),
        (b'{"folder": "/home/../etc/compress-1"}\nnothing\n', 3, "code 3"),
        (b'{"folder": "/tmp/compress-1; reboot"}\n', 3, "code 3"),
        (b'{"folder": ["/tmp/compress-1"]}\n', 3, "code 3"),
    ],
)
def test_a_server_that_says_anything_is_not_believed(said, code, failure, made, tmp_path):
    """It names a folder that is not one of ours: that is not removed."""
    asked: list[str] = []

    def answer(process: asyncssh.SSHServerProcess) -> None:
        asked.append(process.command)
        process.stdout.write(said)
        process.exit(code)

    with ssh_server(tmp_path, answer=answer) as liar:
        assert failure in failure_of(board(liar), made)
    assert len(asked) == 1
