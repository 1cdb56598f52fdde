"""A command whose output nobody reads any more (``... | head -1``) ends quietly, as others do."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

PRINTING = """
import sys
from compress.cli.errors import guarded
def body():
    for number in range(100_000):
        print("line", number)
    return []
sys.exit(guarded(body, []))
"""
LOGGING = """
import logging, sys
from compress.cli.errors import guarded
def body():
    logging.basicConfig(stream=sys.stdout, level=logging.INFO)
    for number in range(100_000):
        logging.info("line %d", number)
    return []
sys.exit(guarded(body, []))
"""
SMALL = """
import sys
from compress.errors import run_command
def body():
    print("one line, which is written at the end")
sys.exit(run_command(body))
"""
A_MISTAKE = """
import sys
from compress.cli.errors import guarded
from compress.errors import CompressError
from compress.quiet import stderr_aside
def body():
    with stderr_aside():
        pass
    return [CompressError("key", expected="this", received="that", fix="Write this.")]
sys.exit(guarded(body, []))
"""
A_WORKER = """
import subprocess, sys
from compress.cli.errors import guarded
def body():
    worker = subprocess.Popen([sys.executable, "-c", ""], stdin=subprocess.PIPE)
    worker.wait()
    worker.stdin.write(b"x")
    worker.stdin.flush()
    return []
sys.exit(guarded(body, []))
"""


def end_of(*arguments: str, unread: str = "stdout") -> tuple[int, str]:
    """Return the exit code, and what was written to standard error, of a command whose output is closed."""
    reader, writer = os.pipe()
    os.close(reader)
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, unread: writer}
    process = subprocess.Popen([sys.executable, *arguments], cwd=REPOSITORY, text=True, **streams)
    os.close(writer)
    _, error = process.communicate()
    return process.returncode, error or ""


@pytest.mark.parametrize("code", [PRINTING, LOGGING, SMALL], ids=["print", "log", "at the end"])
def test_it_ends_without_a_word(code):
    assert end_of("-c", code) == (141, "")


def test_so_does_the_command():
    assert end_of("-m", "compress.run", "--cfg", "job") == (141, "")


def test_a_message_that_nobody_reads():
    assert end_of("-m", "compress.run", "strategy=nosuch", unread="stderr")[0] == 141


def test_another_broken_pipe_is_told():
    code, error = end_of("-c", A_WORKER, unread="stdin")
    assert code == 2
    assert "Broken pipe" in error


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize(
    ("body", "code"), [(SMALL, 0), (PRINTING, 0), (A_MISTAKE, 2)], ids=["small", "long", "mistake"]
)
def test_a_stream_that_was_closed_before_is_left_alone(closed, body, code):
    command = ["/bin/sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, body]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert "Traceback" not in done.stdout + done.stderr
