"""Who teaches, from the command line: names, files, several together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tf_keras

from compress.cache.upkeep import entries

from .test_bad_input import assert_refused

layers = tf_keras.layers
SHORT = (
    "model.train.epochs=2",
    "recovery.epochs=0.2",
    "board.runs=100",
    "board.warmup=1",
    "board.precision=null",
    "strategy=distill",
)


def student_of(path: Path, *, classes: int = 10, scale: float = 1.0) -> Path:
    tf_keras.utils.set_random_seed(int(scale))
    image = tf_keras.Input((8, 8, 1))
    scores = layers.Dense(classes)(layers.Flatten()(layers.Rescaling(scale / 16)(image)))
    tf_keras.Model(image, scores).save(path)
    return path


def accuracy(folder: Path) -> float:
    return json.loads((folder / "report.json").read_text())["final"]["accuracy"]


def test_a_file_teaches_and_another_content_is_another_teacher(cli, tmp_path):
    file = student_of(tmp_path / "teacher.keras")
    settings = (*SHORT, f"strategy.distill.recovery.teachers=[{file},reference]", "hydra.run.dir=out")
    code, _, error = cli(*settings)
    assert code == 0, error
    first = (tmp_path / "out" / "model.tflite").read_bytes()
    shutil.rmtree(tmp_path / "out")
    student_of(file, scale=7.0)
    code, _, error = cli(*settings)
    assert code == 0, error
    assert "distill: taken from the cache" not in error
    assert (tmp_path / "out" / "model.tflite").read_bytes() != first
    assert accuracy(tmp_path / "out") > 0


@pytest.mark.parametrize(
    ("teachers", "parts"),
    [
        ("[lenet55]", ["strategy.distill.recovery.teachers", "lenet55", "lenet5"]),
        ("[lenet5]", ["strategy.distill.recovery.teachers, lenet5", "(8, 8, 1)"]),
        ("[no/such.keras]", ["strategy.distill.recovery.teachers", "no/such.keras"]),
    ],
)
def test_teachers_that_do_not_fit_are_refused(teachers, parts, cli):
    assert_refused(cli(*SHORT, f"strategy.distill.recovery.teachers={teachers}"), *parts)


def test_a_teachers_file_that_is_none_is_said_of_the_teacher(cli, tmp_path):
    (tmp_path / "junk.keras").write_text("junk")
    assert_refused(
        cli(*SHORT, "recovery.teachers=[junk.keras]"),
        "Error in recovery.teachers:",
        "junk.keras",
        "zip archive",
    )
    missing = cli(*SHORT, "recovery.teachers=[missing.keras]")
    assert_refused(missing, "Error in recovery.teachers:", "no such file", str(tmp_path / "missing.keras"))


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            ["strategy=prune+distill", "strategy.distill.soft_weight=0", "strategy.distill.recovery.label_weight=1"],
            ["strategy.distill.recovery.soft_weight:", "something to learn from the teacher"],
        ),
        (
            ["recovery.losses={relational_angle: 1}", "recovery.batch_size=1024"],
            ["strategy.distill.recovery.batch_size:", "512 at most", "received 1024"],
        ),
        (
            ["recovery.losses={hints: 1}", "recovery.pairs={relu3: pool9}"],
            ["strategy.distill.recovery.pairs", "pool9"],
        ),
        (
            ["strategy=prune", "recovery=distill", "recovery.losses={hints: 1}", "recovery.pairs={relu3: relu2}"],
            ["strategy.prune.recovery.pairs:", "relu3 (4, 4, 64)"],
        ),
        (
            ["strategy.distill.width=0.5", "recovery.losses={flow: 1}"],
            ["strategy.distill.recovery.losses.flow:", "the same number of channels"],
        ),
        (
            ["strategy.distill.temperature=8", "recovery.soft_weight=0", "recovery.losses={hints: 1}"],
            ["strategy.distill.temperature:", "decoupled", "soft_weight=0"],
        ),
        (
            ["recovery.temperature=8", "recovery.soft_weight=0", "recovery.losses={hints: 1}"],
            ["strategy.distill.recovery.temperature:", "decoupled", "soft_weight=0"],
        ),
        (["recovery.teachers=[reference,reference]"], ["strategy.distill.recovery.teachers:", "once"]),
        (
            ["strategy=prune+distill", "strategy.distill.width=0.5"],
            ["stage distill after stage prune", "Put distill before prune, or write strategy.distill.release=[prune]."],
        ),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_what_cannot_be_learned_is_refused_before_anything_runs(overrides, parts, cli):
    answer = cli(*SHORT, *overrides)
    assert_refused(answer, *parts)
    assert "baseline: running" not in answer[2]


def test_a_teacher_with_other_classes_is_refused(cli, tmp_path):
    file = student_of(tmp_path / "seven.keras", classes=7)
    answer = cli(*SHORT, f"strategy.distill.recovery.teachers=[{file}]")
    assert_refused(answer, "recovery.teachers", "seven.keras", "(7)", "10 classes")


def test_a_teacher_that_gives_no_logits_is_refused(cli, tmp_path):
    image = tf_keras.Input((8, 8, 1))
    scores = layers.Dense(10, activation="sigmoid")(layers.Flatten()(layers.Rescaling(1 / 16)(image)))
    tf_keras.Model(image, scores).save(tmp_path / "sigmoid.keras")
    answer = cli(*SHORT, "recovery.teachers=[sigmoid.keras]")
    assert_refused(answer, "recovery.teachers, sigmoid.keras", "ends in sigmoid", "logits")
    assert "baseline: running" not in answer[2]


def test_a_file_does_not_teach_twice_under_two_names(cli, tmp_path):
    student_of(tmp_path / "one.keras")
    assert_refused(cli(*SHORT, "recovery.teachers=[one.keras,./one.keras]"), "each teacher once", "./one.keras")


def test_a_teachers_outputs_are_kept_for_other_runs(cli, tmp_path):
    settings = (*SHORT, "cache.dir=cache", "strategy.distill.recovery.losses={contrastive: 0.8, decoupled: 1}")
    for epochs in (0.2, 0.3):
        code, _, error = cli(*settings, f"recovery.epochs={epochs}")
        assert code == 0, error
    kept = [entry.stages for entry in entries(tmp_path / "cache")]
    assert sorted(kept) == [(), ("distill",), ("distill",), ("teacher outputs of digits_cnn",)]


def test_a_teacher_that_has_to_be_trained_is_trained_once(cli, tmp_path):
    settings = (*SHORT, "data.train_limit=256", "strategy.distill.recovery.teachers=[digits_cnn]", "hydra.run.dir=out")

    def made(*more: str) -> bytes:
        code, _, error = cli(*settings, *more)
        assert code == 0, error
        return (tmp_path / "out" / "model.tflite").read_bytes()

    anew = made("cache=off")
    made("cache.dir=kept", "recovery.epochs=0.5")
    # Another length of the recovery is another stage, with the same teacher.
    assert made("cache.dir=kept") == anew
    kept = [entry.stages for entry in entries(tmp_path / "kept")]
    stages = [(), ("distill",), ("distill",)]
    assert sorted(kept) == [*stages, ("teacher outputs of digits_cnn",), ("weights of a teacher",)]
