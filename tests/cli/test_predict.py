"""compress.predict: photos in, class names out; whatever is wrong is one paragraph and exit code 2."""

from __future__ import annotations

import io
import json
import shutil
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import tf_keras
from PIL import Image
from sklearn.datasets import load_digits

from compress.deploy.flatbuffer import parse, serialize
from compress.deploy.interface import Interface
from compress.deploy.metadata import add_metadata
from compress.deploy.photo import read_photo
from compress.errors import CompressError
from compress.predict import main, read_arguments
from tests.deploy.test_verification import with_custom_operator

DIGITS = load_digits()
TEST = np.flatnonzero(np.arange(len(DIGITS.target)) % 5 == 4)


def picture(index: int) -> Image.Image:
    return Image.fromarray(np.round(DIGITS.images[index] * 255 / 16).astype(np.uint8))


@pytest.fixture
def predict(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        shown = capfd.readouterr()
        return int(stopped.value.code or 0), shown.out, shown.err

    return run


def best(shown: str) -> dict[str, str]:
    """Return for each input the label that stands first."""
    lines = shown.splitlines()
    return {
        line: lines[place + 1].partition("%")[2].strip() for place, line in enumerate(lines) if not line.startswith(" ")
    }


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for index in TEST[:20]:
        picture(index).save(folder / f"{index}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.mark.parametrize("name", ["model.tflite", "model.cmp", "model.keras"])
def test_a_folder_of_photos(predict, finished_run, photos, name):
    code, shown, error = predict(f"model={finished_run / name}", f"input={photos}", "top=2")
    assert code == 0, error
    found = best(shown)
    assert list(found) == sorted(str(photos / f"{index}.png") for index in TEST[:20])
    right = sum(found[str(photos / f"{index}.png")] == str(DIGITS.target[index]) for index in TEST[:20])
    assert right >= 18
    assert len(shown.splitlines()) == 60
    assert error == ""


def test_the_files_own_metadata_come_first(predict, finished_run, tmp_path):
    """Another report lies beside it, and other names and another range are inside."""
    report = json.loads((finished_run / "report.json").read_text())
    labels = tuple(f"number {digit}" for digit in range(10))
    inside = Interface.from_json({**report["interface"], "labels": labels, "pixels": [16.0, 32.0]})
    content = (finished_run / "model.tflite").read_bytes()
    (tmp_path / "model.tflite").write_bytes(add_metadata(content, inside))
    (tmp_path / "report.json").write_text(json.dumps(report))
    # Values of 0 to 16 as the model wants them: a black pixel would go in as 16.
    np.save(tmp_path / "samples.npy", DIGITS.images[TEST[:3]])
    _, shown, _ = predict("model=model.tflite", "input=samples.npy", "top=1")
    assert best(shown) == {f"samples.npy {i}": f"number {DIGITS.target[TEST[i]]}" for i in range(3)}
    picture(4).save("black.png")
    Image.new("L", (8, 8), 0).save("all_black.png")
    Image.new("L", (8, 8), 255).save("all_white.png")
    np.save("sixteen.npy", np.full((1, 8, 8), 16.0))
    np.save("thirty_two.npy", np.full((1, 8, 8), 32.0))
    for image, values in (("all_black.png", "sixteen.npy"), ("all_white.png", "thirty_two.npy")):
        by_image, by_values = (
            predict("model=model.tflite", f"input={given}", "top=10")[1].splitlines()[1:] for given in (image, values)
        )
        assert by_image == by_values


def test_probabilities_are_those_of_the_outputs(predict, finished_run, tmp_path):
    picture(4).save(tmp_path / "photo.png")
    _, shown, _ = predict(f"model={finished_run / 'model.keras'}", "input=photo.png", "top=99")
    rows = {line.split("%")[1].strip(): float(line.split("%")[0]) for line in shown.splitlines()[1:]}
    model = tf_keras.models.load_model(finished_run / "model.keras", compile=False)
    logits = model.predict(np.asarray(picture(4), np.float32)[None, ..., None] * 16 / 255, verbose=0)[0]
    wanted = np.exp(logits.astype(float)) / np.exp(logits.astype(float)).sum()
    assert set(rows) == set("0123456789")
    for label, percent in rows.items():
        assert percent == pytest.approx(100 * wanted[int(label)], abs=0.01)
    assert list(rows.values()) == sorted(rows.values(), reverse=True)


def test_a_photo_on_standard_input(predict, finished_run, monkeypatch):
    buffer = io.BytesIO()
    picture(9).convert("RGB").resize((80, 80), Image.Resampling.NEAREST).save(buffer, "JPEG", quality=95)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(buffer.getvalue())))
    code, shown, _ = predict(f"model={finished_run / 'model.tflite'}", "input=-", "top=1")
    assert code == 0
    assert best(shown) == {"-": str(DIGITS.target[9])}


def test_a_lone_file_says_what_it_does_not_know(predict, finished_run, tmp_path):
    shutil.copy(finished_run / "model.tflite", tmp_path / "lone.tflite")
    picture(4).save(tmp_path / "photo.png")
    code, shown, error = predict("model=lone.tflite", "input=photo.png")
    assert code == 0
    assert "pixels go in as 0 to 255" in error
    assert len(shown.splitlines()) == 4


