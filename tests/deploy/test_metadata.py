"""Metadata in the file: found by a reader of its own, at no cost to what the file computes."""

from __future__ import annotations

import io
import struct
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compress.deploy.interface import Interface, TensorType, interface_of, probabilities
from compress.deploy.metadata import Metadata, add_metadata, read_metadata
from compress.errors import CompressError
from compress.metrics.tflite_file import TFLiteFile

FLAT = settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
NAMES = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S"]), min_size=1, max_size=9)


@pytest.fixture(scope="module")
def content(finished_run) -> bytes:
    return (finished_run / "model.tflite").read_bytes()


def described(content: bytes, **changes) -> Interface:
    plain = interface_of(TFLiteFile(content), "digits", (0.0, 16.0), tuple("abcdefghij"))
    return replace(plain, **changes)


class Reader:
    """Reads a flatbuffer with struct alone, by the format's description: offsets, tables by slot, vectors, strings."""

    def __init__(self, data: bytes, place: int | None = None):
        self.data = data
        self.place = self.number("I", 0) if place is None else place

    def number(self, kind: str, place: int) -> int:
        return struct.unpack_from("<" + kind, self.data, place)[0]

    def at(self, slot: int) -> int:
        table = self.place - self.number("i", self.place)
        inside = 4 + 2 * slot < self.number("H", table)
        offset = self.number("H", table + 4 + 2 * slot) if inside else 0
        return self.place + offset if offset else 0

    def follow(self, slot: int) -> int:
        place = self.at(slot)
        return place + self.number("I", place)

    def table(self, slot: int) -> Reader:
        return Reader(self.data, self.follow(slot))

    def items(self, slot: int) -> list[Reader]:
        start = self.follow(slot)
        places = [start + 4 + 4 * i for i in range(self.number("I", start))]
        return [Reader(self.data, place + self.number("I", place)) for place in places]

    def text(self, slot: int) -> str:
        start = self.follow(slot)
        return self.data[start + 4 : start + 4 + self.number("I", start)].decode()

    def floats(self, slot: int) -> list[float]:
        start = self.follow(slot)
        return list(struct.unpack_from(f"<{self.number('I', start)}f", self.data, start + 4))


def metadata_buffer(content: bytes) -> bytes:
    """Find the buffer as the schema of TFLite says: Model.metadata is slot 6, Model.buffers slot 4."""
    model = Reader(content)
    (entry,) = [entry for entry in model.items(6) if entry.text(0) == "TFLITE_METADATA"]
    start = model.items(4)[entry.number("I", entry.at(1))].follow(0)
    return content[start + 4 : start + 4 + model.number("I", start)]


def test_an_independent_reader_finds_it(content):
    written = add_metadata(content, described(content), author="A. Person", licence="MIT")
    data = metadata_buffer(written)
    assert data[4:8] == b"M001"
    root = Reader(data)
    assert (root.text(0), root.text(4), root.text(5)) == ("digits", "A. Person", "MIT")
    (graph,) = root.items(3)
    ((source,), (target,)) = graph.items(2), graph.items(3)
    picture = source.table(3)
    assert picture.number("b", picture.at(0)) == 2
    properties = picture.table(1)
    assert properties.number("b", properties.at(0)) == 2
    assert [properties.table(1).number("I", properties.table(1).at(slot)) for slot in (0, 1)] == [8, 8]
    (unit,) = source.items(4)
    assert unit.number("b", unit.at(0)) == 1
    assert (unit.table(1).floats(0), unit.table(1).floats(1)) == ([0.0], [255 / 16])
    assert (source.table(5).floats(0), source.table(5).floats(1)) == ([16.0], [0.0])
    (labels,) = target.items(6)
    assert (labels.text(0), labels.number("b", labels.at(2))) == ("labels.txt", 2)
    with zipfile.ZipFile(io.BytesIO(written)) as archive:
        assert archive.read("labels.txt").decode().split() == list("abcdefghij")
        # Android reads the archive without unpacking.
        assert archive.getinfo("labels.txt").compress_type == zipfile.ZIP_STORED


