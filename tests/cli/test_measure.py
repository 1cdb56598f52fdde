"""``compress.measure``: one table of several boards; a board that fails is a row."""

from __future__ import annotations

import json

import pytest
import yaml

from compress.boards.board import Board
from compress.candidate import Latency, Measurement
from compress.cli import boards
from compress.errors import CompressError
from compress.measure import main
from tests.boards.files import convolutions, with_unknown_operator
from tests.boards.places import ARM_ROOT, EMULATED, SERVERS, arm, ssh_server


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    good = convolutions(folder / "good.tflite", 4, "int8").path
    return {
        "good": good,
        "small": convolutions(folder / "small.tflite", 1, "int8").path,
        "unknown": with_unknown_operator(good, folder / "unknown.tflite").path,
    }


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return ended.value.code, said.out, said.err


QUICK = ("host.runs=100", "host.warmup=1", "host.precision=null")


def test_one_command_measures_on_every_board_that_needs_no_hardware(files, capsys, tmp_path):
    chosen = ["host", "ssh", "ethos_u", "microcontroller", "aarch64", "roofline"]
    emulator = {"root": ARM_ROOT} if EMULATED else arm(tmp_path).settings
    settings = [*QUICK, *(text.replace("host.", "ssh.") for text in QUICK)]
    settings += [f"aarch64.{key}={value}" for key, value in emulator.items()]
    with ssh_server(tmp_path, SERVERS[-1]) as remote:
        settings += [f"ssh.{key}={value}" for key, value in remote.settings.items()]
        arguments = [files["good"], "--boards", ",".join(chosen), *settings, "-o", tmp_path / "rows.json"]
        code, out, _ = run(capsys, *arguments, "--operators")
    assert code == 0
    rows = {row["board"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert list(rows) == chosen
    assert [name for name, row in rows.items() if row["latency_ms"] is not None] == ["host", "ssh"]
    assert [name for name, row in rows.items() if row["estimate_ms"] is not None] == ["ethos_u", "roofline"]
    assert rows["microcontroller"]["values"]["arena_bytes"] > 0
    assert rows["aarch64"]["values"]["max_difference"] <= 0.02
    assert all(f" {name} " in out for name in chosen)
    assert "estimated ms by operator" in out
    assert f"{rows['host']['latency_ms']['p50']:.3f}" in out


def test_a_board_that_fails_is_a_row_and_the_rest_is_complete(files, capsys, tmp_path):
    arguments = [files["good"], "--boards", "android,ssh,roofline", "ssh.host=127.0.0.1", "ssh.port=1"]
    known = tmp_path / "known"
    known.write_text("")
    arguments += [f"ssh.known_hosts={known}", "android.adb=no-such-adb", "-o", tmp_path / "rows.json"]
    code, out, _ = run(capsys, *arguments)
    assert code == 1
    android, ssh, roofline = json.loads((tmp_path / "rows.json").read_text())
    assert "platform tools" in android["failure"]
    assert "cannot be reached" in ssh["failure"]
    assert roofline["failure"] is None
    assert "platform tools" in " ".join(out.split())


def test_files_of_the_same_name_are_told_apart(files, capsys, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.tflite").write_bytes(files["good"].read_bytes())
    places = [tmp_path / name / "model.tflite" for name in ("one", "two")]
    boards.print_rows(boards.measure_files(boards.load_boards(["roofline"], []), [*places, files["good"]]))
    out = capsys.readouterr().out
    assert all(f" {place} " in out for place in (*places, "good.tflite"))


def test_files_are_compared_with_the_first(files, capsys, tmp_path):
    names = [files["good"], files["unknown"], files["small"]]
    code, _, _ = run(capsys, *names, "--boards", "roofline", "-o", tmp_path / "rows.json")
    assert code == 1
    first, unknown, small = json.loads((tmp_path / "rows.json").read_text())
    assert (first["speedup"], unknown["speedup"]) == (1.0, None)
    assert small["speedup"] == pytest.approx(first["estimate_ms"] / small["estimate_ms"])
    assert "Mystery" in unknown["failure"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--boards", "hots"], "host"),
        (["host.tiemout=3"], "timeout"),
        (["host.threads=0"], "host.threads"),
        (["ssh.host=pi"], "asked for"),
        (["--boards", "ssh"], "ssh.host"),
        (["absent.tflite"], "no such file"),
        (["/"], "received a folder"),
        (["--boards", ""], "a name without letters"),
        (["--fit", "profile.yaml", "--boards", "roofline"], "--boards host"),
        (["--fit", "profile.yaml", *QUICK], "at least 4"),
    ],
)
def test_a_mistake_is_one_paragraph_and_exit_code_2(files, capsys, arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, files["good"], *arguments)
    assert code == 2
    assert said in " ".join(err.split())
    assert not list(tmp_path.iterdir())


def test_a_fitted_profile_is_a_board_of_ones_own(files, capsys, tmp_path, monkeypatch):
    class Linear(Board):
        name = "host"

        def measure(self, artifact):
            time = artifact.path.stat().st_size / 1e4
            return Measurement("host", Latency(time, time, time, time, 100, 1))

    monkeypatch.setattr(boards, "load_boards", lambda names, settings, extra: [Linear()])
    target = tmp_path / "mine/board/mine.yaml"
    code, _, _ = run(capsys, *([files["good"], files["small"]] * 2), "--fit", target)
    assert code == 0
    assert "board=host" in yaml.safe_load(target.read_text())["fitted_to"]
    monkeypatch.undo()
    code, out, _ = run(capsys, files["good"], "--boards", "mine", "--config-dir", tmp_path / "mine")
    assert code == 0
    assert "fitted to board=host" in " ".join(out.split())


def test_a_board_that_raises_is_a_row_too(files):
    class Broken(Board):
        name = "broken"

        def measure(self, artifact):
            raise RuntimeError("smoke")

    (row,) = boards.measure_files([Broken()], [files["good"]])
    assert "smoke" in row.measurement.failure
    with pytest.raises(CompressError, match="at least one"):
        boards.measure_files([Broken()], [])
