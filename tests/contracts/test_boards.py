"""What every board in ``conf/board`` must keep; a new YAML is picked up by itself."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from pathlib import Path

import pytest

from compress.boards.board import Board
from compress.candidate import Artifact, Measurement, Storage
from compress.cli.boards import load_boards
from compress.cli.places import conf_dir
from compress.errors import CompressError
from compress.tracking.report import board_name
from tests.boards.files import convolutions, with_unknown_operator
from tests.boards.places import arm, phone, ssh_server

BOARDS = sorted(file.stem for file in (conf_dir() / "board").glob("*.yaml"))
QUICK = {"runs": 100, "warmup": 1, "precision": "null", "timeout": 120}
"""Fields that save time, where a board has them."""


@pytest.fixture(scope="module", params=BOARDS)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def board(name, tmp_path_factory) -> Board:
    """The board with its defaults, or with what it needs to be found."""
    if name == "ssh":
        with ssh_server(tmp_path_factory.mktemp("ssh")) as remote:
            yield configured(name, remote.settings)
    else:
        stand_ins = {"android": phone, "aarch64": arm}
        yield configured(name, stand_ins[name](tmp_path_factory.mktemp(name)).settings if name in stand_ins else {})


def configured(name: str, settings: dict[str, object]) -> Board:
    plain = (conf_dir() / "board" / f"{name}.yaml").read_text()
    quick = {key: value for key, value in QUICK.items() if f"\n{key}: " in plain}
    return load_boards([name], [f"{name}.{key}={value}" for key, value in {**quick, **settings}.items()])[0]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Artifact]:
    folder = tmp_path_factory.mktemp("files")
    good = convolutions(folder / "good.tflite", 4, "int8")
    for bad, content in (("empty", b""), ("text", b"no model at all"), ("cut", good.path.read_bytes()[:400])):
        (folder / f"{bad}.tflite").write_bytes(content)
    return {
        "good": good,
        "small": convolutions(folder / "small.tflite", 1, "int8"),
        "unknown": with_unknown_operator(good.path, folder / "unknown.tflite"),
        **{bad: Artifact(folder / f"{bad}.tflite", Storage()) for bad in ("empty", "text", "cut", "absent")},
    }


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """Boards clean up after themselves."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    assert list(folder.iterdir()) == []


def test_it_says_something_of_a_good_file(board, name, files):
    found = board.measure(files["good"])
    assert found.failure is None
    assert found.board == name
    assert (found.latency_ms is None) or (found.estimate_ms is None)
    times = [] if found.latency_ms is None else [v for v in dataclasses.astuple(found.latency_ms)[:4] if v is not None]
    times += [] if found.estimate_ms is None else [found.estimate_ms]
    assert all(math.isfinite(value) and value > 0 for value in times)
    assert times or found.values
    assert all(math.isfinite(value) and value >= 0 for value in found.values.values())
    assert all(one.ms >= 0 for one in found.operators)


def test_files_are_answered_in_order_and_a_bad_one_leaves_the_others(board, files):
    asked = [files[which] for which in ("small", "unknown", "text", "good")]
    one, unknown, text, other = board.measure_all(asked)
    assert unknown.failure
    assert text.failure
    assert one.failure is None
    assert other.failure is None
    assert other != one
    for key in ("activation_bytes", "arena_bytes", "sram_bytes"):
        if key in one.values:
            assert one.values[key] < other.values[key]


@pytest.mark.parametrize("bad", ["empty", "text", "cut", "absent", "unknown"])
def test_a_bad_file_is_a_named_failure(board, name, bad, files):
    found = board.measure(files[bad])
    assert isinstance(found, Measurement)
    assert found.board == name
    assert (found.latency_ms, found.estimate_ms) == (None, None)
    assert found.failure
    assert "Traceback" not in found.failure
    assert len(found.failure) < 600
    assert bad != "unknown" or "Mystery" in found.failure or "CUSTOM" in found.failure


def test_its_name_is_its_file(board, name):
    assert board.name == name
    kind = type(board)
    assert board_name({"_target_": f"{kind.__module__}.{kind.__qualname__}"}) == name


def test_a_wrong_field_is_a_clear_error(name):
    with pytest.raises(CompressError, match="tiemout"):
        load_boards([name], [f"{name}.tiemout=1"])


def test_it_is_frozen_and_says_what_widths_it_likes(board):
    assert board.channel_multiple == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        board.channel_multiple = 2


def test_its_yaml_explains_each_field(board, name):
    lines = Path(conf_dir(), "board", f"{name}.yaml").read_text().splitlines()
    assert lines[0].startswith("# ")
    written = {line.partition(":")[0] for line in lines if not line.startswith((" ", "#", "_target_"))}
    assert written == {field.name for field in dataclasses.fields(board)}