def bomb() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def truncated() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "PNG")
    return buffer.getvalue()[:900]


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"hello", "none of these"),
        (b"", "none of these"),
        (bomb(), "900000000"),
        (truncated(), "truncated"),
        # PostScript would be handed to another program.
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "none of these"),
    ],
    ids=["text", "empty", "bomb", "truncated", "postscript"],
)
def test_what_is_no_image(predict, finished_run, tmp_path, content, word):
    (tmp_path / "photo.png").write_bytes(content)
    code, shown, error = predict(f"model={finished_run / 'model.tflite'}", "input=photo.png")
    assert code == 2
    assert shown == ""
    assert "photo.png" in error
    assert word in " ".join(error.split())


def test_one_bad_photo_leaves_the_others_of_its_folder_answered(predict, finished_run, tmp_path):
    picture(4).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"hello")
    picture(9).save(tmp_path / "c.png")
    code, shown, error = predict(f"model={finished_run / 'model.tflite'}", f"input={tmp_path}", "top=1")
    assert code == 2
    assert [Path(name).name for name in best(shown)] == ["a.png", "c.png"]
    assert error.count("Error in") == 1
    assert "b.png" in error


def damaged(content: bytes) -> bytes:
    return content[:5000]


def unknown_builtin(content: bytes) -> bytes:
    model = parse(content)
    code = model.operatorCodes[model.subgraphs[0].operators[-1].opcodeIndex]
    code.builtinCode = 9999
    return serialize(model)


def wrong_version(content: bytes) -> bytes:
    model = parse(content)
    for code in model.operatorCodes:
        code.version = 99
    return serialize(model)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (damaged, ["damaged"]),
        (lambda content: with_custom_operator(content, "MyOperator"), ["MyOperator", "registers a kernel"]),
        (lambda content: with_custom_operator(content, "FlexErf"), ["FlexErf"]),
        (unknown_builtin, ["BUILTIN_9999"]),
        (wrong_version, ["LiteRT accepts", "version"]),
        (lambda content: b"", ["0 bytes"]),
    ],
)
def test_a_model_that_cannot_run(predict, finished_run, tmp_path, change, words):
    (tmp_path / "bad.tflite").write_bytes(change((finished_run / "model.tflite").read_bytes()))
    picture(4).save(tmp_path / "photo.png")
    code, shown, error = predict("model=bad.tflite", "input=photo.png")
    text = " ".join(error.split())
    assert code == 2
    assert shown == ""
    assert "model=bad.tflite" in text
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        (["modl=x", "input=y"], "modl=x"),
        (["photo.jpg"], "photo.jpg"),
        (["input=y"], "model"),
        (["model=x"], "input"),
        (["model=x", "input=y", "top=0"], "top"),
        (["model=x", "input=y", "top=many"], "top"),
    ],
)
def test_a_wrong_command_line(arguments, where):
    with pytest.raises(CompressError) as caught:
        read_arguments(arguments)
    assert caught.value.where == where
    assert caught.value.fix


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model=nothere.tflite", "input=x.png"], ["no such file"]),
        (["model=x.onnx", "input=x.png"], [".onnx", ".tflite, .cmp, .keras"]),
        (["model={run}/model.tflite", "input=nothere.png"], ["no such file"]),
        (["model={run}/model.tflite", "input=."], ["none of these"]),
        (["model={run}/model.tflite", "input=flat.npy"], ["[n, 8, 8, 1]", "[3, 5]"]),
        (["model={run}/model.tflite", "input=objects.npy"], ["object"]),
        (["model={run}/model.tflite", "input=nothere.npy"], ["no such file"]),
    ],
)
def test_files_that_are_not_what_they_should_be(predict, finished_run, tmp_path, arguments, words):
    (tmp_path / "x.onnx").write_text("x")
    np.save(tmp_path / "flat.npy", np.zeros((3, 5)))
    np.save(tmp_path / "objects.npy", np.array([{}, 1], object), allow_pickle=True)
    code, _, error = predict(*(argument.format(run=finished_run) for argument in arguments))
    assert code == 2
    for word in words:
        assert word.lower() in " ".join(error.split()).lower()


def test_photos_are_upright_opaque_and_of_the_models_size(tmp_path):
    """Against Pillow-free arithmetic on pictures where every way of resizing agrees."""
    halves = np.zeros((16, 32), np.uint8)
    halves[:, 16:] = 200
    Image.fromarray(halves).save(tmp_path / "plain.png")
    found = read_photo(tmp_path / "plain.png", "x", (2, 4), 1)
    assert found.shape == (2, 4, 1)
    assert found[:, [0, 3], 0].tolist() == [[0, 200], [0, 200]]

    exif = Image.Exif()
    exif[0x0112] = 3  # turned by half a circle
    Image.fromarray(halves).save(tmp_path / "turned.png", exif=exif)
    assert read_photo(tmp_path / "turned.png", "x", (2, 4), 1)[:, [0, 3], 0].tolist() == [[200, 0], [200, 0]]

    clear = np.zeros((8, 8, 4), np.uint8)
    Image.fromarray(clear).save(tmp_path / "clear.png")
    assert (read_photo(tmp_path / "clear.png", "x", (8, 8), 3) == 255).all()

    deep = np.full((8, 8), 40_000, np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert abs(int(read_photo(tmp_path / "deep.png", "x", (8, 8), 3)[0, 0, 0]) - 40_000 / 257) <= 1

    red = Image.new("RGB", (4, 4), (255, 0, 0))
    red.convert("P").save(tmp_path / "palette.gif")
    assert read_photo(tmp_path / "palette.gif", "x", (1, 1), 3).ravel().tolist() == [255, 0, 0]
    # The weights of ITU-R 601-2.
    assert read_photo(tmp_path / "palette.gif", "x", (1, 1), 1).ravel().tolist() == [76]
