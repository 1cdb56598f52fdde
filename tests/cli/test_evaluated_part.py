"""Accuracies on held-out images: what is chosen by them has not seen the test part."""

from __future__ import annotations

import pytest
import tf_keras

from compress.data.digits import Digits

from .test_students import report

SHORT = ("strategy=prune", "recovery=none", "model.train.epochs=2", "board=roofline")


@pytest.mark.parametrize("part", ["test", "validation"])
def test_accuracies_are_those_of_the_part_that_was_asked_for(part, cli, tmp_path):
    code, shown, error = cli(*SHORT, f"data.evaluate_on={part}", "hydra.run.dir=out")
    assert code == 0, error
    found, samples = report(tmp_path / "out"), getattr(Digits().load(), part)
    model = tf_keras.models.load_model(tmp_path / "out" / "model.keras")
    right = 100 * (model.predict(samples.x, verbose=0).argmax(1) == samples.y).mean()
    assert found["final"]["accuracy_keras"] == pytest.approx(right)
    # A float file answers as the model does.
    assert found["final"]["accuracy"] == pytest.approx(right, abs=0.3)
    assert found["evaluated_on"] == part
    assert found["verification"]["agreement"]["samples"] == len(samples)
    card = (tmp_path / "out" / "card.md").read_text()
    assert f"% right on the {part} part" in card
    assert ("not on the test part" in " ".join(shown.split())) == (part == "validation")


def test_both_parts_have_entries_of_their_own_in_the_cache(cli, tmp_path):
    kept = (*SHORT, f"cache.dir={tmp_path / 'cache'}")
    for part in ("validation", "test", "validation"):
        code, _, error = cli(*kept, f"data.evaluate_on={part}", f"hydra.run.dir={part}")
        assert code == 0, error
    again = report(tmp_path / "validation")
    assert all(stage["cached"] for stage in again["stages"])
    assert again["final"]["accuracy"] != report(tmp_path / "test")["final"]["accuracy"]
