"""Several replicas train as one does: the same batches, gradients, statistics, and guarantees."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.batches import Part, augment, mix, training_batches
from compress.data.source import Augmentation
from compress.distribution.replicas import SINGLE, Distribution, _rows
from compress.distribution.settings import Mirrored, MultiWorker
from compress.errors import CompressError
from compress.training import train
from tests.conftest import REPOSITORY
from tests.distributed_training import CASES, MASK, data, recovery, trained
from tests.test_batches import split

SECONDS = 600
"""Much more than any process needs on a busy machine; one that waits for another that is gone is stopped."""
SCRIPT = "tests.distributed_training"


@dataclass(frozen=True)
class Replicas:
    """Stands for a ``tf.distribute.Strategy``: what is asked of it before any training."""

    num_replicas_in_sync: int


def start(arguments: Sequence[str], folder: Path, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_workers(arguments: Sequence[Sequence[str]], folder: Path) -> list[subprocess.Popen]:
    """Start workers of one cluster on this machine, each with arguments of its own."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in arguments]
    addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    for each in sockets:
        each.close()
    return [
        start(own, folder, TF_CONFIG=json.dumps(tf_config(addresses, index))) for index, own in enumerate(arguments)
    ]


def tf_config(addresses: Sequence[str], index: int) -> dict:
    return {"cluster": {"worker": list(addresses)}, "task": {"type": "worker", "index": index}}


