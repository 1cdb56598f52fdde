"""A recurrent model's exported file must not carry its state from one sample to the next."""

from __future__ import annotations

import numpy as np
import tf_keras

from compress.candidate import Candidate
from compress.data.source import Split, make_data
from compress.deploy.tflite import export
from compress.metrics.accuracy import file_outputs, keras_outputs


def test_samples_do_not_see_each_other(tmp_path):
    tf_keras.utils.set_random_seed(0)
    sequence = tf_keras.Input((6, 4))
    model = tf_keras.Model(sequence, tf_keras.layers.Dense(3)(tf_keras.layers.LSTM(8)(sequence)))
    x = np.random.default_rng(0).normal(size=(12, 6, 4)).astype(np.float32)
    split = Split(x, np.arange(12) % 3)
    artifact = export(Candidate(model), make_data("made", split, split), tmp_path / "model.tflite")
    np.testing.assert_allclose(file_outputs(artifact.path, x), keras_outputs(model, x), rtol=1e-4, atol=1e-4)
