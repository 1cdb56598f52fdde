"""strategy=auto: budgets are met by the built file, the choice is shown, and what cannot be is said."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from compress.candidate import Candidate
from compress.deploy.tflite import export
from compress.errors import CompressError
from compress.metrics.accuracy import keras_accuracy
from compress.metrics.tflite_file import TFLiteFile
from compress.search.auto import Auto
from compress.search.stored import measure_files
from compress.search.technique import origin_of
from tests.search.toys import Memory, context_of, measure, techniques

STANDARD = {
    "prune_channels": {"channels": [0.75, 0.5], "ranking": "layer"},
    "prune": {"sparsity": [0.75]},
    "share": {"clusters": [16]},
    "quantize": {"bits": [8, 4], "rounding": "second_order", "rounding_images": 64, "trained": "qat"},
}


@pytest.fixture(scope="module")
def memory() -> Memory:
    """The sensitivity table is measured once for all tests."""
    return Memory()


@pytest.fixture(scope="module")
def context(model, data, memory):
    return context_of(model, data, memory)


@pytest.fixture(scope="module")
def whole(model, context) -> int:
    """Bytes of the packed file of the model as it is."""
    return size_of(Candidate(model), context)


def search(chosen=STANDARD, **fields) -> Auto:
    return Auto(techniques=techniques(**chosen), images=60, **fields)


def size_of(candidate, context) -> int:
    return measure_files(candidate, context, latency=False)[0]


def test_the_packed_file_keeps_to_its_bytes_and_the_choice_is_shown(model, context, memory, whole):
    found, made = {}, []
    for share in (0.4, 0.12):
        result = search(bytes=int(share * whole)).apply(Candidate(model), context)
        assert size_of(result, context) <= share * whole
        assert [row.layer for row in result.allocation] == ["conv1", "conv2", "fc1", "logits"]
        assert result.measured["expected_bytes"] == pytest.approx(size_of(result, context), rel=0.25)
        assert result.measured["expected_divergence"] == pytest.approx(sum(r.divergence for r in result.allocation))
        for guarantee in result.guarantees:
            assert guarantee.stage == "auto"
            assert guarantee.check(result.model) == []
        found[share] = result.measured["expected_divergence"]
        made.append(memory.names.count("sensitivity"))
    assert found[0.12] > found[0.4], "a tighter budget costs more"
    assert made[0] == made[1], "another budget finds the table"


def test_the_file_holds_what_the_choice_says(model, context, data, tmp_path, whole):
    result = search(bytes=int(0.15 * whole)).apply(Candidate(model), context)
    export(result, data, tmp_path / "model.tflite")
    file = TFLiteFile.read(tmp_path / "model.tflite")
    names = [row.layer for row in result.allocation]
    seen = set()
    for row in result.allocation:
        for layer in (layer for layer in result.model.layers if origin_of(layer.name, names) == row.layer):
            if not hasattr(layer, "kernel"):
                continue
            stored = file.kernel_of(layer.name, tuple(layer.kernel.shape))
            for choice in row.chosen:
                technique, level = choice.split()[0], float(choice.partition("=")[2])
                seen.add(technique)
                if technique == "quantize":
                    assert stored.dtype == np.int8
                    assert np.abs(stored.astype(int)).max() <= 2 ** (level - 1) - 1
                elif technique == "share":
                    assert len(np.unique(stored)) <= level
                elif technique == "prune":
                    assert np.mean(stored == 0) >= level - 1 / stored.size
    assert seen


def test_a_latency_is_met_as_measured(model, context, data, tmp_path):
    before = measure(export(Candidate(model), data, tmp_path / "whole.tflite")).cost_ms
    for budget in ({"latency_ms": 0.4 * before}, {"latency": 0.3}):
        result = search(**budget).apply(Candidate(model), context)
        kept = measure(export(result, data, tmp_path / "model.tflite")).cost_ms / before
        assert 0.2 < kept <= budget.get("latency", 0.4)
        assert all(row.milliseconds is not None for row in result.allocation)


def test_a_share_of_the_latency_is_kept_to_on_a_board_whose_clock_drifts(model, data, tmp_path):
    """A file and the original's take turns: what slows both is no reason to take more away."""
    calls = []

    def slower(artifacts):
        calls.append(len(artifacts))
        factor = 1.1 ** len(calls)
        return [
            dataclasses.replace(one, latency_ms=dataclasses.replace(one.latency_ms, p50=one.cost_ms * factor))
            for one in map(measure, artifacts)
        ]

    chosen = {"prune_channels": {"channels": [0.9, 0.75, 0.5], "ranking": "layer"}}
    steady = context_of(model, data)
    drifting = steady.for_stage("auto", measure=slower)
    before = measure(export(Candidate(model), data, tmp_path / "whole.tflite")).cost_ms
    result = search(chosen, latency=0.6).apply(Candidate(model), drifting)
    assert 0.45 < measure(export(result, data, tmp_path / "model.tflite")).cost_ms / before <= 0.6
    assert len(calls) > 3


