"""A head for images of any size: exact at the original one, an average over places at others."""

from __future__ import annotations

import numpy as np
import pytest
import tf_keras

from compress.candidate import Candidate, Storage
from compress.data.source import Data, Split, make_data
from compress.deploy.export import main as export_file
from compress.deploy.tflite import export
from compress.errors import CompressError
from compress.graph.resize import with_input_size
from compress.metrics.accuracy import file_outputs
from compress.metrics.counts import count_params
from compress.metrics.tflite_file import TFLiteFile
from compress.models.small import DigitsCnn
from compress.strategies.compact.convolutional_head import ConvolutionalHead, pooled_least_squares
from compress.strategies.strategy import Context
from compress.training import Recovery

layers = tf_keras.layers


@pytest.fixture(scope="module")
def data() -> Data:
    x = np.random.default_rng(0).normal(size=(80, 8, 8, 3)).astype(np.float32)
    part = Split(x, np.arange(80) % 4)
    return make_data("random", part, part)


def network(*, softmax: str = "", norm: bool = False, behind_flatten: bool = False) -> tf_keras.Model:
    tf_keras.utils.set_random_seed(0)
    image = tf_keras.Input((8, 8, 3), name="image")
    x = layers.Conv2D(6, 3, strides=2, padding="same", activation="relu", name="conv")(image)
    x = layers.Flatten(name="flatten")(x)
    if behind_flatten:
        x = layers.Dropout(0.5)(layers.LeakyReLU()(x))
    x = layers.Dense(10, activation=None if norm else "relu", use_bias=not norm, name="fc1")(x)
    if norm:
        x = layers.ReLU()(layers.BatchNormalization(name="fc1_norm")(x))
    x = layers.Dense(4, activation="softmax" if softmax == "inside" else None, name="fc2")(x)
    model = tf_keras.Model(image, layers.Softmax(name="softmax")(x) if softmax == "beside" else x, name="network")
    if norm:
        rng = np.random.default_rng(1)
        model.get_layer("fc1_norm").set_weights([rng.uniform(0.5, 2, 10) for _ in range(4)])
    return model


def replaced(model: tf_keras.Model, data: Data, **fields) -> Candidate:
    context = Context("convolutional_head", data, model, Recovery(method="none"), seed=0)
    return ConvolutionalHead(**fields).apply(Candidate(model), context)


@pytest.mark.parametrize(
    "kind",
    [{}, {"softmax": "inside"}, {"softmax": "beside"}, {"norm": True}, {"behind_flatten": True}],
    ids=str,
)
def test_the_outputs_stay_and_any_size_runs(kind, data) -> None:
    model = network(**kind)
    result = replaced(model, data)
    x = data.train.x[:16]
    np.testing.assert_allclose(result.model(x), model(x), atol=1e-5)
    assert result.model.input_shape == model.input_shape
    assert not any(isinstance(layer, (layers.Flatten, layers.Dense)) for layer in result.model.layers)
    assert count_params(result.model) == count_params(model)
    assert result.guarantees[0].check(result.model) == []
    free = with_input_size(result.model, (None, None))
    assert free.input_shape == (None, None, None, 3)
    np.testing.assert_allclose(free(x), model(x), atol=1e-5)
    # A map that is larger by one row and one column holds four maps of the original size.
    large = np.random.default_rng(2).normal(size=(2, 10, 10, 3)).astype(np.float32)
    scores = model
    if kind.get("softmax"):
        # The same network without it: a softmax is of the average, not of each place.
        scores = network()
        scores.set_weights(model.get_weights())
    maps = np.asarray(with_input_size(head_less(model), (None, None))(large))
    tail = behind_map(scores)
    wanted = np.mean([tail(maps[:, i : i + 4, j : j + 4]) for i in range(2) for j in range(2)], axis=0)
    if kind.get("softmax"):
        wanted = np.exp(wanted) / np.exp(wanted).sum(-1, keepdims=True)
    np.testing.assert_allclose(with_input_size(result.model, (10, 10))(large), wanted, atol=1e-5)


def head_less(model: tf_keras.Model) -> tf_keras.Model:
    return tf_keras.Model(model.inputs, model.get_layer("conv").output)


def behind_map(model: tf_keras.Model) -> tf_keras.Model:
    """The layers behind the map, on a map of the original size."""
    place = tf_keras.Input(model.get_layer("conv").output.shape[1:])
    x = place
    for layer in model.layers[2:]:
        x = layer(x)
    return tf_keras.Model(place, x)


