"""Verification: the numbers hold against their formulas, the operators against the runtime's own list."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from ai_edge_litert.interpreter import Interpreter
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.datasets import load_digits

from compress.boards.board import Board
from compress.boards.host import Host
from compress.boards.micro_kernels import MICRO_KERNELS
from compress.candidate import Artifact, Candidate, Measurement, Storage
from compress.data.source import Split, make_data
from compress.deploy.flatbuffer import parse, serialize
from compress.deploy.tflite import export
from compress.deploy.verification import (
    Agreement,
    OperatorUse,
    agreement,
    complaints,
    micro_resolver,
    operators_in,
    selective_build,
    verify,
)
from compress.errors import CompressError
from compress.graph.rewrite import rewrite
from compress.tracking.report import SCHEMA_FILE

SCORES = arrays(np.float32, (5, 3), elements=st.floats(-100, 100, width=32))
GOOD = Agreement(samples=200, max_difference=1e-6, mean_difference=1e-7, largest_output=1.0, same_class=100.0)


def with_custom_operator(content: bytes, name: str) -> bytes:
    """Return the file with its last operator replaced by one that only ``name`` registers."""
    model = parse(content)
    code = model.operatorCodes[model.subgraphs[0].operators[-1].opcodeIndex]
    code.builtinCode, code.deprecatedBuiltinCode, code.customCode = 32, 32, name
    return serialize(model)


@given(SCORES, SCORES)
def test_agreement_is_its_formula(keras, file):
    found = agreement(keras, file)
    rows = [
        [abs(float(a) - float(b)) for a, b in zip(one, two, strict=True)] for one, two in zip(keras, file, strict=True)
    ]
    flat = [value for row in rows for value in row]
    assert found.samples == 5
    assert found.max_difference == pytest.approx(max(flat))
    assert found.mean_difference == pytest.approx(sum(flat) / 15)
    assert found.largest_output == pytest.approx(max(abs(float(v)) for row in keras for v in row))
    same = sum(list(a).index(max(a)) == list(b).index(max(b)) for a, b in zip(keras, file, strict=True))
    assert found.same_class == pytest.approx(100 * same / 5)


def test_the_report_of_a_run_says_how_its_file_agrees_with_its_keras_model(finished_run):
    report = json.loads((finished_run / "report.json").read_text())
    jsonschema.validate(report, json.loads(SCHEMA_FILE.read_text()))
    bunch = load_digits()
    x = bunch.images[np.arange(len(bunch.images)) % 5 == 4, ..., None].astype(np.float32)
    keras = tf_keras.models.load_model(finished_run / "model.keras", compile=False).predict(x, verbose=0)
    interpreter = Interpreter(model_path=str(finished_run / "model.tflite"))
    interpreter.allocate_tensors()
    outputs = []
    for image in x:
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], image[None])
        interpreter.invoke()
        outputs.append(interpreter.get_tensor(interpreter.get_output_details()[0]["index"])[0])
    found = report["verification"]["agreement"]
    assert found["samples"] == len(x) == 359
    assert found["max_difference"] == pytest.approx(np.abs(keras - outputs).max(), rel=1e-3)
    assert found["mean_difference"] == pytest.approx(np.abs(keras - outputs).mean(), rel=1e-3)
    assert found["same_class"] == pytest.approx(100 * np.mean(keras.argmax(1) == np.argmax(outputs, 1)))
    # It is a good file: nothing about it among the notes.
    assert not [note for note in report["notes"] if "Keras" in note or "kernel for" in note]


def test_operators_are_those_of_the_runtime(finished_run):
    interpreter = Interpreter(model_path=str(finished_run / "model.tflite"))
    expected = Counter(
        # The runtime lists the delegates that took operators over as well.
        row["op_name"]
        for row in interpreter._get_ops_details()
        if row["op_name"] != "DELEGATE"
    )
    uses = operators_in((finished_run / "model.tflite").read_bytes())
    assert {use.name: use.count for use in uses} == dict(expected)
    assert [use.count for use in uses] == sorted((use.count for use in uses), reverse=True)
    report = json.loads((finished_run / "report.json").read_text())
    assert {row["name"]: row["count"] for row in report["verification"]["operators"]} == dict(expected)


def test_an_operator_that_is_not_builtin_goes_by_its_own_name(finished_run):
    content = with_custom_operator((finished_run / "model.tflite").read_bytes(), "FlexErf")
    found = verify(content, None, Host())
    assert OperatorUse("FlexErf", 1, 2, builtin=False) in [replace(use, version=2) for use in found.operators]
    assert found.lacking == ("FlexErf",)
    assert "FlexErf" in found.micro_lacking
    assert any("host has no kernel for FlexErf" in text for text in complaints(found, "int8"))


@pytest.mark.parametrize(
    ("layer", "storage", "floats"),
    [
        (lambda x: tf.sin(tf_keras.layers.ELU()(x)), Storage("int8"), ("ELU", "SIN")),
        (lambda x: tf_keras.layers.ReLU()(x), Storage("int8"), ()),
        (lambda x: tf_keras.layers.ReLU()(x), Storage("int8", float_layers=("head",)), ("FULLY_CONNECTED",)),
        (lambda x: tf_keras.layers.ELU()(x), Storage("dynamic"), ()),
        (lambda x: tf_keras.layers.ELU()(x), Storage(), ()),
    ],
    ids=["no integer form", "integers", "left in float", "dynamic", "floats"],
)
def test_operators_that_compute_with_floats_between_integers_are_listed(tmp_path: Path, layer, storage, floats):
    x = np.random.default_rng(0).normal(size=(32, 64)).astype(np.float32)
    part = Split(x, np.arange(32) % 4)
    image = tf_keras.Input((64,))
    model = tf_keras.Model(image, tf_keras.layers.Dense(4, name="head")(layer(tf_keras.layers.Dense(64)(image))))
    candidate = Candidate(rewrite(model), storage=storage)
    path = export(candidate, make_data("random", part, part), tmp_path / "model.tflite").path
    assert verify(path.read_bytes(), None, Host()).float_operators == floats


class Poor(Board):
    """A board without convolutions."""

    name = "poor"

    def measure(self, artifact: Artifact) -> Measurement:
        return Measurement(self.name, None, "none")

    def lacks(self, operators):
        return frozenset({"CONV_2D"} & set(operators))


def test_what_a_board_lacks_is_said(finished_run):
    content = (finished_run / "model.tflite").read_bytes()
    assert verify(content, None, Host()).lacking == ()
    found = verify(content, None, Poor())
    assert found.lacking == ("CONV_2D",)
    assert complaints(found, "int8") == ["The board poor has no kernel for CONV_2D."]


@pytest.mark.parametrize(
    ("changes", "scheme", "word"),
    [
        ({}, "float32", None),
        ({"same_class": 98.9}, "int8", "1.10 %"),
        ({"same_class": 99.0, "max_difference": 0.3}, "int8", None),
        ({"max_difference": 2e-3}, "float32", "0.2 %"),
        ({"max_difference": 2e-3, "largest_output": 10.0}, "float32", None),
        ({"max_difference": 0.5, "largest_output": 0.0}, "float32", "50 %"),
    ],
)
def test_only_what_is_wrong_is_said(finished_run, changes, scheme, word):
    found = verify((finished_run / "model.tflite").read_bytes(), replace(GOOD, **changes), Host())
    said = complaints(found, scheme)
    assert len(said) == (word is not None)
    assert word is None or word in said[0]


@pytest.mark.parametrize("size", [8, 40, 1000])
def test_a_damaged_file_is_an_error_for_people(finished_run, size):
    with pytest.raises(CompressError, match="damaged"):
        operators_in((finished_run / "model.tflite").read_bytes()[:size])


def test_the_kernels_to_register():
    uses = [OperatorUse("CONV_2D", 3, 5), OperatorUse("FULLY_CONNECTED", 1, 4), OperatorUse("DENSIFY", 2, 1)]
    uses.append(OperatorUse("FlexErf", 1, 1, builtin=False))
    micro = micro_resolver(uses, ["DENSIFY", "FlexErf"])
    assert "MicroMutableOpResolver<2>" in micro
    assert re.findall(r"resolver\.(\w+)\(\)", micro) == ["AddConv2D", "AddFullyConnected"]
    assert "no kernel for DENSIFY" in micro
    selected = selective_build(uses)
    assert "BuiltinOperator_CONV_2D, ::tflite::ops::builtin::Register_CONV_2D(), 1, 5)" in selected
    assert selected.count("AddBuiltin(") == 3
    assert "by hand: FlexErf" in selected
    assert "board=microcontroller" in micro


@pytest.mark.parametrize(
    ("operator", "method"),
    [
        ("DEPTHWISE_CONV_2D", "AddDepthwiseConv2D"),
        ("AVERAGE_POOL_2D", "AddAveragePool2D"),
        ("BATCH_MATMUL", "AddBatchMatMul"),
        ("UNIDIRECTIONAL_SEQUENCE_LSTM", "AddUnidirectionalSequenceLSTM"),
        ("PADV2", "AddPadV2"),
        ("BATCH_TO_SPACE_ND", "AddBatchToSpaceNd"),
        ("L2_NORMALIZATION", "AddL2Normalization"),
        ("RELU6", "AddRelu6"),
    ],
)
def test_methods_that_register_kernels(operator, method):
    """As they are spelled in micro_mutable_op_resolver.h."""
    assert MICRO_KERNELS[operator] == method
    assert "DENSIFY" not in MICRO_KERNELS
