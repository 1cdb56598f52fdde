"""The bridge from Keras 3: equal outputs for what it rebuilds, one clear error for what it does not."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tf_keras

from compress.candidate import Calibration, Candidate, Storage
from compress.data.source import Split, make_data
from compress.deploy.tflite import export
from compress.errors import CompressError
from compress.graph.channels.groups import Channels
from compress.graph.channels.surgery import remove_channels
from compress.graph.keras3 import from_keras3, is_keras3_file
from compress.graph.keras3_export import to_keras3
from compress.metrics.accuracy import file_outputs
from compress.metrics.tflite_file import TFLiteFile
from tests.graph.zoo import half_gone

keras = pytest.importorskip("keras", minversion="3")
k = keras.layers
ops = keras.ops


def filled(model):
    """Give every weight a random value, so that a mix-up cannot go unnoticed."""
    random = np.random.default_rng(0)
    for weight in model.weights:
        low = 0.1 if "variance" in weight.name else -0.5
        if "float" in weight.dtype and weight.name not in ("mean", "variance"):  # Those of Normalization.
            weight.assign(random.uniform(low, 0.5, weight.shape))
    return model


def saved(model, folder: Path, name: str = "model.keras") -> Path:
    path = folder / name
    filled(model).save(path)
    return path


def samples(model, integers: int | None):
    random = np.random.default_rng(1)
    shapes = [[size or 3 for size in tensor.shape] for tensor in model.inputs]
    if integers is not None:
        return [random.integers(0, integers, shape) for shape in shapes]
    return [random.standard_normal(shape).astype("float32") for shape in shapes]


def check_equal(model, rebuilt, integers: int | None = None) -> None:
    x = samples(model, integers)
    theirs = keras.tree.flatten(model(x if len(x) > 1 else x[0], training=False))
    ours = keras.tree.flatten(rebuilt(x, training=False))
    assert len(theirs) == len(ours)
    for a, b in zip(theirs, ours, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.shape == b.shape
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * max(1.0, np.abs(a).max()))
    flat = [layer for layer in rebuilt.layers if isinstance(layer, tf_keras.Model)]
    assert not flat, "the rebuilt model must be flat"


def image_model():
    image = keras.Input((8, 8, 3), name="image")
    x = k.Rescaling(1 / 127.5, offset=-1.0)(image)
    x = k.ZeroPadding2D(((0, 1), (1, 0)))(x)
    x = k.Conv2D(4, 3, strides=2, use_bias=False, kernel_regularizer="l2", name="conv")(x)
    x = k.BatchNormalization(name="norm")(x)
    x = k.ReLU(6.0)(x)
    y = k.DepthwiseConv2D(3, padding="same", activation="relu")(x)
    z = k.SeparableConv2D(4, 3, padding="same", activation="silu")(x)
    x = k.Add()([y, z])
    x = k.Concatenate()([x, k.MaxPooling2D(2, strides=1, padding="same")(y)])
    pooled, flat = k.GlobalAveragePooling2D()(x), k.Flatten()(x)
    x = k.Concatenate()([pooled, k.Dropout(0.5)(flat)])
    return keras.Model(image, k.Dense(5, activation="softmax", name="scores")(x), name="image_model")


def sequential():
    return keras.Sequential([keras.Input((6, 6, 1)), k.Conv2D(2, 3, activation="tanh"), k.Flatten(), k.Dense(3)])


def nested():
    part = keras.Sequential([keras.Input((4, 4, 2)), k.Conv2D(2, 1, name="conv"), k.BatchNormalization()], name="part")
    inner = keras.Input((6, 6, 2))
    backbone = keras.Model(inner, part(k.Conv2D(2, 3, name="conv")(inner)), name="backbone")
    backbone.trainable = False
    image = keras.Input((6, 6, 2))
    x = backbone(image, training=False)
    return keras.Model(image, k.Dense(2, name="conv")(k.Flatten()(x)))


def shared():
    left, right = keras.Input((4,), name="left"), keras.Input((4,), name="right")
    tower = k.Dense(3, activation="relu", name="tower")
    both = keras.Sequential([keras.Input((3,)), k.Dense(2, name="both")])
    a, b = both(tower(left)), both(tower(right))
    return keras.Model([left, right], [k.Subtract()([a, b]), k.Multiply()([a, b])])


def transposed():
    return keras.Sequential(
        [
            keras.Input((5, 5, 2)),
            k.Conv2DTranspose(3, 3, strides=2, padding="same"),
            k.LeakyReLU(negative_slope=0.1),
            k.UpSampling2D(2, interpolation="bilinear"),
            k.Cropping2D(1),
            k.PReLU(shared_axes=[1, 2]),
            k.AveragePooling2D(2),
            k.LayerNormalization(),
            k.GroupNormalization(3),
        ]
    )


def recurrent():
    return keras.Sequential(
        [
            keras.Input((5, 3)),
            k.LSTM(3, return_sequences=True),
            k.GRU(2, return_sequences=True),
            k.Bidirectional(k.LSTM(2, return_sequences=True)),
            k.TimeDistributed(k.Dense(3, activation="relu")),
            k.SimpleRNN(2),
        ]
    )


def sequence():
    return keras.Sequential(
        [keras.Input((8, 2)), k.Conv1D(3, 3, padding="causal"), k.SeparableConv1D(2, 2), k.GlobalMaxPooling1D()]
    )


def attention():
    x = keras.Input((4, 6))
    return keras.Model(x, k.MultiHeadAttention(2, 3)(x, x))


def replayed_activations():
    names = ("hard_sigmoid", "hard_swish", "relu6", "leaky_relu")
    image = keras.Input((4, 4, 2))
    x = [k.Conv2D(2, 1, activation=name, name=name)(image) for name in names]
    return keras.Model(image, [*x, k.Activation("hard_silu")(image)])


def operators():
    x = keras.Input((4, 3))
    y = (x + 3.0) * (1 / 6) - 0.5
    y = ops.relu6(2.0 - y) / 4.0 + ops.sigmoid(x) * -x
    return keras.Model(x, [y, y[:, 1:], ops.expand_dims(y, -1), ops.reshape(y, (-1, 12)), ops.concatenate([x, y], -1)])


def adapted():
    layer = k.Normalization()
    layer.adapt(np.random.default_rng(0).normal(3.0, 2.0, (64, 4)))
    return keras.Sequential([keras.Input((4,)), layer, k.Dense(2)])


def any_size():
    return keras.Sequential([keras.Input((None, None, 2)), k.Conv2D(2, 3), k.GlobalAveragePooling2D()])


MODELS = [
    image_model, sequential, nested, shared, transposed, recurrent, sequence, attention,
    replayed_activations, operators, adapted, any_size,
]  # fmt: skip


@pytest.mark.parametrize("make", MODELS)
def test_rebuilt_model_has_equal_outputs(make, tmp_path: Path):
    model = make()
    path = saved(model, tmp_path)
    assert is_keras3_file(path)
    check_equal(model, from_keras3(path))


@pytest.mark.parametrize("make", [image_model, sequential, nested, shared])
def test_h5_written_by_keras_3(make, tmp_path: Path):
    model = make()
    path = saved(model, tmp_path, "model.h5")
    assert is_keras3_file(path)
    check_equal(model, from_keras3(path))


@pytest.mark.parametrize("dtype", ["int32", "float32"])
def test_embedding_with_mask(dtype: str, tmp_path: Path):
    tokens = keras.Input((6,), dtype=dtype)
    x = k.Embedding(9, 4, mask_zero=True)(tokens)
    model = keras.Model(tokens, k.GRU(2)(k.LSTM(3, return_sequences=True)(x)))
    check_equal(model, from_keras3(saved(model, tmp_path)), integers=9)


def test_structure_is_kept(tmp_path: Path):
    rebuilt = from_keras3(saved(image_model(), tmp_path))
    assert rebuilt.name == "image_model"
    assert [tensor.node.layer.name for tensor in rebuilt.inputs] == ["image"]
    assert rebuilt.get_layer("scores").activation is tf_keras.activations.softmax
    assert rebuilt.get_layer("conv").kernel_regularizer.l2 == pytest.approx(0.01)
    assert len(rebuilt.get_layer("norm").non_trainable_weights) == 2


def test_shared_layer_stays_one_layer(tmp_path: Path):
    rebuilt = from_keras3(saved(shared(), tmp_path))
    assert len(rebuilt.get_layer("tower").inbound_nodes) == 2
    assert len(rebuilt.get_layer("both").inbound_nodes) == 2


def test_names_are_unique_and_frozen_layers_stay_frozen(tmp_path: Path):
    rebuilt = from_keras3(saved(nested(), tmp_path))
    names = [layer.name for layer in rebuilt.layers]
    assert {"conv", "backbone_part_conv"} < set(names)
    assert len(set(names)) == len(names)
    assert not rebuilt.get_layer("backbone_part_conv").trainable
    assert rebuilt.layers[-1].trainable


def test_mixed_precision_becomes_float32(tmp_path: Path):
    layers = [k.Conv2D(3, 3, dtype="mixed_float16"), k.BatchNormalization(dtype="mixed_float16"), k.Dense(2)]
    model = keras.Sequential([keras.Input((6, 6, 1)), *layers])
    rebuilt = from_keras3(saved(model, tmp_path))
    assert {layer.compute_dtype for layer in rebuilt.layers} == {"float32"}


def test_rebuilt_model_can_be_saved_and_loaded(tmp_path: Path):
    rebuilt = from_keras3(saved(image_model(), tmp_path))
    rebuilt.save(tmp_path / "again.keras")
    again = tf_keras.models.load_model(tmp_path / "again.keras")
    x = samples(rebuilt, None)
    np.testing.assert_array_equal(again(x), rebuilt(x))


def unsupported_layer():
    return keras.Sequential([keras.Input((4,)), k.Dense(2), k.RMSNormalization(name="odd")])


def unsupported_activation():
    return keras.Sequential([keras.Input((4,)), k.Dense(2, activation="celu", name="odd")])


def unsupported_recurrent_activation():
    return keras.Sequential([keras.Input((4, 2)), k.LSTM(2, recurrent_activation="hard_sigmoid", name="odd")])


def unsupported_setting():
    return keras.Sequential([keras.Input((4, 4, 1)), k.Resizing(3, 3, antialias=True, name="odd")])


def unsupported_operation():
    x = keras.Input((4,))
    return keras.Model(x, ops.sin(x))


UNSUPPORTED = [unsupported_layer, unsupported_activation, unsupported_recurrent_activation, unsupported_setting]


@pytest.mark.parametrize("make", UNSUPPORTED)
def test_unsupported_layer_is_named(make, tmp_path: Path):
    model = make()
    with pytest.raises(CompressError) as caught:
        from_keras3(saved(model, tmp_path))
    assert caught.value.where == "layer odd"
    assert type(model.get_layer("odd")).__name__ in caught.value.received


def test_unsupported_operation_is_named(tmp_path: Path):
    with pytest.raises(CompressError, match=r"keras\.src\.ops\.numpy\.Sin"):
        from_keras3(saved(unsupported_operation(), tmp_path))


def test_quantized_model_is_refused(tmp_path: Path):
    model = filled(keras.Sequential([keras.Input((4,)), k.Dense(2, name="small")]))
    model.quantize("int8")
    model.save(tmp_path / "model.keras")
    with pytest.raises(CompressError, match="quantized to int8"):
        from_keras3(tmp_path / "model.keras")


def test_sequential_without_input_shape_is_refused(tmp_path: Path):
    model = keras.Sequential([k.Flatten(), k.ReLU()])
    model.save(tmp_path / "model.keras")
    with pytest.raises(CompressError, match="unbuilt Sequential"):
        from_keras3(tmp_path / "model.keras")


def test_different_outputs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from compress.graph import keras3

    monkeypatch.setitem(keras3._ACTIVATIONS, "tanh", "sigmoid")
    with pytest.raises(CompressError, match="outputs that differ up to"):
        from_keras3(saved(sequential(), tmp_path))


def test_weights_of_other_shapes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from compress.graph import keras3

    arguments = keras3._arguments
    monkeypatch.setattr(
        keras3, "_arguments", lambda *a: {**arguments(*a), **({"units": 4} if "units" in arguments(*a) else {})}
    )
    with pytest.raises(CompressError, match=r"weights of shapes \[\(32, 4\), \(4,\)\]"):
        from_keras3(saved(sequential(), tmp_path))


def test_tf_keras_files_are_not_keras_3(tmp_path: Path):
    model = tf_keras.Sequential([tf_keras.Input((2,)), tf_keras.layers.Dense(1)])
    for name in ("model.keras", "model.h5"):
        model.save(tmp_path / name)
        assert not is_keras3_file(tmp_path / name)


def test_config_decides_where_metadata_is_missing(tmp_path: Path):
    path = tmp_path / "model.keras"
    for model, expected in ((sequential(), True), (tf_keras.Sequential([tf_keras.layers.Dense(1)]), False)):
        config = {"class_name": "Sequential", "module": "keras", "config": model.get_config()}
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("config.json", json.dumps(config, default=str))
        assert is_keras3_file(path) is expected


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 cut", b"\x89HDF\r\n\x1a\n cut"])
def test_other_files_are_not_keras_3(content: bytes, tmp_path: Path):
    path = tmp_path / "model.keras"
    assert not is_keras3_file(path)
    path.write_bytes(content)
    assert not is_keras3_file(path)


@pytest.mark.parametrize(
    ("equation", "left", "right"),
    [
        ("bqd,bkd->bqk", (5, 4), (6, 4)),
        ("bqk,bkd->bqd", (5, 6), (6, 4)),
        ("bqhd,bkhd->bhqk", (5, 2, 4), (6, 2, 4)),
        ("bhqk,bkhd->bqhd", (2, 5, 6), (6, 2, 4)),
        ("bxyc,bdc->bdxy", (3, 5, 4), (6, 4)),
        ("bd,bd->b", (4,), (4,)),
        ("bd,be->bed", (4,), (5,)),
        ("bqhd,bkhd->bqk", (5, 2, 4), (6, 2, 4)),
    ],
)
def test_einstein_sums(equation, left, right, tmp_path):
    one, two = keras.Input(left), keras.Input(right)
    model = keras.Model([one, two], ops.einsum(equation, one, two))
    rebuilt = from_keras3(saved(model, tmp_path))
    x, y = samples(model, None)
    np.testing.assert_allclose(rebuilt([x, y]), np.einsum(equation, x, y), atol=1e-5)
    rebuilt.save(tmp_path / "tf_keras.keras")
    loaded = tf_keras.models.load_model(tmp_path / "tf_keras.keras")
    np.testing.assert_allclose(loaded([x, y]), np.einsum(equation, x, y), atol=1e-5)


@pytest.mark.parametrize("equation", ["...d,...d->...", "bij,bkd->bkd", "bii,bid->bd"])
def test_other_einstein_sums_are_refused(equation, tmp_path):
    one, two = keras.Input((4, 4)), keras.Input((4, 4))
    path = saved(keras.Model([one, two], ops.einsum(equation, one, two)), tmp_path)
    with pytest.raises(CompressError, match="equation"):
        from_keras3(path)


def transformer_block(sums: bool):
    """With attention written by hand: by matrix products, or by Einstein sums."""
    image = keras.Input((8, 8, 1))
    x = k.Reshape((64, 8))(k.Conv2D(8, 3, padding="same", name="stem")(k.Rescaling(1 / 16)(image)))

    def heads(name: str):
        return ops.reshape(k.Dense(12, name=name)(x), (-1, 64, 3, 4))

    query, key, value = heads("query"), heads("key"), heads("value")
    if sums:
        weights = ops.softmax(ops.einsum("bqhd,bkhd->bhqk", query, key) / 2.0)
        y = ops.einsum("bhqk,bkhd->bqhd", weights, value)
    else:
        query, value = (ops.transpose(t, (0, 2, 1, 3)) for t in (query, value))
        weights = ops.softmax(ops.matmul(query, ops.transpose(key, (0, 2, 3, 1))) / 2.0)
        y = ops.transpose(ops.matmul(weights, value), (0, 2, 1, 3))
    x = k.LayerNormalization()(x + k.Dense(8, name="output")(ops.reshape(y, (-1, 64, 12))))
    return keras.Model(image, k.Dense(10, name="logits")(k.GlobalAveragePooling1D()(x)))


@pytest.mark.parametrize("sums", [False, True])
def test_a_transformer_block_with_attention_written_by_hand(sums, tmp_path):
    source = transformer_block(sums)
    model = from_keras3(saved(source, tmp_path))
    check_equal(source, model)
    channels = Channels(model)
    assert channels.trace.unsupported == {}
    cut = remove_channels(channels, half_gone(channels))
    assert cut.get_layer("query").units < 12
    to_keras3(cut, tmp_path / "back.keras")
    back = keras.models.load_model(tmp_path / "back.keras")
    x = np.random.default_rng(0).normal(size=(16, 8, 8, 1)).astype(np.float32)
    np.testing.assert_allclose(back(x), cut(x), atol=1e-4)
    part = Split(x, np.arange(16) % 2)
    candidate = Candidate(model, storage=Storage("int8", Calibration(images=16)))
    artifact = export(candidate, make_data("random", part, part), tmp_path / "model.tflite")
    file = TFLiteFile.read(artifact.path)
    assert {"BATCH_MATMUL", "SOFTMAX"} <= {operator.name for operator in file.operators}
    wanted = np.asarray(model(x))
    assert np.abs(file_outputs(artifact.path, x) - wanted).max() < 0.1 * np.abs(wanted).max()
