"""The study behind ``hydra/sweeper=search``: what it asks, that it goes on, what it says when the database does not."""

from __future__ import annotations

import json
import sqlite3
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from moocore import hypervolume

from compress.errors import CompressError, GivenUp
from compress.search import study as module
from compress.search.space import Choice, Interval
from compress.search.study import SAMPLERS, Study, Trial
from compress.search.trial import metrics_of_report, note_given_up, read_limits, read_outcome, refuse_hopeless
from compress.tracking.pareto import Objective

optuna = pytest.importorskip("optuna")
OBJECTIVES = (Objective("accuracy", True), Objective("packed_bytes", False))
SPACE = {
    "strategy.prune.sparsity": Interval(0.3, 0.9),
    "strategy.share.clusters": Interval(2, 16, whole=True),
    "recovery.learning_rate": Interval(1e-4, 1e-1, log=True),
    "strategy": Choice(("prune", "lowrank+prune")),
}


def study_in(folder: Path | None, *, name: str = "s", seed: int = 0, space=SPACE, sampler: str = "nsga2") -> Study:
    """A study in a file, or, quicker, in memory."""
    storage = f"sqlite:///{folder}/search.db" if folder is not None else "sqlite:///:memory:"
    return Study(storage, name, OBJECTIVES, space, sampler=sampler, seed=seed, population=4)


def values_of(trial: Trial) -> dict[str, str]:
    return dict(text.split("=") for text in trial.overrides)


def numbers_of(trial: Trial) -> dict[str, float]:
    """More sparsity costs accuracy and saves bytes; fewer clusters only save bytes."""
    values = values_of(trial)
    sparsity, clusters = float(values["strategy.prune.sparsity"]), int(values["strategy.share.clusters"])
    return {"accuracy": 100 - 50 * sparsity**2, "packed_bytes": 1000 * (1 - sparsity) + clusters}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_settings_lie_in_the_space_and_the_front_is_found(sampler):
    study = study_in(None, sampler=sampler)
    numbers = []
    for _ in range(12):
        trial = study.ask()
        values = values_of(trial)
        assert 0.3 <= float(values["strategy.prune.sparsity"]) <= 0.9
        assert 2 <= int(values["strategy.share.clusters"]) <= 16
        assert 1e-4 <= float(values["recovery.learning_rate"]) <= 1e-1
        assert values["strategy"] in ("prune", "lowrank+prune")
        numbers.append(numbers_of(trial))
        study.tell(trial, numbers[-1])
    assert study.finished == 12

    def beaten(one: dict[str, float]) -> bool:
        return any(
            o["accuracy"] >= one["accuracy"] and o["packed_bytes"] <= one["packed_bytes"] and o != one for o in numbers
        )

    expected = {(n["accuracy"], n["packed_bytes"]) for n in numbers if not beaten(n)}
    assert {found.values for found in study.best()} == expected


def test_a_gaussian_search_dominates_more_than_chance_does():
    """Twelve trials of which four are drawn evenly; the hypervolume is counted from the baseline that trials report."""
    baseline = {"baseline.accuracy": 100.0, "baseline.packed_bytes": 1000.0}

    def dominated(sampler: str, seed: int) -> float:
        study = study_in(None, seed=seed, sampler=sampler)
        for _ in range(12):
            trial = study.ask()
            study.tell(trial, {**numbers_of(trial), **baseline})
        values = np.array([found.values for found in study.best()])
        return float(hypervolume(values * [-0.01, 0.001], ref=[0, 1]))

    gaussian, random = ([dominated(sampler, seed) for seed in range(2)] for sampler in ("gaussian", "random"))
    assert all(one > other for one, other in zip(gaussian, random, strict=True)), (gaussian, random)


def test_a_gaussian_search_leaves_alone_what_is_at_work_or_was_given_up():
    space = {"strategy.share.clusters": Interval(2, 9, whole=True)}
    study = study_in(None, space=space, sampler="gaussian")
    asked = [study.ask() for _ in range(4)]
    for number, trial in enumerate(asked):
        clusters = int(values_of(trial)["strategy.share.clusters"])
        study.tell(trial, None if number == 3 else {"accuracy": clusters, "packed_bytes": clusters}, hopeless=True)
    drawn = [trial.overrides for trial in asked]
    for _ in range(8 - len(set(drawn))):
        drawn.append(study.ask().overrides)
    assert len(set(drawn)) == 8, "each of the eight settings once, before any is tried again"


