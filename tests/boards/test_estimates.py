"""Boards that run nothing, or run elsewhere than where it counts: roofline, ethos_u, microcontroller."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tf_keras
import yaml
from hypothesis import given
from hypothesis import strategies as st

from compress.boards import ethos_u, microcontroller
from compress.boards.ethos_u import EthosU
from compress.boards.microcontroller import Microcontroller
from compress.boards.roofline import Roofline, Work, work_of
from compress.boards.roofline_fit import fit_profile
from compress.errors import CompressError
from compress.metrics.tflite_file import TFLiteFile
from tests.boards.files import convolutions, dense, residual_blocks, with_packed_kernels, with_sparse_kernels

layers = tf_keras.layers
PROFILE = {"peaks": {"float32": 2e9, "int8": 8e9}, "depthwise": 0.5, "bandwidth": 1e9, "overhead_us": 3.0}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return {kind: convolutions(folder / f"{kind}.tflite", 8, kind) for kind in ("float32", "int8")}


def test_the_work_of_a_file_is_counted(files):
    work = work_of(TFLiteFile.read(files["float32"].path))
    assert work.names == ("CONV_2D", "CONV_2D", "MEAN")
    places, weights = 16 * 16, 3 * 3 * 8 * 8
    assert list(work.macs) == [places * weights, places * weights, 0]
    floats = [2 * places * 8 + weights + 8, 2 * places * 8 + weights + 8, places * 8 + 8]
    # The mean reads the two axes as integers of the same size.
    assert list(work.bytes) == [4 * floats[0], 4 * floats[1], 4 * (floats[2] + 2)]


def test_an_estimate_is_the_slower_of_two_and_a_start(files):
    found = Roofline(**PROFILE).measure(files["float32"])
    conv = max(16 * 16 * 9 * 64 / 2e9, 4 * (2 * 16 * 16 * 8 + 9 * 64 + 8) / 1e9) * 1e3 + 3e-3
    mean = 4 * (16 * 16 * 8 + 8 + 2) / 1e9 * 1e3 + 3e-3
    assert [one.ms for one in found.operators] == pytest.approx([conv, conv, mean])
    assert found.estimate_ms == pytest.approx(2 * conv + mean)
    assert found.latency_ms is None
    assert found.cost_ms == found.estimate_ms


def test_a_type_without_a_peak_and_too_little_memory_are_said(files):
    only_floats = Roofline(**{**PROFILE, "peaks": {"float32": 1e9}})
    assert "board.peaks.int8" in only_floats.measure(files["int8"]).failure
    (note,) = Roofline(**PROFILE, sram_bytes=100).measure(files["int8"]).notes
    assert "does not fit" in note


def random_work(rng: np.random.Generator, operators: int) -> Work:
    macs = 10 ** rng.uniform(3, 8, operators) * (rng.random(operators) < 0.8)
    kinds = np.array(["float32", "int8"], object)[rng.integers(0, 2, operators)]
    moved = 10 ** rng.uniform(2, 7, operators)
    return Work(("CONV_2D",) * operators, kinds, macs, rng.random(operators) < 0.3, moved)


@given(st.integers(0, 2**31))
def test_more_work_never_takes_less(seed):
    rng = np.random.default_rng(seed)
    work, board = random_work(rng, 6), Roofline(**PROFILE)
    more = Work(work.names, work.types, work.macs * 1.5, work.depthwise, work.bytes * 1.2)
    assert np.all(board.times(more) >= board.times(work))


def test_the_fit_finds_the_profile_that_made_the_times():
    rng = np.random.default_rng(0)
    works = [random_work(rng, int(rng.integers(3, 40))) for _ in range(60)]
    true = Roofline(**PROFILE)
    times = np.array([true.times(work).sum() for work in works])
    found = fit_profile(works, times * np.exp(0.02 * rng.normal(size=len(works))), "a test")
    estimates = np.array([found.times(work).sum() for work in works])
    assert np.max(np.abs(np.log(estimates / times))) < 0.1
    assert found.peaks["int8"] / found.peaks["float32"] == pytest.approx(4, rel=0.2)
    plain = yaml.safe_load(found.to_yaml())
    assert plain.pop("_target_") == "compress.boards.roofline.Roofline"
    assert Roofline(**plain) == found


def test_too_few_files_are_no_fit():
    with pytest.raises(CompressError, match="at least 4"):
        fit_profile([random_work(np.random.default_rng(0), 3)] * 3, [1.0] * 3)


def test_vela_counts_cycles_and_memory(files):
    small, large = (EthosU(accelerator=f"ethos-u55-{n}").measure(files["int8"]) for n in (32, 256))
    assert small.failure is None
    assert small.estimate_ms > large.estimate_ms > 0
    assert small.values["cycles"] > large.values["cycles"]
    # The largest two activations, one byte each, and the kernels with their biases.
    assert small.values["sram_bytes"] >= 2 * 16 * 16 * 8
    assert small.values["off_chip_flash_bytes"] >= 2 * 9 * 64
    assert sum(one.ms for one in small.operators) == pytest.approx(small.estimate_ms, rel=0.1)


def test_vela_refuses_floats_and_says_why(files):
    failure = EthosU().measure(files["float32"]).failure
    assert "Float32" in failure
    assert "quantize" in failure


def test_vela_that_takes_no_setting_is_a_failure(files):
    assert "nowhere" in EthosU(system="nowhere").measure(files["int8"]).failure


@pytest.mark.parametrize(("module", "board"), [(ethos_u, EthosU()), (microcontroller, Microcontroller())])
def test_a_package_that_is_missing_is_named(module, board, files, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    extra = board.name.replace("_", "-")
    assert f"pip install 'compress[{extra}]'" in board.measure(files["int8"]).failure


@pytest.mark.parametrize("board", [EthosU(), Microcontroller()])
def test_kernels_without_their_zeros_are_refused_with_the_next_step(board, tmp_path):
    sparse = with_sparse_kernels(convolutions(tmp_path / "wide.tflite", 32, "int8").path, tmp_path / "sparse.tflite")
    failure = board.measure(sparse).failure
    assert "DENSIFY" in failure
    assert f"board={board.name}" in failure
    assert board.lacks(["CONV_2D", "DENSIFY"]) == {"DENSIFY"}


@pytest.mark.parametrize("board", [EthosU(), Microcontroller(arena_bytes=1_000_000)])
def test_kernels_of_four_bits_are_named_where_the_board_cannot_read_them(board, tmp_path):
    bytes_each = dense(tmp_path / "bytes.tflite")
    assert board.measure(bytes_each).failure is None
    failure = board.measure(with_packed_kernels(bytes_each.path, tmp_path / "packed.tflite")).failure
    assert "first" in failure
    assert "packed=false" in failure


@pytest.mark.parametrize("board", [EthosU(), Microcontroller()])
def test_a_file_that_is_cut_off_is_a_failure(board, files, tmp_path):
    cut = tmp_path / "cut.tflite"
    cut.write_bytes(files["int8"].path.read_bytes()[:200])
    assert board.measure(replace(files["int8"], path=cut)).failure


def test_a_microcontroller_needs_an_arena(files):
    found = Microcontroller().measure(files["int8"])
    assert found.failure is None
    assert found.latency_ms is None
    assert found.values["flash_bytes"] == files["int8"].path.stat().st_size
    assert found.values["arena_bytes"] == found.values["arena_head_bytes"] + found.values["arena_tail_bytes"]
    assert found.values["arena_bytes"] >= 2 * 16 * 16 * 8
    assert found.values["max_difference"] <= 0.02
    enough = int(found.values["arena_bytes"]) + 2048
    assert Microcontroller(arena_bytes=enough).measure(files["int8"]).failure is None
    assert "board.arena_bytes" in Microcontroller(arena_bytes=2048).measure(files["int8"]).failure


def test_a_file_that_the_flash_does_not_hold(files):
    assert "flash" in Microcontroller(flash_bytes=100).measure(files["int8"]).failure


def test_outputs_that_differ_are_a_failure(files, tmp_path, monkeypatch):
    worker = microcontroller._WORKER.read_text().replace("micro.get_output(number)", "micro.get_output(number) * 2")
    (tmp_path / "worker.py").write_text(worker)
    monkeypatch.setattr(microcontroller, "_WORKER", tmp_path / "worker.py")
    assert "differ" in Microcontroller().measure(files["float32"]).failure


def test_a_deep_network_of_integers_gives_on_a_microcontroller_what_the_reference_kernels_give(tmp_path):
    # LiteRT's fast kernels round otherwise: by 8 % for ResNet-8 and noise.
    found = Microcontroller(tolerance=0).measure(residual_blocks(tmp_path / "deep.tflite", 12))
    assert found.failure is None
    assert found.values["max_difference"] == 0


def test_floats_are_compared_with_all_that_their_integers_can_hold(tmp_path):
    file = TFLiteFile.read(residual_blocks(tmp_path / "model.tflite", 1).path)
    (span,) = microcontroller._spans(file)
    integers = file.integers_of(file.outputs[0])
    assert integers.dtype == np.int8
    assert span == pytest.approx(255 * integers.scales[0])
    floats = TFLiteFile.read(convolutions(tmp_path / "floats.tflite").path)
    assert microcontroller._spans(floats) == [None]


def test_floats_run_on_a_microcontroller_too(files):
    assert Microcontroller().measure(files["float32"]).values["max_difference"] < 1e-4
