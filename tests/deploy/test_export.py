"""A Keras file as a plain .tflite file; operators that LiteRT lacks only where they are asked for."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from ai_edge_litert.interpreter import Interpreter

from compress.deploy.conversion import complaints_explained, make_converter
from compress.deploy.export import main
from compress.deploy.verification import operators_in
from compress.errors import CompressError


def with_determinant() -> tf_keras.Model:
    image = tf_keras.Input((4, 4), name="image")
    number = tf_keras.layers.Reshape((1,))(tf.linalg.det(image))
    return tf_keras.Model(image, tf_keras.layers.Dense(3, name="scores")(number))


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    shown = capsys.readouterr()
    return int(stopped.value.code or 0), shown.out, " ".join(shown.err.split())


def test_an_operator_that_litert_lacks_is_refused_with_the_cost_of_the_fallback(tmp_path, capsys):
    model = with_determinant()
    model.save(tmp_path / "det.keras")
    target = tmp_path / "det.tflite"
    code, _, error = run(capsys, str(tmp_path / "det.keras"), "-o", str(target))
    assert code == 2
    assert "tf.linalg.det" in error
    assert not target.exists()
    (size,) = re.findall(r"a file of ([\d,]+) bytes", error)

    code, shown, _ = run(capsys, str(tmp_path / "det.keras"), "-o", str(target), "--select-tf-ops")
    assert code == 0
    assert target.stat().st_size == pytest.approx(int(size.replace(",", "")), rel=0.02)
    assert "FlexMatrixDeterminant" in [use.name for use in operators_in(target.read_bytes()) if not use.builtin]
    assert "no kernel for FlexMatrixDeterminant" in shown
    # That is why it is off by default.
    with pytest.raises(RuntimeError, match="Select TensorFlow op"):
        Interpreter(model_path=str(target)).allocate_tensors()


def test_a_plain_model_computes_the_same(tmp_path, capsys):
    image = tf_keras.Input((6,), name="image")
    model = tf_keras.Model(image, tf_keras.layers.Dense(2, activation="softmax")(image))
    model.save(tmp_path / "m.keras")
    for extra in ([], ["--select-tf-ops"]):
        code, shown, _ = run(capsys, str(tmp_path / "m.keras"), "-o", str(tmp_path / "m.tflite"), *extra)
        assert code == 0
        assert "1 FULLY_CONNECTED" in shown
        x = np.linspace(-1, 1, 6, dtype=np.float32)[None]
        interpreter = Interpreter(model_path=str(tmp_path / "m.tflite"))
        interpreter.allocate_tensors()
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x)
        interpreter.invoke()
        outputs = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
        np.testing.assert_allclose(outputs, model(x), atol=1e-6)


def test_a_name_that_is_no_tflite_file(tmp_path, capsys):
    code, _, error = run(capsys, "m.keras", "-o", str(tmp_path / "m.txt"))
    assert code == 2
    assert "m.tflite" in error


def test_other_complaints_offer_no_fallback():
    with pytest.raises(CompressError) as caught, complaints_explained("float32", with_determinant()):
        raise ValueError("something else")
    assert "TensorFlow's own" not in caught.value.fix
    assert make_converter(with_determinant(), select_tf_ops=True).target_spec.supported_ops[-1] == (
        tf.lite.OpsSet.SELECT_TF_OPS
    )
