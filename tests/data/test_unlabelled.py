"""Images without labels: read, kept apart, refused where labels are asked for, and left out of the task loss."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.data.npz import Npz
from compress.data.source import NO_LABEL
from compress.errors import CompressError
from compress.training_step import task_loss

from .test_sources import arrays, refused, rows, saved


def test_training_images_without_labels(tmp_path):
    data = Npz(path=str(saved(tmp_path / "a.npz", y_train=None))).load()
    assert not data.train.labelled
    assert not data.validation.labelled, "held out of the same images"
    assert data.test.labelled
    assert (len(data.train), len(data.validation), data.classes) == (36, 4, 3)
    assert rows(data.train) | rows(data.validation) == {x.tobytes() for x in arrays()["x_train"]}
    for look in (lambda: data.train.y, lambda: data.train.take(3).y):
        error = refused(look)
        assert "y_train" in error.received
        assert "recovery=auto" in error.fix
    every = data.for_distillation().train
    assert rows(every) == rows(data.train)
    assert (every.y == NO_LABEL).all()


def test_labels_change_the_identity(tmp_path):
    with_labels, without = (
        Npz(path=str(saved(tmp_path / f"{name}.npz", **changes))).load()
        for name, changes in (("a", {}), ("b", {"y_train": None}))
    )
    assert with_labels.identity != without.identity


def test_more_images_without_labels(tmp_path):
    more = arrays()["x_train"][:7] + np.float32(0.5)
    data = Npz(path=str(saved(tmp_path / "a.npz", x_unlabelled=more))).load()
    assert data.train.labelled
    assert len(data.train) == 36
    every = data.for_distillation().train
    np.testing.assert_array_equal(every.x[:36], data.train.x)
    np.testing.assert_array_equal(every.y[:36], data.train.y)
    np.testing.assert_array_equal(every.x[36:], more)
    assert (every.y[36:] == NO_LABEL).all()
    plain = Npz(path=str(saved(tmp_path / "b.npz"))).load()
    assert plain.identity != data.identity
    assert plain.for_distillation() is plain


@pytest.mark.parametrize(
    ("more", "found"),
    [(np.zeros((3, 5, 4, 1), np.float32), "(5, 4, 1)"), (np.zeros((3, 4, 4, 1), np.uint8), "uint8")],
)
def test_more_images_of_another_kind_are_refused(more, found, tmp_path):
    path = saved(tmp_path / "a.npz", x_unlabelled=more)
    error = refused(Npz(path=str(path)).load)
    assert "unlabelled" in error.where
    assert found in error.received


def test_a_validation_part_without_labels_goes_with_training_images_without(tmp_path):
    x = arrays()["x_train"][:5]
    error = refused(Npz(path=str(saved(tmp_path / "a.npz", x_val=x))).load)
    assert "y_val" in error.received
    data = Npz(path=str(saved(tmp_path / "b.npz", x_val=x, y_train=None))).load()
    assert len(data.train) == 40
    assert not data.validation.labelled
    error = refused(Npz(path=str(saved(tmp_path / "c.npz", y_val=np.zeros(5, np.int64)))).load)
    assert "x_val" in error.received


def test_classes_can_be_left_out_of_the_training_part(tmp_path):
    data = Npz(path=str(saved(tmp_path / "a.npz"))).load()
    left = data.without([1])
    assert set(left.train.y) == {0, 2}
    assert rows(left.train) == {x.tobytes() for x, y in zip(data.train.x, data.train.y, strict=True) if y != 1}
    assert left.validation is data.validation
    assert left.classes == data.classes
    with pytest.raises(CompressError, match="y_train"):
        Npz(path=str(saved(tmp_path / "b.npz", y_train=None))).load().without([1])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(-1, 3), min_size=2, max_size=6), st.booleans(), st.integers(0, 1000))
def test_the_task_loss_is_the_mean_over_what_is_labelled(labels, mixed, seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(len(labels), 4)).astype(np.float32)
    ratio = rng.uniform(size=len(labels)).astype(np.float32) if mixed else None
    log = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum(1, keepdims=True))
    total, weight = 0.0, 0.0
    for place, label in enumerate(labels):
        shares = [(label, 1.0)] if ratio is None else [(label, ratio[place]), (labels[-1 - place], 1 - ratio[place])]
        for own, share in shares:
            if own >= 0:
                total -= share * log[place, own]
                weight += share
    ours = task_loss(
        tf.constant(labels), tf.constant(logits), None if ratio is None else tf.constant(ratio), labelled=False
    )
    assert float(ours) == pytest.approx(total / weight if weight else 0.0, abs=1e-5)
    if min(labels) >= 0:
        known = task_loss(
            tf.constant(labels), tf.constant(logits), None if ratio is None else tf.constant(ratio), labelled=True
        )
        assert float(known) == pytest.approx(total / weight, abs=1e-5)
