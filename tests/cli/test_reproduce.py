"""``compress.reproduce``: ours beside the published numbers."""

from __future__ import annotations

import shutil

import pytest
from pydantic import ValidationError

from compress.cli.build import make_plan
from compress.cli.compose import compose_config
from compress.cli.experiment import Column, Experiment, Grid, PublishedTable, load_experiment, render, run_experiment
from compress.cli.finished import FinishedRuns
from compress.cli.places import experiments_dir
from compress.errors import CompressError
from compress.reproduce import main, names


def test_every_experiment_can_be_read():
    assert "resnet_cifar10" in names()
    for name in names():
        experiment = load_experiment(experiments_dir() / name, name)
        for row in experiment.grid.rows:
            assert experiment.table.value(row, experiment.table.columns[0]) == row
        for column in experiment.grid.columns:
            assert column.published is None or column.published in experiment.table.columns


@pytest.mark.parametrize("name", names())
def test_every_row_is_a_pipeline_that_can_be_built(name):
    grid = load_experiment(experiments_dir() / name, name).grid
    rows = list(grid.runs.values())
    if grid.count:
        # Of rows that differ in values alone, one.
        rows = list({tuple(item.partition("=")[0] for item in own): own for own in rows}.values())
    for own in rows:
        plan = make_plan(compose_config([*grid.overrides, *own, "model.weights=scratch"]))
        assert bool(plan.stages) == ("strategy=none" not in [*grid.overrides, *own])


def test_an_unknown_experiment_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["resnet_cifar"])
    assert stopped.value.code == 2
    assert "resnet_cifar10" in capsys.readouterr().err


def test_a_difference_outside_the_tolerance_is_said():
    experiment = load_experiment(experiments_dir() / "resnet_cifar10", "resnet_cifar10")
    numbers = {"accuracy": 91.73, "accuracy_keras": 91.73, "params": 269722, "macs": 40551040, "tflite_bytes": 1}
    good = {"final": {**numbers, "latency_ms": {"p50": 1.0}}, "board": "host"}
    bad = {"final": {**numbers, "accuracy": 90.0, "latency_ms": None}, "board": "host"}
    page = render(experiment, {"ResNet-20": [good]}, [0], [])
    assert "Outside the tolerance" not in page
    assert "not run yet" in page
    page = render(experiment, {"ResNet-20": [good, bad]}, [0, 1], [])
    assert "Outside the tolerance: ResNet-20, accuracy, exported file %" in page


def test_a_floor_is_met_from_above_only():
    experiment = load_experiment(experiments_dir() / "resnet20_pipelines", "resnet20_pipelines")

    def page(accuracy: float) -> str:
        report = {"baseline": {"accuracy": 91.73}, "final": {"accuracy": accuracy}, "ratios": {"nonzero_params": 9.0}}
        return render(experiment, {"lowrank+prune": [report]}, [0], [])

    assert "Outside" not in page(91.5)
    assert "Outside" in page(90.9)


def page_of(column: Column, published: str | float, report: dict) -> str:
    table = PublishedTable("title", "source", ["row", "theirs"], [["all", published]])
    return render(Experiment("mine", table, Grid({"all": []}, [column], [], [0])), {"all": [report]}, [0], [])


@pytest.mark.parametrize(
    ("published", "ours", "agrees"),
    [
        ("1.8E+06", 1_769_472, True),
        ("1.8E+06", 1_750_000, True),
        ("1.8E+06", 1_749_999, False),
        ("64.0", 64.04, True),
        ("64.0", 64.06, False),
        (34, 34.5, True),
        (34, 33.4, False),
    ],
)
def test_half_a_unit_of_the_last_digit_printed_may_differ(published, ours, agrees):
    page = page_of(
        Column("number", "final.number", "theirs", tolerance="printed"), published, {"final": {"number": ours}}
    )
    assert ("Outside" not in page) == agrees


def test_paths_may_sum_and_compare():
    layers = {"baseline": {"a": {"macs": 30}, "b": {"macs": 70}}, "final": {"a": {"macs": 30}, "b": {"macs": 7.5}}}
    column = Column("gone %", "layers.final.*.macs", removed_from="layers.baseline.*.macs")
    assert "| all | 62.50 |" in page_of(column, 0, {"layers": layers})
    assert "| all | - |" in page_of(column, 0, {"layers": {"final": layers["final"]}})
    assert "| all | - |" in page_of(column, 0, {})
    rate = Column("rate", "stages.1.measured.rate")
    stages = [{"measured": {"rate": 3.0}}, {"measured": {"rate": 4.5}}]
    assert "| all | 4.5 |" in page_of(rate, 0, {"stages": stages})
    assert "| all | - |" in page_of(rate, 0, {"stages": stages[:1]})
    assert "| all | 7.5 |" in page_of(Column("rates", "stages.*.measured.rate"), 0, {"stages": stages})


