"""Transferred filters: the transformations and the fit against NumPy's own, the guarantee, and the files."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.candidate import Candidate, Storage, Transfer
from compress.data.source import Data, Split, make_data
from compress.deploy.coding.draft import Tables
from compress.deploy.coding.tensors import Raw, draft_array
from compress.deploy.coding.tensors import Transferred as TransferredForm
from compress.deploy.coding.transfers import labels_of, numbers_of, places
from compress.deploy.packed import read_packed
from compress.deploy.packing import CODER_CHOICES, read_model, unpack, write_cmp
from compress.deploy.tflite import export
from compress.errors import CompressError
from compress.graph.kernels import kernels
from compress.graph.selection import Rule, Selection
from compress.metrics.tflite_file import TFLiteFile
from compress.strategies.compact.meta_filters import assign_filters
from compress.strategies.compact.tied_filters import TiedFilters
from compress.strategies.compact.transferred import Transferred
from compress.strategies.pruning.prune import Prune
from compress.strategies.strategy import Context
from compress.training import Recovery

layers = tf_keras.layers
NONE = Recovery(method="none")
TRAINING = Recovery(epochs=2, batch_size=16, learning_rate=0.01)


def turned(meta: np.ndarray, transformation: int) -> np.ndarray:
    view = np.rot90(meta, transformation % 4, axes=(0, 1))
    return view[:, ::-1] if transformation >= 4 else view


def circled(meta: np.ndarray, transformation: int, size: int) -> np.ndarray:
    return np.concatenate(
        [np.roll(part, transformation, axis=2) for part in np.split(meta, meta.shape[2] // size, axis=2)], axis=2
    )


def shifted(meta: np.ndarray, transformation: int, size: int, height: int, width: int) -> np.ndarray:
    down, across = divmod(transformation, size)
    return meta[down : down + height, across : across + width]


CASES = st.one_of(
    st.builds(
        lambda size, h, w, c: Transfer("translation", size, (h, w, c)),
        st.integers(2, 3),
        st.integers(1, 3),
        st.integers(2, 3),
        st.integers(1, 3),
    ),
    st.builds(
        lambda size, side, c: Transfer("rotation", size, (side, side, c)),
        st.sampled_from([2, 4, 8]),
        st.integers(2, 4),
        st.integers(1, 3),
    ),
    st.builds(
        lambda size, h, circles: Transfer("circulant", size, (h, 2, size * circles)),
        st.integers(2, 4),
        st.integers(1, 2),
        st.integers(1, 2),
    ),
)


def filter_of(transfer: Transfer, meta: np.ndarray, transformation: int) -> np.ndarray:
    """A filter by its definition; ``meta`` are a meta filter's numbers."""
    height, width, channels = transfer.shape
    if transfer.transform == "translation":
        more = transfer.size - 1
        return shifted(
            meta.reshape(height + more, width + more, channels), transformation, transfer.size, height, width
        )
    if transfer.transform == "circulant":
        return circled(meta.reshape(height, width, channels), transformation, transfer.size)
    turns = transformation * 2 if transfer.size == 2 else transformation
    return turned(meta.reshape(height, width, channels), turns)


@given(transfer=CASES)
@settings(deadline=None, max_examples=60)
def test_each_transformation_is_what_it_is_called(transfer: Transfer) -> None:
    meta = np.arange(numbers_of(transfer), dtype=float)
    moved = places(transfer)
    assert len(moved) == (transfer.size**2 if transfer.transform == "translation" else transfer.size)
    for transformation, place in enumerate(moved):
        np.testing.assert_array_equal(meta[place].reshape(transfer.shape), filter_of(transfer, meta, transformation))


