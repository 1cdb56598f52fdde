"""Students and data without labels, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import tf_keras

from compress.cli.places import conf_dir
from compress.data.digits import Digits
from compress.tracking.report import SCHEMA_FILE

from .test_bad_input import assert_refused

SHORT = ("model.train.epochs=2", "recovery.epochs=0.3", "board=roofline")


def report(folder: Path) -> dict:
    found = json.loads((folder / "report.json").read_text())
    jsonschema.validate(found, json.loads(SCHEMA_FILE.read_text()), jsonschema.Draft202012Validator)
    return found


def test_a_narrow_student_is_exported_and_goes_on(cli, tmp_path):
    code, _, error = cli(*SHORT, "strategy=distill+prune+quantize", "strategy.distill.width=0.5", "hydra.run.dir=out")
    assert code == 0, error
    found = report(tmp_path / "out")
    assert found["ratios"]["params"] == pytest.approx(4, rel=0.05)
    assert found["ratios"]["macs"] > 3
    kept = tf_keras.models.load_model(tmp_path / "out" / "model.keras")
    assert kept.get_layer("conv2").filters == 32
    assert np.mean(np.asarray(kept.get_layer("fc1").kernel) == 0) > 0.3
    said = found["stages"][0]["recovered"]
    assert (said["method"], said["teachers"]) == ("distill", ["reference"])
    # A student that has hardly learned: the second stage receives it, and the reference teaches again.
    assert found["stages"][1]["recovered"]["teacher_accuracy"] > found["stages"][1]["recovered"]["received_accuracy"]
    assert found["stages"][2]["recovered"] is None


def test_a_student_of_the_users_own_folder(cli, tmp_path):
    (tmp_path / "own" / "model").mkdir(parents=True)
    (tmp_path / "own" / "model" / "mine.yaml").write_text(
        (conf_dir() / "model" / "mlp_800.yaml").read_text().replace("[800, 800]", "[20]")
    )
    folder = ("--config-dir", str(tmp_path / "own"))
    code, _, error = cli(*folder, *SHORT, "strategy=distill", "strategy.distill.student=mine", "hydra.run.dir=out")
    assert code == 0, error
    assert report(tmp_path / "out")["final"]["params"] == 64 * 20 + 20 + 20 * 10 + 10


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["strategy=prune+distill", "strategy.distill.width=0.5"], ["distill", "prune", "another network"]),
        (["strategy=quantize+distill", "strategy.distill.student=again"], ["distill", "quantize", "another network"]),
        (
            ["strategy=distill", "strategy.distill.student=resnet21"],
            ["strategy.distill.student:", "resnet21", "resnet20"],
        ),
        (["strategy=distill", "strategy.distill.student=resnet20"], ["resnet20: (32, 32, 3)", "(8, 8, 1)"]),
        (["strategy=distill", "strategy.distill.student=file"], ["strategy.distill.student:", "received file"]),
        (["strategy=distill", "strategy.distill.width=1.5"], ["strategy.distill.width", "less than 1"]),
        (["strategy=mutual", "strategy.mutual.peers=[lenet5]"], ["strategy.mutual.peers, lenet5", "(8, 8, 1)"]),
        (["strategy=mutual", "recovery=none"], ["strategy.mutual.recovery", "training"]),
        (["strategy=quantize", "recovery.losses={hints: 1}"], ["strategy.quantize.recovery.losses", "does not train"]),
        (["strategy=distill", "recovery.pairs={a: b}"], ["recovery.pairs", "leave the pairs out"]),
        (["strategy=distill", "strategy.distill.recovery.method=finetune"], ["strategy.distill.recovery.method"]),
        (["strategy=finetune", "recovery.losses={hints: 1}"], ["strategy.finetune.recovery.losses", "labels alone"]),
        (
            ["strategy=lowrank", "recovery=finetune", "recovery.temperature=9"],
            ["strategy.lowrank.recovery.temperature"],
        ),
        (["strategy=prune+mutual", "recovery.mixup=0.5"], ["strategy.mutual.recovery.mixup"]),
        (["strategy=prune+distill", "strategy.distill.omit=[12]"], ["strategy.distill.omit", "from 0 to 9"]),
        (["strategy=distill", "strategy.distill.omit=[true]"], ["strategy.distill.omit", "a number", "received true"]),
        (["strategy=distill", "strategy.distill.omit=3"], ["'strategy.distill.omit=[3]'"]),
        (["strategy=distill", "strategy.distill.width=true"], ["strategy.distill.width", "a number", "received true"]),
        (["strategy=distill", "strategy.distill.width=0.999"], ["strategy.distill.width", "width=0.999"]),
        (["strategy=distill", "strategy.distill.depth=0.5"], ["strategy.distill.depth", "depth=0.5"]),
        (["strategy=distill", "strategy.distill.student=my.keras"], ["strategy.distill.student:", "Name a network"]),
        (["strategy=mutual", "strategy.mutual.peers=[my.keras]"], ["strategy.mutual.peers:", "Name a network"]),
        (["strategy=distill", "strategy.distill.student=mlp_800", "strategy.distill.skip=first"], ["only, skip"]),
        (
            ["strategy=distill", "strategy.distill.student=mobilenet_v1"],
            ["strategy.distill.student, mobilenet_v1:", "Name another network", "--config-dir"],
        ),
    ],
)
def test_what_cannot_be_a_student_is_refused(overrides, parts, cli, tmp_path):
    answer = cli(*SHORT, *overrides)
    assert_refused(answer, *parts)
    assert "running" not in answer[2]
    assert not list(tmp_path.rglob("report.json"))


@pytest.mark.parametrize(
    ("settings", "received"),
    [
        (["strategy.distill.student=again", "strategy.distill.width=0.5"], "student=again, width=0.5."),
        (["strategy.distill.start=teacher"], "start=teacher."),
        (["strategy.distill.raise_bias=true"], "raise_bias=true."),
    ],
)
def test_what_does_not_go_together_is_said_without_what_nobody_wrote(settings, received, cli):
    assert f"received {received}" in assert_refused(cli(*SHORT, "strategy=distill", *settings), "strategy.distill")


def test_biases_to_be_raised_are_looked_for_before_anything_runs(cli):
    image = tf_keras.Input((8, 8, 1))
    scores = tf_keras.layers.Dense(10, use_bias=False, name="scores")(tf_keras.layers.Flatten()(image))
    tf_keras.Model(image, scores).save("unbiased.keras")
    settings = ["model=file", "model.path=unbiased.keras", "board=roofline", "strategy=distill"]
    answer = cli(*settings, "strategy.distill.omit=[3]", "strategy.distill.raise_bias=true")
    assert_refused(answer, "strategy.distill.raise_bias", "scores (Dense), which has none")
    assert "running" not in answer[2]


def test_a_model_of_a_fixed_batch_teaches_another_network(cli, tmp_path):
    image = tf_keras.Input((8, 8, 1), batch_size=7)
    scores = tf_keras.layers.Dense(10)(tf_keras.layers.Flatten()(tf_keras.layers.Rescaling(1 / 16)(image)))
    tf_keras.Model(image, scores).save("seven.keras")
    few = ["recovery.epochs=0.3", "data.train_limit=300", "data.test_limit=60", "board=roofline", "strategy=distill"]
    settings = ["model=file", "model.path=seven.keras", "strategy.distill.student=one_layer", "hydra.run.dir=out"]
    code, _, error = cli(*few, *settings)
    assert code == 0, error
    code, _, error = cli(*few, "recovery.teachers=[seven.keras]", "model.train.epochs=1", "data.shift=1")
    assert code == 0, error


def test_images_without_labels(cli, tmp_path):
    digits = Digits(train_limit=300, test_limit=60).load()
    np.savez("bare.npz", x_train=digits.train.x, x_test=digits.test.x, y_test=digits.test.y)
    tf_keras.utils.set_random_seed(0)
    image = tf_keras.Input((8, 8, 1))
    scores = tf_keras.layers.Dense(10)(tf_keras.layers.Flatten()(tf_keras.layers.Rescaling(1 / 16)(image)))
    tf_keras.Model(image, scores).save("model.keras")
    given = ("data=npz", "data.path=bare.npz", "model=file", "model.path=model.keras", "board=roofline")
    refused = assert_refused(cli(*given, "strategy=prune", "recovery=finetune"), "strategy.prune.recovery", "y_train")
    assert "recovery.method=distill" in refused
    assert_refused(cli("data=npz", "data.path=bare.npz", "model=digits_cnn", "strategy=none"), "y_train")
    code, _, error = cli(*given, "strategy=prune", "recovery=auto", "recovery.epochs=0.3", "hydra.run.dir=out")
    assert code == 0, error
    found = report(tmp_path / "out")
    assert found["stages"][0]["recovered"]["method"] == "distill"
    (note,) = [note for note in found["notes"] if "recovery=auto" in note]
    assert note.startswith("prune: recovery=auto chose distill, without labels")


def test_a_worse_teacher_is_warned_of_in_the_report(cli, tmp_path):
    tf_keras.utils.set_random_seed(0)
    image = tf_keras.Input((8, 8, 1))
    scores = tf_keras.layers.Dense(10)(tf_keras.layers.Flatten()(tf_keras.layers.Rescaling(1 / 16)(image)))
    tf_keras.Model(image, scores).save("poor.keras")
    taught = "strategy.distill.recovery.teachers=[poor.keras]"
    code, printed, error = cli(*SHORT, "strategy=distill", taught, "hydra.run.dir=out")
    assert code == 0, error
    found = report(tmp_path / "out")
    said = found["stages"][0]["recovered"]
    (note,) = [note for note in found["notes"] if "worse" in note]
    assert note == f"distill: {said['warning']}"
    assert "poor.keras" in note
    assert f"{said['teacher_accuracy']:.2f} against {said['received_accuracy']:.2f} %" in note
    assert "worse than the model that the stage received" in " ".join(printed.split())