def test_even_maps_make_the_average_exact(data) -> None:
    model = network()
    result = replaced(model, data, form="pooling", images=80)
    assert result.model.get_layer("fc1").kernel.shape == (6, 10)
    even = np.ones((3, 4, 4, 6), np.float32) * np.random.default_rng(3).uniform(size=(3, 1, 1, 6)).astype(np.float32)
    dense = model.get_layer("fc1")
    pooled = even.mean((1, 2), dtype=np.float64)
    wanted = even.reshape(3, -1) @ np.asarray(dense.kernel) + np.asarray(dense.bias)
    matrix = pooled_least_squares(dense, pooled, wanted)
    np.testing.assert_allclose(pooled @ matrix[:-1] + matrix[-1], wanted, atol=1e-4)


def test_the_weights_behind_the_average_are_the_least_squares_solution(data, monkeypatch) -> None:
    monkeypatch.setattr("compress.strategies.compact.convolutional_head._RIDGE", 1e-9)
    dense = network().get_layer("fc1")
    rng = np.random.default_rng(0)
    pooled, wanted = rng.normal(size=(50, 6)), rng.normal(size=(50, 10))
    rows = np.hstack([pooled, np.ones((50, 1))])
    np.testing.assert_allclose(
        pooled_least_squares(dense, pooled, wanted), np.linalg.lstsq(rows, wanted, rcond=None)[0], atol=1e-6
    )


@pytest.mark.parametrize(("form", "scheme"), [("convolution", "float32"), ("convolution", "int8"), ("pooling", "int8")])
def test_the_file_runs_and_keeps_the_guarantee(form, scheme, data, tmp_path) -> None:
    fields = {"images": 80} if form == "pooling" else {}
    result = replaced(network(), data, form=form, **fields).evolve(storage=Storage(scheme))
    artifact = export(result, data, tmp_path / "model.tflite")
    assert result.guarantees[0].check_file(TFLiteFile.read(artifact.path)) == []
    ours, theirs = file_outputs(artifact.path, data.test.x), np.asarray(result.model(data.test.x))
    assert np.abs(ours - theirs).max() <= (1e-5 if scheme == "float32" else 0.15) * np.abs(theirs).max()


def test_a_file_for_another_size_is_exported(data, tmp_path, capsys) -> None:
    plain = network()
    plain.save(tmp_path / "plain.keras")
    replaced(plain, data).model.save(tmp_path / "head.keras")
    target = tmp_path / "large.tflite"
    large = np.random.default_rng(2).normal(size=(2, 12, 16, 3)).astype(np.float32)
    with pytest.raises(SystemExit) as done:
        export_file([str(tmp_path / "head.keras"), "-o", str(target), "--size", "12x16"])
    assert done.value.code in (0, None)
    wanted = with_input_size(tf_keras.models.load_model(tmp_path / "head.keras"), (12, 16))(large)
    np.testing.assert_allclose(file_outputs(target, large), wanted, atol=1e-5)
    for source, size, message in (("plain", "12x16", "convolutional_head"), ("head", "12", "--size 64x48")):
        with pytest.raises(SystemExit) as refused:
            export_file([str(tmp_path / f"{source}.keras"), "-o", str(tmp_path / "no.tflite"), "--size", size])
        assert refused.value.code == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "no.tflite").exists()


def test_the_default_network_gives_up_most_weights_by_pooling() -> None:
    model = DigitsCnn().architecture((8, 8, 1), 10)
    x = np.random.default_rng(0).uniform(0, 16, (40, 8, 8, 1)).astype(np.float32)
    part = Split(x, np.arange(40) % 10)
    result = replaced(model, make_data("digits", part, part), form="pooling", images=40)
    assert count_params(model) - count_params(result.model) == (2 * 2 - 1) * 64 * 128


def no_flatten() -> tf_keras.Model:
    image = tf_keras.Input((8, 8, 3))
    return tf_keras.Model(image, layers.Dense(4)(layers.GlobalAveragePooling2D()(image)))


def vector() -> tf_keras.Model:
    image = tf_keras.Input((8, 8, 3))
    return tf_keras.Model(image, layers.Dense(4)(layers.Flatten()(layers.GlobalAveragePooling2D()(image))))


def two_readers() -> tf_keras.Model:
    image = tf_keras.Input((8, 8, 3))
    x = layers.Flatten()(image)
    return tf_keras.Model(image, layers.Add()([layers.Dense(4)(x), layers.Dense(4)(x)]))


@pytest.mark.parametrize(
    ("make", "received"),
    [(no_flatten, "no layer of this kind"), (vector, "no map of height"), (two_readers, "reads it alone")],
)
def test_models_without_such_a_head_are_refused(make, received, data) -> None:
    with pytest.raises(CompressError, match="Flatten of maps") as caught:
        replaced(make(), data)
    assert received in caught.value.received


def test_images_without_pooling_are_refused() -> None:
    with pytest.raises(ValueError, match="images=7 only beside form=pooling"):
        ConvolutionalHead(images=7)