@given(transfer=CASES, seed=st.integers(0, 99), data=st.data())
@settings(deadline=None, max_examples=40)
def test_projection_is_the_least_squares_solution(transfer: Transfer, seed: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    transformations = len(places(transfer))
    filters = data.draw(st.integers(1, 2 * transformations))
    slots = tuple(map(int, rng.permutation(2 * transformations)[:filters]))
    transfer = Transfer(transfer.transform, transfer.size, transfer.shape, slots)
    bound = TiedFilters.of("stage", {"conv/kernel": transfer})
    value = rng.normal(size=(*transfer.shape, filters)).astype(np.float32)
    value[rng.random(value.shape) < 0.2] = 0
    # One row for each weight: the numbers that it is made of.
    identity = np.eye(numbers_of(transfer))
    design = np.zeros((*value.shape, 2, numbers_of(transfer)))
    for index, slot in enumerate(slots):
        meta, transformation = divmod(slot, transformations)
        for number, row in enumerate(identity):
            design[..., index, meta, number] = filter_of(transfer, row, transformation)
    matrix = design.reshape(value.size, -1) * (value.reshape(-1, 1) != 0)
    best = matrix @ np.linalg.lstsq(matrix, value.ravel().astype(np.float64), rcond=None)[0]
    projected = np.asarray(bound.project("conv/kernel", tf.constant(value)))
    np.testing.assert_allclose(projected.ravel(), best, atol=1e-5)
    assert bound.transfers() == {"conv/kernel": transfer}
    assert bound.numbers() == len(np.unique(labels_of(transfer)))


@pytest.mark.parametrize(
    "transfer",
    [
        Transfer("translation", 2, (3, 3, 4)),
        Transfer("rotation", 4, (3, 3, 4)),
        Transfer("rotation", 8, (3, 3, 4)),
        Transfer("circulant", 4, (1, 1, 8)),
    ],
    ids=str,
)
def test_filters_that_follow_from_few_are_found_again(transfer: Transfer) -> None:
    rng = np.random.default_rng(3)
    transformations = len(places(transfer))
    slots = tuple(map(int, rng.permutation(2 * transformations)))
    made = Transfer(transfer.transform, transfer.size, transfer.shape, slots)
    numbers = rng.normal(size=2 * numbers_of(transfer)).astype(np.float32)
    kernel = numbers[labels_of(made)]
    found = assign_filters(kernel, transfer, 0)
    assert sorted(found.transfer.slots) == sorted(slots)
    energy = float(np.square(kernel).sum())
    assert found.error == pytest.approx(float(np.square(kernel - found.kernel).sum()), abs=1e-3 * energy)
    random = rng.normal(size=kernel.shape).astype(np.float32)
    assert found.error < 1e-6 * energy
    assert assign_filters(random, transfer, 0).error > 0.3 * np.square(random).sum()


@pytest.fixture(scope="module")
def data() -> Data:
    x = np.random.default_rng(0).normal(size=(96, 6, 6, 4)).astype(np.float32)
    part = Split(x, np.arange(96) % 3)
    return make_data("random", part, part)


@pytest.fixture(scope="module")
def model() -> tf_keras.Model:
    tf_keras.utils.set_random_seed(0)
    image = tf_keras.Input((6, 6, 4), name="image")
    x = layers.Conv2D(16, 3, padding="same", use_bias=False, name="conv")(image)
    x = layers.ReLU()(layers.BatchNormalization(name="norm")(x))
    x = layers.DepthwiseConv2D(3, name="depthwise")(x)
    x = layers.Conv2D(2, 3, name="few")(x)
    return tf_keras.Model(image, layers.Dense(3, name="last")(layers.GlobalAveragePooling2D()(x)))


def applied(model, data, recovery=NONE, before: Candidate | None = None, **fields) -> Candidate:
    context = Context("transferred", data, model, recovery, seed=1)
    return Transferred(**fields).apply(before or Candidate(model), context)


@pytest.mark.parametrize(
    ("fields", "left", "recovery"),
    [
        ({"transform": "translation"}, 16 / 36, TRAINING),
        ({"transform": "translation", "filters": 9}, 2 * 25 / (16 * 9), NONE),
        ({"transform": "rotation"}, 1 / 4, NONE),
        ({"transform": "rotation", "filters": 8}, 1 / 8, NONE),
        ({"transform": "circulant"}, 1 / 4, TRAINING),
    ],
    ids=["translation", "translation 9", "rotation", "rotation 8", "circulant"],
)
def test_the_kernel_is_made_of_so_many_numbers(fields, left, recovery, model, data) -> None:
    result = applied(model, data, recovery, images=32, **fields)
    assert {item.layer for item in result.skipped} == {"depthwise", "few"}
    (bound,) = result.guarantees
    assert bound.check(result.model) == []
    kernel = result.model.get_layer("conv").kernel
    assert len(np.unique(np.asarray(kernel))) <= left * 576
    assert result.measured["free_numbers"] <= left * 576
    assert result.measured["compression_rate"] >= 1 / left
    kernel.assign_add(np.random.default_rng(0).normal(size=kernel.shape))
    (violation,) = bound.check(result.model)
    assert violation.layer == "conv/kernel"


def test_solving_on_images_keeps_the_outputs_nearer_than_means_do(model, data) -> None:
    wanted = model.predict(data.train.x, verbose=0)
    errors = {}
    for images in (0, 96):
        found = applied(model, data, images=images).model
        errors[images] = float(np.mean((found.predict(data.train.x, verbose=0) - wanted) ** 2))
    assert errors[96] < 0.9 * errors[0]


@pytest.mark.parametrize("scheme", ["float32", "int8"])
def test_the_exported_file_holds_the_same_numbers(scheme, model, data, tmp_path) -> None:
    result = applied(model, data, images=0, transform="rotation")
    artifact = export(result.evolve(storage=Storage(scheme)), data, tmp_path / "model.tflite")
    (bound,) = result.guarantees
    assert bound.check_file(TFLiteFile.read(artifact.path)) == []
    other = applied(model, data, images=0, transform="circulant").guarantees[0]
    (violation,) = other.check_file(TFLiteFile.read(artifact.path))
    assert "meta filter" in violation.found


@pytest.mark.parametrize("transform", ["translation", "rotation", "circulant"])
def test_the_packed_file_holds_the_meta_filters_alone(transform, model, data, tmp_path) -> None:
    result = applied(model, data, images=0, transform=transform)
    (bound,) = result.guarantees
    sizes = {}
    for name, network, hints in (("plain", model, ()), ("tied", result.model, bound.transfers().values())):
        network.save(tmp_path / f"{name}.keras")
        write_cmp(tmp_path / f"{name}.cmp", tmp_path / f"{name}.keras", transfers=hints)
        sizes[name] = (tmp_path / f"{name}.cmp").stat().st_size
    kernel = np.asarray(result.model.get_layer("conv").kernel)
    assert sizes["plain"] - sizes["tied"] > 0.9 * 4 * (kernel.size - bound.numbers())
    unpacked = read_packed((tmp_path / "tied.cmp").read_bytes(), "tied.cmp").arrays
    assert any(a.shape == kernel.shape and a.tobytes() == kernel.tobytes() for a in unpacked.values())


def test_integers_are_packed_so_too(data, tmp_path) -> None:
    image = tf_keras.Input((6, 6, 4), name="image")
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(64, 3, name="conv")(image))
    wide = tf_keras.Model(image, layers.Dense(3, name="last")(x))
    result = applied(wide, data, images=0, transform="circulant")
    (bound,) = result.guarantees
    source = export(result.evolve(storage=Storage("int8")), data, tmp_path / "model.tflite").path
    sizes = []
    for hints in ((), bound.transfers().values()):
        write_cmp(tmp_path / "model.cmp", source, transfers=hints)
        sizes.append((tmp_path / "model.cmp").stat().st_size)
    assert sizes[1] < sizes[0]
    # A byte for each number and for what becomes of each of the 64 filters, and the head.
    (kernel,) = (array for array in read_model(source).arrays.values() if array.shape == (64, 3, 3, 4))
    forms = (Raw(), TransferredForm(tuple(bound.transfers().values())))
    assert len(draft_array(kernel, Tables(), CODER_CHOICES["ans"], forms).write()) <= bound.numbers() + 64 + 16
    unpack(tmp_path / "model.cmp", tmp_path / "again.tflite")
    assert (tmp_path / "again.tflite").read_bytes() == source.read_bytes()