def test_training_is_bounded_and_kept_within_the_budget(model, data, memory, monkeypatch, whole):
    from compress.strategies import strategy

    context = context_of(model, data, memory, epochs=2.0)
    epochs = []
    inner = strategy.train

    def counted(*args, **kwargs):
        epochs.append(args[2].epochs)
        return inner(*args, **kwargs)

    monkeypatch.setattr(strategy, "train", counted)
    weights = [w.copy() for w in model.get_weights()]
    result = search(bytes=int(0.13 * whole)).apply(Candidate(model), context)
    assert size_of(result, context) <= 0.13 * whole
    assert sum(epochs) == pytest.approx(2.0)
    assert all(np.array_equal(a, b) for a, b in itertools.zip_longest(weights, model.get_weights()))


def test_blocks_go_where_no_channel_of_theirs_is_left(data):
    """What is chosen for the other layers of such a block goes with it."""
    import tf_keras

    layers = tf_keras.layers
    tf_keras.utils.set_random_seed(0)
    image = tf_keras.Input((8, 8, 1))
    x = layers.Conv2D(8, 3, padding="same", name="stem")(layers.Rescaling(1 / 16)(image))
    for number in range(3):
        y = layers.Conv2D(8, 3, padding="same", activation="relu", name=f"inner{number}")(x)
        x = layers.Add(name=f"sum{number}")([x, layers.Conv2D(8, 3, padding="same", name=f"outer{number}")(y)])
    deep = tf_keras.Model(image, layers.Dense(10, name="logits")(layers.GlobalAveragePooling2D()(x)))
    context = context_of(deep, data, epochs=0.01)
    size = size_of(Candidate(deep), context)
    chosen = {
        "prune_channels": {"channels": [0.5, 0], "ranking": "layer"},
        "quantize": {"bits": [8], "packed": False, "trained": {"strategy": "qat", "packed": False}},
    }
    result = search(chosen, bytes=int(0.16 * size)).apply(Candidate(deep), context)
    assert size_of(result, context) <= 0.16 * size
    gone = [row.layer for row in result.allocation if "prune_channels channels=0" in row.chosen]
    assert gone
    assert not {layer.name for layer in result.model.layers} & {name.replace("inner", "outer") for name in gone}


def test_where_there_is_training_channels_may_go_in_another_way(model, data, memory, whole):
    context = context_of(model, data, memory, epochs=0.01)
    reached = {}
    for criterion in ("random", "reconstruction"):
        chosen = {"channels": [0.5], "ranking": "layer", "trained": {"criterion": criterion, "ranking": "layer"}}
        result = search({"prune_channels": chosen}, bytes=int(0.6 * whole)).apply(Candidate(model), context)
        reached[criterion] = keras_accuracy(result.model, data.test)
    assert reached["reconstruction"] > reached["random"] + 5


def test_a_board_that_does_not_run_the_original_has_no_share_of_its_latency(model, data):
    def only_integers(artifacts):
        return [
            dataclasses.replace(measure(one), latency_ms=None, failure="floats: quantize it first")
            if one.storage.scheme == "float32"
            else measure(one)
            for one in artifacts
        ]

    chosen = {"prune_channels": {"channels": [0.5]}, "quantize": {"bits": [8]}}
    context = context_of(model, data).for_stage("auto", measure=only_integers)
    with pytest.raises(CompressError, match=r"floats: quantize it first.*budget\.latency_ms") as caught:
        search(chosen, latency=0.5).apply(Candidate(model), context)
    assert caught.value.where == "budget.latency"


def test_levels_that_may_not_be_cut_at_once_are_cut_one_after_the_other(model, data, whole):
    chosen = {"prune_channels": {"channels": [0.75, 0.5, 0.25], "ranking": "layer", "steps": 2}}
    result = search(chosen, bytes=int(0.5 * whole)).apply(Candidate(model), context_of(model, data))
    levels = {choice for row in result.allocation for choice in row.chosen}
    assert len(levels) > 1
    assert size_of(result, context_of(model, data)) <= 0.5 * whole


def test_two_budgets_of_one_kind_are_refused():
    with pytest.raises(CompressError, match=r"budget\.latency .*received both"):
        search(latency=0.5, latency_ms=1.0)


@pytest.mark.parametrize("fields", [{}, {"accuracy_drop": 1.0}])
def test_no_budget_is_refused(fields):
    with pytest.raises(CompressError, match=r"budget.bytes .*or budget.latency_ms"):
        search(**fields)


@pytest.mark.parametrize(
    "fields", [{"bytes": -5}, {"bytes": 0}, {"latency_ms": -1.0}, {"latency": 0.0}, {"bytes": 9, "accuracy_drop": -1}]
)
def test_what_is_no_budget_is_refused(fields):
    with pytest.raises(ValueError, match="greater than"):
        search(**fields)


