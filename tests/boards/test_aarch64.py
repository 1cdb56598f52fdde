"""The board aarch64 against a stand-in for QEMU, and against QEMU itself where it is here with a root for it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from compress.boards import aarch64 as module
from compress.boards.aarch64 import Aarch64, largest_difference, same_class
from compress.candidate import Artifact, Storage
from tests.boards.files import convolutions, with_unknown_operator
from tests.boards.places import ARM_ROOT, EMULATED, Arm, arm


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Artifact]:
    folder = tmp_path_factory.mktemp("files")
    return {
        kind: convolutions(folder / f"{kind}; touch hacked $(touch hacked) '.tflite", 8, kind)
        for kind in ("float32", "int8")
    }


@pytest.fixture(scope="module")
def processor(tmp_path_factory) -> Arm:
    return arm(tmp_path_factory.mktemp("arm"), "root; touch hacked $(touch hacked) '")


@pytest.fixture(autouse=True)
def clean(tmp_path, monkeypatch, request):
    if "processor" in request.fixturenames:
        request.getfixturevalue("processor").set()
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.rglob("hacked"))


def board(processor: Arm, **fields) -> Aarch64:
    return Aarch64(**{"samples": 4, "timeout": 60.0, **processor.settings, **fields})


def failure_of(found: Aarch64, made: Artifact) -> str:
    measurement = found.measure(made)
    assert measurement.board == "aarch64"
    assert (measurement.latency_ms, measurement.estimate_ms, measurement.values) == (None, None, {})
    return measurement.failure


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """Put a program in the worker's place that writes outputs of ours."""

    def place(outputs: list, dtype: str) -> Artifact:
        (tmp_path / "worker.py").write_text(
            "import json, platform, sys, numpy\n"
            f"found = {{f'0_{{n}}': numpy.array(one, {dtype!r}) for n, one in enumerate({outputs!r})}}\n"
            "numpy.savez(json.loads(sys.argv[3])['outputs'], **found)\n"
            "print(json.dumps({'machine': platform.machine(), 'litert': '2', 'inputs': 7}))\n"
        )
        (tmp_path / "any.tflite").write_bytes(b"    TFL3")
        monkeypatch.setattr(module, "_WORKER", tmp_path / "worker.py")
        return Artifact(tmp_path / "any.tflite", Storage())

    return place


CHANGE = """
import numpy
with numpy.load("there.npz") as file:
    found = dict(file)
{0}
numpy.savez("there.npz", **found)
"""


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_equal_answers_have_no_difference_and_no_time(processor, files, kind):
    found = board(processor).measure(files[kind])
    assert found.failure is None
    assert (found.latency_ms, found.estimate_ms, found.cost_ms) == (None, None, None)
    assert found.values == {"max_difference": 0.0, "samples": 4.0, "same_class_percent": 100.0}
    (note,) = found.notes
    assert "emulated" in note
    assert "no time" in note


def test_a_difference_is_a_share_of_the_range(processor, worker):
    made = worker([[[10, 20, -100]], [[5, 0, 7]]], "int8")
    processor.set(then=CHANGE.format("found['0_1'] = numpy.array([[5, 0, 1]], numpy.int8)"))
    found = board(processor, tolerance=6 / 255).measure(made)
    assert found.values == {"max_difference": pytest.approx(6 / 255), "samples": 4.0, "same_class_percent": 50.0}
    assert "board.tolerance" in failure_of(board(processor, tolerance=5.9 / 255), made)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"then": CHANGE.format("found['0_0'] = found['0_0'] * 2")}, "differ"),
        ({"then": CHANGE.format("found['0_0'] = found['0_0'] * numpy.nan")}, "differ"),
        ({"then": CHANGE.format("found['0_0'] = found['0_0'][:, :1]")}, "other shapes"),
        ({"then": CHANGE.format("del found['0_0']")}, "other shapes"),
        ({"then": CHANGE.format("found['0_0'] = numpy.array([['a'] * 3])")}, "differ"),
        ({"then": CHANGE.format("found['0_0'] = numpy.array([[None] * 3])")}, "unreadable"),
        ({"then": "open('there.npz', 'wb').write(b'no archive')"}, "unreadable"),
        ({"then": "open('there.npz', 'r+b').truncate(200)"}, "unreadable"),
        ({"then": "import os; os.remove('there.npz')"}, "unreadable"),
        ({"then": "print('garbage')"}, "unreadable"),
        ({"then": "print('{\"machine\": 3}')"}, "unreadable"),
        ({"then": "print('[' * 100_000)"}, "unreadable"),
        ({"then": "print('x' * 3_000_000)"}, "more than"),
        ({"machine": "x86_64"}, "for x86_64, not for aarch64"),
        ({"then": "print(json.dumps({'machine': 'aarch64', 'litert': '2', 'inputs': 8}))"}, "random numbers"),
        ({"first": "import os; os.abort()"}, "code -6"),
        ({"first": "import ai_edge_litert_is_not_here"}, "make the root anew"),
        ({"first": "import time; time.sleep(60)"}, "no answer within 3"),
    ],
)
def test_an_answer_that_cannot_be_is_a_named_failure(processor, worker, state, said):
    made = worker([[[1.0, 2.0, 3.0]]], "float32")
    processor.set(**state)
    failure = failure_of(board(processor, timeout=3.0 if "sleep" in str(state) else 60.0), made)
    assert said in failure
    assert "Traceback" not in failure


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"emulator": "no-such-qemu"}, "apt-get install qemu-user-static"),
        ({"root": "/absent"}, "python -m compress.boards.aarch64_root"),
        ({"cpu": "pentium"}, "-cpu help"),
    ],
)
def test_what_is_missing_is_named(processor, files, fields, said):
    assert said in failure_of(board(processor, **fields), files["int8"])


