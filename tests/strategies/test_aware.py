"""Quantization-aware training: the integer file computes what the network was trained as."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tf_keras

from compress.candidate import Candidate
from compress.data.digits import Digits
from compress.deploy.tflite import export
from compress.errors import CompressError
from compress.graph.selection import Rule, Selection
from compress.metrics.accuracy import accuracy, file_outputs
from compress.metrics.tflite_file import TFLiteFile
from compress.models.small import DigitsCnn
from compress.models.source import Schedule
from compress.reference import make_reference
from compress.strategies.pruning.prune import Prune
from compress.strategies.quantization import aware
from compress.strategies.quantization.aware import QuantizeAware
from compress.strategies.quantization.post_training import Quantize
from compress.strategies.strategy import Context
from compress.training import Recovery, train

layers = tf_keras.layers


@pytest.fixture(scope="module")
def data():
    return Digits().load()


@pytest.fixture(scope="module")
def context(data) -> Context:
    model = make_reference(DigitsCnn(train=Schedule(epochs=6)), data, 0)
    return Context("qat", data, model, Recovery(epochs=2.0, batch_size=64), seed=0)


@pytest.fixture
def fake(monkeypatch) -> list[tf_keras.Model]:
    """Collect the models that are trained with fake quantization."""
    trained: list[tf_keras.Model] = []

    def spied(*args, **kwargs):
        trained.append(inner(*args, **kwargs))
        return trained[-1]

    inner = aware.with_fake_quantization
    monkeypatch.setattr(aware, "with_fake_quantization", spied)
    return trained


@pytest.mark.parametrize(
    "fields", [{}, {"bits": 4}, {"bits": 4, "learned_steps": True, "rounding_images": 0}], ids=["8", "4", "4-lsq"]
)
def test_the_file_agrees_with_the_fake_quantized_model(fields, context, data, fake, tmp_path):
    assert_file_agrees(QuantizeAware(**fields).apply(Candidate(context.reference), context), fake, data, tmp_path)


def assert_file_agrees(candidate, fake, data, tmp_path, learned=True):
    """Of a network that has not ``learned``, the two largest outputs often lie within a level: either is right."""
    (trained,) = fake
    images = np.concatenate([data.test.x, data.validation.x]).astype(np.float32)
    labels = np.concatenate([data.test.y, data.validation.y])
    # The rounded weights are in the model by now; its activations are rounded as in training.
    wanted = trained.predict(images, verbose=0)
    export(candidate, data, tmp_path / "model.tflite")
    found = file_outputs(tmp_path / "model.tflite", images)
    # The file rounds its outputs, too: of two that fall on one level, the first is the largest.
    file = TFLiteFile.read(tmp_path / "model.tflite")
    (last,) = (file.tensors[op.inputs[0]] for op in file.operators if op.name == "DEQUANTIZE")
    scale, zero = last.scales[0], last.zero_point
    wanted = (np.clip(np.rint(wanted / scale) + zero, -128, 127) - zero) * scale
    assert np.abs(found - wanted).max() <= 4 * scale
    if learned:
        assert (found.argmax(-1) == wanted.argmax(-1)).mean() >= 0.995
        assert abs(accuracy(found, labels) - accuracy(wanted, labels)) <= 0.2
    else:
        of_the_file_s_class = np.take_along_axis(wanted, found.argmax(-1)[:, None], -1)[:, 0]
        assert (of_the_file_s_class > wanted.max(-1) - 1.5 * scale).mean() >= 0.995


def called_twice(x):
    twice = layers.Conv2D(8, 3, padding="same", activation="relu", name="twice")
    return twice(twice(layers.Conv2D(8, 3, padding="same", activation="relu")(x)))


def normed(x):
    x = layers.Conv2D(8, 3, padding="same", activation="relu")(layers.BatchNormalization()(x))
    grown = layers.Concatenate()([x, layers.Conv2D(8, 3, padding="same")(layers.BatchNormalization()(x))])
    return layers.ReLU()(layers.BatchNormalization()(grown))


def layer_normed(x):
    rows = layers.Dense(12)(layers.Reshape((16, 4))(x))
    norm = layers.LayerNormalization(gamma_initializer=tf_keras.initializers.RandomUniform(0.5, 2, seed=0))
    both = norm(rows)
    sides = layers.Dense(8, "relu", use_bias=False, name="left")(both), layers.Dense(8, name="right")(both)
    return layers.Reshape((4, 4, 16))(layers.Concatenate()(sides))


def test_a_layer_norm_s_scale_is_learned_in_the_kernels_behind_it(data, tmp_path):
    tf_keras.utils.set_random_seed(0)
    image = layers.Input((8, 8, 1), name="image")
    model = tf_keras.Model(image, layers.Dense(10, name="head")(layers.GlobalAveragePooling2D()(layer_normed(image))))
    context = Context("qat", data, model, Recovery(epochs=0.2, batch_size=64), seed=0)
    candidate = QuantizeAware(calibration_images=16).apply(Candidate(model), context)
    export(candidate, data, tmp_path / "model.tflite")
    file = TFLiteFile.read(tmp_path / "model.tflite")
    for guarantee in candidate.guarantees:
        assert guarantee.check_file(file) == []
    kernel = np.asarray(candidate.model.get_layer("left").kernel)
    np.testing.assert_allclose(file.weights_of("left", kernel.shape), kernel, atol=1e-5)


@pytest.mark.parametrize("strategy", [QuantizeAware(calibration_images=16), Quantize(calibration_images=16)])
def test_layers_that_litert_cannot_compute_in_integers_stay_floats_and_are_listed(strategy, data, tmp_path):
    image = layers.Input((8, 8, 1), name="image")
    volume = layers.Conv3D(3, (3, 3, 1), activation="relu", name="volume")(layers.Reshape((8, 8, 1, 1))(image))
    model = tf_keras.Model(image, layers.Dense(10, name="head")(layers.Flatten()(volume)))
    context = Context("qat", data, model, Recovery(epochs=0.2, batch_size=64), seed=0)
    candidate = strategy.apply(Candidate(model), context)
    export(candidate, data, tmp_path / "model.tflite")
    assert [(item.layer, "integer operator" in item.reason) for item in candidate.skipped] == [("volume", True)]
    file = TFLiteFile.read(tmp_path / "model.tflite")
    assert [violation for guarantee in candidate.guarantees for violation in guarantee.check_file(file)] == []
    assert file.kernel_of("head", model.get_layer("head").kernel.shape).dtype == np.int8
    assert file_outputs(tmp_path / "model.tflite", data.test.x[:8].astype(np.float32)).shape == (8, 10)


def transposed_along_one_axis(x):
    rows = layers.Reshape((8, 8))(x)
    return layers.Conv1DTranspose(16, 2, strides=2, activation="relu", name="up")(rows)[:, :, None]


@pytest.mark.parametrize("body", [called_twice, normed, transposed_along_one_axis])
def test_the_file_of_an_odd_model_agrees_with_the_fake_quantized_one(body, data, fake, tmp_path):
    tf_keras.utils.set_random_seed(0)
    image = layers.Input((8, 8, 1), name="image")
    pooled = layers.GlobalAveragePooling2D()(body(layers.Rescaling(1 / 16, name="scaled")(image)))
    model = tf_keras.Model(image, layers.Dense(10, name="head")(pooled))
    train(model, data, Recovery(epochs=8.0, batch_size=64, learning_rate=0.05), seed=0)
    context = Context("qat", data, model, Recovery(epochs=0.5, batch_size=64), seed=0)
    candidate = QuantizeAware(calibration_images=32).apply(Candidate(model), context)
    assert_file_agrees(candidate, fake, data, tmp_path, learned=False)
    operators = {operator.name for operator in TFLiteFile.read(tmp_path / "model.tflite").operators}
    # A transposed convolution along one axis gets its bias from an operator of its own.
    assert not operators & {"MUL", "ADD"} or body is transposed_along_one_axis


def test_what_was_trained_is_told_where_the_file_computes_more_finely(context, data, fake):
    strategy = QuantizeAware(activation_bits=3)
    made = strategy.apply(Candidate(context.reference), replace(context, recovery=Recovery(epochs=0.2, batch_size=64)))
    (trained,) = fake
    wanted = accuracy(trained.predict(data.validation.x, verbose=0), data.validation.y)
    assert made.measured == {"accuracy_as_trained": pytest.approx(wanted)}
    assert any("8 bits, not to 3" in item.reason for item in made.skipped)


def test_learned_steps_are_trained(context):
    before = QuantizeAware(bits=4, rounding_images=0)
    trained = QuantizeAware(bits=4, rounding_images=0, learned_steps=True)
    grids = [
        dict(next(iter(s.apply(Candidate(context.reference), context).guarantees)).grids()) for s in (before, trained)
    ]
    for name, grid in grids[1].items():
        assert grid.steps.shape == grids[0][name].steps.shape
        assert not np.allclose(grid.steps, grids[0][name].steps, rtol=1e-3)


def test_zeros_are_kept_in_the_file(context, data, tmp_path):
    pruned = Prune(sparsity=0.6).apply(Candidate(context.reference), context.for_stage("prune"))
    candidate = QuantizeAware().apply(pruned, context)
    export(candidate, data, tmp_path / "model.tflite")
    file = TFLiteFile.read(tmp_path / "model.tflite")
    for guarantee in candidate.guarantees:
        assert guarantee.check(candidate.model) == []
        assert guarantee.check_file(file) == []
    kernel = file.kernel_of("conv3", candidate.model.get_layer("conv3").kernel.shape)
    assert (kernel == 0).mean() >= 0.5


def test_layers_that_are_left_out_stay_floats(context, data, tmp_path):
    chosen = context.for_stage("qat", selection=Selection(skip=(Rule(name="fc1"),)))
    candidate = QuantizeAware().apply(Candidate(context.reference), chosen)
    export(candidate, data, tmp_path / "model.tflite")
    file = TFLiteFile.read(tmp_path / "model.tflite")
    assert file.kernel_of("fc1", candidate.model.get_layer("fc1").kernel.shape).dtype == np.float32
    assert file.kernel_of("conv2", candidate.model.get_layer("conv2").kernel.shape).dtype == np.int8


def test_tfmot_s_scheme_gives_a_file_that_is_as_good(context, data, tmp_path):
    candidate = QuantizeAware(scheme="tfmot").apply(Candidate(context.reference), context)
    export(candidate, data, tmp_path / "model.tflite")
    images = data.test.x.astype(np.float32)
    found = file_outputs(tmp_path / "model.tflite", images)
    wanted = candidate.model.predict(images, verbose=0)
    assert (found.argmax(-1) == wanted.argmax(-1)).mean() >= 0.98
    assert candidate.storage.ranges.keys() >= {"fc1"}
    assert {"conv1/kernel", "conv2/kernel", "fc1/kernel"} <= candidate.guarantees[0].grids().keys()
    assert [item.layer for item in candidate.skipped] == ["rescale"]


def test_tfmot_s_scheme_trains_a_model_that_ends_in_a_softmax_on_its_logits(data, tmp_path):
    def network(activation) -> tf_keras.Model:
        tf_keras.utils.set_random_seed(0)
        image = layers.Input((8, 8, 1), name="image")
        x = layers.Conv2D(4, 3, activation="relu", name="conv")(image)
        return tf_keras.Model(image, layers.Dense(10, activation, name="head")(layers.Flatten()(x)))

    found = []
    for ending in (None, "softmax"):
        model = network(ending)
        context = Context("qat", data, model, Recovery(epochs=0.5, batch_size=64), seed=0)
        candidate = QuantizeAware(scheme="tfmot").apply(Candidate(model), context)
        found.append(candidate.model.get_weights())
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)
    export(candidate, data, tmp_path / "model.tflite")
    images = data.test.x.astype(np.float32)
    outputs = file_outputs(tmp_path / "model.tflite", images)
    np.testing.assert_allclose(outputs.sum(-1), 1.0, atol=0.03)
    assert (outputs.argmax(-1) == candidate.model.predict(images, verbose=0).argmax(-1)).mean() > 0.95


def test_tfmot_s_scheme_lists_what_it_leaves_alone(data):
    image = layers.Input((8, 8, 1), name="image")
    x = layers.PReLU(name="leaky")(layers.Conv2D(4, 3)(image))
    model = tf_keras.Model(image, layers.Dense(10, name="head")(layers.Flatten()(x)))
    context = Context("qat", data, model, Recovery(epochs=0.2, batch_size=64), seed=0)
    candidate = QuantizeAware(scheme="tfmot").apply(Candidate(model), context)
    assert [item.layer for item in candidate.skipped] == ["leaky"]
    with pytest.raises(CompressError, match="leaky: TFMOT's registry does not know it"):
        QuantizeAware(scheme="tfmot").apply(Candidate(model), context.for_stage("qat", strict=True))


def test_tfmot_s_scheme_is_refused_where_it_would_break_something(context):
    pruned = Prune(sparsity=0.6).apply(Candidate(context.reference), context.for_stage("prune"))
    with pytest.raises(CompressError) as caught:
        QuantizeAware(scheme="tfmot").apply(pruned, context)
    assert "prune" in caught.value.received
    with pytest.raises(ValueError, match="bits=4 only beside scheme=own"):
        QuantizeAware(scheme="tfmot", bits=4)


@pytest.mark.parametrize("kind", [Quantize, QuantizeAware])
def test_single_layers_have_bits_of_their_own_in_the_file(kind, context, data, tmp_path):
    wanted = {"conv1": 8, "conv2": 3, "conv3": 3, "fc1": 2, "logits": 4}
    strategy = kind(bits=8, layer_bits={"logits": 4, "conv[23]": 3, "fc1": 2})
    candidate = strategy.apply(Candidate(context.reference), context.for_stage("qat", recovery=Recovery(epochs=0.2)))
    export(candidate, data, tmp_path / "model.tflite")
    file = TFLiteFile.read(tmp_path / "model.tflite")
    for layer, bits in wanted.items():
        stored = file.kernel_of(layer, candidate.model.get_layer(layer).kernel.shape)
        most = 2 ** (bits - 1) - 1
        assert np.abs(stored.astype(int)).max() <= most
        assert len(np.unique(stored)) > most, f"{layer}: the levels of {bits} bits are used"


@pytest.mark.parametrize("kind", [QuantizeAware, Quantize])
def test_few_bits_may_have_a_byte_each_in_the_file(kind, data, tmp_path):
    tf_keras.utils.set_random_seed(0)
    image = tf_keras.Input((8, 8, 1))
    x = tf_keras.layers.Conv2D(8, 3, activation="relu", name="conv")(tf_keras.layers.Rescaling(1 / 16)(image))
    model = tf_keras.Model(image, tf_keras.layers.Dense(10, name="logits")(tf_keras.layers.Flatten()(x)))
    context = Context("qat", data, model, Recovery(epochs=0.02, batch_size=32), seed=0)
    kernels, outputs = {}, []
    for bits, packed in ((4, True), (8, False)):
        result = kind(bits=4, packed=packed, rounding_images=32).apply(Candidate(model), context)
        path = export(result, data, tmp_path / f"{bits}.tflite").path
        file = TFLiteFile.read(path)
        kernels[bits] = [file.tensors[file.operators_of(layer)[0].inputs[1]] for layer in ("conv", "logits")]
        assert {kernel.bits for kernel in kernels[bits]} == {bits}
        outputs.append(file_outputs(path, data.test.x[:64]))
    for four, eight in zip(*kernels.values(), strict=True):
        np.testing.assert_array_equal(four.data, eight.data)
    np.testing.assert_allclose(*outputs, atol=0.05 * np.abs(outputs[0]).max())


def test_a_rule_for_bits_that_fits_no_layer_is_refused(context):
    with pytest.raises(CompressError, match=r"layer_bits.*logits"):
        Quantize(layer_bits={"logit": 4}).apply(Candidate(context.reference), context)