def test_a_budget_out_of_reach_says_what_is_in_reach(model, context, whole):
    with pytest.raises(CompressError) as caught:
        search(bytes=100).apply(Candidate(model), context)
    least = int(caught.value.expected.partition("bytes=")[2].partition(",")[0])
    assert caught.value.where == "budget"
    assert 100 < least < 0.2 * whole
    assert size_of(search(bytes=int(least * 1.05)).apply(Candidate(model), context), context) <= 1.05 * least


def test_a_file_that_keeps_to_the_budget_without_room_to_spare_is_tried(model, data, memory, whole):
    """Training is given room, but what fits is not refused for the lack of it."""
    context = context_of(model, data, memory, epochs=0.02)
    few = {"quantize": {"bits": [4], "trained": "qat"}}
    with pytest.raises(CompressError) as caught:
        search(few, bytes=100).apply(Candidate(model), context)
    assert caught.value.received == "bytes=100"
    least = int(caught.value.expected.partition("bytes=")[2].partition(",")[0])
    result = search(few, bytes=int(1.04 * least)).apply(Candidate(model), context)
    assert size_of(result, context) <= 1.04 * least


def test_where_no_file_keeps_the_room_for_training_free_the_nearest_is_taken(model, data, memory, whole, monkeypatch):
    """A little more than what is aimed at, each time: not a reason to take all that can be taken away."""
    budget = int(0.5 * whole)
    monkeypatch.setattr("compress.search.auto.measure_files", lambda *_, **__: (int(0.92 * budget), None))
    few = {"quantize": {"bits": [8, 4], "rounding": "nearest"}}
    result = search(few, bytes=budget).apply(Candidate(model), context_of(model, data, memory, epochs=0.01))
    assert {row.chosen for row in result.allocation} != {("quantize bits=4",)}


def test_techniques_that_no_layer_takes_are_told(model, context, whole):
    chosen = {"prune": {"sparsity": [0.9]}, "lowrank": {"ranks": [0.99]}}
    result = search(chosen, bytes=int(0.6 * whole)).apply(Candidate(model), context)
    assert [item.layer for item in result.skipped if item.layer.startswith("techniques.")] == ["techniques.lowrank"]


def test_a_latency_that_training_spoils_is_an_error(model, data, memory):
    """What stands for the level where there is training keeps most channels."""
    context = context_of(model, data, memory, epochs=0.01)
    kept = {"ranking": "layer", "most": 0.1, "allow_partial": True}
    chosen = {"channels": [0.5], "ranking": "layer", "trained": kept}
    before = measure_files(Candidate(model), context, latency=True)[1]
    for field, budget in (("latency_ms", 0.6 * before), ("latency", 0.6)):
        with pytest.raises(CompressError, match="after the training, too") as caught:
            search({"prune_channels": chosen}, **{field: budget}).apply(Candidate(model), context)
        assert caught.value.where == f"budget.{field}"
        lower = float(caught.value.fix.partition(f"budget.{field}=")[2].split()[0].rstrip(",."))
        assert 0.3 * budget < lower < budget


def test_a_drop_that_is_exceeded_is_an_error_with_both_numbers(model, context, whole):
    few = {"prune": {"sparsity": [0.97]}}
    with pytest.raises(CompressError, match=r"at most 1 points below .* points below") as caught:
        search(few, bytes=int(0.3 * whole), accuracy_drop=1.0).apply(Candidate(model), context)
    assert caught.value.where == "budget.accuracy_drop"
    assert search(few, bytes=int(0.3 * whole)).apply(Candidate(model), context).allocation


def test_a_model_with_nothing_to_change_is_said_so(context):
    import tf_keras

    image = tf_keras.Input((8, 8, 1))
    plain = tf_keras.Model(image, tf_keras.layers.Dense(10, name="logits")(tf_keras.layers.Flatten()(image)))
    with pytest.raises(CompressError, match="a layer that a technique can change"):
        search({"prune_channels": {"channels": [0.5]}}, bytes=1000).apply(
            Candidate(plain), dataclasses.replace(context, reference=plain)
        )


def test_a_search_that_was_stopped_comes_to_the_same_choice_on_a_noisy_board(model, data, whole):
    """The board says something else each time; what it said of a file is remembered."""
    memory, times, asked = Memory(), np.random.default_rng(0), []

    def noisy(artifacts):
        asked.append(len(artifacts))
        return [
            dataclasses.replace(one, latency_ms=dataclasses.replace(one.latency_ms, p50=one.cost_ms * factor))
            for one, factor in zip(map(measure, artifacts), times.uniform(0.8, 1.2, len(artifacts)), strict=True)
        ]

    context = context_of(model, data, memory).for_stage("auto", measure=noisy)
    before = measure_files(Candidate(model), context_of(model, data), latency=True)[1]
    chosen = {"prune_channels": {"channels": [0.75, 0.5], "ranking": "layer"}, "quantize": {"bits": [8]}}
    first = search(chosen, latency_ms=0.35 * before).apply(Candidate(model), context).allocation
    asked.clear()
    assert search(chosen, latency_ms=0.35 * before).apply(Candidate(model), context).allocation == first
    assert asked == [1, 1], "whether it times floats and integers at all"
