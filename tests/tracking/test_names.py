"""Objectives that no run can report are refused before any run; the names are those that runs do report."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from compress.errors import CompressError
from compress.search.trial import metrics_of_report
from compress.tracking import names
from compress.tracking.pareto import read_fronts
from compress.tracking.recorder import metrics_of
from compress.tracking.report import ratios
from tests.tracking.runs import NUMBERS

WHOLE = dataclasses.replace(NUMBERS, packed_bytes=3000, estimate_ms=1.0, speedup=2.0, on_board={"energy": 1.0})


def test_the_names_are_those_that_runs_report():
    assert set(metrics_of(WHOLE)) == names.OF_STAGE | {"board_energy"}
    assert set(ratios(WHOLE, WHOLE)) == names.RATIOS
    numbers = dataclasses.asdict(WHOLE)
    report = metrics_of_report({"final": numbers, "baseline": numbers, "ratios": ratios(WHOLE, WHOLE)})
    assert {name for name in report if "." not in name} == names.OF_FINAL | {"board_energy"}


@pytest.mark.parametrize(
    "metric",
    ["board_energy", "ratio.tflite_bytes", "baseline.accuracy", "baseline.board_energy", "speedup", "estimate_ms:min"],
)
@pytest.mark.parametrize("recorded", [True, False])
def test_what_only_some_runs_report_is_allowed(metric, recorded):
    names.require_known(read_fronts(["accuracy", metric], ""), "tracking.objectives", recorded=recorded)


@pytest.mark.parametrize("metric", ["prune.oracle_difference", "seconds", "accuracy_gap"])
def test_what_a_stage_measures_is_in_mlflow_alone(metric):
    fronts = read_fronts(["accuracy", metric], "")
    names.require_known(fronts, "tracking.objectives", recorded=True)
    with pytest.raises(CompressError, match="a metric that runs report"):
        names.require_known(fronts, "hydra.sweeper.objectives", recorded=False)


@pytest.mark.parametrize(
    ("metric", "nearest"),
    [("tflite_byte", "tflite_bytes"), ("ratio.mac", "ratio.macs"), ("baseline.acuracy", "baseline.accuracy")],
)
def test_a_misspelt_one_is_told_with_the_nearest(metric, nearest):
    with pytest.raises(CompressError, match=f"nearest to it: {nearest}"):
        names.require_known(read_fronts(["accuracy", metric], ""), "tracking.objectives", recorded=True)


def test_a_multirun_is_refused_before_its_first_job(cli, tmp_path):
    code, _, error = cli(
        *("-m", "strategy=none", "tracking.objectives=[accuracy,tflite_byte]", "hydra.sweep.dir=swept"),
        f"tracking.uri=sqlite:///{tmp_path}/runs.db",
    )
    assert code == 2, error
    said = " ".join(error.split())
    assert "Error in tracking.objectives: expected a metric that runs report" in said
    assert "nearest to it: tflite_bytes" in said
    assert not Path("swept").exists()
    assert not Path("runs.db").exists()
