"""The models that come with the program: published sizes, published accuracies, wrong weights refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from compress.data.npz import KerasDataset
from compress.data.source import Augmentation, Data, Split
from compress.errors import CompressError
from compress.metrics.accuracy import keras_accuracy
from compress.metrics.counts import count_macs, count_params
from compress.models.resnet import CifarResNet, ResNet8, cifar_resnet, load_torch_weights, resnet8
from compress.models.small import DigitsCnn, Lenet5, Lenet300100, TutorialCnn
from compress.reference import make_reference

# He et al. (arXiv 1512.03385), table 6, to the digit as counted by its well-known PyTorch port (option A shortcuts).
PARAMETERS = {20: 269_722, 32: 464_154, 44: 658_586, 56: 853_018, 110: 1_727_962}
MULTIPLY_ADDS = {20: 40_551_040, 32: 68_862_592, 44: 97_174_144, 56: 125_485_696, 110: 252_887_680}


@pytest.mark.parametrize("depth", PARAMETERS)
def test_cifar_resnets_are_of_the_published_size(depth):
    model = cifar_resnet(depth)
    assert count_params(model) == PARAMETERS[depth]
    assert count_macs(model) == MULTIPLY_ADDS[depth]
    convolutions = [
        layer for layer in model.layers if "conv" in layer.name and not layer.name.endswith(("norm", "pad"))
    ]
    assert len(convolutions) == depth - 2


def test_lenets_are_of_the_published_size():
    """Han et al. (arXiv 1506.02626), tables 3 and 4: 267K and 431K."""
    lenet5, lenet300, tutorial = (kind().architecture((28, 28, 1), 10) for kind in (Lenet5, Lenet300100, TutorialCnn))
    assert (count_params(lenet5), count_params(lenet300), count_params(tutorial)) == (431_080, 266_610, 20_410)
    assert count_macs(lenet5) == 24 * 24 * 25 * 20 + 8 * 8 * 25 * 20 * 50 + 800 * 500 + 500 * 10
    assert count_macs(lenet300) == 784 * 300 + 300 * 100 + 100 * 10


def test_resnet8_is_of_the_published_size():
    # MLPerf Tiny: 78,666 with the moving means and variances of seven batch norms, of 240 channels in all.
    assert count_params(resnet8()) == 78_666 - 2 * (3 * 16 + 2 * 32 + 2 * 64)


def test_the_default_network_fits_the_default_data():
    model = DigitsCnn().architecture((8, 8, 1), 10)
    assert (model.input_shape, model.output_shape) == ((None, 8, 8, 1), (None, 10))


def torch_arrays(depth: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random arrays under the names and in the layout of a torch state dictionary."""
    rng = np.random.default_rng(seed)
    arrays = {}

    def convolution(name: str, inputs: int, outputs: int) -> None:
        arrays[f"{name}.weight"] = rng.normal(0, np.sqrt(2 / (9 * inputs)), (outputs, inputs, 3, 3))

    def norm(name: str, size: int) -> None:
        for part, low in (("weight", 0.5), ("bias", -0.5), ("running_mean", -0.5), ("running_var", 0.5)):
            arrays[f"{name}.{part}"] = rng.uniform(low, low + 1, size)

    convolution("conv1", 3, 16)
    norm("bn1", 16)
    for stage, width in enumerate((16, 32, 64), start=1):
        for block in range((depth - 2) // 6):
            name = f"layer{stage}.{block}"
            convolution(f"{name}.conv1", width // 2 if stage > 1 and block == 0 else width, width)
            norm(f"{name}.bn1", width)
            convolution(f"{name}.conv2", width, width)
            norm(f"{name}.bn2", width)
    arrays["linear.weight"] = rng.normal(size=(10, 64))
    arrays["linear.bias"] = rng.normal(size=10)
    return {name: value.astype(np.float32) for name, value in arrays.items()}


def forward(arrays: dict[str, np.ndarray], depth: int, images: np.ndarray) -> np.ndarray:
    """ResNet as the paper and the PyTorch port define it, written anew: one pixel of zeros all around, option A."""

    def convolve(x: tf.Tensor, name: str, stride: int) -> tf.Tensor:
        padded = tf.pad(x, [[0, 0], [1, 1], [1, 1], [0, 0]])
        kernel = arrays[f"{name}.weight"].transpose(2, 3, 1, 0)
        x = tf.nn.conv2d(padded, kernel, stride, "VALID")
        norm = name.replace("conv", "bn")
        mean, variance = arrays[f"{norm}.running_mean"], arrays[f"{norm}.running_var"]
        return (x - mean) / np.sqrt(variance + 1e-5) * arrays[f"{norm}.weight"] + arrays[f"{norm}.bias"]

    normal = (images / 255.0 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    x = tf.nn.relu(convolve(tf.constant(normal, tf.float32), "conv1", 1))
    for stage, width in enumerate((16, 32, 64), start=1):
        for block in range((depth - 2) // 6):
            stride = 2 if stage > 1 and block == 0 else 1
            y = tf.nn.relu(convolve(x, f"layer{stage}.{block}.conv1", stride))
            y = convolve(y, f"layer{stage}.{block}.conv2", 1)
            if stride > 1:
                x = tf.pad(x[:, ::2, ::2], [[0, 0], [0, 0], [0, 0], [width // 4, width // 4]])
            x = tf.nn.relu(x + y)
    pooled = np.asarray(x, np.float64).mean(axis=(1, 2))
    return pooled @ arrays["linear.weight"].T + arrays["linear.bias"]


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("depth", [8, 20])
def test_weights_of_torch_give_the_networks_outputs(depth, prefix, tmp_path):
    arrays = torch_arrays(depth)
    np.savez(tmp_path / "weights.npz", **{prefix + name: value for name, value in arrays.items()})
    model = cifar_resnet(depth)
    load_torch_weights(model, tmp_path / "weights.npz")
    images = np.random.default_rng(1).integers(0, 256, (4, 32, 32, 3)).astype(np.float32)
    expected = forward(arrays, depth, images)
    np.testing.assert_allclose(model(images, training=False), expected, atol=2e-4 * np.abs(expected).max())


def data() -> Data:
    part = Split(np.zeros((2, 32, 32, 3), np.uint8), np.array([0, 9]))
    return Data("two", part, part, part, 10, Augmentation(), "identity")


def refused(path: Path, depth: int = 8) -> CompressError:
    with pytest.raises(CompressError) as caught:
        CifarResNet(depth=depth, weights=str(path)).build(data(), 0)
    assert str(path) in caught.value.where
    assert f"resnet{depth}" in caught.value.expected
    return caught.value


@pytest.mark.parametrize("name", ["layer2.0.conv1.weight", "bn1.running_var", "linear.bias"])
def test_a_missing_array_is_named(name, tmp_path):
    arrays = torch_arrays(8)
    del arrays[name]
    np.savez(tmp_path / "weights.npz", **arrays)
    assert name in refused(tmp_path / "weights.npz").received


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("conv1.weight", np.zeros((3, 3, 3, 16))),
        ("layer3.0.bn2.weight", np.zeros((64, 1))),
        ("linear.weight", np.zeros((100, 64))),
        ("linear.bias", np.float32(0)),
    ],
)
def test_an_array_of_another_shape_is_named_with_both_shapes(name, value, tmp_path):
    np.savez(tmp_path / "weights.npz", **{**torch_arrays(8), name: value})
    received = refused(tmp_path / "weights.npz").received
    assert name in received
    assert str(value.shape) in received


@pytest.mark.parametrize(
    "content", [b"no archive at all", b"PK\x03\x04" + bytes(60), b""], ids=["text", "cut", "empty"]
)
def test_a_file_that_is_no_archive_is_refused(content, tmp_path):
    (tmp_path / "weights.npz").write_bytes(content)
    refused(tmp_path / "weights.npz")


def test_a_single_array_is_refused(tmp_path):
    np.save(tmp_path / "weights.npy", np.zeros(3))
    refused(tmp_path / "weights.npy")


def test_the_weights_of_a_deeper_network_are_refused(tmp_path):
    np.savez(tmp_path / "weights.npz", **torch_arrays(20))
    refused(tmp_path / "weights.npz", depth=8)


def test_weights_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(CompressError, match=r"model\.weights"):
        CifarResNet(weights=str(tmp_path / "absent.npz")).origin()


@pytest.mark.filterwarnings("ignore:.*HDF5")
def test_a_keras_file_of_another_model_is_refused(tmp_path):
    DigitsCnn().architecture((8, 8, 1), 10).save(tmp_path / "digits.h5")
    with pytest.raises(CompressError, match="resnet8"):
        ResNet8(weights=str(tmp_path / "digits.h5")).build(data(), 0)


@pytest.mark.data
def test_resnet20_with_its_published_weights_gives_the_outputs_written_anew(data_dir):
    file = data_dir / "resnet_cifar10" / "resnet20_cifar10_torch.npz"
    model = CifarResNet(depth=20, weights=str(file)).build(data(), 0)
    with np.load(data_dir / "cifar10.npz") as archive:
        images = archive["x_test"][:32].astype(np.float32)
    with np.load(file) as archive:
        arrays = {name.removeprefix("module."): archive[name] for name in archive.files}
    expected = forward(arrays, 20, images)
    np.testing.assert_allclose(model(images, training=False), expected, atol=2e-4 * np.abs(expected).max())


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "weights", "published"),
    [
        # The PyTorch port reports an error of 8.27 %.
        (CifarResNet, "resnet_cifar10/resnet20_cifar10_torch.npz", 91.73),
        (ResNet8, "mlperf_tiny/ic_resnet8.h5", 87.19),
    ],
    ids=["resnet20", "resnet8"],
)
def test_published_accuracies(source, weights, published, data_dir):
    test = KerasDataset(dataset="cifar10", path=str(data_dir)).load()
    model = make_reference(source(weights=str(data_dir / weights)), test, 0)
    assert keras_accuracy(model, test.test) == pytest.approx(published, abs=0.02)