def test_a_gaussian_search_turns_away_from_what_fails():
    """The setting that would be best by what is known does not work."""
    space = {"strategy.share.clusters": Interval(2, 9, whole=True), "strategy": Choice(("prune", "lowrank+prune"))}
    study, failed = study_in(None, space=space, sampler="gaussian"), 0
    for _ in range(16):
        trial = study.ask()
        clusters = int(values_of(trial)["strategy.share.clusters"])
        failed += clusters == 9
        study.tell(trial, None if clusters == 9 else {"accuracy": clusters, "packed_bytes": -clusters})
    assert 0 < failed <= 4


def test_a_gaussian_search_passes_over_what_another_process_has_drawn_in_part(tmp_path):
    space = {"a": Interval(0, 1), "b": Interval(0, 1)}
    study = study_in(tmp_path, space=space, sampler="gaussian")
    for number in range(4):
        study.tell(study.ask(), {"accuracy": number, "packed_bytes": number})
    other = optuna.load_study(study_name="s", storage=f"sqlite:///{tmp_path}/search.db").ask()
    other.suggest_float("a", 0, 1)
    assert len(study.ask().overrides) == 2


def test_a_study_goes_on_and_does_not_repeat_its_draws(tmp_path):
    first = [study_in(tmp_path).ask() for _ in range(1)]
    study = study_in(tmp_path)
    trial = study.ask()
    assert trial.number == 1
    assert trial.overrides != first[0].overrides
    study.tell(trial, numbers_of(trial))
    study.tell(first[0], None)
    assert study_in(tmp_path).finished == 1, "a failed trial is replaced"


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_processes_that_begin_a_study_at_once_draw_different_settings(sampler, tmp_path):
    both = [study_in(tmp_path, sampler=sampler) for _ in range(2)]
    drawn = []
    # The first generation; a child of nsga2's later ones may be a parent once more.
    for _ in range(2):
        trials = [study.ask() for study in both]
        drawn += [trial.overrides for trial in trials]
        for study, trial in zip(both, trials, strict=True):
            study.tell(trial, numbers_of(trial))
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_process_draws_the_same_for_a_seed_also_when_it_is_continued(sampler, tmp_path):
    def drawn(name: str, seed: int, *, continued: bool) -> list[tuple[str, ...]]:
        study, found = study_in(tmp_path, name=name, seed=seed, sampler=sampler), []
        for _ in range(5):
            trial = study.ask()
            found.append(trial.overrides)
            study.tell(trial, numbers_of(trial))
            if continued:
                study = study_in(tmp_path, name=name, seed=seed, sampler=sampler)
        return found

    first = drawn("first", 3, continued=False)
    assert drawn("second", 3, continued=True) == first
    assert drawn("third", 4, continued=False)[0] != first[0]


def test_trials_at_work_elsewhere_are_not_made_twice(tmp_path, monkeypatch):
    mine, other = study_in(tmp_path), study_in(tmp_path)
    assert mine.left(3) == 3
    theirs = other.ask()
    assert mine.left(3) == 2
    other.tell(theirs, None)
    assert mine.left(3) == 3, "a failed one is replaced"
    other.ask()
    monkeypatch.setattr(module, "has_ended", lambda tags: True)
    assert mine.left(3) == 3, "so is one whose process has gone meanwhile"


def test_the_best_settings_are_those_that_ran(tmp_path):
    study = study_in(tmp_path)
    trial = study.ask()
    study.tell(trial, numbers_of(trial), folder="sweep/0")
    (found,) = study.best()
    setting = found.setting
    assert (found.number, found.folder) == (0, "sweep/0")
    assert (
        tuple(f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in setting.items())
        == trial.overrides
    )
    assert float(values_of(trial)["strategy.prune.sparsity"]) == setting["strategy.prune.sparsity"]


