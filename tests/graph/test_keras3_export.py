"""The way back: a Keras 3 file that plain Keras 3 opens, with the same outputs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from compress.errors import CompressError
from compress.graph.channels.groups import Channels
from compress.graph.channels.surgery import remove_channels
from compress.graph.keras3 import from_keras3, is_keras3_file, read_keras3
from compress.graph.keras3_export import to_keras3
from compress.graph.nesting import nest
from compress.graph.rewrite import rewrite
from tests.graph.zoo import ZOO, half_gone

layers = tf_keras.layers
# A process that knows nothing of this project; it prints how far the outputs are from those in the file.
PLAIN = """
import json, sys
import numpy as np, keras
model = keras.models.load_model(sys.argv[1])
arrays = np.load(sys.argv[2])
found = model(arrays["x"])
found = found if isinstance(found, (list, tuple)) else [found]
gaps = [float(np.abs(np.asarray(y) - arrays[f"y{i}"]).max()) for i, y in enumerate(found)]
nested = [layer.name for layer in model.layers if isinstance(layer, keras.Model)]
known = "compress" in sys.modules
print(json.dumps({"gap": max(gaps), "params": model.count_params(), "compress": known, "nested": nested}))
"""


def in_plain_keras(file: Path, model: tf_keras.Model, folder: Path) -> dict:
    x = np.random.default_rng(0).normal(size=(3, *[size or 6 for size in model.inputs[0].shape[1:]])).astype(np.float32)
    outputs = model(x)
    outputs = outputs if isinstance(outputs, list) else [outputs]
    np.savez(folder / "arrays.npz", x=x, **{f"y{i}": np.asarray(y) for i, y in enumerate(outputs)})
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TF_USE_LEGACY_KERAS")}
    environment["KERAS_BACKEND"] = "tensorflow"
    answer = subprocess.run(
        [sys.executable, "-c", PLAIN, str(file), str(folder / "arrays.npz")],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr[-2000:]
    return json.loads(answer.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ZOO)
def test_every_odd_network_is_read_by_keras_3_with_the_same_outputs(name, tmp_path):
    import keras

    model = rewrite(ZOO[name]())
    to_keras3(model, tmp_path / "model.keras")
    assert is_keras3_file(tmp_path / "model.keras")
    assert [file.name for file in tmp_path.iterdir()] == ["model.keras"]
    x = np.random.default_rng(0).normal(size=(3, *[size or 6 for size in model.inputs[0].shape[1:]])).astype(np.float32)
    ours, theirs = model(x), keras.models.load_model(tmp_path / "model.keras")(x)
    for one, other in zip(tf.nest.flatten(ours), tf.nest.flatten(theirs), strict=True):
        np.testing.assert_allclose(other, one, atol=1e-4 * max(1.0, float(np.abs(one).max())))


@pytest.mark.parametrize("name", ["residual", "squeeze and excite", "attention", "recurrent", "channel shuffle"])
def test_plain_keras_opens_it_and_it_is_smaller(name, tmp_path):
    model = rewrite(ZOO[name]())
    channels = Channels(model)
    cut = remove_channels(channels, half_gone(channels))
    to_keras3(cut, tmp_path / "model.keras")
    found = in_plain_keras(tmp_path / "model.keras", cut, tmp_path)
    assert found["gap"] < 1e-4
    assert found["params"] == cut.count_params() < model.count_params()
    assert not found["compress"]


def test_a_layer_without_a_counterpart_is_named_and_nothing_written(tmp_path):
    class Own(layers.Layer):
        def call(self, x):
            return x * 2

    image = tf_keras.Input((4,))
    model = tf_keras.Model(image, layers.Dense(2)(Own(name="mine")(image)))
    with pytest.raises(CompressError, match="mine"):
        to_keras3(model, tmp_path / "model.keras")
    assert list(tmp_path.iterdir()) == []


def test_a_keras_3_file_with_a_nested_backbone_goes_through_the_command_line(cli, tmp_path):
    import keras

    keras.utils.set_random_seed(0)
    inner_input = keras.Input((8, 8, 16))
    y = keras.layers.Conv2D(16, 3, padding="same", use_bias=False)(inner_input)
    y = keras.layers.ReLU()(keras.layers.BatchNormalization()(y))
    backbone = keras.Model(inner_input, keras.layers.Add()([y, inner_input]), name="backbone")
    image = keras.Input((8, 8, 1))
    x = backbone(keras.layers.Conv2D(16, 3, padding="same", activation="relu")(keras.layers.Rescaling(1 / 16)(image)))
    outputs = keras.layers.Dense(10)(keras.layers.GlobalAveragePooling2D()(x))
    model = keras.Model(image, outputs)
    model.save(tmp_path / "mine.keras")
    code, _, error = cli(
        *("strategy=prune+prune_channels", "model=file", f"model.path={tmp_path}/mine.keras", "data=digits"),
        *("hydra.run.dir=out", "recovery.epochs=2", "board.runs=100"),
    )
    assert code == 0, error
    written = tmp_path / "out" / "model.keras"
    rebuilt = from_keras3(written)
    found = in_plain_keras(written, rebuilt, tmp_path)
    assert found["gap"] < 1e-4
    assert found["nested"] == ["backbone"]
    assert found["params"] < 0.75 * model.count_params()
    kernels = [layer.kernel.numpy() for layer in rebuilt.layers if hasattr(layer, "kernel")]
    assert 0.2 < np.mean(np.concatenate([kernel.ravel() for kernel in kernels]) == 0) < 0.6


def towers(keras):
    """A model nested in another, both with two inputs."""
    k = keras.layers
    left, right = keras.Input((4,)), keras.Input((4,))
    inner = keras.Model([left, right], k.Add()([k.Dense(3)(left), k.Dense(3)(right)]), name="inner")
    given = {name: keras.Input((4,), name=name) for name in ("left", "right")}
    return keras.Model(given, k.Dense(2)(inner([given["left"], given["right"]])))


def one_tower(keras):
    k = keras.layers
    image = keras.Input((6, 6, 3))
    inner = keras.Sequential([keras.Input((6, 6, 3)), k.Conv2D(2, 3), k.Flatten()], name="inner")
    return keras.Model(image, k.Dense(2)(inner(image)))


@pytest.mark.parametrize("build", [one_tower, towers])
def test_no_call_of_a_keras_3_model_warns_of_the_structure_of_its_inputs(build, tmp_path, recwarn):
    import keras

    build(keras).save(tmp_path / "model.keras")
    flat, nests = read_keras3(tmp_path / "model.keras")
    to_keras3(nest(flat, nests), tmp_path / "back.keras")
    loaded = keras.models.load_model(tmp_path / "back.keras")
    x = [np.zeros((2, *t.shape[1:]), np.float32) for t in loaded.inputs]
    loaded(x if len(x) > 1 else x[0])
    assert [layer.name for layer in loaded.layers if isinstance(layer, keras.Model)] == ["inner"]
    assert [str(warning.message) for warning in recwarn if "structure" in str(warning.message)] == []


def test_a_layer_may_be_called_as_keras_3_calls_its_operations(tmp_path):
    import keras

    keras.utils.clear_session()
    image = tf_keras.Input((4,))
    x = layers.Dense(3, name="add")(image) + layers.Dense(3, name="add_1")(image)
    model = rewrite(tf_keras.Model(image, x + layers.Dense(3, name="add_2")(x)))
    to_keras3(model, tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert {"add", "add_1", "add_2"} < {layer.name for layer in loaded.layers}
    sample = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
    np.testing.assert_allclose(loaded(sample), model(sample), atol=1e-5)
