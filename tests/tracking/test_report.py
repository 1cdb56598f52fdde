"""The report: ratios, notes, the published schema, what is printed."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import tf_keras
from hypothesis import given
from hypothesis import strategies as st

from compress.candidate import Artifact, Candidate, Latency, Numbers, Recovered, Skipped, Storage
from compress.pipeline.pipeline import Result
from compress.pipeline.stage import StageResult
from compress.strategies.compact.separable_form import SeparableForm
from compress.strategies.lowrank.rank import Rank
from compress.strategies.quantization.stored import Stored
from compress.tracking.report import (
    SCHEMA_FILE,
    make_report,
    notes,
    numbers_to_json,
    print_table,
    ratios,
    read_report,
    versions,
    write_report,
)

BASELINE = Numbers(
    accuracy=90.0,
    accuracy_keras=90.1,
    params=1000,
    nonzero_params=990,
    macs=50_000,
    tflite_bytes=8000,
    gzip_bytes=7000,
    packed_bytes=9000,
    peak_memory_bytes=4096,
    latency_ms=Latency(p50=2.0, p90=2.5, p99=3.0, mean=2.1, runs=200, threads=1),
)
SMALLER = replace(
    BASELINE,
    accuracy=89.5,
    accuracy_keras=89.5,
    params=500,
    nonzero_params=250,
    macs=20_000,
    tflite_bytes=2000,
    gzip_bytes=1000,
    packed_bytes=900,
    peak_memory_bytes=1024,
    latency_ms=Latency(p50=0.5, p90=0.6, p99=0.7, mean=0.5, runs=200, threads=1),
)
CONFIG = {
    "data": {"_target_": "compress.data.npz.KerasDataset", "dataset": "mnist"},
    "board": {"_target_": "compress.boards.host.Host"},
    "seed": 3,
}
SCHEMA = json.loads(SCHEMA_FILE.read_text())


def stage(name: str, numbers: Numbers, **changes) -> StageResult:
    plain = StageResult(
        name=name,
        config={},
        numbers=numbers,
        seconds=1.23456,
        skipped=(),
        guarantees=(),
        released=(),
        layers={"dense": {"channels": 1, "params": 3, "nonzero": 2, "macs": 4}},
    )
    return replace(plain, **changes)


@pytest.fixture(scope="module")
def model() -> tf_keras.Model:
    values = tf_keras.Input((2,))
    return tf_keras.Model(values, values, name="tiny")


@pytest.fixture
def result(model) -> Result:
    return finished(model, SMALLER)


def finished(model, numbers: Numbers, *, baseline: Numbers = BASELINE, **candidate) -> Result:
    last = stage(
        "quantize",
        numbers,
        config={"scheme": "int8"},
        skipped=(Skipped("conv", "too small"),),
        guarantees=("quantize: weights are stored as int8",),
        cached=True,
    )
    return Result(
        baseline=stage("baseline", baseline),
        stages=(stage("prune", replace(BASELINE, nonzero_params=500)), last),
        candidate=Candidate(model, **candidate),
        artifact=Artifact(Path("model.tflite"), Storage()),
    )


def test_the_report_keeps_to_its_schema(result):
    report = make_report(result, CONFIG, seconds=12.3456)
    # As it is read from disk: no tuples.
    jsonschema.validate(json.loads(json.dumps(report)), SCHEMA, jsonschema.Draft202012Validator)


def test_the_schema_is_a_schema_and_bites(result):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    good = json.loads(json.dumps(make_report(result, CONFIG, seconds=1.0)))
    for path in (
        ("schema",),
        ("baseline", "accuracy"),
        ("final", "latency_ms", "p99"),
        ("stages", 0, "guarantees"),
        ("stages", 1, "macs"),
        ("ratios", "accuracy_delta"),
        ("artifacts", "packed"),
        ("layers", "final", "dense", "params"),
    ):
        wrong = copy.deepcopy(good)
        place = wrong
        for key in path[:-1]:
            place = place[key]
        del place[path[-1]]
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, SCHEMA)
    for change in ({"more": 1}, {"schema": 2}, {"seed": "3"}, {"ratios": {**good["ratios"], "macs": 0}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**good, **change}, SCHEMA)


def test_what_the_report_says(result):
    report = make_report(result, CONFIG, seconds=12.3456)
    assert report["strategy"] == "prune+quantize"
    assert (report["model"], report["data"], report["board"], report["seed"]) == ("tiny", "mnist", "host", 3)
    assert report["seconds"] == pytest.approx(12.346)
    assert report["baseline"] == numbers_to_json(BASELINE)
    assert report["final"] == numbers_to_json(SMALLER)
    assert "latency_failure" not in report["final"]
    first, second = report["stages"]
    assert (first["name"], first["nonzero_params"], first["cached"]) == ("prune", 500, False)
    assert (second["name"], second["tflite_bytes"], second["cached"]) == ("quantize", 2000, True)
    assert second["config"] == {"scheme": "int8"}
    assert second["latency_ms"]["p50"] == 0.5
    assert [(item["layer"], item["reason"]) for item in second["skipped"]] == [("conv", "too small")]
    assert report["layers"]["final"] == {"dense": {"channels": 1, "params": 3, "nonzero": 2, "macs": 4}}
    assert report["trained"] is True
    assert make_report(replace(result, untrained=True), CONFIG, seconds=1.0)["trained"] is False
    assert second["guarantees"] == ["quantize: weights are stored as int8"]


def test_a_pipeline_without_stages_and_a_source_without_a_name(result):
    empty = replace(result, stages=())
    config = {**CONFIG, "data": {"_target_": "compress.data.digits.Digits"}}
    report = make_report(empty, config, seconds=1.0)
    assert report["strategy"] == "none"
    assert report["data"] == "digits"
    assert report["final"] == report["baseline"]
    assert report["ratios"]["macs"] == 1.0
    assert report["notes"] == []
    jsonschema.validate(json.loads(json.dumps(report)), SCHEMA)


def test_ratios_by_hand():
    assert ratios(BASELINE, SMALLER) == {
        "params": 2.0,
        "nonzero_params": 990 / 250,
        "macs": 2.5,
        "tflite_bytes": 4.0,
        "packed_bytes": 10.0,
        "compression_rate": 4 * 1000 / 900,
        "gzip_bytes": 7.0,
        "peak_memory_bytes": 4.0,
        "latency_p50": 4.0,
        "accuracy_delta": -0.5,
    }


def test_ratios_of_what_is_not_known_are_none():
    unmeasured = replace(SMALLER, latency_ms=None)
    assert ratios(BASELINE, unmeasured)["latency_p50"] is None
    assert ratios(unmeasured, BASELINE)["latency_p50"] is None
    assert ratios(BASELINE, replace(SMALLER, packed_bytes=None))["packed_bytes"] is None
    assert ratios(BASELINE, replace(SMALLER, macs=0))["macs"] is None


@given(st.integers(1, 10**9), st.integers(1, 10**9), st.floats(0, 100), st.floats(0, 100))
def test_ratios_are_above_one_where_it_got_smaller_and_the_change_is_in_points(before, after, high, low):
    found = ratios(replace(BASELINE, macs=before, accuracy=high), replace(SMALLER, macs=after, accuracy=low))
    assert (found["macs"] > 1) == (before > after)
    assert found["macs"] * after == pytest.approx(before)
    assert found["accuracy_delta"] == low - high


def test_nothing_is_said_when_all_went_well(model):
    assert notes(finished(model, SMALLER)) == []


def test_a_gap_between_keras_and_the_file_is_said(model):
    (note,) = notes(finished(model, replace(SMALLER, accuracy=88.0, accuracy_keras=89.0)))
    assert note.startswith("quantize: ")
    assert "-1.00 points" in note
    assert notes(finished(model, replace(SMALLER, accuracy=89.2, accuracy_keras=89.5))) == []


def test_a_board_that_failed_is_said(model):
    failed = replace(SMALLER, latency_ms=None, latency_failure="the runtime ended with code -6")
    (note,) = notes(finished(model, failed))
    assert "quantize" in note
    assert "code -6" in note


def test_an_estimate_is_never_called_a_latency(model):
    first, last = (replace(n, latency_ms=None, estimate_ms=ms) for n, ms in ((BASELINE, 2.0), (SMALLER, 0.5)))
    result = finished(model, last, baseline=first)
    (note,) = notes(result)
    assert "2.000 to 0.500 ms is an estimate and no latency" in note
    report = make_report(result, CONFIG, seconds=1.0)
    jsonschema.validate(report, json.loads(SCHEMA_FILE.read_text()))
    assert report["final"]["latency_ms"] is None
    assert report["ratios"]["latency_p50"] is None


def test_times_taken_in_turns_say_whether_the_latency_fell(model):
    quick, slow = (replace(BASELINE.latency_ms, p50=p50) for p50 in (0.5, 2.1))
    (note,) = notes(finished(model, replace(SMALLER, latency_ms=quick, speedup=0.88)))
    assert note.startswith("Latency did not fall (0.88 times as fast, timed in turns with the original): ")
    (note,) = notes(finished(model, replace(SMALLER, latency_ms=quick, speedup=1.02)))
    assert note.startswith("Latency fell by less than 3 % (1.02 times as fast, timed in turns with the original): ")
    assert notes(finished(model, replace(SMALLER, latency_ms=slow, speedup=1.2))) == []


@pytest.mark.parametrize(("p50", "speedup"), [(0.5, 0.88), (2.1, 1.2)])
def test_the_table_and_the_notes_give_one_gain_in_latency(p50, speedup, model, capsys):
    sparse = replace(SMALLER, latency_ms=replace(BASELINE.latency_ms, p50=p50), speedup=speedup, sparse_kernels=14)
    result = replace(finished(model, sparse), stages=(stage("prune", sparse),))
    report = make_report(result, CONFIG, seconds=1.0)
    assert report["ratios"]["latency_p50"] == 2.0 / p50, "of the two medians, as it is documented"
    print_table(report)
    shown = capsys.readouterr().out
    gain = next(line for line in shown.splitlines() if "gain" in line)
    assert [cell for cell in gain.split() if cell.endswith("x")][-1] == f"{speedup:.2f}x"
    assert "timed in turns" in shown
    assert ("faster in this stage" in shown) == (speedup > 1)
    assert ("gets no faster" in shown) == ("did not fall" in shown) == (speedup < 1)


def test_without_times_in_turns_the_table_gives_the_gain_of_the_medians(result, capsys):
    print_table(make_report(result, CONFIG, seconds=1.0))
    shown = capsys.readouterr().out
    gain = next(line for line in shown.splitlines() if "gain" in line)
    assert [cell for cell in gain.split() if cell.endswith("x")][-1] == "4.00x"
    assert "in turns" not in shown


def test_a_later_stage_is_compared_with_the_one_before_by_times_in_turns(model):
    quantized = replace(SMALLER, speedup=2.0)
    pruned = replace(SMALLER, speedup=1.9, sparse_kernels=14, latency_ms=replace(BASELINE.latency_ms, p50=0.4))
    result = replace(finished(model, SMALLER), stages=(stage("quantize", quantized), stage("prune", pruned)))
    (note,) = notes(result)
    assert "gets no faster (0.95 times as fast, timed in turns with the original)" in note


@pytest.mark.parametrize(
    ("guarantees", "reason"),
    [
        ((), "no stage removed work"),
        ((Rank("lowrank", {"dense": 2}),), "two small operators"),
        ((SeparableForm("compact", {"a": "b"}), Stored("quantize", "int8")), "depthwise convolutions do little work"),
    ],
)
def test_a_latency_that_did_not_fall_is_said_with_the_reason(guarantees, reason, model):
    slow = replace(SMALLER, latency_ms=replace(BASELINE.latency_ms, p50=1.99))
    (note,) = notes(finished(model, slow, guarantees=guarantees))
    assert note.startswith("Latency fell by less than 3 % (p50 2.000 to 1.990 ms): ")
    assert reason in note
    faster = replace(SMALLER, latency_ms=replace(BASELINE.latency_ms, p50=1.9))
    assert notes(finished(model, faster, guarantees=guarantees)) == []


TRAINED = {"method": "finetune", "epochs": 4.0, "learning_rate": 0.03}
FINETUNED = Recovered("finetune")


def in_stages(result: Result, *accuracies: float, recovery=TRAINED, recovered=FINETUNED) -> Result:
    """Return the result with a stage for each accuracy of the exported file."""
    stages = tuple(
        stage(
            f"stage{number}",
            replace(SMALLER, accuracy=value, accuracy_keras=value),
            config={"recovery": recovery},
            recovered=recovered,
        )
        for number, value in enumerate(accuracies, start=1)
    )
    return replace(result, stages=stages)


def test_a_great_loss_of_accuracy_is_said_once_with_the_stage_that_lost_most(result):
    (note,) = notes(in_stages(result, 88.0, 31.5, 30.0))
    assert note.startswith("Accuracy fell from 90.00 to 30.00 %, most in stage2: from 88.00 to 31.50 %. ")
    assert "strategy.stage2.recovery.learning_rate=0.01 " in note
    assert "strategy.stage2.recovery.epochs=8" in note
    assert "recovery=finetune" not in note
    assert note in make_report(in_stages(result, 88.0, 31.5, 30.0), CONFIG, seconds=1.0)["notes"]


@pytest.mark.parametrize("accuracies", [(85.5,), (30.0, 89.0), (95.0,)])
def test_a_small_loss_of_accuracy_or_one_that_was_won_back_is_not_said(accuracies, result):
    assert notes(in_stages(result, *accuracies)) == []


@pytest.mark.parametrize(
    ("recovery", "recovered", "said", "unsaid"),
    [
        ({**TRAINED, "method": "distill"}, Recovered("distill"), "strategy.stage1.recovery.method=finetune", "nothing"),
        (
            {**TRAINED, "method": "distill", "losses": {"hints": 16}},
            Recovered("distill"),
            "smaller weights in strategy.stage1.recovery.losses",
            "nothing",
        ),
        ({**TRAINED, "epochs": 0}, None, "recovery=finetune recovery.epochs=1", "learning_rate"),
        ({**TRAINED, "method": "auto"}, Recovered("none"), "recovery=finetune", "learning_rate"),
        (TRAINED, None, "a milder setting of strategy.stage1", "recovery"),
    ],
)
def test_what_to_try_after_a_great_loss_depends_on_how_the_stage_has_trained(recovery, recovered, said, unsaid, result):
    (note,) = notes(in_stages(result, 40.0, recovery=recovery, recovered=recovered))
    assert said in note
    assert unsaid not in note
    assert "a milder setting" in note


@pytest.mark.parametrize(
    ("student", "fresh"),
    [
        ({"student": "resnet20", "width": None, "depth": None, "start": "random"}, True),
        ({"student": None, "width": 0.5, "depth": None, "start": "random"}, True),
        ({"student": None, "width": 0.5, "depth": None, "start": "teacher"}, False),
        ({"student": None, "width": None, "depth": None, "start": "random"}, False),
    ],
)
def test_a_student_of_fresh_weights_is_told_to_train_longer_not_slower(student, fresh, result):
    (first, *_) = in_stages(result, 40.0, recovered=Recovered("distill")).stages
    taught = replace(first, config={**first.config, **student})
    (note,) = notes(replace(result, stages=(taught,)))
    assert ("strategy.stage1.recovery.epochs=20" in note) == fresh
    assert ("strategy.stage1.recovery.learning_rate=0.01" in note) == (not fresh)


def test_an_untrained_model_loses_nothing_by_training(result):
    (note,) = notes(replace(in_stages(result, 40.0), untrained=True))
    assert "untrained" in note


def test_a_file_that_did_not_shrink_is_said_with_the_reason(model):
    from compress.strategies.pruning.zeros import Zeros

    same = replace(SMALLER, tflite_bytes=8000)
    (note,) = notes(finished(model, same))
    assert "did not shrink" in note
    assert "no stage removed weights" in note
    (note,) = notes(finished(model, same, guarantees=(Zeros("prune", {}),)))
    assert "too few for its sparse form" in note


@pytest.mark.parametrize(
    ("p50", "said"),
    [
        (2.0, "expands them when it loads the file and gets no faster (p50 2.000 to 2.000 ms)"),
        (1.0, "got faster in this stage (p50 2.000 to 1.000 ms)"),
        (None, "not known without a latency"),
    ],
)
def test_sparse_storage_is_said_once_with_what_the_runtime_makes_of_it(p50, said, model):
    latency = None if p50 is None else replace(BASELINE.latency_ms, p50=p50)
    pruned = replace(BASELINE, sparse_kernels=14, tflite_bytes=3000, latency_ms=latency)
    result = replace(
        finished(model, SMALLER), stages=(stage("prune", pruned), stage("tune", replace(SMALLER, sparse_kernels=14)))
    )
    (note,) = notes(result)
    assert note.startswith("prune: 14 kernels are stored sparsely; ")
    assert said in note
    report = make_report(result, CONFIG, seconds=1.0)
    jsonschema.validate(json.loads(json.dumps(report)), SCHEMA, jsonschema.Draft202012Validator)
    assert [entry["sparse_kernels"] for entry in (report["baseline"], *report["stages"])] == [0, 14, 14]


def test_kernels_that_are_no_longer_stored_sparsely_are_said(model):
    stages = tuple(stage(f"stage{i}", replace(SMALLER, sparse_kernels=i)) for i in (5, 4))
    first, second = notes(replace(finished(model, SMALLER), stages=stages))
    assert first.startswith("stage5: 5 kernels")
    assert second.startswith("stage4: 4 kernels are stored sparsely, 5 before: ")


def test_what_was_given_up_is_said(model):
    (note,) = notes(finished(model, SMALLER, released=("prune: half is zero (released by lowrank)",)))
    assert "half is zero" in note


def test_a_report_is_written_whole_and_read_back(result, tmp_path):
    report = json.loads(json.dumps(make_report(result, CONFIG, seconds=1.0)))
    path = tmp_path / "report.json"
    path.write_text("an older one")
    write_report(report, path)
    assert read_report(path) == report
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_versions_name_what_decides_the_numbers():
    import numpy as np
    import tensorflow as tf

    found = versions()
    assert found["tensorflow"] == tf.__version__
    assert found["numpy"] == np.__version__
    assert all(isinstance(value, str) and value for value in found.values())
    assert found["commit"] == "unknown" or len(found["commit"].removesuffix("+changes")) == 40


def test_the_table_shows_every_stage_and_the_gains(result, model, capsys):
    failed = replace(SMALLER, latency_ms=None, latency_failure="no answer within 600 s")
    print_table(make_report(finished(model, failed), CONFIG, seconds=1.0))
    shown = capsys.readouterr().out
    lines = [line.split() for line in shown.splitlines()]
    gain = next(line for line in shown.splitlines() if "gain" in line)
    assert any("baseline" in line and "90.00" in line and "8,000" in line for line in lines)
    assert "quantize (cached)" in shown
    for text in ("-0.50", "3.96x", "2.50x", "4.00x", "10.00x"):
        assert text in gain
    assert "quantize skipped conv: too small" in shown
    assert "no answer within 600 s" in shown


def test_the_seconds_of_the_whole_run_are_below_the_table(result, capsys):
    print_table(make_report(result, CONFIG, seconds=12.34))
    shown = capsys.readouterr().out
    gain = next(line for line in shown.splitlines() if "gain" in line)
    assert "12.3" not in gain
    assert "the whole run: 12.3 s" in shown[shown.index("└") :]