@FLAT
@given(
    labels=st.lists(NAMES, min_size=10, max_size=10),
    low=st.floats(-1000, 1000, width=32),
    width=st.floats(0.125, 1000, width=32),
    name=NAMES,
)
def test_what_is_written_is_read(content, labels, low, width, name):
    interface = described(content, name=name, labels=tuple(labels), pixels=(low, low + width))
    found = read_metadata(add_metadata(content, interface))
    assert found is not None
    assert (found.name, found.labels) == (name, tuple(labels))
    pixels = np.array([0.0, 255.0])
    values = (pixels - found.mean[0]) / found.std[0]
    np.testing.assert_allclose(values, interface.pixels, rtol=1e-4, atol=1e-4 * max(1, abs(low) + width))


def test_the_file_computes_the_same_and_metadata_are_replaced_not_piled_up(content):
    once = add_metadata(content, described(content))
    assert len(once) < len(content) + 1500
    twice = add_metadata(once, described(content, name="other", labels=()))
    assert read_metadata(twice) == Metadata("other", (0.0,), (255 / 16,), ())
    x = np.random.default_rng(0).uniform(0, 16, (1, 8, 8, 1)).astype(np.float32)
    outputs = []
    for file in (content, once, twice):
        interpreter = Interpreter(model_content=file)
        interpreter.allocate_tensors()
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x)
        interpreter.invoke()
        outputs.append(interpreter.get_tensor(interpreter.get_output_details()[0]["index"]))
    assert (outputs[0] == outputs[1]).all()
    assert (outputs[0] == outputs[2]).all()


def test_a_file_without_metadata_has_none(content):
    assert read_metadata(content) is None


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1))
def test_damaged_metadata_count_as_none_and_raise_nothing(content, seed):
    written = add_written(content)
    start = written.index(b"M001") - 4
    rng = np.random.default_rng(seed)
    damaged = bytearray(written)
    for _ in range(rng.integers(1, 9)):
        damaged[rng.integers(start, len(damaged))] = rng.integers(256)
    found = read_metadata(bytes(damaged))
    assert found is None or (all(found.std) and np.isfinite([*found.mean, *found.std]).all())


_WRITTEN: dict[int, bytes] = {}


def add_written(content: bytes) -> bytes:
    if len(content) not in _WRITTEN:
        _WRITTEN[len(content)] = add_metadata(content, described(content))
    return _WRITTEN[len(content)]


def test_an_interface_survives_json():
    ends = TensorType((1, 32, 32, 3), "int8", 0.5, -128), TensorType((1, 4), "int8", 1 / 256, -128)
    whole = Interface("m", *ends, (-1.0, 1.0), ("a", "b"), "probabilities")
    assert Interface.from_json(whole.to_json()) == whole
    assert whole.channels == 3
    assert whole.class_names == ("a", "b", "2", "3")
    assert (whole.mean, whole.std) == (127.5, 127.5)


@pytest.mark.parametrize(
    ("shape", "channels"), [((1, 8, 8), 1), ((1, 8, 8, 1), 1), ((1, 8, 8, 3), 3), ((1, 8, 8, 4), None), ((1, 64), None)]
)
def test_what_is_an_image(shape, channels):
    ends = TensorType(shape, "float32"), TensorType((1, 2), "float32")
    assert Interface("m", *ends, (0, 255), (), "logits").channels == channels


def test_a_file_that_is_no_classifier_is_refused(content):
    file = TFLiteFile(content)
    file.outputs = (file.operators[0].outputs[0],)
    with pytest.raises(CompressError, match="classifier"):
        interface_of(file, "model")


def test_scores():
    logits = np.array([[0.0, np.log(3.0)], [1000.0, 1000.0]])
    np.testing.assert_allclose(probabilities(logits, "logits"), [[0.25, 0.75], [0.5, 0.5]])
    assert (probabilities(logits, "probabilities") == logits).all()