def test_a_root_that_shows_this_machines_processor_is_refused(processor, files, tmp_path):
    (tmp_path / "usr/bin").mkdir(parents=True)
    (tmp_path / "usr/bin/python3").touch()
    assert "proc/cpuinfo" in failure_of(board(processor, root=str(tmp_path)), files["int8"])


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"tolerance": -1}, {"cpu": "-L"}, {"root": ""}, {"timeout": 0}])
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValidationError):
        Aarch64(**wrong)


def test_operators_of_tensorflow_are_lacking():
    assert "qemu-nowhere is not there" in Aarch64(emulator="qemu-nowhere").unreachable()
    assert Aarch64().lacks(["CONV_2D", "FlexRoll"]) == {"FlexRoll"}


outputs = st.integers(0, 2**31).map(lambda seed: np.random.default_rng(seed).normal(size=(3, 1, 5)))


@given(outputs, st.integers(0, 2), st.floats(0, 3))
def test_the_difference_of_floats_is_a_share_of_the_largest(scores, sample, much):
    wanted = {f"0_{number}": one for number, one in enumerate(scores)}
    given_ = {**wanted, f"0_{sample}": scores[sample] - much}
    assert largest_difference(given_, wanted) == pytest.approx(much / np.abs(scores[sample]).max())
    assert largest_difference(wanted, wanted) == 0


@given(outputs, st.integers(0, 3))
def test_the_same_class_is_counted_by_sample(scores, moved):
    wanted = {f"0_{number}": one for number, one in enumerate(scores)}
    other = {
        key: np.roll(one, 1, axis=-1) if number < moved else one for number, (key, one) in enumerate(wanted.items())
    }
    assert same_class(other, wanted) == pytest.approx(100 * (3 - moved) / 3)


def test_what_is_no_number_must_be_none_on_both_sides():
    one = {"0_0": np.array([[1.0, np.nan, np.inf]])}
    assert largest_difference(one, one) == 0
    assert largest_difference({"0_0": np.array([[1.0, 2.0, np.inf]])}, one) == math.inf
    assert largest_difference({"0_0": np.array([[1.0, np.nan, -np.inf]])}, one) == math.inf
    assert largest_difference({"0_0": one["0_0"].astype(np.float32)}, one) == math.inf
    assert same_class({"0_0": np.zeros((1, 4, 4, 3))}, {"0_0": np.zeros((1, 4, 4, 3))}) is None


if EMULATED:

    def test_real_arm_kernels_answer_as_these(files, tmp_path):
        unknown = with_unknown_operator(files["int8"].path, tmp_path / "unknown.tflite")
        bad, *good = Aarch64(root=str(ARM_ROOT)).measure_all([unknown, files["int8"], files["float32"]])
        assert "Mystery" in bad.failure
        for found, most in zip(good, (0.02, 1e-5), strict=True):
            assert found.failure is None
            assert found.values["max_difference"] <= most
            assert found.values["same_class_percent"] == 100.0
            assert found.latency_ms is None