def test_zeros_stay_zero_and_the_rest_is_tied(model, data) -> None:
    context = Context("prune", data, model, NONE, seed=1)
    pruned = Prune(sparsity=0.5).apply(Candidate(model), context)
    result = applied(model, data, TRAINING, before=pruned, images=32)
    assert [v for bound in result.guarantees for v in bound.check(result.model)] == []
    kernel = next(k.value for k in kernels(result.model) if k.layer.name == "conv")
    assert np.mean(kernel == 0) >= 0.4


def test_a_second_stage_leaves_what_is_transferred_alone(model, data) -> None:
    context = Context("again", data, model, NONE, seed=2, selection=Selection(only=(Rule(name="conv"),)))
    once = applied(model, data, images=0)
    twice = Transferred(images=0).apply(once, context)
    assert twice.guarantees == once.guarantees
    assert [(item.layer, item.by_choice) for item in twice.skipped] == [("conv", True)]
    np.testing.assert_array_equal(twice.model.get_layer("conv").kernel, once.model.get_layer("conv").kernel)
    assert twice.model is not once.model


def test_cut_channels_leave_the_others_tied(model, data) -> None:
    result = applied(model, data, images=0)
    (bound,) = result.guarantees
    cut = bound.cut(lambda name, array: array[:, :, :3])
    assert cut.labels["conv/kernel"].shape == (3, 3, 3, 16)
    assert cut.transfers() == {}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"transform": "translation", "filters": 64}, "fewer than the 64"),
        ({"transform": "circulant", "filters": 3}, "no multiple of the circle of 3"),
    ],
)
def test_what_does_not_fit_is_said(fields, reason, model, data) -> None:
    with pytest.raises(CompressError) as caught:
        applied(model, data, **fields)
    assert reason in caught.value.received


@pytest.mark.parametrize(
    ("kernel_size", "transform", "reason"),
    [
        (1, "translation", "1 x 1"),
        (1, "rotation", "turned by 90 degrees"),
        ((1, 3), "rotation", "1 x 3 cannot be turned"),
    ],
)
def test_filters_of_other_shapes_are_named(kernel_size, transform, reason, data) -> None:
    image = tf_keras.Input((6, 6, 4))
    x = layers.GlobalMaxPooling2D()(layers.Conv2D(16, kernel_size, name="conv")(image))
    with pytest.raises(CompressError) as caught:
        applied(tf_keras.Model(image, layers.Dense(3)(x)), data, transform=transform)
    assert reason in caught.value.received


@pytest.mark.parametrize(("transform", "filters"), [("translation", 3), ("rotation", 5), ("rotation", 16)])
def test_numbers_that_a_group_does_not_have_are_refused(transform, filters) -> None:
    with pytest.raises(ValueError, match=f"filters={filters} of {transform}"):
        Transferred(transform=transform, filters=filters)