def finish(processes: Sequence[subprocess.Popen]) -> list[str]:
    """Wait for all; return what they have written."""
    try:
        outputs = [process.communicate(timeout=SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return outputs


def require_same_training(arrays: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Weights, statistics of batch norms, and losses; after one step their change is the gradient."""
    for name, value in expected.items():
        np.testing.assert_allclose(arrays[name], value, rtol=1e-5, atol=1e-5 * np.abs(value).max(), err_msg=name)
    np.testing.assert_array_equal(arrays["guaranteed/conv/kernel:0"] == 0, ~MASK)


def test_two_devices_train_as_one_does(tmp_path):
    names = [case.__name__ for case in CASES]
    processes = [start(["-m", SCRIPT, "mirrored", "found", *names], tmp_path)]
    try:
        single = trained(SINGLE, names)
    finally:
        finish(processes)
    found = dict(np.load(tmp_path / "found" / "weights.npz"))
    require_same_training(found, single)
    # Each replica draws a dropout of its own.
    first, second = found["dropped"]
    assert set(np.unique([first, second])) == {0.0, 2.0}
    assert 16 < (first != second).sum() < 48


def test_two_workers_train_as_one_does(tmp_path):
    places = ["worker0", "worker1"]
    processes = start_workers([["-m", SCRIPT, "multi_worker", place, "guaranteed"] for place in places], tmp_path)
    try:
        single = trained(SINGLE, ["guaranteed"])
    finally:
        finish(processes)
    first, second = (dict(np.load(tmp_path / place / "weights.npz")) for place in places)
    for found in (first, second):
        require_same_training(found, single)
        # Then a model that is another one in each.
        refused = str(found["refused"])
        assert refused.startswith("stage second: expected the same model, settings and data on every worker")
        assert "others on replica 1" in refused
    for name in single:
        assert first[name].tobytes() == second[name].tobytes(), name


@given(replicas=st.integers(1, 6), share=st.integers(1, 5))
@settings(deadline=None)
def test_the_parts_of_a_batch_hold_each_row_and_its_partner_once(replicas, share):
    size = 2 * replicas * share
    rows = _rows(size, replicas)
    assert sorted(rows.ravel()) == list(range(size))
    # Reversed, a part is in the place of its rows' partners.
    np.testing.assert_array_equal(rows[:, ::-1], size - 1 - rows)


def test_parts_are_augmented_as_the_whole_batch():
    part, changes = split(48, (5, 5, 1)), Augmentation(shift=2, mirror=True)
    whole = list(training_batches(part, 12, 5, 7, changes))
    rows = _rows(12, 3)
    # As the second of two machines: the last two replicas.
    parts = list(training_batches(part, 12, 5, 7, changes, parts=rows[1:]))
    assert len(parts) == 10
    for number, own in enumerate(parts):
        for one, other in zip(own, whole[number // 2], strict=True):
            np.testing.assert_array_equal(one, np.asarray(other)[rows[1 + number % 2]])


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_parts_are_mixed_as_the_whole_batch(share):
    samples, seed = tf.random.stateless_normal([12, 4, 4, 1], [0, 1]), tf.constant([3, 4], tf.int64)
    whole, ratios = mix(samples, share, seed)
    for own in _rows(12, 2):
        mixed, ratio = mix(tf.gather(samples, own), share, seed, Part(12, tf.constant(own)))
        np.testing.assert_array_equal(mixed, np.asarray(whole)[own])
        np.testing.assert_array_equal(ratio, np.asarray(ratios)[own])
    shifted = augment(samples[..., 0], Augmentation(shift=1), seed)
    own = _rows(12, 3)[1]
    mine = augment(tf.gather(samples[..., 0], own), Augmentation(shift=1), seed, Part(12, tf.constant(own)))
    np.testing.assert_array_equal(mine, np.asarray(shifted)[own])


def test_one_command_on_two_workers(cli, tmp_path):
    """One report, from the chief, as that of a single run; the other worker's files lie apart."""
    command = ["strategy=finetune", "recovery=finetune", "recovery.epochs=0.5", "recovery.batch_size=64"]
    command += ["model.train.epochs=0", "board=roofline", "cache=off", "tracking=none"]
    both = ["-m", "compress.run", *command, "distribution=multi_worker", "hydra.run.dir=out"]
    workers = start_workers([both, both], tmp_path)
    try:
        code, _, error = cli(*command, "hydra.run.dir=single")
    finally:
        outputs = finish(workers)
    assert code == 0, error
    places = [tmp_path / place for place in ("single", "out", "out/worker1")]
    single, chief, other = (json.loads((place / "report.json").read_text()) for place in places)
    for key in ("params", "macs", "tflite_bytes"):
        assert single["final"][key] == chief["final"][key] == other["final"][key]
    assert chief["final"]["accuracy"] > chief["baseline"]["accuracy"] + 20
    assert chief["final"]["accuracy"] == other["final"]["accuracy"] == pytest.approx(single["final"]["accuracy"], abs=1)
    assert (places[1] / "model.cmp").read_bytes() == (places[2] / "model.cmp").read_bytes()
    assert "worker 1 of 2" in outputs[1]


def test_a_worker_that_is_not_the_chief_leaves_its_files_apart_and_no_run(cli, tmp_path, monkeypatch):
    monkeypatch.setattr("compress.cli.job.start_distribution", lambda plain, sweep: Distribution(worker=1))
    tracking = ["tracking=mlflow", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"]
    code, _, error = cli("strategy=none", "model.train.epochs=0", "board=roofline", "hydra.run.dir=out", *tracking)
    assert code == 0, error
    assert (tmp_path / "out" / "worker1" / "report.json").exists()
    assert not (tmp_path / "out" / "report.json").exists()
    assert not (tmp_path / "mlflow.db").exists()


ADDRESSES = ["127.0.0.1:2222", "127.0.0.1:2223"]
TWO = ["distribution=multi_worker", "cache=off"]


@pytest.mark.parametrize(
    ("config", "arguments", "parts"),
    [
        (None, TWO, ["TF_CONFIG", "none", "host1:2222"]),
        ("{cluster", TWO, ["TF_CONFIG", "JSON", "{cluster"]),
        ("[1]", TWO, ["TF_CONFIG", "a cluster of workers", "[1]"]),
        ('{"cluster": {"worker": ["a"]}, "task": {"type": "worker", "index": 0}}', TWO, ["host:port"]),
        ('{"cluster": {"ps": ["a:1"]}, "task": {"type": "ps", "index": 0}}', TWO, ["a cluster of workers"]),
        (json.dumps(tf_config(ADDRESSES, 2)), TWO, ["TF_CONFIG, task", "one of the 2 tasks", '"index": 2']),
        (json.dumps({**tf_config(ADDRESSES, 0), "task": {"type": "ps"}}), TWO, ["TF_CONFIG, task"]),
        (json.dumps(tf_config(ADDRESSES, 0)), ["distribution=multi_worker"], ["cache", "cache=off"]),
        (None, [*TWO, "distribution.cluster=slurm"], ["distribution.cluster", "SLURM", "srun"]),
        (None, [*TWO, "distribution.cluster=mesos"], ["distribution.cluster", "tf_config", "slurm"]),
        (None, [*TWO, "+distribution.clusters=slurm"], ["distribution.clusters", "cluster"]),
        (None, ["distribution=mirrored"], ["distribution.devices", "two different devices", "no GPU"]),
        (None, ["distribution=mirrored", "distribution.devices=[GPU:0,GPU:7]"], ["GPU:7", "no GPU"]),
        (None, ["distribution=mirrored", "distribution.devices=[CPU:0,GPU:0]"], ["two different devices"]),
        (None, ["distribution=mirrored", "distribution.devices=[CPU:0,CPU:0]"], ["two different devices"]),
        (None, ["distribution=mirrored", "distribution.devices=[first,second]"], ["two different devices"]),
        (None, ["distribution=mirrored", "+distribution.device=GPU:0"], ["distribution.device", "devices"]),
        (None, ["~distribution"], ["distribution"]),
    ],
)
def test_bad_input_is_refused_before_anything_runs(cli, monkeypatch, config, arguments, parts):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    if config is not None:
        monkeypatch.setenv("TF_CONFIG", config)
    code, _, error = cli("strategy=none", *arguments)
    assert code == 2
    assert error.count("Error in") == 1
    for part in parts:
        assert part in error


def test_a_multirun_of_workers_is_refused(cli, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", json.dumps(tf_config(ADDRESSES, 0)))
    code, out, error = cli("-m", "strategy=none", "seed=0,1", *TWO)
    assert code == 2
    assert "a multirun" in out + error


def test_a_process_that_runs_already_cannot_be_a_worker_or_divide_its_processor(monkeypatch):
    tf.constant(1.0)
    with pytest.raises(CompressError, match="in a process that runs already"):
        Mirrored(("CPU:0", "CPU:1")).start()
    monkeypatch.setenv("TF_CONFIG", json.dumps(tf_config(ADDRESSES, 0)))
    with pytest.raises(CompressError, match="at the start of the program"):
        MultiWorker().start()


@pytest.mark.parametrize(
    ("size", "samples", "replicas", "nearest"),
    [(128, 1000, 3, 126), (10, 1000, 4, 8), (1, 1000, 2, 4), (128, 101, 2, 100), (7, 7, 4, None)],
)
def test_a_batch_that_cannot_be_divided_names_the_nearest_that_can(size, samples, replicas, nearest):
    distribution = Distribution(Replicas(replicas))
    with pytest.raises(CompressError) as caught:
        distribution.require_divisible(size, samples, "recovery.batch_size")
    assert caught.value.where == "recovery.batch_size"
    assert f"a multiple of {2 * replicas}" in caught.value.expected
    assert caught.value.fix == (
        f"Write recovery.batch_size={nearest}." if nearest else f"Use fewer replicas: there are {samples} samples."
    )
    if nearest:
        distribution.require_divisible(nearest, samples, "recovery.batch_size")
    SINGLE.require_divisible(size, samples, "recovery.batch_size")


def test_layers_with_statistics_of_their_own_are_refused():
    kind = type("Observer", (tf_keras.layers.Dense,), {"__module__": "tensorflow_model_optimization.observers"})
    image = tf_keras.Input((6, 6, 1))
    net = tf_keras.Model(image, kind(3, name="observed")(tf_keras.layers.Flatten()(image)))
    with pytest.raises(CompressError, match="observed, a layer of TFMOT"):
        train(net, data(), recovery(), seed=0, distribution=Distribution(Replicas(2)))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("recovery.batch_size=30", "strategy.prune.recovery.batch_size"),
        ("model.train.batch_size=30", "model.train.batch_size"),
    ],
)
def test_a_pipeline_with_such_a_batch_is_refused_before_any_training(pipeline, tmp_path, change, key):
    built = replace(pipeline("strategy=prune", change, cache=False), distribution=Distribution(Replicas(4)))
    with pytest.raises(CompressError) as caught:
        built.run(tmp_path)
    assert caught.value.where == key
    assert caught.value.fix == f"Write {key}=32."
