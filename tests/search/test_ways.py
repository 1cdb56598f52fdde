"""What levels save on the board: as it measures it, at each resolution of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import tf_keras

from compress.candidate import Artifact, Candidate, Latency, Measurement, Storage
from compress.deploy.tflite import export
from compress.errors import CompressError
from compress.graph.selection import Rule, Selection
from compress.metrics.tflite_file import TFLiteFile
from compress.search.allocation import Allocator, Limits
from compress.search.auto import Auto
from compress.search.sensitivity import measure_sensitivity
from compress.search.technique import layers_by_resolution, stage, weighted_layers
from compress.search.ways import _stored_like, measure_ways, storages
from compress.strategies.strategy import Context
from tests.search.toys import Memory, context_of, small_data, techniques

layers = tf_keras.layers
NARROWER = {"prune_channels": {"channels": [0.5, 0], "ranking": "layer"}}
PART = 0.01


def blocks() -> tf_keras.Model:
    """Two residual blocks at 8 x 8, two at 4 x 4."""
    tf_keras.utils.set_random_seed(0)
    image = tf_keras.Input((8, 8, 1))
    x = layers.Conv2D(8, 3, padding="same", name="stem")(layers.Rescaling(1 / 16)(image))
    for number in range(4):
        if number == 2:
            x = layers.Conv2D(16, 3, strides=2, padding="same", activation="relu", name="reduce")(x)
        width = x.shape[-1]
        y = layers.Conv2D(width, 3, padding="same", activation="relu", name=f"first{number}")(x)
        x = layers.Add(name=f"add{number}")([x, layers.Conv2D(width, 3, padding="same", name=f"second{number}")(y)])
    return tf_keras.Model(image, layers.Dense(10, name="logits")(layers.GlobalAveragePooling2D()(x)))


def board(artifacts: Sequence[Artifact]) -> list[Measurement]:
    """A board to which a layer at 8 x 8 is a layer, however narrow; at 4 x 4 it takes its time for multiply-adds."""
    found = []
    for artifact in artifacts:
        file = TFLiteFile.read(artifact.path)
        time = 1.0
        for operator in file.operators:
            shape = file.tensors[operator.outputs[0]].shape
            if operator.name == "CONV_2D":
                weights = int(np.prod(file.tensors[operator.inputs[1]].shape))
                time += PART if shape[1] == 8 else PART * weights / (9 * 16 * 16)
        found.append(Measurement("toy", Latency(time, None, None, time, 100, 1)))
    return found


@pytest.fixture(scope="module")
def model():
    return blocks()


@pytest.fixture(scope="module")
def context(model):
    return context_of(model, small_data(), Memory()).for_stage("auto", measure=board)


def test_layers_are_looked_at_together_by_their_resolution(model):
    groups = layers_by_resolution(model, 0.0)
    fine = [f"{part}{number}" for number in (0, 1) for part in ("first", "second")]
    coarse = [f"{part}{number}" for number in (2, 3) for part in ("first", "second")]
    assert groups == [["stem", *fine], ["reduce", *coarse], ["logits"]]
    for share in (0.1, 0.6, 1.0):
        joined = layers_by_resolution(model, share)
        assert sorted(name for group in joined for name in group) == sorted(weighted_layers(model))
        macs = weighted_layers(model)
        assert all(sum(macs[n] for n in group) >= share * sum(macs.values()) for group in joined)


def test_expected_times_are_those_that_the_board_takes(model, context):
    chosen = techniques(**NARROWER)
    candidate = Candidate(model)
    found = measure_sensitivity(candidate, chosen, context, 30)
    (way,) = measure_ways(candidate, found, chosen, [None], context, Limits(None, 1.0))
    allocator = Allocator(found.layers, found.probes, chosen, way)
    probes = {(p.layer, p.value): p for p in found.probes if p.refused is None}

    def expected(*picked: tuple[str, float]) -> float:
        (cost,) = allocator.costs_of({layer: (probes[layer, value],) for layer, value in picked}, Limits(None, 1.0))
        return cost

    whole = expected()
    assert whole == pytest.approx(1 + 5 * PART + 4.5 * PART)
    assert whole - expected(("first0", 0.5)) == pytest.approx(0.0, abs=1e-9), "as long as before, where it is narrow"
    assert whole - expected(("first1", 0)) == pytest.approx(2 * PART)
    assert whole - expected(("first2", 0.5)) == pytest.approx(PART)
    assert whole - expected(("first3", 0)) == pytest.approx(2 * PART)
    assert whole - expected(("first1", 0), ("first2", 0.5), ("first3", 0)) == pytest.approx(5 * PART)


def test_a_noisy_board_leaves_no_layer_with_less_than_no_time(model, context):
    """Every narrower file takes next to nothing, as if all layers took several times what the whole file does."""
    chosen = techniques(**NARROWER)
    candidate = Candidate(model)
    found = measure_sensitivity(candidate, chosen, context, 30)

    def noisy(artifacts: Sequence[Artifact]) -> list[Measurement]:
        times = [1.0, *(0.01 for _ in artifacts[1:])]
        return [Measurement("noisy", Latency(time, None, None, time, 100, 1)) for time in times]

    context = context_of(model, context.data).for_stage("auto", measure=noisy)
    (way,) = measure_ways(candidate, found, chosen, [None], context, Limits(None, 1.0))
    assert way.rest_milliseconds >= -1e-9
    assert sum(way.times.values()) + way.rest_milliseconds == pytest.approx(1.0)
    assert min(Allocator(found.layers, found.probes, chosen, way).cheapest(Limits(None, 1.0)).costs) >= -1e-9


def integers_only(artifacts: Sequence[Artifact]) -> list[Measurement]:
    found = []
    for artifact in artifacts:
        floats = any(stored.dtype == np.float32 for _, stored in TFLiteFile.read(artifact.path).weighted)
        time = Latency(1.0, None, None, 1.0, 100, 1)
        found.append(Measurement("npu", None, "floats") if floats else Measurement("npu", time))
    return found


def test_a_way_that_the_board_does_not_run_is_left_out(model, context):
    chosen = techniques(quantize={"bits": [8]})
    context = context_of(model, context.data).for_stage("auto", measure=integers_only)
    found, left_out = storages(Candidate(model), chosen, context, Limits(None, 1.0))
    assert [way and way.name for way in found] == ["quantize"]
    assert left_out == ()
    result = Auto(latency_ms=1.0, techniques=chosen, images=30).apply(Candidate(model), context)
    assert {row.chosen for row in result.allocation} == {("quantize bits=8",)}


@pytest.mark.parametrize("failure", [None, "it is switched off"])
def test_a_board_without_times_is_refused_before_anything_is_measured(failure, model, context):
    memory = Memory()

    def silent(artifacts: Sequence[Artifact]) -> list[Measurement]:
        return [Measurement("microcontroller", None, failure) for _ in artifacts]

    context = context_of(model, context.data, memory).for_stage("auto", measure=silent)
    search = Auto(latency_ms=1.0, techniques=techniques(**NARROWER), images=30)
    with pytest.raises(CompressError, match=failure or "gives no time") as caught:
        search.apply(Candidate(model), context)
    assert caught.value.where == "budget.latency_ms"
    assert memory.made == 0


def test_what_saves_no_time_is_left_alone(model, context, tmp_path):
    """Half of the channels of a layer at 8 x 8 change the outputs less than those of the others, and save nothing."""
    result = Auto(latency_ms=1 + 8.1 * PART, techniques=techniques(**NARROWER), images=30).apply(
        Candidate(model), context
    )
    (measured,) = board([export(result, context.data, tmp_path / "model.tflite")])
    assert measured.cost_ms is not None
    assert measured.cost_ms <= 1 + 8.1 * PART
    rows = {row.layer: row.chosen for row in result.allocation}
    assert not any("channels=0.5" in choice for name in ("stem", "first0", "first1") for choice in rows[name])


class Counting:
    """The board above; it notes how many files it is given at once, and gives some no time."""

    def __init__(self, silent: Callable[[int], bool] = lambda place: False) -> None:
        self.given: list[int] = []
        self._silent = silent

    def __call__(self, artifacts: Sequence[Artifact]) -> list[Measurement]:
        self.given.append(len(artifacts))
        found = enumerate(board(artifacts))
        return [Measurement("toy", None, "it does not run it") if self._silent(n) else one for n, one in found]


def ways_of(
    model: tf_keras.Model, context: Context, counting: Counting, memory: Memory, selection: Selection | None = None
):
    context = context_of(model, context.data, memory).for_stage("auto", measure=counting)
    context = context if selection is None else context.for_stage("auto", selection=selection)
    chosen = techniques(**NARROWER)
    found = measure_sensitivity(Candidate(model), chosen, context, 30)
    return measure_ways(Candidate(model), found, chosen, [None], context, Limits(None, 1.0))[0]


def test_files_are_timed_a_few_at_once_and_those_without_a_time_say_nothing(model, context, monkeypatch):
    monkeypatch.setattr("compress.search.ways._AT_ONCE", 2)
    all_timed, some = Counting(), Counting(lambda place: place == 1)
    whole = ways_of(model, context, all_timed, Memory())
    less = ways_of(model, context, some, Memory())
    assert all_timed.given == [3, 3], "four levels, two at a time beside the whole file"
    assert len(less.saving) < len(whole.saving)
    assert all(less.saving[key] <= 1.0 for key in less.saving)
    with pytest.raises(CompressError, match=r"budget\.latency_ms"):
        ways_of(model, context, Counting(lambda place: place == 0), Memory())


def test_times_are_kept_for_the_layers_that_were_changed(model, context):
    memory, counting = Memory(), Counting()
    ways_of(model, context, counting, memory)
    asked = len(counting.given)
    ways_of(model, context, counting, memory)
    assert len(counting.given) == asked, "the same layers"
    ways_of(model, context, counting, memory, Selection(skip=(Rule(name="first0"),)))
    assert len(counting.given) > asked


def test_what_a_file_keeps_as_floats_its_narrower_files_keep_too(model, context):
    made = Candidate(model, storage=Storage("int8", float_layers=("stem", "first1", "logits")))
    chosen = techniques(**NARROWER)
    without = stage("auto", chosen[0].levels[0], ["first1"]).apply(Candidate(model), context)
    stored = _stored_like(made, without, list(weighted_layers(model)))
    assert stored.storage.scheme == "int8"
    assert set(stored.storage.float_layers) == {"stem", "logits"}