@pytest.mark.parametrize(
    ("values", "part"),
    [
        (Interval(0.9, 0.3), "interval(0.9,0.3)"),
        (Interval(9, 2, whole=True), "interval(9,2)"),
        (Interval(0.0, 0.9, log=True), "tag(log,interval(0,0.9))"),
        (Interval(0.0, float("inf")), "inf"),
        (Choice(()), "a range without a value"),
    ],
    ids=str,
)
def test_a_key_that_can_have_no_value_is_refused_before_the_study_is_made(values, part, tmp_path):
    with pytest.raises(CompressError) as caught:
        study_in(tmp_path, space={"strategy.prune.sparsity": values})
    assert caught.value.where == "strategy.prune.sparsity"
    assert part in caught.value.received
    assert not (tmp_path / "search.db").exists()


def test_a_study_is_about_jobs_of_the_same_settings(tmp_path):
    def study(settings: str) -> Study:
        storage = f"sqlite:///{tmp_path}/search.db"
        return Study(storage, "s", OBJECTIVES, SPACE, sampler="random", seed=0, population=4, settings=settings)

    study("recovery=none")
    study("recovery=none")
    with pytest.raises(CompressError, match=r"hydra\.sweeper\.study.*settings of the jobs"):
        study("recovery=finetune")


def test_a_trial_without_an_objective_has_failed_and_others_go_on(tmp_path):
    study = study_in(tmp_path)
    with pytest.raises(CompressError, match="packed_bytes, which trial 0 does not"):
        study.tell(study.ask(), {"accuracy": 90.0})
    assert (study.reported, study.left(1)) == (False, 1)
    trial = study.ask()
    study.tell(trial, numbers_of(trial))
    assert (study.reported, study.left(1)) == (True, 0)


def test_given_up_trials_count_and_are_on_no_front(tmp_path):
    study = study_in(tmp_path)
    study.tell(study.ask(), None, hopeless=True)
    assert study.finished == 1
    assert study.best() == []


def test_the_setting_of_a_killed_trial_is_tried_again(tmp_path, monkeypatch):
    killed = study_in(tmp_path).ask()
    monkeypatch.setattr(module, "has_ended", lambda tags: True)
    again = study_in(tmp_path).ask()
    assert again.number == 1
    assert again.overrides == killed.overrides


def test_a_trial_that_is_at_work_elsewhere_is_left_alone(tmp_path):
    running = study_in(tmp_path).ask()
    assert study_in(tmp_path).ask().overrides != running.overrides


def test_another_space_needs_another_name(tmp_path):
    study_in(tmp_path)
    with pytest.raises(CompressError) as caught:
        study_in(tmp_path, space={"strategy.prune.sparsity": Interval(0.3, 0.8)})
    assert "hydra.sweeper.study" in str(caught.value)
    study_in(tmp_path, name="other", space={"strategy.prune.sparsity": Interval(0.3, 0.8)})


def test_an_objective_that_a_trial_does_not_report(tmp_path):
    study = study_in(tmp_path)
    with pytest.raises(CompressError) as caught:
        study.tell(study.ask(), {"accuracy": 1.0, "packed_byte": 2.0})
    assert "packed_bytes" in str(caught.value)


def test_a_locked_database_is_one_paragraph(tmp_path, monkeypatch):
    study_in(tmp_path)
    monkeypatch.setattr(module, "_LOCK_SECONDS", 0.2)
    holder = sqlite3.connect(tmp_path / "search.db")
    holder.execute("BEGIN EXCLUSIVE")
    try:
        with pytest.raises(CompressError) as caught:
            study_in(tmp_path).ask()
    finally:
        holder.rollback()
        holder.close()
    assert "hydra.sweeper.storage" in str(caught.value)
    assert "locked" in str(caught.value)


@pytest.mark.parametrize(
    "storage", ["sqlite:////nowhere/at/all/search.db", "no uri", "postgresql://me:secret@x.invalid/s"]
)
def test_a_database_that_does_not_answer(storage):
    with pytest.raises(CompressError) as caught:
        Study(storage, "s", OBJECTIVES, SPACE, sampler="tpe", seed=0, population=4)
    assert "hydra.sweeper.storage" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_an_unknown_sampler_names_the_nearest(tmp_path):
    with pytest.raises(CompressError, match="nsga2"):
        study_in(tmp_path, sampler="nsga")


