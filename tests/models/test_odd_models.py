"""The odd-network zoo through every kind of file that is read: equal outputs."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from compress.errors import CompressError
from compress.graph.keras3_export import keras3_model
from compress.graph.rewrite import rewrite
from compress.models.file import load_model_file
from tests.graph.zoo import ZOO, samples

NOT_READ_BY_KERAS_3 = (
    *("broadcast add", "split and concat", "slices", "padded shortcut", "channel shuffle", "embedding", "hard swish"),
    *("mean over space", "gate with new axes", "hand-written attention"),
)
"""Keras 3 writes functions of ``keras.ops`` into an .h5 file, but cannot read them from there itself."""
KINDS = ("model.h5", "keras 3/model.keras", "keras 3/model.h5", "saved model")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ZOO)
def test_an_odd_model_read_from_a_file(name: str, kind: str, tmp_path: Path):
    model = rewrite(ZOO[name]())
    path = tmp_path / kind
    path.parent.mkdir(exist_ok=True)
    if kind == "saved model":
        model.export(path)
        if len(model.outputs) > 1:
            with pytest.raises(CompressError, match="one output"):
                load_model_file(path, allow_code=False)
            return
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that .h5 is an old format
            (keras3_model(model) if "keras 3" in kind else model).save(path)
    if kind == "keras 3/model.h5" and name in NOT_READ_BY_KERAS_3:
        with pytest.raises(CompressError, match=r"Save it again as \.keras"):
            load_model_file(path, allow_code=False)
        return
    (x,) = samples(model)
    ours, theirs = load_model_file(path, allow_code=False)(x), model(x)
    for one, other in zip(tf.nest.flatten(ours), tf.nest.flatten(theirs), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * max(1.0, float(np.abs(other).max())))