def test_rows_that_are_layers_belong_to_one_run(tmp_path):
    (tmp_path / "table.yaml").write_text("{title: t, source: s, columns: [layer], rows: []}")
    (tmp_path / "grid.yaml").write_text(
        "{runs: {a: [], b: []}, columns: [], overrides: [], seeds: [0], layers: {c: d}}"
    )
    with pytest.raises(CompressError, match="one run, or one for each layer"):
        load_experiment(tmp_path, "mine")


def test_a_row_is_compared_with_another_one_seed_by_seed():
    columns = [Column("gain", ours="final.accuracy", compared=True)]
    runs = {"with": ["seed=0,1"], "without": ["seed=0,1"]}
    table = PublishedTable("t", "s", ["model"], [["with"], ["without"]])
    experiment = Experiment("x", table, Grid(runs, columns, [], [0, 1], compared_with={"with": "without"}))
    rows = {"with": [{"final": {"accuracy": a}} for a in (80.0, 90.0)]}
    assert "| with | - |" in render(experiment, rows, [0, 1], [])
    rows["without"] = [{"final": {"accuracy": a}} for a in (79.0, 86.0)]
    assert "| with | 2.5 ± 2.12 |" in render(experiment, rows, [0, 1], [])
    with pytest.raises(ValidationError, match="'nothing'"):
        Grid(runs, columns, [], [0], compared_with={"with": "nothing"})


def test_a_row_may_name_its_only_seed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    column = Column("accuracy", "final.accuracy")
    quick = ["strategy=none", "model.train.epochs=0.1", "tracking=none", "cache=off", "board.runs=100"]
    grid = Grid({"all": [], "one": ["seed=5"]}, [column], quick, [0, 1])
    table = PublishedTable("title", "source", ["row"], [["all"], ["one"]])
    page = run_experiment(Experiment("mine", table, grid), [], tmp_path).read_text()
    cells = {row.split("|")[1].strip(): row.split("|")[2] for row in page.splitlines() if row.startswith("|")}
    assert "±" in cells["all"]
    assert "±" not in cells["one"]
    assert "- seeds: 0, 1, one: 5 alone" in page
    made = {path.name for path in (tmp_path / "outputs" / "reproduce" / "mine").iterdir()}
    assert made == {"all-seed0", "all-seed1", "one-seed5"}
    # Another machine: no cache, no outputs, one run not yet made, one of other overrides.
    shutil.rmtree(tmp_path / "outputs")
    file = tmp_path / "mine.jsonl"
    lines = file.read_text().splitlines()
    file.write_text(lines[0].replace("epochs=0.1", "epochs=0.2") + "\n" + lines[1] + "\n")
    again = run_experiment(Experiment("mine", table, grid), [], tmp_path, keep=True).read_text()
    assert {path.name for path in (tmp_path / "outputs" / "reproduce" / "mine").iterdir()} == {"all-seed0", "one-seed5"}
    assert again.splitlines()[:8] == page.splitlines()[:8]
    file.write_text(lines[0] + "\nnothing\n")
    with pytest.raises(CompressError, match=r"mine\.jsonl, line 2"):
        run_experiment(Experiment("mine", table, grid), [], tmp_path, keep=True)


@pytest.mark.data
def test_the_first_table_in_short(data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["resnet_cifar10", "tracking=none", "data.train_limit=64", "data.test_limit=100", "board.runs=100"])
    assert stopped.value.code == 0
    page = (tmp_path / "results" / "resnet_cifar10.md").read_text()
    for value in ("269,722", "853,018", "125,485,696", "command: `python -m compress.reproduce resnet_cifar10"):
        assert value in page
    assert "not run yet" not in page


def test_what_a_search_chose_is_shown_layer_by_layer(tmp_path):
    table = PublishedTable("t", "s", ["row"], [["first"]])
    column = Column("accuracy", "final.accuracy")
    experiment = Experiment("x", table, Grid({"first": []}, [column], [], [0], allocation="stages.0.allocation"))
    chosen = [
        {"layer": "conv1", "chosen": ["prune sparsity=0.5", "quantize bits=4"], "divergence": 0.0123, "bytes": 1234},
        {"layer": "fc1", "chosen": [], "divergence": 0.0, "bytes": 80},
    ]
    rows = [{**row, "milliseconds": time} for row, time in zip(chosen, (0.25, None), strict=True)]
    report = {"trained": True, "board": "host", "final": {"accuracy": 90.0}, "stages": [{"allocation": rows}]}
    kept = FinishedRuns(tmp_path / "x.jsonl", ["final.accuracy", "stages.0.allocation"], kept=False)
    kept.add("first", 0, [], report)
    for found in (report, kept.runs[0].report):
        page = render(experiment, {"first": [found]}, [0], [])
        assert "| conv1 | prune sparsity=0.5, quantize bits=4 | 1.2e-02 | 1,234 | 0.2500 |" in page
        assert "| fc1 | as it is | 0.0e+00 | 80 | - |" in page