def test_hopeless_is_below_a_limit():
    metrics = {"accuracy": 60.0, "accuracy_keras": 61.0}
    refuse_hopeless("prune", metrics, read_limits({"accuracy": 50, "accuracy_keras": 61}, "give_up"))
    with pytest.raises(GivenUp, match="accuracy is 60 after prune"):
        refuse_hopeless("prune", metrics, {"accuracy": 70})


@pytest.mark.parametrize(
    ("limits", "parts"),
    [
        ({"packed_bytes": 20000}, ["packed_bytes", "later stages", "objectives"]),
        ({"acuracy": 50}, ["acuracy", "nearest to it: accuracy"]),
        ({"accuracy": "high"}, ["give_up.accuracy", "a number", "high"]),
        ({"accuracy": True}, ["a number"]),
        ({"accuracy": float("nan")}, ["a number"]),
        (50, ["limits by metric", "{accuracy: 50}"]),
    ],
    ids=str,
)
def test_limits_that_an_early_look_cannot_judge_are_refused(limits, parts):
    with pytest.raises(CompressError) as caught:
        read_limits(limits, "give_up")
    assert all(part in str(caught.value) for part in parts), caught.value


def test_what_a_job_leaves_for_its_search(tmp_path):
    assert read_outcome(tmp_path) == (None, False)
    final = {"accuracy": 90.0, "packed_bytes": None, "latency_ms": {"p50": 2.0}}
    report = {"final": final, "baseline": {"accuracy": 93.0}, "ratios": {"macs": 3.0}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    expected = {"accuracy": 90.0, "latency_p50": 2.0, "ratio.macs": 3.0, "baseline.accuracy": 93.0}
    assert read_outcome(tmp_path) == (expected, False)
    note_given_up(tmp_path, "no hope")
    assert read_outcome(tmp_path) == (None, True)
    note_given_up(tmp_path, None)
    assert read_outcome(tmp_path)[0] is not None
    assert metrics_of_report({"final": {"x": True, "y": "z"}, "baseline": {}, "ratios": {}}) == {}


def test_the_latency_as_a_share_of_the_baselines_is_that_of_the_two_measured_in_turns():
    report = {
        "final": {"speedup": 4.0, "latency_ms": {"p50": 0.3}},
        "baseline": {"speedup": None, "latency_ms": {"p50": 1.0}},
        "ratios": {"latency_p50": 1.0 / 0.3},
    }
    known = metrics_of_report(report)
    assert (known["relative_latency"], known["baseline.relative_latency"]) == (0.25, 1.0)
    report["final"]["speedup"] = None
    assert not [key for key in metrics_of_report(report) if key.endswith("relative_latency")]


def test_a_trial_that_nobody_has_claimed_is_tried_again(tmp_path, monkeypatch):
    """Its process was killed before it could say who it is."""
    study = study_in(tmp_path)
    drawn = study._study.ask(study._distributions)
    assert study_in(tmp_path).left(1) == 0, "perhaps it is about to"
    monkeypatch.setattr(module, "_SILENCE", timedelta(seconds=-1))
    again = study_in(tmp_path).ask()
    assert again.number != drawn.number
    assert dict(text.split("=") for text in again.overrides).keys() == drawn.params.keys()


def test_of_two_processes_that_find_a_killed_trial_one_tries_it_again(tmp_path, monkeypatch):
    killed, other = study_in(tmp_path).ask(), study_in(tmp_path)

    def ended(tags: dict[str, str]) -> bool:
        """While this process asks, the other one is faster."""
        other._study.tell(killed.number, state=optuna.trial.TrialState.FAIL)
        other._study.enqueue_trial({})
        return True

    monkeypatch.setattr(module, "has_ended", ended)
    trials = study_in(tmp_path)._study.get_trials(states=(optuna.trial.TrialState.WAITING,))
    assert len(trials) == 1
