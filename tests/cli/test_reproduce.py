"""``compress.reproduce``: ours beside the published numbers."""

from __future__ import annotations

import pytest

from compress.cli.experiment import load_experiment, render
from compress.cli.places import experiments_dir
from compress.reproduce import main, names


def test_every_experiment_can_be_read():
    assert "resnet_cifar10" in names()
    for name in names():
        experiment = load_experiment(experiments_dir() / name, name)
        for row in experiment.grid.runs:
            assert experiment.table.value(row, experiment.table.columns[0]) == row
        for column in experiment.grid.columns:
            assert column.published is None or column.published in experiment.table.columns


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
