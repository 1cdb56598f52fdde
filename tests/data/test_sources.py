"""Data sources: parts that never mix, the same for every call; arrays that cannot be right are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tf_keras
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from compress.data.digits import Digits
from compress.data.npz import KerasDataset, Npz
from compress.data.source import Augmentation, Data, Split, find_file, make_data
from compress.errors import CompressError


def arrays(count: int = 40, shape: tuple[int, ...] = (4, 4, 1), classes: int = 3) -> dict[str, np.ndarray]:
    """Every sample is different, so that it can be found again."""
    size = int(np.prod(shape))
    values = np.arange((count + 10) * size, dtype=np.float32).reshape(count + 10, *shape)
    labels = np.arange(count + 10) % classes
    return {"x_train": values[:count], "y_train": labels[:count], "x_test": values[count:], "y_test": labels[count:]}


def saved(path: Path, **changes: np.ndarray | None) -> Path:
    kept = {key: value for key, value in {**arrays(), **changes}.items() if value is not None}
    np.savez(path, **kept)
    return path


def refused(load) -> CompressError:
    with pytest.raises(CompressError) as caught:
        load()
    assert caught.value.expected
    assert caught.value.fix
    return caught.value


def rows(split: Split) -> set[bytes]:
    return {np.ascontiguousarray(x).tobytes() for x in split.x}


def same(one: Data, two: Data) -> bool:
    pairs = [(getattr(one, name), getattr(two, name)) for name in ("train", "validation", "test")]
    return all(np.array_equal(a.x, b.x) and np.array_equal(a.y, b.y) for a, b in pairs)


def test_digits():
    from sklearn.datasets import load_digits

    data = Digits().load()
    # Every fifth of 1797 images from the fifth on is test data; a tenth of the rest is for validation.
    assert [len(part) for part in (data.train, data.validation, data.test)] == [1294, 144, 359]
    assert data.classes == 10
    assert data.train.x.shape[1:] == (8, 8, 1)
    assert int(data.train.x.max()) == 16
    bunch = load_digits()
    np.testing.assert_array_equal(data.test.x[..., 0], bunch.images[4::5])
    np.testing.assert_array_equal(data.test.y, bunch.target[4::5])
    # No image of one part is in another; the set itself holds no image twice.
    assert len(rows(data.train) | rows(data.validation) | rows(data.test)) == 1797
    truth = {image.astype(np.uint8).tobytes(): label for image, label in zip(bunch.images, bunch.target, strict=True)}
    for part in (data.train, data.validation):
        assert [truth[x.tobytes()] for x in part.x] == part.y.tolist()
        assert np.bincount(part.y, minlength=10).min() > 0.05 * len(part)


def test_the_split_is_the_same_for_every_call():
    one, two = Digits().load(), Digits().load()
    assert same(one, two)
    assert one.identity == two.identity


@given(count=st.integers(2, 200), fraction=st.floats(0.01, 0.9))
@settings(deadline=None)
def test_holding_out_loses_nothing_and_keeps_the_order(count, fraction):
    values = np.arange(count * 2).reshape(count, 2)
    whole = Split(values, np.arange(count) % 2)
    held_out = max(1, round(count * fraction))
    if held_out >= count:
        refused(lambda: make_data("test", whole, whole, validation_fraction=fraction))
        return
    data = make_data("test", whole, whole, validation_fraction=fraction)
    assert len(data.validation) == held_out
    assert len(data.train) == count - held_out
    assert not rows(data.train) & rows(data.validation)
    np.testing.assert_array_equal(np.sort(np.concatenate([data.train.x, data.validation.x])[:, 0]), values[:, 0])
    for part in (data.train, data.validation):
        assert (np.diff(part.x[:, 0]) > 0).all()
        np.testing.assert_array_equal(part.y, part.x[:, 0] // 2 % 2)


def test_limits_take_the_first_samples():
    whole, part = Digits().load(), Digits(train_limit=100, test_limit=7).load()
    assert [len(p) for p in (part.train, part.validation, part.test)] == [100, 25, 7]
    np.testing.assert_array_equal(part.train.x, whole.train.x[:100])
    np.testing.assert_array_equal(part.test.y, whole.test.y[:7])
    assert part.identity != whole.identity


def test_the_part_that_accuracies_are_measured_on():
    x, y = arrays()["x_train"], arrays()["y_train"]
    parts = Split(x[:30], y[:30]), Split(x[30:], y[30:])
    data = make_data("mine", *parts)
    searched = make_data("mine", *parts, evaluate_on="validation")
    assert data.evaluated is data.test
    assert searched.evaluated is searched.validation
    assert same(data, searched)
    # What a stage is worth is kept with it: one part's accuracy must not be taken for the other's.
    assert data.identity != searched.identity
    with pytest.raises(ValidationError, match="evaluate_on"):
        Digits(evaluate_on="train")


def test_a_validation_part_without_labels_measures_nothing(tmp_path):
    file = saved(tmp_path / "mine.npz", y_train=None)
    assert "labels" in refused(Npz(str(file), evaluate_on="validation").load).expected
    Npz(str(file)).load()


@pytest.mark.parametrize("field", ["train_limit", "test_limit", "shift"])
@pytest.mark.parametrize("source", [Digits, Npz, KerasDataset])
def test_negative_settings_are_refused(source, field):
    with pytest.raises(ValidationError):
        source(**{field: -5})


@pytest.mark.data
@pytest.mark.parametrize(
    ("dataset", "sizes", "shape"),
    [("mnist", [54000, 6000, 10000], (28, 28)), ("cifar10", [45000, 5000, 10000], (32, 32, 3))],
)
def test_known_data_sets(dataset, sizes, shape, data_dir, monkeypatch):
    monkeypatch.setenv("COMPRESS_DATA_DIR", str(data_dir))
    data = KerasDataset(dataset=dataset).load()
    assert data.name == dataset
    assert [len(part) for part in (data.train, data.validation, data.test)] == sizes
    assert data.train.x.shape[1:] == shape
    assert data.train.x.dtype == np.uint8
    assert data.classes == 10
    # Published: CIFAR-10 has 6000 images of each class; MNIST's rarest digit is 5, with 6313.
    counts = sum(np.bincount(part.y, minlength=10) for part in (data.train, data.validation, data.test))
    assert counts.min() == (6000 if dataset == "cifar10" else 6313)
    assert not rows(data.validation) & rows(data.test)
    with np.load(data_dir / f"{dataset}.npz") as archive:
        np.testing.assert_array_equal(data.test.x, archive["x_test"])
        np.testing.assert_array_equal(data.test.y, archive["y_test"])


def test_a_path_goes_before_the_data_folder(tmp_path, monkeypatch):
    folder, mine = tmp_path / "shared", tmp_path / "mine"
    folder.mkdir()
    mine.mkdir()
    saved(folder / "mnist.npz")
    saved(mine / "mnist.npz", x_train=arrays()["x_train"] + 1000)
    saved(mine / "renamed.npz", x_train=arrays()["x_train"] + 2000)
    monkeypatch.setenv("COMPRESS_DATA_DIR", str(folder))
    assert KerasDataset().load().train.x.min() < 1000
    assert 1000 <= KerasDataset(path=str(mine)).load().train.x.min() < 2000
    assert KerasDataset(path=str(mine / "renamed.npz")).load().train.x.min() >= 2000
    error = refused(KerasDataset(path=str(tmp_path / "nowhere")).load)
    assert error.where == "data.path"
    refused(KerasDataset(dataset="cifar10", path=str(mine)).load)


def test_where_a_file_is_looked_for(tmp_path, monkeypatch):
    (tmp_path / "a.npz").write_bytes(b"")
    monkeypatch.delenv("COMPRESS_DATA_DIR", raising=False)
    assert find_file(None, "a.npz") is None
    monkeypatch.setenv("COMPRESS_DATA_DIR", str(tmp_path))
    assert find_file(None, "a.npz") == tmp_path / "a.npz"
    assert find_file(None, "b.npz") is None
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_file("~/a.npz", "anything") == tmp_path / "a.npz"


def test_without_a_file_or_a_network_the_way_out_is_named(monkeypatch, tmp_path):
    monkeypatch.delenv("COMPRESS_DATA_DIR", raising=False)

    def no_network():
        raise Exception("URL fetch failure on https://storage.example: None -- [Errno -3]")

    monkeypatch.setattr(tf_keras.datasets.mnist, "load_data", no_network)
    error = refused(KerasDataset().load)
    assert "COMPRESS_DATA_DIR" in error.fix
    assert "URL fetch failure" in error.received


def test_arrays_of_a_user(tmp_path):
    data = Npz(path=str(saved(tmp_path / "mine.npz")), shift=2, mirror=True).load()
    assert data.name == "mine"
    assert [len(part) for part in (data.train, data.validation, data.test)] == [36, 4, 10]
    assert data.augmentation == Augmentation(2, True)
    assert data.classes == 3


def test_a_validation_part_that_is_given_is_used_and_nothing_else_held_out(tmp_path):
    given_part = {"x_val": arrays()["x_test"][:6] + 0.5, "y_val": np.zeros(6, int)}
    data = Npz(path=str(saved(tmp_path / "mine.npz", **given_part))).load()
    np.testing.assert_array_equal(data.validation.x, given_part["x_val"])
    np.testing.assert_array_equal(data.train.x, arrays()["x_train"])


def test_labels_in_a_column_are_flattened(tmp_path):
    plain = arrays()
    columns = {key: plain[key].astype(np.uint8)[:, None] for key in ("y_train", "y_test")}
    data = Npz(path=str(saved(tmp_path / "mine.npz", **columns))).load()
    np.testing.assert_array_equal(data.test.y, plain["y_test"])
    assert data.train.y.dtype == np.int64


NAN = arrays()["x_train"].copy()
NAN[3, 1, 1] = np.nan


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"y_test": None}, "y_test"),
        ({"x_val": arrays()["x_test"]}, "y_val"),
        ({"y_val": arrays()["y_test"]}, "x_val"),
        ({"y_train": arrays()["y_train"][:-1]}, "39 labels"),
        ({"y_train": np.eye(3)[arrays()["y_train"]]}, "argmax"),
        ({"y_train": arrays()["y_train"].astype(float)}, "float64"),
        ({"y_train": arrays()["y_train"] - 1}, "-1"),
        ({"x_test": arrays(shape=(4, 5, 1))["x_test"]}, "(4, 5, 1)"),
        ({"x_train": NAN}, "NaN"),
        ({"x_train": np.zeros((0, 4, 4, 1)), "y_train": np.zeros(0, int)}, "(0, 4, 4, 1)"),
        ({"x_train": np.zeros(40), "x_test": np.zeros(10)}, "(40,)"),
        ({"x_train": arrays()["x_train"].astype(str)}, "<U"),
        ({"x_train": np.array([None] * 40)}, "plain arrays"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arrays_that_cannot_be_right_are_refused(changes, word, tmp_path):
    error = refused(Npz(path=str(saved(tmp_path / "mine.npz", **changes))).load)
    assert word in str(error)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04" + bytes(50)])
def test_a_file_that_is_no_archive_is_refused(content, tmp_path):
    path = tmp_path / "mine.npz"
    path.write_bytes(content)
    assert str(path) in refused(Npz(path=str(path)).load).where


@pytest.mark.parametrize(("name", "what"), [("mine.npz", "no such file"), (".", "a folder")])
def test_a_path_without_a_file_is_refused(name, what, tmp_path):
    error = refused(Npz(path=str(tmp_path / name)).load)
    assert error.where == "data.path"
    assert error.received == f"{tmp_path / name} ({what})"


def test_no_path_is_refused():
    assert refused(Npz().load).where == "data.path"


def test_a_single_array_is_refused(tmp_path):
    np.save(tmp_path / "mine.npy", np.zeros((4, 4)))
    refused(Npz(path=str(tmp_path / "mine.npy")).load)


def test_a_damaged_archive_is_refused(tmp_path):
    path = tmp_path / "mine.npz"
    np.savez_compressed(path, **{k: np.random.default_rng(0).permutation(v) for k, v in arrays().items()})
    whole = path.read_bytes()
    for place in range(0, len(whole), 61):
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        try:
            Npz(path=str(path)).load()
        except CompressError:
            continue


@given(part=st.sampled_from(["train", "validation", "test"]), place=st.integers(0, 10**6), labels=st.booleans())
@settings(deadline=None, max_examples=30)
def test_the_identity_changes_with_one_value(part, place, labels):
    def build(change: bool) -> Data:
        whole = arrays()
        parts = {
            "train": Split(whole["x_train"], whole["y_train"]),
            "validation": Split(whole["x_test"][:4].copy(), whole["y_test"][:4].copy()),
            "test": Split(whole["x_test"].copy(), whole["y_test"].copy()),
        }
        if change:
            chosen = parts[part].y if labels else parts[part].x
            chosen.reshape(-1)[place % chosen.size] += 1
        return make_data("test", parts["train"], parts["test"], validation=parts["validation"])

    assert build(False).identity == build(False).identity
    assert build(True).identity != build(False).identity


def test_the_identity_tells_types_and_augmentation_apart():
    whole = Split(arrays()["x_train"], arrays()["y_train"])
    as_double = Split(whole.x.astype(np.float64), whole.y)
    made = [
        make_data("test", whole, whole),
        make_data("test", as_double, as_double),
        make_data("test", whole, whole, augmentation=Augmentation(1)),
        make_data("test", whole, whole, augmentation=Augmentation(1, True)),
    ]
    assert len({data.identity for data in made}) == 4


def model(shape: tuple[int | None, ...], outputs: int = 3) -> tf_keras.Model:
    image = tf_keras.Input(shape)
    x = tf_keras.layers.GlobalAveragePooling2D()(image) if None in shape else tf_keras.layers.Flatten()(image)
    return tf_keras.Model(image, tf_keras.layers.Dense(outputs)(x))


def made(shape: tuple[int, ...], classes: int = 3) -> Data:
    whole = arrays(shape=shape, classes=classes)
    return make_data("test", Split(whole["x_train"], whole["y_train"]), Split(whole["x_test"], whole["y_test"]))


def test_gray_images_get_the_channel_axis_that_a_model_reads():
    data = made((6, 5))
    fitted = data.fitted_to(model((6, 5, 1)), "model")
    for name in ("train", "validation", "test"):
        np.testing.assert_array_equal(getattr(fitted, name).x, getattr(data, name).x[..., None])
        np.testing.assert_array_equal(getattr(fitted, name).y, getattr(data, name).y)
    assert fitted.identity == data.identity
    assert data.train.x.shape == (36, 6, 5)


@pytest.mark.parametrize(
    ("shape", "wanted"), [((6, 5, 2), (6, 5, 2)), ((6, 5), (6, 5)), ((6, 5, 2), (None, None, 2))], ids=str
)
def test_data_that_fit_are_left_as_they_are(shape, wanted):
    data = made(shape)
    assert data.fitted_to(model(wanted), "model") is data
    assert data.fitted_to(model(wanted, outputs=7), "model") is data, "more scores than classes are fine"


@pytest.mark.parametrize(
    ("shape", "wanted", "outputs", "word"),
    [
        ((6, 5, 2), (5, 6, 2), 3, "(5, 6, 2)"),
        ((6, 5, 3), (6, 5, 1), 3, "(6, 5, 1)"),
        ((6, 5), (6, 5, 3), 3, "(6, 5, 3)"),
        ((6, 5, 2), (6, 5, 2), 2, "3 classes"),
        ((6, 5), (6, 5, 1), 2, "3 classes"),
    ],
)
def test_data_that_do_not_fit_the_model_are_refused(shape, wanted, outputs, word):
    error = refused(lambda: made(shape).fitted_to(model(wanted, outputs), "model given"))
    assert error.where == "model given"
    assert word in str(error)


def test_models_with_several_inputs_or_outputs_are_refused():
    one, two = tf_keras.Input((4,)), tf_keras.Input((4,))
    dense = tf_keras.layers.Dense(3)
    data = made((4,))
    assert "2 inputs" in str(refused(lambda: data.fitted_to(tf_keras.Model([one, two], dense(one + two)), "model")))
    assert "2 outputs" in str(refused(lambda: data.fitted_to(tf_keras.Model(one, [dense(one), one]), "model")))


def test_only_images_are_shifted_and_mirrored(tmp_path):
    x, y = np.zeros((40, 8)), np.arange(40) % 3
    np.savez(tmp_path / "flat.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    with pytest.raises(CompressError, match=r"data\.shift=0"):
        Npz(path=str(tmp_path / "flat.npz"), shift=1).load()


def test_class_names_and_pixel_range_of_the_built_in_data(tmp_path):
    digits = Digits().load()
    assert digits.labels == tuple("0123456789")
    assert digits.pixels == (0.0, 16.0)
    pictures = np.zeros((20, 4, 4, 3), np.uint8)
    saved(tmp_path / "cifar10.npz", x_train=pictures, y_train=np.arange(20) % 10, x_test=pictures, y_test=[9] * 20)
    cifar = KerasDataset(path=str(tmp_path), dataset="cifar10").load()
    assert (cifar.labels[3], cifar.labels[9], len(cifar.labels)) == ("cat", "truck", 10)
    assert cifar.pixels == (0.0, 255.0)


def test_class_names_of_own_arrays_change_no_identity(tmp_path):
    plain = Npz(path=str(saved(tmp_path / "plain.npz"))).load()
    named = Npz(path=str(saved(tmp_path / "named.npz", labels=np.array(["ant", "bee", "cow"])))).load()
    assert plain.labels == ()
    assert named.labels == ("ant", "bee", "cow")
    assert named.identity == plain.identity


@pytest.mark.parametrize(
    ("labels", "named"),
    [
        (np.array(["ant", "bee"]), "2 names"),
        (np.array(["ant", "", "cow"]), "''"),
        (np.array(["ant", "b\nc", "cow"]), "b\\nc"),
        (np.array([["a", "b", "c"]]), "(1, 3)"),
        (np.array([0.5, 1.0, 2.0]), "float64"),
    ],
)
def test_class_names_that_cannot_be_right(tmp_path, labels, named):
    error = refused(Npz(path=str(saved(tmp_path / "a.npz", labels=labels))).load)
    assert "labels" in error.where
    assert named in error.received


@pytest.mark.parametrize(
    ("low", "high", "dtype", "pixels"),
    [
        (0, 255, np.uint8, (0, 255)),
        (0, 1, np.uint8, (0, 255)),
        (0.0, 1.0, np.float32, (0, 1)),
        (-0.9, 1.0, np.float32, (-1, 1)),
        (0.0, 200.0, np.float32, (0, 255)),
    ],
)
def test_what_black_and_white_are_is_seen_from_the_arrays_unless_said(tmp_path, low, high, dtype, pixels):
    x = np.linspace(low, high, 40 * 16).reshape(40, 4, 4, 1).astype(dtype)
    file = saved(tmp_path / "a.npz", x_train=x)
    assert Npz(path=str(file)).load().pixels == pixels
    assert Npz(path=str(file), pixels=(2.0, 3.0)).load().pixels == (2.0, 3.0)


@pytest.mark.parametrize("pixels", [(1.0, 1.0), (5.0, 2.0), (0.0, float("nan")), (0.0, float("inf"))])
def test_a_pixel_range_that_is_none(tmp_path, pixels):
    assert refused(Npz(path=str(saved(tmp_path / "a.npz")), pixels=pixels).load).where == "data.pixels"
