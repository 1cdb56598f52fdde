"""The android board against a stand-in for adb that speaks its command line; no phone was used."""

from __future__ import annotations

import pytest

from compress.boards.android import Android, _operators, _statistics
from compress.boards.command import BoardFailure
from compress.candidate import Artifact
from tests.boards.files import convolutions, with_unknown_operator
from tests.boards.places import Phone, phone


@pytest.fixture(scope="module")
def pocket(tmp_path_factory) -> Phone:
    return phone(tmp_path_factory.mktemp("phone"))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Artifact:
    return convolutions(tmp_path_factory.mktemp("files") / "a; touch hacked $(touch hacked) '.tflite")


@pytest.fixture(autouse=True)
def clean(pocket):
    pocket.set()
    yield
    assert pocket.left == []


def board(pocket: Phone, **fields) -> Android:
    return Android(**{"warmup": 1, "operators": False, "timeout": 60.0, **pocket.settings, **fields})


def test_a_file_is_timed(pocket, made):
    found = board(pocket, rounds=2, operators=True).measure(made)
    assert found.failure is None
    latency = found.latency_ms
    assert latency.runs == 200
    assert (latency.p90, latency.p99) == (None, None)
    assert 0 < latency.p50 <= found.values["p95_ms"]
    assert found.values["memory_bytes"] == 2.25e6
    assert [(one.name, one.ms) for one in found.operators] == [("CONV_2D", 0.020), ("MEAN", 0.005)]


def test_an_unknown_operator_is_named_and_leaves_the_other_file(pocket, made, tmp_path):
    unknown = with_unknown_operator(made.path, tmp_path / "unknown.tflite")
    bad, good = board(pocket).measure_all([unknown, made])
    assert "Mystery" in bad.failure
    assert "leave the layer out" in bad.failure
    assert good.failure is None


@pytest.mark.parametrize(
    ("state", "fields", "said"),
    [
        ({}, {"adb": "no-such-adb"}, "platform tools"),
        ({}, {"benchmark": None}, "board.benchmark"),
        ({}, {"benchmark": "/absent/benchmark_model"}, "not there"),
        ({"devices": []}, {}, "USB debugging"),
        ({"devices": [["a", "unauthorized"]]}, {}, "allow debugging"),
        ({"devices": [["a", "device"], ["b", "device"]]}, {}, "board.serial"),
        ({"devices": [["a", "device"]]}, {"serial": "b"}, "no such device"),
        ({"full": True}, {}, "No space left on device"),
        ({"unplugged": True}, {}, "not found"),
        ({"hangs": True}, {"timeout": 0.5}, "no answer within"),
        ({"says": "garbage"}, {}, "unreadable"),
        ({"says": ""}, {}, "unreadable"),
        ({"says": "count=5 first=1 avg=-3 median=1e99"}, {}, "unreadable|cannot be"),
        ({"old": True}, {}, "newer TensorFlow Lite"),
    ],
)
def test_what_goes_wrong_is_said(pocket, made, state, fields, said):
    pocket.set(**state)
    found = board(pocket, **fields).measure(made)
    assert found.latency_ms is None
    assert any(part in found.failure for part in said.split("|")), found.failure


def test_one_of_several_devices(pocket, made):
    pocket.set(devices=[["a", "device"], ["emulator-5554", "device"]])
    assert board(pocket, serial="emulator-5554").measure(made).failure is None


@pytest.mark.parametrize("serial", ["-s", "a b", "", "$(id)"])
def test_a_serial_that_is_none_is_refused(serial):
    with pytest.raises(ValueError, match="serial"):
        Android(serial=serial)


def test_the_timed_runs_count_and_not_the_warm_up():
    printed = "count=1 curr=9\ncount=2 first=9 curr=8 min=8 max=9 avg=8.5 std=1 p5=8 median=8.5 p95=9\n"
    printed += "I tflite: count=50 first=4 curr=4 min=3 max=9 avg=4.5e+00 std=1 p5=3 median=4.25 p95=8\n"
    assert _statistics(printed)["median"] == 4.25
    assert _statistics(printed)["count"] == 50
    with pytest.raises(BoardFailure, match="median"):
        _statistics("count=50 first=4 curr=4 min=3 max=9 avg=4.5 std=1\n")


def test_both_forms_of_the_profile_are_read():
    head = "Operator-wise Profiling Info for Regular Benchmark Runs:\n=== Run Order =====\n"
    older = (
        "\t[node type]\t[start]\t[first]\t[avg ms]\t[%]\n\tCONV_2D\t0.000\t5.3\t4.2\t90.1%\t90.1%\t0.0\t1\t[a]:0\n\n"
    )
    newer = "\t[node type]\t[first]\t[avg ms]\t[%]\n\tCONV_2D\t5.3\t4.2\t90.1%\t90.1%\t0.0\t1\t[a]:0\n\n"
    for table in (older, newer):
        assert [(one.name, one.ms) for one in _operators(head + table + "CONV_2D\t9.9\t9.9\t1%\n")] == [
            ("CONV_2D", 4.2)
        ]
    assert _operators("no profile") == ()
