"""The tables of Li et al. (arXiv 1608.08710): what the grids cut, counted on random weights."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from compress.candidate import Candidate
from compress.cli.build import make_plan
from compress.cli.compose import compose_config
from compress.cli.experiment import load_experiment, render
from compress.cli.places import experiments_dir
from compress.data.source import Augmentation, Data, Split
from compress.metrics.counts import count_macs
from compress.pipeline.layers import layer_table
from compress.strategies.strategy import Context
from compress.training import Recovery

TABLE1 = load_experiment(experiments_dir() / "l1_t1", "l1_t1")
TABLE2 = load_experiment(experiments_dir() / "l1_t2", "l1_t2")
CUT_OFF = {
    "ResNet-56-pruned-B": ["parameters removed %: 13.77 against 13.7"],
    "ResNet-110-pruned-B": ["multiply-adds removed %: 38.66 against 38.6", "parameters removed %: 32.45 against 32.4"],
}
"""The paper's percentages that are not rounded like its others."""


def analytic_report(overrides: list[str]) -> dict[str, Any]:
    """What a run's report says about sizes, without data, training and export."""
    plan = make_plan(compose_config([*overrides, "model.weights=scratch"]))
    part = Split(np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3)).astype(np.uint8), np.arange(16) % 10)
    data = Data("random", part, part, part, 10, Augmentation(), "identity")
    model = plan.model.build(data, 0)
    candidate, context = Candidate(model), Context("", data, model, Recovery(), 0)
    for stage in plan.stages:
        if not stage.recovery.trains:
            candidate = stage.apply(candidate, context)
    return {
        "trained": False,
        "baseline": {"macs": count_macs(model)},
        "final": {"macs": count_macs(candidate.model), "accuracy": 12.34},
        "layers": {"baseline": layer_table(model), "final": layer_table(candidate.model)},
    }


def cells_of(page: str, row: str) -> list[str]:
    (line,) = re.findall(rf"^\| {re.escape(row)} \|(.*)\|$", page, re.MULTILINE)
    return [cell.strip() for cell in line.split("|")]


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, marks=[pytest.mark.slow] if "ResNet" in row and "pruned" in row else [])
        for row in TABLE1.grid.runs
    ],
)
def test_sizes_of_table_1(row):
    report = analytic_report([*TABLE1.grid.overrides, *TABLE1.grid.runs[row]])
    page = render(TABLE1, {row: [report]}, [0], [])
    misses = [f"{row}, {miss}" for miss in CUT_OFF.get(row, [])]
    assert re.findall(r"Outside the tolerance: (.*)\.", page) == (["; ".join(misses)] if misses else [])
    published = next(cells for cells in TABLE1.table.rows if cells[0] == row)[2:]
    judged = [cell for cell in cells_of(page, row) if cell in ("yes", "**no**")]
    assert len(judged) == sum(cell is not None for cell in published)
    assert "12.34" not in page, "an untrained network has no accuracy"


def test_layers_of_table_2():
    report = analytic_report([*TABLE2.grid.overrides, *TABLE2.grid.runs["VGG-16-pruned-A"]])
    page = render(TABLE2, {"VGG-16-pruned-A": [report]}, [0], [])
    assert "Outside" not in page
    assert sum(cells_of(page, row).count("yes") for row in TABLE2.grid.layers) == 16 * 5 - 2
    assert cells_of(page, "Conv_9")[-3:] == ["75", "75.00", "yes"]
    assert cells_of(page, "Total")[4:6] == ["3.1E+08", "313,463,808"]
    empty = render(TABLE2, {}, [0], [])
    assert cells_of(empty, "Conv_9").count("not run yet") == 5
