"""The files that a search measures are those that the pipeline delivers."""

from __future__ import annotations

import pytest
import tf_keras

from compress.boards.roofline import Roofline
from compress.metrics.tflite_file import TFLiteFile
from compress.strategies.strategy import Context

layers = tf_keras.layers
AUTO = "strategy.auto.recovery.method=none"


@pytest.fixture
def sizes(monkeypatch) -> list[int]:
    """Bytes of the packed files that are written in searches."""
    found: list[int] = []
    plain = Context.write_files

    def spied(self, candidate, folder):
        artifact = plain(self, candidate, folder)
        found.append(artifact.packed.stat().st_size)
        return artifact

    monkeypatch.setattr(Context, "write_files", spied)
    return found


def test_a_board_without_sparse_kernels_is_searched_without_them(pipeline, tmp_path, monkeypatch, sizes):
    plain = Roofline.lacks
    monkeypatch.setattr(
        Roofline, "lacks", lambda self, operators: plain(self, operators) | {"DENSIFY"} & set(operators)
    )
    techniques = "techniques={prune:{sparsity:[0.5,0.9]},quantize:{bits:[8]}}"
    settings = (f"strategy.auto.{techniques}", "strategy.auto.bytes=40000", "strategy.auto.images=32", AUTO)
    result = pipeline("strategy=auto", *settings, "board=roofline", cache=False).run(tmp_path)
    assert result.final.packed_bytes == sizes[-1] <= 40000
    file = TFLiteFile.read(tmp_path / "model.tflite")
    assert "DENSIFY" not in {operator.name for operator in file.operators}


def test_a_nested_model_is_packed_as_it_is_delivered(pipeline, tmp_path, sizes):
    tf_keras.utils.set_random_seed(0)
    inner = tf_keras.Sequential([layers.Dense(32, "relu", name=f"fc{n}") for n in range(6)], name="inner")
    image = tf_keras.Input((8, 8, 1), name="image")
    tf_keras.Model(image, layers.Dense(10, name="logits")(inner(layers.Flatten()(image)))).save(tmp_path / "my.keras")
    (tmp_path / "out").mkdir()
    techniques = "strategy.auto.techniques={prune:{sparsity:[0.5,0.9]}}"
    settings = (techniques, "strategy.auto.bytes=24000", "strategy.auto.images=32", AUTO)
    model = ("model=file", f"model.path={tmp_path / 'my.keras'}")
    result = pipeline(*model, "strategy=auto", *settings, "board=roofline", cache=False).run(tmp_path / "out")
    assert result.final.packed_bytes == sizes[-1] <= 24000
