"""The classifiers that were made for ImageNet: variants, downloaded weights, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tf_keras

from compress.data.noise import Noise
from compress.data.source import Data
from compress.errors import CompressError
from compress.graph.channels.groups import Channels
from compress.graph.rewrite import rewrite
from compress.metrics.counts import count_macs
from compress.models.applications import KerasApplication
from compress.models.imagenet import ImagenetClassifier
from compress.models.mobilenet import MobileNetV1
from compress.models.shufflenet import ShuffleNet
from compress.models.squeezenet import SqueezeNet
from tests.graph.zoo import randomised


def images(side: int, classes: int = 10, channels: int = 3) -> Data:
    return Noise(shape=(side, side, channels), classes=classes, samples=2).load()


def downloads(monkeypatch, trained: tf_keras.Model, folder: Path) -> None:
    """Have Keras find the weights of ``trained`` where it downloads."""
    file = folder / "weights.h5"
    trained.save_weights(file)
    monkeypatch.setattr("tf_keras.src.utils.data_utils.get_file", lambda *_, **__: str(file))


def test_mobilenet_with_keras_weights_is_keras_mobilenet(tmp_path, monkeypatch):
    theirs = randomised(tf_keras.applications.MobileNet((128, 128, 3), alpha=0.25, weights=None))
    downloads(monkeypatch, theirs, tmp_path)
    data = images(32, 1000)
    ours = MobileNetV1(alpha=0.25, weights="imagenet", resolution=128).build(data, 0)
    x = data.train.x.astype(np.float32)
    resized = tf_keras.layers.Resizing(128, 128)(x)
    scores = tf_keras.layers.Softmax()(ours(x))
    np.testing.assert_allclose(scores, theirs(resized / 127.5 - 1), atol=1e-5)
    assert np.ptp(np.asarray(ours(x)), axis=-1).min() > 1
    with pytest.raises(CompressError, match="a form that Keras has imagenet weights for"):
        MobileNetV1(alpha=0.25, weights="imagenet", resolution=128, shallow=True).build(data, 0)


def test_a_network_of_caffe_reads_red_green_blue_here(tmp_path, monkeypatch):
    theirs = tf_keras.applications.VGG16(include_top=False, weights=None)
    downloads(monkeypatch, theirs, tmp_path)
    data = images(32)
    ours = KerasApplication(name="VGG16", weights="imagenet").build(data, 0)
    x = data.train.x.astype(np.float32)
    maps = tf_keras.Model(ours.input, ours.get_layer("block5_pool").output)(x)
    expected = theirs(tf_keras.applications.vgg16.preprocess_input(x.copy()))
    np.testing.assert_allclose(maps, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    assert ours.output_shape == (None, 10)


def test_a_download_that_fails_is_said(monkeypatch):
    def fails(*_, **__):
        raise Exception("URL fetch failure on https://example.org: None -- unreachable")

    monkeypatch.setattr("tf_keras.src.utils.data_utils.get_file", fails)
    with pytest.raises(CompressError, match=r"a working download.*URL fetch failure"):
        MobileNetV1(alpha=0.25, weights="imagenet").build(images(32), 0)


@pytest.mark.parametrize(
    ("source", "side", "message"),
    [
        (MobileNetV1(alpha=0.03), 32, "model.alpha.*at least 0.03125"),
        (MobileNetV1(), 16, "model.resolution.*at least 32.*16 pixels"),
        (MobileNetV1(resolution=24), 64, "at least 32.*24 pixels"),
        (MobileNetV1(alpha=0.3, weights="imagenet"), 32, "a form that Keras has imagenet weights for"),
        (ShuffleNet(groups=8, width=0.3), 32, "model.width.*8 groups divide.*115.2 channels in stage 2"),
        (ShuffleNet(groups=4, first=22), 32, "4 groups divide.*22 in conv1"),
        (ShuffleNet(groups=1, width=0.1, first=24), 32, "more than conv1 has"),
        (SqueezeNet(version="1.0"), 32, "at least 35"),
        (KerasApplication(name="InceptionV3"), 32, "at least 75"),
        (KerasApplication(name="ResNet50", alpha=0.5), 32, "ResNet50 has no width"),
    ],
)
def test_what_cannot_be_built_is_refused(source: ImagenetClassifier, side: int, message: str, monkeypatch):
    monkeypatch.setattr("tf_keras.src.utils.data_utils.get_file", lambda *_, **__: "no file")
    with pytest.raises(CompressError, match=f"(?s){message}"):
        source.build(images(side), 0)


@pytest.mark.parametrize(
    ("source", "side"),
    [
        (SqueezeNet(version="1.0"), 35),
        (SqueezeNet(version="1.1"), 31),
        (MobileNetV1(alpha=0.03125, small=True), 16),
        (ShuffleNet(groups=1, width=0.25, small=True), 8),
    ],
)
def test_the_smallest_images_still_have_a_pixel_at_the_end(source: ImagenetClassifier, side: int):
    model = source.build(images(side, channels=1), 0)
    maps = next(layer.input for layer in model.layers if isinstance(layer, tf_keras.layers.GlobalAveragePooling2D))
    assert min(maps.shape[1:3]) == 1


def test_weights_that_nobody_has_are_refused_at_once():
    with pytest.raises(CompressError, match="the file imagenet, here or in"):
        ShuffleNet(weights="imagenet").origin()


def test_classes_and_resolution_may_be_other_than_the_data_s():
    model = MobileNetV1(alpha=0.25, classes=12, resolution=64).build(images(40), 0)
    assert model.input_shape == (None, 40, 40, 3)
    assert model.output_shape == (None, 12)
    assert count_macs(model) == count_macs(MobileNetV1(alpha=0.25, classes=12).build(images(64), 0))


def test_channels_of_shufflenet_are_read():
    channels = Channels(rewrite(ShuffleNet(groups=2, width=0.25, small=True).build(images(8), 0)))
    assert channels.trace.unsupported == {}
    # The maps inside a unit may lose channels, those that are added up go together.
    assert any(group.kept_because is None and "stage2_unit2_compress" in group.writers for group in channels.groups)


def test_without_the_shuffle_groups_never_meet():
    """What a unit's second convolution reads of a group hangs on that group alone, unless channels are shuffled."""
    x = np.random.default_rng(0).normal(size=(1, 16, 16, 50)).astype(np.float32)
    changed = x.copy()
    changed[..., :25] += 1
    found = {}
    for shuffle in (False, True):
        model = ShuffleNet(groups=2, width=0.25, small=True, shuffle=shuffle).build(images(32), 0)
        start = model.get_layer("stage2_unit2_compress")
        end = model.get_layer("stage2_unit2_expand")
        unit = tf_keras.Model(start.input, end.output)
        differs = (np.asarray(unit(changed)) != np.asarray(unit(x))).any((0, 1, 2))
        found[shuffle] = (differs[:25].any(), differs[25:].any())
    assert found == {False: (True, False), True: (True, True)}


def test_an_excitation_of_few_channels_has_one_unit_at_least():
    model = ShuffleNet(groups=1, width=0.0625, excitation=True).build(images(32), 0)
    assert np.isfinite(np.asarray(model(np.zeros((1, 32, 32, 3), np.float32)))).all()


def test_a_version_may_be_written_as_a_number():
    assert SqueezeNet(version=1.0) == SqueezeNet(version="1.0")  # type: ignore[arg-type]
