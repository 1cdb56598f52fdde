"""``compress.sensitivity`` and ``strategy=auto`` from the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from compress.cli.places import conf_dir
from compress.tracking.report import SCHEMA_FILE
from tests.conftest import QUICK

SMALL = ["images=48", "techniques=none", "+techniques={prune:{sparsity:[0.5,0.9]},quantize:{bits:[8]}}"]


@pytest.fixture
def survey(tmp_path, session_cache, monkeypatch, capfd):
    from compress.sensitivity import main

    monkeypatch.chdir(tmp_path)

    def run(*overrides: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sensitivity.py"])
        with pytest.raises(SystemExit) as stopped:
            main([*overrides, f"cache.dir={session_cache}", *(q for q in QUICK if q.startswith("board"))])
        shown = capfd.readouterr()
        return int(stopped.value.code or 0), shown.out, shown.err

    return run


def test_the_table_the_map_and_the_run(survey, tmp_path):
    code, out, err = survey("hydra.run.dir=out", f"tracking.uri=sqlite:///{tmp_path}/runs.db", *SMALL)
    assert code == 0, err
    table = json.loads(Path("out/sensitivity.json").read_text())
    assert len(table["probes"]) == 5 * 3
    assert "quantize bits 8" in out
    assert Path("out/sensitivity.md").read_text().count("| fc1 |") == 3
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/runs.db")
    (run,) = client.search_runs([client.get_experiment_by_name("compress").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["probes"] == 15
    assert {item.path for item in client.list_artifacts(run.info.run_id)} >= {"sensitivity.png", "sensitivity.md"}


def test_a_strategy_of_the_users_own_folder_is_a_technique(survey, tmp_path):
    (tmp_path / "own" / "strategy").mkdir(parents=True)
    prune = (conf_dir() / "strategy" / "prune.yaml").read_text()
    (tmp_path / "own" / "strategy" / "mine.yaml").write_text(prune)
    code, _, err = survey(
        *("--config-dir", str(tmp_path / "own"), "hydra.run.dir=out", "tracking=none", "images=48", "techniques=none"),
        "+techniques={mine:{sparsity:[0.5]}}",
    )
    assert code == 0, err
    assert {probe["technique"] for probe in json.loads(Path("out/sensitivity.json").read_text())["probes"]} == {"mine"}


@pytest.mark.parametrize(
    ("override", "where", "said"),
    [
        ("+techniques.prun={sparsity:[0.5]}", "techniques.prun", "prune"),
        ("techniques.prune.sparsty=[0.5]", "techniques.prune.sparsty", "sparsity"),
        ("images=0", "images", "0"),
        ("strategy=prune", "strategy", "none"),
        ("only=conv", "only", "{type: Dense}"),
        ("only={name:conv9}", "only", "conv1"),
    ],
)
def test_mistakes_end_with_one_paragraph(survey, override, where, said):
    code, _, err = survey("tracking=none", override)
    assert code == 2
    assert "Traceback" not in err
    assert "Error executing job" not in err
    assert where in err
    assert said in err


def test_several_models_at_once_are_refused_before_anything_is_logged(survey, tmp_path):
    code, _, err = survey("-m", "seed=0,1", f"tracking.uri=sqlite:///{tmp_path}/runs.db")
    assert code == 2
    assert "one model at a time" in err
    assert not (tmp_path / "runs.db").exists()


def test_a_budget_on_the_command_line_is_met_and_reported(cli):
    techniques = "{prune_channels:{channels:[0.5],ranking:layer},quantize:{bits:[8]}}"
    code, out, err = cli(
        "strategy=auto", "budget.bytes=50000", "recovery=none", "hydra.run.dir=out", "strategy.auto.images=48",
        "techniques=none", f"+techniques={techniques}", *(q for q in QUICK if q.startswith("board")),
    )  # fmt: skip
    assert code == 0, err
    report = json.loads(Path("out/report.json").read_text())
    assert report["final"]["packed_bytes"] <= 50_000
    assert [row["layer"] for row in report["stages"][0]["allocation"]] == ["conv1", "conv2", "conv3", "fc1", "logits"]
    assert "what each layer got" in out
    import jsonschema

    jsonschema.validate(report, json.loads(SCHEMA_FILE.read_text()))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], "budget.bytes"),
        (["budget.bytes=-1"], "greater than 0"),
        (["budget.byts=5"], "bytes"),
        (["budget.bytes=5000", "techniques=standrd"], "standard"),
    ],
)
def test_a_wrong_budget_is_refused_before_anything_runs(cli, overrides, said):
    code, _, err = cli("strategy=auto", *overrides)
    assert code == 2
    assert said in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "overrides", [["strategy=prune"], ["strategy=none"], ["strategy=auto", "strategy.auto.bytes=60000"]]
)
def test_a_budget_that_no_stage_reads_is_refused(cli, overrides):
    code, _, err = cli(*overrides, "budget.bytes=70000")
    assert code == 2
    assert "budget.bytes" in err
    assert "no stage of the pipeline reads it" in err
