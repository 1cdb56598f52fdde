"""The packed file: what comes out is what went in; whatever is not as it was written is named."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from compress.candidate import Hash
from compress.deploy import pack
from compress.deploy import unpack as unpack_command
from compress.deploy.coding import ans
from compress.deploy.coding.draft import Tables
from compress.deploy.coding.frequencies import Frequencies
from compress.deploy.coding.hashing import buckets_and_signs
from compress.deploy.coding.symbols import Ans, Deflate, FixedWidth, Huffman
from compress.deploy.coding.wire import varint
from compress.deploy.packed import MAGIC, VERSION, Packed, read_packed, write_packed
from compress.deploy.packing import CODER_CHOICES, read_model, unpack, write_cmp
from compress.errors import CompressError
from compress.metrics.accuracy import file_outputs
from tests.deploy.independent_reader import read_file

LAYERS = tf_keras.layers


def hashed_array(rng: np.random.Generator, shape: tuple[int, ...], hashing: Hash) -> np.ndarray:
    buckets, signs = buckets_and_signs(hashing, int(np.prod(shape)))
    book = rng.normal(size=hashing.buckets).astype(np.float32)
    return np.where(signs, -book[buckets], book[buckets]).reshape(shape)


def some_arrays() -> dict[str, np.ndarray]:
    """One array for each form, each coder and each way to write positions."""
    rng = np.random.default_rng(0)
    hashed = hashed_array(rng, (60, 20), Hash(77, 90))
    book = np.sort(rng.normal(size=16)).astype(np.float32)
    busy = rng.random((60, 1)) * rng.random((1, 40)) > 0.55
    vectors = book[rng.integers(0, 16, (6, 3))][rng.integers(0, 6, (12, 8))]
    skewed = np.minimum(rng.geometric(0.4, (50, 40)), 16) - 1
    return {
        "dense/kernel": rng.normal(size=(40, 30)).astype(np.float32),
        "shared/kernel": book[skewed],
        "sparse/kernel": np.where(rng.random((100, 40)) < 0.03, rng.normal(size=(100, 40)), 0).astype(np.float32),
        "busy/kernel": np.where(busy, rng.choice(book, (60, 40)), 0).astype(np.float32),
        "grid/kernel": (skewed[:, :8] - 4).astype(np.float32) * rng.uniform(1, 2, 8).astype(np.float32),
        "hashed/kernel": hashed,
        "hashed/pruned": np.where(rng.random(hashed.shape) < 0.4, hashed, 0),
        "bytes": rng.integers(-9, 9, (30, 20)).astype(np.int8),
        "step": np.array(7, np.int64),
        "nothing": np.zeros((0, 3), np.float16),
        "zeros": np.zeros((9, 9), np.float32),
        "flags": rng.random(50) < 0.1,
        # Late in the file: for every byte behind them they are read once more by the tests of damage.
        "vectors/kernel": vectors.transpose(0, 2, 1).reshape(36, 8).copy(),
        "vectors/rows": np.rint(20 * vectors).astype(np.int8).reshape(12, 3, 2, 4),
        "few": np.array([1.5, -0.0, np.nan], np.float64),
    }


def packed_file(coder: str = "smallest") -> bytes:
    return write_packed(Packed("keras", some_arrays(), {"config": {"a": [1, None, "ü"]}}), CODER_CHOICES[coder])


@pytest.mark.parametrize("coder", sorted(CODER_CHOICES))
def test_what_goes_in_comes_out(coder: str) -> None:
    back = read_packed(packed_file(coder), "x.cmp")
    assert back.kind == "keras"
    assert back.structure == {"config": {"a": [1, None, "ü"]}}
    for name, array in some_arrays().items():
        assert (back.arrays[name].dtype, back.arrays[name].shape) == (array.dtype, array.shape)
        assert back.arrays[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("coder", sorted(CODER_CHOICES))
def test_another_program_can_read_it(coder: str) -> None:
    """Written from ``docs/packed_file.md`` alone, in plain Python."""
    kind, structure, arrays, skeleton = read_file(packed_file(coder))
    assert (kind, structure, skeleton) == (0, {"config": {"a": [1, None, "ü"]}}, b"")
    for name, array in some_arrays().items():
        assert arrays[name] == (array.dtype.name, list(array.shape), array.tobytes()), name


def test_another_program_can_read_large_alphabets_and_negative_zeros() -> None:
    """What :func:`some_arrays` leaves out: Huffman codes of more than 256 symbols, both marks of a grid."""
    rng = np.random.default_rng(0)
    wide = rng.choice(65_536, 300, replace=False).astype(np.uint16)[rng.geometric(0.007, 3_000) % 300]
    levels = rng.integers(-3, 4, (150, 1)).astype(np.float32)
    levels[:9] = -0.0
    full = np.where(levels == 3, np.float32(-4), levels)
    arrays = {"wide": wide, "free": levels * np.float32(0.3), "full": full * np.float32(0.3)}
    _, _, found, _ = read_file(write_packed(Packed("keras", arrays), (FixedWidth(), Huffman(), Deflate())))
    assert {name: raw for name, (_, _, raw) in found.items()} == {name: a.tobytes() for name, a in arrays.items()}


def test_every_flipped_byte_is_found() -> None:
    content = packed_file()
    rng = np.random.default_rng(0)
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= int(rng.integers(1, 256))
        with pytest.raises(CompressError):
            read_packed(bytes(damaged), "x.cmp")


def test_every_missing_end_is_found() -> None:
    content = packed_file()
    for length in range(len(content)):
        with pytest.raises(CompressError):
            read_packed(content[:length], "x.cmp")
    for place in range(0, len(content), 7):
        with pytest.raises(CompressError):
            read_packed(content[:place] + content[place + 1 :], "x.cmp")
    with pytest.raises(CompressError):
        read_packed(content + b"\0", "x.cmp")


def test_the_damaged_part_is_named() -> None:
    content = bytearray(packed_file())
    content[-3] ^= 1
    with pytest.raises(CompressError, match=r"x\.cmp, array few: .*checksum"):
        read_packed(bytes(content), "x.cmp")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file"),
        (b"PK\3\4 something else", "begin with"),
        (MAGIC, "damaged"),
        (MAGIC + struct.pack("<H", VERSION + 1) + bytes(60), f"version {VERSION + 1}"),
    ],
)
def test_what_is_not_ours_is_said_so(content: bytes, message: str) -> None:
    with pytest.raises(CompressError, match=message):
        read_packed(content, "x.cmp")


def forged(rows: list[object], bodies: bytes, total: int, size: int | None = None) -> bytes:
    """Return a file whose checksums are right and whose content is what one likes."""
    text = json.dumps({"arrays": rows, "structure": {}}).encode()
    directory = struct.pack("<Q", len(text)) + text
    size = len(directory) if size is None else size
    stored = zlib.compress(directory)
    length = 40 + len(stored) + 4 + len(bodies)
    header = struct.pack("<4sHHQQQI", MAGIC, VERSION, 0, length, size, total + size, len(stored))
    return header + struct.pack("<I", zlib.crc32(header)) + stored + struct.pack("<I", zlib.crc32(stored)) + bodies


def body(content: bytes) -> bytes:
    return content + struct.pack("<I", zlib.crc32(content))


def test_a_bomb_is_refused_before_it_goes_off() -> None:
    # One value, many times: a few bytes that say they are a terabyte.
    book = bytes([2, 1]) + bytes(4)
    content = forged([["bomb", "float32", [1 << 38], len(book)]], body(book), 1 << 40)
    with pytest.raises(CompressError, match=r"at most .* bytes.*--limit"):
        read_packed(content, "x.cmp")
    # The same, and a header that lies about it.
    content = forged([["bomb", "float32", [1 << 38], len(book)]], body(book), 8)
    with pytest.raises(CompressError, match="do not add up"):
        read_packed(content, "x.cmp")
    with pytest.raises(CompressError, match="the directory"):
        read_packed(forged([], b"", 0, size=10), "x.cmp")
    small = write_packed(Packed("keras", {"a": np.zeros(1000, np.float32)}))
    with pytest.raises(CompressError, match="at most 1,000 bytes"):
        read_packed(small, "x.cmp", limit=1000)


def all_the_same(alphabet: int, symbol: int, count: int) -> bytes:
    """Return an ANS stream of one symbol, which takes a few bytes however often it comes."""
    counts = np.bincount([symbol], minlength=alphabet)
    drafted = Ans().draft(np.full(count, symbol), counts, Tables())
    assert drafted is not None
    return bytes([Ans.code]) + drafted.write()


@pytest.mark.parametrize("form", ["relative", "rows", "mask", "hashed", "hashed and sparse"])
def test_few_bytes_do_not_take_much_more_memory_than_they_say(form: str) -> None:
    rows, columns = 1 << 10, 1 << 10
    size, value = rows * columns, bytes([2, 1, 7])
    relative = bytes([0, 2]) + varint(size) + all_the_same(4, 0, size)
    classes = all_the_same(24, 1, rows) + all_the_same(24, 1, columns)
    never = ans.encode([(np.zeros(size, np.int32), Frequencies(16, np.array([2**16 - 1, 1])))])
    content = {
        "relative": bytes([4]) + relative + value,
        "rows": bytes([4, 1]) + all_the_same(columns + 1, 1, rows) + all_the_same(columns, 3, rows) + value,
        "mask": bytes([4, 2]) + classes + bytes([0, 31 << 2]) + never,
        "hashed": bytes([6, 0, 0]) + varint(size) + varint(1) + value,
        "hashed and sparse": bytes([6, 0, 1]) + varint(size) + varint(1) + relative + value,
    }[form]
    file = forged([["bomb", "uint8", [rows, columns], len(content)]], body(content), size)
    assert len(file) < 300
    tracemalloc.start()
    try:
        read_packed(file, "x.cmp", limit=26 * size)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 25 * size
    with pytest.raises(CompressError, match="bytes of memory"):
        read_packed(file, "x.cmp", limit=24 * size)


def test_a_directory_that_takes_much_more_memory_than_it_says_is_refused() -> None:
    file = write_packed(Packed("keras", {}, {"config": [[]] * 100_000}))
    assert len(file) < 5_000
    with pytest.raises(CompressError, match="bytes of memory"):
        read_packed(file, "x.cmp", limit=1_000_000)


@pytest.mark.parametrize(
    "row",
    [
        ["a", "object", [1], 1],
        ["a", "float32", [-1], 1],
        ["a", "float32", [1.5], 1],
        ["a", "float32", [1] * 40, 1],
        ["a", "float32", "1", 1],
        ["a", "float32", [True], 1],
        ["a", "float32", [1]],
        [1, "float32", [1], 1],
        ["a", "float32", [1], 1 << 61],
        ["a", "float32", [0, 1 << 61], 1 << 61],
        {},
    ],
)
def test_a_forged_directory_is_refused(row: object) -> None:
    with pytest.raises(CompressError, match="damaged"):
        read_packed(forged([row], body(b"\0"), 4), "x.cmp")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("a", [0, 1 << 61, 1 << 61]),
        ("a", [1 << 61, 1 << 61, 0]),
        ("", [0]),
        ("a\0b", [0]),
        ("\ud800", [0]),
        ("x" * 10_001, [0]),
    ],
    ids=["empty and huge", "huge and empty", "no name", "a zero byte", "no text", "a long name"],
)
def test_a_row_that_no_array_has_is_refused(name: str, shape: list[int]) -> None:
    with pytest.raises(CompressError, match=r"the directory: .*damaged"):
        read_packed(forged([[name, "float32", shape, 0]], body(b""), 0), "x.cmp")


def test_types_that_it_cannot_hold_are_refused() -> None:
    with pytest.raises(ValueError, match="names"):
        write_packed(Packed("keras", {"names": np.array(["a"])}))


@pytest.fixture(scope="module")
def model() -> tf_keras.Model:
    tf_keras.utils.set_random_seed(0)
    inputs = tf_keras.Input((8, 8, 3))
    x = LAYERS.Conv2D(8, 3, activation="relu", name="conv")(inputs)
    x = LAYERS.BatchNormalization(name="norm")(x)
    x = LAYERS.Flatten()(x)
    made = tf_keras.Model(inputs, LAYERS.Dense(10, name="head")(x))
    kernel = made.get_layer("head").kernel.numpy()
    kernel[np.abs(kernel) < np.quantile(np.abs(kernel), 0.9)] = 0
    made.get_layer("head").kernel.assign(kernel)
    return made


@pytest.fixture
def keras_file(model: tf_keras.Model, tmp_path: Path) -> Path:
    path = tmp_path / "model.keras"
    model.save(str(path))
    return path


def same_weights(first: tf_keras.Model, second: tf_keras.Model) -> bool:
    pairs = zip(first.get_weights(), second.get_weights(), strict=True)
    return all(a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in pairs)


def test_a_keras_file_comes_back_with_the_same_weights(model: tf_keras.Model, keras_file: Path, tmp_path: Path) -> None:
    write_cmp(tmp_path / "model.cmp", keras_file)
    assert (tmp_path / "model.cmp").stat().st_size < keras_file.stat().st_size / 4
    unpack(tmp_path / "model.cmp", tmp_path / "back.keras")
    back = tf_keras.models.load_model(tmp_path / "back.keras", compile=False)
    assert same_weights(model, back)
    image = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)
    np.testing.assert_array_equal(model(image), back(image))


def test_two_files_of_one_network_are_packed_alike(model: tf_keras.Model, keras_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.keras"
    with zipfile.ZipFile(keras_file) as source, zipfile.ZipFile(other, "w") as target:
        for member in source.namelist():
            data = source.read(member)
            if member == "metadata.json":
                data = json.dumps({**json.loads(data), "date_saved": "1999-12-31@23:59:59"}).encode()
            target.writestr(member, data)
    assert write_packed(read_model(keras_file)) == write_packed(read_model(other))


def test_a_tflite_file_comes_back_byte_by_byte(model: tf_keras.Model, tmp_path: Path) -> None:
    for name, settings in (("float", []), ("int8", [tf.lite.Optimize.DEFAULT])):
        converter = tf.lite.TFLiteConverter.from_keras_model(model)
        converter.optimizations = settings
        source = tmp_path / f"{name}.tflite"
        source.write_bytes(converter.convert())
        write_cmp(tmp_path / "model.cmp", source)
        assert (tmp_path / "model.cmp").stat().st_size < source.stat().st_size
        unpack(tmp_path / "model.cmp", tmp_path / "back.tflite")
        assert (tmp_path / "back.tflite").read_bytes() == source.read_bytes()


def test_a_keras_model_unpacks_to_a_tflite_file_too(model: tf_keras.Model, keras_file: Path, tmp_path: Path) -> None:
    write_cmp(tmp_path / "model.cmp", keras_file)
    unpack(tmp_path / "model.cmp", tmp_path / "back.tflite")
    images = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)
    np.testing.assert_allclose(file_outputs(tmp_path / "back.tflite", images), model(images), atol=1e-4)


def test_the_arrays_alone(model: tf_keras.Model, keras_file: Path, tmp_path: Path) -> None:
    write_cmp(tmp_path / "model.cmp", keras_file)
    unpack(tmp_path / "model.cmp", tmp_path / "back.npz")
    with np.load(tmp_path / "back.npz") as arrays:
        stored = sorted(arrays[name].tobytes() for name in arrays.files)
    assert stored == sorted(weight.tobytes() for weight in model.get_weights())


def test_arrays_of_any_name(tmp_path: Path) -> None:
    """``np.savez`` has arguments of its own."""
    arrays = {name: np.full(3, number) for number, name in enumerate(("file", "allow_pickle", "a/b", "é", "kwds"))}
    (tmp_path / "model.cmp").write_bytes(write_packed(Packed("keras", arrays)))
    unpack(tmp_path / "model.cmp", tmp_path / "back.npz")
    with np.load(tmp_path / "back.npz") as back:
        assert {name: back[name].tolist() for name in back.files} == {n: a.tolist() for n, a in arrays.items()}


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *arguments], cwd=cwd, capture_output=True, text=True, check=False)


def test_the_commands(model: tf_keras.Model, keras_file: Path, tmp_path: Path) -> None:
    done = command("compress.deploy.pack", "model.keras", "-o", "model.cmp", "--coder", "huffman", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "times smaller" in done.stdout
    assert not done.stderr
    done = command("compress.deploy.unpack", "model.cmp", "-o", "back.keras", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert same_weights(model, tf_keras.models.load_model(tmp_path / "back.keras", compile=False))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("unpack", "absent.cmp", "-o", "x.keras"), "absent.cmp.*no such file"),
        (("unpack", "model.keras", "-o", "x.keras"), "a packed file of compress"),
        (("unpack", "model.npz", "-o", "x.keras"), "a packed file of compress.*begin with b'PK"),
        (("unpack", "empty.cmp", "-o", "x.keras"), "an empty file"),
        (
            ("unpack", "newer.cmp", "-o", "x.keras"),
            f"version {VERSION + 1}.*Install a newer compress",
        ),
        (("unpack", "half.cmp", "-o", "x.keras"), "half.cmp, the header: .*damaged"),
        (("unpack", "model.cmp", "-o", "x.h5"), "ends in .keras"),
        (("unpack", "tflite.cmp", "-o", "x.keras"), "what was packed is a .tflite file"),
        (("unpack", "model.cmp", "-o", "absent/x.keras"), "can be written"),
        (("unpack", "model.cmp", "-o", "folder.keras"), "can be written.*Is a directory"),
        (("unpack", "model.cmp", "-o", "folder.npz"), "can be written.*Is a directory"),
        (("unpack", "model.cmp", "-o", "x.keras", "--limit", "100"), "at most 100 bytes"),
        (("pack", "absent.keras", "-o", "x.cmp"), "no such file"),
        (("pack", "model.txt", "-o", "x.cmp"), ".keras or .tflite"),
        (("pack", "broken.tflite", "-o", "x.cmp"), "TFLite file"),
        (("pack", "broken.keras", "-o", "x.cmp"), "neither"),
    ],
)
def test_mistakes_end_with_a_paragraph(
    arguments: tuple[str, ...],
    message: str,
    keras_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_cmp(tmp_path / "model.cmp", keras_file)
    (tmp_path / "tflite.cmp").write_bytes(write_packed(Packed("tflite", {}, {"places": []}, b"")))
    content = (tmp_path / "model.cmp").read_bytes()
    (tmp_path / "half.cmp").write_bytes(content[: len(content) // 2])
    (tmp_path / "newer.cmp").write_bytes(content[:4] + struct.pack("<H", VERSION + 1) + content[6:])
    (tmp_path / "empty.cmp").write_bytes(b"")
    np.savez(tmp_path / "model.npz", a=np.zeros(3))
    for name in ("model.txt", "broken.tflite", "broken.keras"):
        (tmp_path / name).write_text("nothing of the kind")
    for name in ("folder.keras", "folder.npz"):
        (tmp_path / name).mkdir()
    before = sorted(path.name for path in tmp_path.iterdir())
    module, *rest = arguments
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        {"pack": pack.main, "unpack": unpack_command.main}[module](rest)
    assert ended.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith("Error in ")
    assert re.search(message, said), said
    assert sorted(path.name for path in tmp_path.iterdir()) == before, "nothing is left half-written"
