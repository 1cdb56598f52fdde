"""``hydra/sweeper=search`` from the command line: a short search, continued, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compress.cli.places import conf_dir

pytest.importorskip("optuna")
SEARCH = ("-m", "hydra/sweeper=search", "hydra.sweeper.population=2", "hydra.sweep.dir=sweep", "recovery=none")
SPACE = ("strategy=prune,share", "strategy.prune.sparsity=interval(0.3,0.9)")
QUICK = ("board.runs=100", "board.warmup=1", "board.precision=null")


def reports(folder: Path) -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted(folder.glob("sweep/*/report.json"))]


def test_a_search_is_made_continued_and_drawn(cli, tmp_path):
    space = ("strategy=prune", "strategy.prune.sparsity=interval(0.3,0.9)")
    store = f"tracking.uri=sqlite:///{tmp_path}/runs.db"
    code, _, error = cli(*SEARCH, *space, *QUICK, store, "hydra.sweeper.trials=2", "hydra.sweeper.at_once=2")
    assert code == 0, error
    assert len(reports(tmp_path)) == 2
    found = json.loads((tmp_path / "sweep" / "search.json").read_text())
    assert found["objectives"] == ["accuracy", "packed_bytes"]
    numbers = [(r["final"]["accuracy"], r["final"]["packed_bytes"]) for r in reports(tmp_path)]
    front = {n for n in numbers if not any(o[0] >= n[0] and o[1] <= n[1] and o != n for o in numbers)}
    assert {tuple(best["values"]) for best in found["best"]} == front
    first = reports(tmp_path)

    # Three in all: one more. A limit that nothing keeps gives it up, after its stage and not at the baseline.
    code, _, error = cli(
        *SEARCH, *space, *QUICK, store, "hydra.sweeper.trials=3", "hydra.sweeper.give_up={accuracy: 100.5}"
    )
    assert code == 0, error
    said = (tmp_path / "sweep" / "2" / "given_up.txt").read_text()
    assert said.startswith("accuracy is ")
    assert "after prune" in said
    assert not (tmp_path / "sweep" / "3").exists(), "one more was enough"
    for best in found["best"]:
        assert Path(best["folder"]) == tmp_path / "sweep" / str(best["trial"])
    assert json.loads((tmp_path / "sweep" / "search.json").read_text()) == found
    assert reports(tmp_path) == first, "a trial that is given up leaves no report"


def test_each_pipeline_has_fields_of_its_own(cli, tmp_path):
    space = ("strategy=prune,share", "strategy.prune.sparsity=interval(0.3,0.9)", "strategy.share.clusters=4,8")
    settings = (
        "hydra.sweeper.trials=4",
        "hydra.sweeper.sampler=random",
        "hydra.sweeper.seed=1",
        "tracking=none",
        *QUICK,
    )
    code, _, error = cli(*SEARCH, *space, *settings)
    assert code == 0, error
    stages = [report["stages"][0]["name"] for report in reports(tmp_path)]
    assert set(stages) == {"prune", "share"}
    for best in json.loads((tmp_path / "sweep" / "search.json").read_text())["best"]:
        own = {"prune": "strategy.prune.sparsity", "share": "strategy.share.clusters"}[best["setting"]["strategy"]]
        assert set(best["setting"]) == {"strategy", own}
    assert len(stages) == 4


def test_a_trial_that_does_not_report_an_objective_is_one_of_many(cli, tmp_path, monkeypatch):
    """The first has both numbers, the next lacks one, a third is made in its place."""
    from compress.search import trial

    outcomes = [{"accuracy": 90.0, "packed_bytes": 5.0}, {"accuracy": 91.0}, {"accuracy": 92.0, "packed_bytes": 6.0}]
    monkeypatch.setattr(trial, "read_outcome", lambda folder: (outcomes.pop(0), False))
    space = ("strategy=prune", "strategy.prune.sparsity=interval(0.3,0.9)", "tracking=none")
    code, said, error = cli(*SEARCH, *space, *QUICK, "hydra.sweeper.trials=2", "hydra.sweeper.at_once=1")
    assert code == 0, error
    assert "The trial counts as failed" in " ".join(said.split())
    found = json.loads((tmp_path / "sweep" / "search.json").read_text())
    assert [best["trial"] for best in found["best"]] == [0, 2]


def test_a_search_begins_anew_where_a_configuration_file_has_changed(cli, tmp_path):
    recovery = (conf_dir() / "recovery" / "none.yaml").read_text()
    own = tmp_path / "conf" / "recovery" / "mine.yaml"
    own.parent.mkdir(parents=True)
    space = ("strategy=prune", "strategy.prune.sparsity=interval(0.3,0.9)", "recovery=none,mine", "tracking=none")

    def made_before(content: str) -> str:
        own.write_text(content)
        code, said, error = cli(
            "--config-dir", str(tmp_path / "conf"), *SEARCH[:-1], *space, *QUICK, "hydra.sweeper.trials=1"
        )
        assert code == 0, error
        return next(line for line in said.splitlines() if "trials were made before" in line)

    assert "0 of 1" in made_before(recovery)
    assert "0 of 1" in made_before(recovery.replace("mixup: 0.0", "mixup: 0.5"))


def test_a_search_that_gives_everything_up_says_so(cli):
    limit = "hydra.sweeper.give_up={accuracy: 100.5}"
    space = ("strategy=prune", "strategy.prune.sparsity=interval(0.3,0.9)")
    code, _, error = cli(*SEARCH, *space, *QUICK, "hydra.sweeper.trials=1", limit)
    assert code == 2, error
    assert "all 1 trials were given up" in " ".join(error.split())


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["strategy=prune"], ["hydra.sweeper.params", "interval(0.3,0.9)"]),
        ([*SPACE, "hydra.sweeper.seed=-1"], ["hydra.sweeper.seed", "from 0"]),
        ([*SPACE, "hydra.sweeper.sampler=nsga"], ["hydra.sweeper.sampler", "nsga2"]),
        ([*SPACE, "hydra.sweeper.trials=0"], ["hydra.sweeper.trials"]),
        ([*SPACE, "hydra.sweeper.objectives=[accuracy]"], ["hydra.sweeper.objectives", "two or more"]),
        ([*SPACE, "hydra.sweeper.storage=sqlite:////nowhere/x.db"], ["hydra.sweeper.storage"]),
        ([*SPACE, "hydra.sweeper.give_up={packed_bytes: 20000}"], ["hydra.sweeper.give_up", "packed_bytes"]),
        ([*SPACE, "hydra.sweeper.give_up={acuracy: 50}"], ["hydra.sweeper.give_up", "nearest to it: accuracy"]),
        ([*SPACE, "hydra.sweeper.give_up={accuracy: high}"], ["hydra.sweeper.give_up.accuracy", "a number"]),
        ([*SPACE, "hydra.sweeper.storage=null"], ["hydra.sweeper.storage", "sqlite:///search.db"]),
        ([*SPACE, "hydra.sweeper.params=[1,2]"], ["hydra.sweeper.params", "[1, 2]"]),
        (
            [*SPACE, "hydra.sweeper.objectives=[accuracy,packed_byte]"],
            ["hydra.sweeper.objectives", "a metric that runs report", "nearest to it: packed_bytes"],
        ),
        ([*SPACE, "hydra.sweeper.objectives=accuracy"], ["hydra.sweeper.objectives", "a list of metrics"]),
        (
            [*SPACE, "hydra.sweeper.objectives=[[accuracy,packed_bytes],[accuracy,macs]]"],
            ["hydra.sweeper.objectives", "one front"],
        ),
        (["strategy=prune", "strategy.prune.sparsity=interval(0.9,0.3)"], ["strategy.prune.sparsity", "0.9", "0.3"]),
        (["strategy=prune", "strategy.prune.sparsity=tag(log,interval(0,0.9))"], ["strategy.prune.sparsity", "log"]),
        (["strategy=share", "strategy.share.clusters=range(9,2)"], ["strategy.share.clusters", "range"]),
        (
            ["strategy=share", "strategy.share.clusters=tag(log,range(2,99))"],
            ["strategy.share.clusters", "tag(log,int(interval("],
        ),
        ([*SPACE, "strategy.shar.clusters=4,8"], ["strategy.shar.clusters", "nearest to it: share"]),
        ([*SPACE, "strategy.share.cluster=4,8"], ["strategy.share.cluster"]),
    ],
    ids=lambda value: str(value[-1]) if isinstance(value, list) else "",
)
def test_mistakes_of_a_search(cli, arguments, parts):
    code, _, error = cli(*SEARCH, *arguments, "tracking=none")
    assert code == 2, error
    assert "Traceback" not in error
    said = " ".join(error[error.index("Error in ") :].split())
    assert all(part in said for part in parts), said
    assert not Path("search.db").exists()
