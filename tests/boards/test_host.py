"""The host board: times a file in a process of its own, and answers in words when that fails."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import tensorflow as tf
import tf_keras
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from compress.boards import host as module
from compress.boards import host_worker
from compress.boards.host import Host
from compress.candidate import Artifact, Calibration, Candidate, Storage
from compress.data.source import Split, make_data
from compress.deploy.tflite import export

layers = tf_keras.layers
TIMES = {"p50": 1.0, "p90": 2.0, "p99": 3.0, "mean": 1.5, "first": 4.0, "interval": 0.01}
ANSWER = {**TIMES, "runs": 100, "threads": 1, "load_ms": 0.5, "cpu_ms": 1.0, "memory_bytes": None}


def artifact(folder: Path, filters: int = 2, scheme: str = "float32") -> Artifact:
    image = tf_keras.Input((16, 16, filters), name="image")
    x = layers.Conv2D(filters, 3, padding="same")(image)
    model = tf_keras.Model(image, layers.GlobalAveragePooling2D()(layers.Conv2D(filters, 3, padding="same")(x)))
    part = Split(np.random.default_rng(0).normal(size=(8, 16, 16, filters)).astype(np.float32), np.arange(8) % 2)
    candidate = Candidate(model, storage=Storage(scheme, Calibration(4)))
    return export(candidate, make_data("random", part, part), folder / f"{filters}.tflite")


def said(answer: dict) -> str:
    return json.dumps({"files": [answer]})


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """Put a program of ours in the worker's place."""

    def place(code: str) -> Artifact:
        script = tmp_path / "worker.py"
        script.write_text(code)
        monkeypatch.setattr(module, "_WORKER", script)
        return Artifact(tmp_path / "any.tflite", Storage())

    return place


def failure_of(board: Host, made: Artifact) -> str:
    measurement = board.measure(made)
    assert measurement.board == "host"
    assert measurement.latency_ms is None
    assert measurement.failure
    return measurement.failure


@pytest.mark.parametrize("scheme", ["float32", "int8"])
def test_a_file_is_timed(scheme, tmp_path):
    measurement = Host(runs=120, warmup=2).measure(artifact(tmp_path, scheme=scheme))
    latency = measurement.latency_ms
    assert measurement.failure is None
    assert latency.threads == 1
    assert latency.runs >= 120
    assert 0 < latency.p50 <= latency.p90 <= latency.p99
    # The mean of times above zero, half of them at least p50.
    assert latency.p50 / 2 <= latency.mean
    assert latency.p50 < 100
    assert latency.first > 0
    assert measurement.values["load_ms"] > 0
    assert 0 < measurement.values["memory_bytes"] < 2**30


@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_a_vocabulary_is_not_left(dtype, tmp_path):
    words = tf_keras.Input((5,), dtype=dtype)
    model = tf_keras.Model(words, layers.Dense(2)(layers.Flatten()(layers.Embedding(7, 3)(words))))
    part = Split(np.zeros((8, 5), np.float32), np.arange(8) % 2)
    made = export(Candidate(model), make_data("words", part, part), tmp_path / "words.tflite")
    measurement = Host(runs=100, warmup=1).measure(made)
    assert measurement.failure is None


def test_more_work_takes_longer(tmp_path):
    small, large = (Host(runs=100, warmup=5).measure(artifact(tmp_path, n)).latency_ms for n in (1, 64))
    assert large.p50 > 3 * small.p50


def test_two_threads_are_reported_as_two(tmp_path):
    assert Host(runs=100, warmup=1, threads=2).measure(artifact(tmp_path)).latency_ms.threads == 2


def test_a_narrow_interval_takes_more_runs_and_time_bounds_them(tmp_path):
    made = artifact(tmp_path, 64)
    short, long = (Host(runs=100, precision=1e-6, seconds=seconds).measure(made).latency_ms for seconds in (0.0, 2.0))
    assert 100 <= short.runs < long.runs
    assert min(short.interval, long.interval) > 1e-6


def test_files_are_measured_in_turns_and_one_that_crashes_leaves_the_others(tmp_path):
    small, large = artifact(tmp_path, 1), artifact(tmp_path, 64)
    (tmp_path / "none.tflite").write_bytes(b"nothing")
    broken = Artifact(tmp_path / "none.tflite", Storage())
    first, failed, second, again = Host(runs=100).measure_all([small, broken, large, small])
    assert failed.latency_ms is None
    assert "code" in failed.failure
    assert second.latency_ms.p50 > 3 * first.latency_ms.p50
    # The same file; the machine may be busy with other tests.
    assert 0.5 < again.latency_ms.p50 / first.latency_ms.p50 < 2


def test_every_input_is_filled(tmp_path):
    one, other = tf_keras.Input((4,)), tf_keras.Input((5,))
    model = tf_keras.Model([one, other], layers.Dense(2)(layers.Concatenate()([one, other])))
    path = tmp_path / "two.tflite"
    path.write_bytes(tf.lite.TFLiteConverter.from_keras_model(model).convert())
    assert Host(runs=100, precision=None).measure(Artifact(path, Storage())).failure is None


def test_reference_kernels_are_slower(tmp_path):
    made = artifact(tmp_path, 64)
    fast, plain = (Host(runs=100, precision=None, xnnpack=on).measure(made).latency_ms for on in (True, False))
    assert plain.p50 > 1.2 * fast.p50


