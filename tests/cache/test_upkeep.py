"""The cache as a folder that fills: what makes room, what is made once, and the command that lists and clears."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from compress.cache.__main__ import main as cache_command
from compress.cache.store import Entry, StageCache
from tests.cache.conftest import KEY


def aged(cache: StageCache, entry: Entry, ages: dict[str, float]) -> None:
    """Store entries that were used so many seconds ago."""
    for key, age in ages.items():
        cache.store(key, entry)
        used = time.time() - age
        os.utime(cache.folder / key / "manifest.json", (used, used))


def kept(folder: Path) -> set[str]:
    return {item.name for item in folder.iterdir() if not item.name.startswith(".")}


def test_what_was_not_used_for_longest_makes_room(entry, tmp_path):
    aged(StageCache(tmp_path), entry, {"old": 300, "older": 500, "read again": 400})
    assert StageCache(tmp_path).load("read again") is not None
    size = sum(file.stat().st_size for file in (tmp_path / "old").iterdir())
    StageCache(tmp_path, most_bytes=2.5 * size).store("new", entry)
    assert kept(tmp_path) == {"new", "read again"}
    StageCache(tmp_path, most_bytes=1).store("newest", entry)
    assert kept(tmp_path) == {"newest"}


def test_what_was_never_finished_is_removed_after_a_day(entry, tmp_path):
    for name, age in {"abandoned": 100_000, "being written": 100}.items():
        (tmp_path / f".partial-{name}").mkdir()
        os.utime(tmp_path / f".partial-{name}", (time.time() - age,) * 2)
    StageCache(tmp_path).store(KEY, entry)
    assert sorted(item.name for item in tmp_path.iterdir()) == [".partial-being written", KEY]


def test_two_that_want_the_same_take_turns(tmp_path):
    cache, inside, most = StageCache(tmp_path), [], []

    def work(number: int) -> None:
        with cache.alone(KEY):
            inside.append(number)
            most.append(len(inside))
            time.sleep(0.05)
            inside.remove(number)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert most == [1, 1, 1, 1]
    with cache.alone("one"), cache.alone("another"):
        pass


def test_a_measurement_that_two_want_is_made_once(tmp_path):
    cache, made = StageCache(tmp_path), []

    def measure() -> list[float]:
        made.append(1)
        time.sleep(0.1)
        return [0.5]

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda _: cache.remembered(KEY, measure), range(3))) == [[0.5]] * 3
    assert len(made) == 1


def test_the_command_lists_and_clears(entry, tmp_path, capsys):
    aged(StageCache(tmp_path), entry, {"a" * 64: 10, "b" * 64: 3 * 24 * 3600})
    StageCache(tmp_path).remembered(KEY, lambda: 1)

    def command(*arguments: str) -> tuple[int, list[str]]:
        with pytest.raises(SystemExit) as stopped:
            cache_command([*arguments, "--dir", str(tmp_path)])
        return int(stopped.value.code or 0), capsys.readouterr().out.splitlines()

    code_, lines = command()
    assert code_ == 0
    assert [line.split()[4] for line in lines[:2]] == ["a" * 12, "b" * 12]
    assert all(line.endswith("prune+share") for line in lines[:2])
    assert lines[2].startswith("2 finished stages")
    assert command("clear", "--older-than", "2")[1][0].startswith("removed 1 finished stage,")
    assert kept(tmp_path) == {"a" * 64, "measured"}
    command("clear")
    assert kept(tmp_path) == set()


def test_clearing_leaves_what_a_run_is_at(tmp_path, capsys):
    cache, inside, most = StageCache(tmp_path), [], []
    held, cleared = threading.Event(), threading.Event()

    def work(wait: threading.Event) -> None:
        with cache.alone(KEY):
            held.set()
            inside.append(1)
            most.append(len(inside))
            wait.wait(10)
            inside.pop()

    for key in (KEY, "idle"):
        cache.trainings(key).next().save("who", {"step": np.array(1)})
    cache.remembered("idle", lambda: 1)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(work, cleared)
        held.wait(10)
        with pytest.raises(SystemExit):
            cache_command(["clear", "--dir", str(tmp_path)])
        second = pool.submit(work, cleared)
        time.sleep(0.3)
        cleared.set()
        first.result()
        second.result()
    assert most == [1, 1], "one at a time, also after the locks were cleared"
    assert [folder.name for folder in (tmp_path / ".trainings").iterdir()] == [KEY]
    assert not (tmp_path / "measured").exists()
    assert "left: what belongs to 1 stage that" in capsys.readouterr().out


def test_the_command_names_a_folder_that_is_not_there(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        cache_command(["--dir", str(tmp_path / "none")])
    assert stopped.value.code == 2
    assert "which is not there" in " ".join(capsys.readouterr().err.split())
