"""Bias correction makes up for the rounding that the file really does, and for nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tf_keras
from ai_edge_litert.interpreter import Interpreter

from compress.candidate import Candidate, Guarantee
from compress.data.source import Split, make_data
from compress.deploy.tflite import export
from compress.graph.selection import Rule, Selection
from compress.strategies.quantization import post_training
from compress.strategies.quantization.post_training import FloatFallback, Quantize
from compress.strategies.quantization.stored import FinalStorage
from compress.strategies.strategy import Context
from compress.training import Recovery

layers = tf_keras.layers
SMALL, LARGE = "small", "large"


@dataclass(frozen=True)
class OneScale(Guarantee):
    """Something that needs one scale for each tensor."""

    one_scale_per_tensor = True
    layers = frozenset()

    def describe(self) -> str:
        return "one scale"

    def check(self, model):
        return []

    def check_file(self, file):
        return []


@pytest.fixture(scope="module")
def context() -> Context:
    """A layer of 8 x 16 weights before one of 128 x 20, whose outputs have weights of very different size."""
    tf_keras.utils.set_random_seed(0)
    image = tf_keras.Input((8, 8))
    x = layers.Dense(16, name=SMALL)(image)
    model = tf_keras.Model(image, layers.Dense(20, name=LARGE)(layers.Flatten()(x)))
    rng = np.random.default_rng(0)
    model.get_layer(LARGE).kernel.assign(rng.normal(size=(128, 20)) * np.geomspace(0.01, 1, 20))
    x = rng.normal(2, 0.3, size=(200, 8, 8)).astype(np.float32)
    part = Split(x, np.arange(200) % 20)
    return Context("quantize", make_data("made", part, part), model, Recovery(method="none"), seed=0)


def corrections(candidate: Candidate, model: tf_keras.Model) -> dict[str, bool]:
    """Which layers' biases are others than those of the model."""
    pairs = {name: (candidate.model.get_layer(name).bias, model.get_layer(name).bias) for name in (SMALL, LARGE)}
    return {name: not np.array_equal(one, other) for name, (one, other) in pairs.items()}


def mean_error(candidate: Candidate, context: Context, folder: Path) -> float:
    """The largest mean error of an output of the file, over the samples that biases were corrected on."""
    export(candidate, context.data, folder / "model.tflite")
    interpreter = Interpreter(model_path=str(folder / "model.tflite"))
    x = context.data.train.x
    interpreter.resize_tensor_input(interpreter.get_input_details()[0]["index"], x.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x)
    interpreter.invoke()
    found = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    return float(np.abs((found - context.reference.predict(x, verbose=0)).mean(0)).max())


@pytest.mark.parametrize(
    ("scheme", "wanted"),
    [
        ("int8", {SMALL: True, LARGE: True}),
        ("int16", {SMALL: True, LARGE: True}),
        ("weight_only", {SMALL: False, LARGE: True}),
        ("dynamic", {SMALL: False, LARGE: True}),
    ],
)
def test_biases_of_layers_that_the_scheme_rounds(scheme, wanted, context):
    candidate = Quantize(scheme=scheme, bias_correction=True).apply(Candidate(context.reference), context)
    assert corrections(candidate, context.reference) == wanted


@pytest.mark.parametrize("guarantees", [(), (OneScale("share"),)], ids=["each output", "whole tensor"])
def test_the_mean_error_of_the_file_is_gone(guarantees, context, tmp_path):
    errors = {}
    for corrected in (False, True):
        strategy = Quantize(scheme="weight_only", bias_correction=corrected)
        candidate = strategy.apply(Candidate(context.reference, guarantees), context)
        errors[corrected] = mean_error(candidate, context, tmp_path)
    assert errors[True] < 0.02 * errors[False]


def test_a_layer_that_is_left_out_keeps_its_bias(context):
    apart = context.for_stage("quantize", selection=Selection(skip=(Rule(name=LARGE),)))
    candidate = Quantize(bias_correction=True).apply(Candidate(context.reference), apart)
    assert corrections(candidate, context.reference) == {SMALL: True, LARGE: False}


def test_weights_that_lie_on_a_grid_are_not_rounded_again(context):
    only = context.for_stage("first", selection=Selection(only=(Rule(name=LARGE),)))
    first = Quantize(bits=4).apply(Candidate(context.reference), only)
    second = Quantize(bias_correction=True).apply(first, context)
    assert corrections(second, first.model) == {SMALL: True, LARGE: False}


def test_a_layer_that_falls_back_to_floats_keeps_its_bias(context, monkeypatch):
    answers = [(LARGE,), ()]
    asked = []

    def keep(candidate, data, names, most, stage, original):
        asked.append((candidate.storage.float_layers, names, corrections(candidate, context.reference)))
        return answers[len(asked) - 1]

    monkeypatch.setattr(post_training, "keep_floats", keep)
    strategy = Quantize(bias_correction=True, float_fallback=FloatFallback(accuracy_drop=0.5))
    candidate = strategy.apply(Candidate(context.reference), context)
    # The accuracy is judged once more without the correction.
    assert asked == [
        ((), [SMALL, LARGE], {SMALL: True, LARGE: True}),
        ((LARGE,), [SMALL], {SMALL: True, LARGE: False}),
    ]
    assert corrections(candidate, context.reference) == {SMALL: True, LARGE: False}
    assert candidate.guarantees == (FinalStorage("quantize", "int8", (LARGE,)),)


def test_halves_have_nothing_to_correct():
    with pytest.raises(ValueError, match="round weights to integers"):
        Quantize(scheme="float16", bias_correction=True)