@given(st.lists(st.floats(0.1, 100), min_size=12, max_size=60))
def test_the_interval_is_that_of_the_binomial_distribution(medians):
    ordered = sorted(medians)
    # The ranks between which the median lies with a probability of at least 95 %, by SciPy's binomial distribution.
    low, high = (int(scipy.stats.binom.ppf(share, len(ordered), 0.5)) for share in (0.025, 0.975))
    exact = (ordered[high] - ordered[low - 1]) / np.median(ordered)
    wider = (ordered[min(high + 1, len(ordered) - 1)] - ordered[max(low - 2, 0)]) / np.median(ordered)
    assert exact - 1e-9 <= host_worker.interval(medians) <= wider + 1e-9


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=60), st.floats(0, 100))
def test_percentiles_are_numpys(values, share):
    assert host_worker.percentile(sorted(values), share) == pytest.approx(np.percentile(values, share))


def test_too_few_blocks_have_no_interval():
    assert host_worker.interval([1.0] * 5) is None


@pytest.mark.parametrize(
    "wrong",
    [{"runs": 99}, {"warmup": 0}, {"threads": 0}, {"timeout": 0}, {"thread": 1}, {"precision": 0}, {"seconds": -1}],
)
def test_settings_that_measure_nothing_are_refused(wrong):
    with pytest.raises(ValidationError):
        Host(**wrong)


@pytest.mark.parametrize(
    "content", [b"", b"no model at all", b"\x1c\0\0\0TFL3" + bytes(range(256))], ids=["empty", "text", "cut"]
)
def test_a_file_that_is_no_model_is_a_failure_and_no_exception(content, tmp_path):
    path = tmp_path / "garbage.tflite"
    path.write_bytes(content)
    assert "code" in failure_of(Host(), Artifact(path, Storage()))


def test_an_operator_of_tensorflow_is_named(tmp_path):
    image = tf_keras.Input((3, 3))
    converter = tf.lite.TFLiteConverter.from_keras_model(tf_keras.Model(image, tf.linalg.det(image)))
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS, tf.lite.OpsSet.SELECT_TF_OPS]
    (tmp_path / "flex.tflite").write_bytes(converter.convert())
    failure = failure_of(Host(runs=100), Artifact(tmp_path / "flex.tflite", Storage()))
    assert "FlexMatrixDeterminant" in failure
    assert failure.endswith("LiteRT alone does not run them")


def test_a_missing_file_is_a_failure(tmp_path):
    assert failure_of(Host(), Artifact(tmp_path / "absent.tflite", Storage()))


def test_a_crash_is_a_failure(worker):
    assert "-6" in failure_of(Host(), worker("import os\nos.abort()\n"))


def test_the_last_line_of_an_error_is_shown(worker):
    code = "import sys\nprint('first', file=sys.stderr)\nprint('no such operator', file=sys.stderr)\nsys.exit(3)\n"
    failure = failure_of(Host(), worker(code))
    assert "3" in failure
    assert failure.endswith("no such operator")


def test_no_answer_in_time_is_a_failure(worker):
    assert "0.3" in failure_of(Host(timeout=0.3), worker("import time\ntime.sleep(60)\n"))


@pytest.mark.parametrize(
    "printed",
    ["", "garbage", "[]", "7", "null", '{"files": []}', json.dumps({"files": [{"p50": 1.0}]}), "[" * 100_000],
    ids=["nothing", "text", "list", "number", "null", "no-files", "fields-missing", "deep"],
)
def test_an_unreadable_answer_is_a_failure(printed, worker):
    assert "unreadable" in failure_of(Host(), worker(f"print({printed!r})\n"))


def test_an_answer_is_read_from_the_last_line(worker):
    made = worker(f"print('INFO: a note of the runtime')\nprint({said(ANSWER)!r})\n")
    assert Host().measure(made).latency_ms.p90 == 2.0


@pytest.mark.parametrize(("cpu", "shared"), [(0.9, False), (0.1, True)])
def test_a_processor_that_others_use_is_said(cpu, shared, worker):
    measurement = Host().measure(worker(f"print({said({**ANSWER, 'cpu_ms': cpu})!r})\n"))
    assert bool(measurement.notes) == shared
    assert measurement.values["cpu_ms"] == cpu


def test_real_time_priority_is_asked_for_and_a_refusal_is_named(tmp_path):
    measurement = Host(runs=100, precision=None, real_time=True).measure(artifact(tmp_path))
    # Whether it is allowed is up to the machine.
    assert measurement.failure is None or "board.real_time=false" in measurement.failure


def test_processor_time_is_that_of_a_run(tmp_path):
    found = Host(runs=100).measure(artifact(tmp_path, 64))
    # Waiting for the processor is in the longest times, and not in the shortest.
    assert 0.5 * found.values["cpu_ms"] < found.latency_ms.p50


@pytest.mark.parametrize(
    "code",
    [
        "import sys\nsys.stdout.buffer.write(b'\\xff\\xfe')\n",
        "import sys\nsys.stderr.buffer.write(b'\\xff\\xfe')\nsys.exit(3)\n",
    ],
    ids=["stdout", "stderr"],
)
def test_bytes_that_are_no_text_are_a_failure(code, worker):
    failure_of(Host(), worker(code))


@pytest.mark.parametrize("value", [float("nan"), "fast", -1.0, None, True, 2.5, 1e300])
def test_an_answer_without_a_positive_number_is_a_failure(value, worker):
    failure_of(Host(), worker(f"print({said({**ANSWER, 'p50': value})!r})\n"))


def test_an_answer_without_end_is_a_failure(worker):
    assert "more than" in failure_of(Host(timeout=30), worker("while True:\n    print('x' * 1000)\n"))


def test_nothing_runs_on_after_a_timeout(worker, tmp_path):
    beat = tmp_path / "beat"
    child = f"import time\nwhile True:\n    open({str(beat)!r}, 'a').write('x')\n    time.sleep(0.02)\n"
    made = worker(f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}])\n")
    failure_of(Host(timeout=1.0), made)
    size = beat.stat().st_size
    time.sleep(0.2)
    assert size > 0
    assert beat.stat().st_size == size
