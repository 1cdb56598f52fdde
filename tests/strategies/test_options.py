"""An option that would have no effect is refused; one that is as by default never is."""

from __future__ import annotations

import dataclasses

import pytest

from compress.strategies.quantization.aware import QuantizeAware
from compress.strategies.quantization.mixed_precision import MixedPrecision
from compress.strategies.quantization.post_training import FloatFallback, Quantize

IDLE = [
    *((Quantize, {"scheme": s, "ranges": "mse"}) for s in ("int16", "float16", "dynamic", "weight_only")),
    *((Quantize, {"scheme": s, "ranges": "percentile", "percentile": 99.0}) for s in ("int16", "dynamic")),
    *((Quantize, {"scheme": s, "calibrate_on": "synthetic"}) for s in ("float16", "dynamic", "weight_only")),
    *((Quantize, {"scheme": s, "calibration_images": 10}) for s in ("float16", "dynamic", "weight_only")),
    *((Quantize, {"ranges": r, "percentile": 99.0}) for r in ("minmax", "mse", "entropy")),
    *((Quantize, {"scheme": s, "bits": 4}) for s in ("int16", "float16", "dynamic")),
    (Quantize, {"scheme": "int16", "float_fallback": FloatFallback(0.5)}),
    (Quantize, {"scheme": "float16", "bias_correction": True}),
    (Quantize, {"rounding": "second_order", "bias_correction": True}),
    *((QuantizeAware, {"scheme": "tfmot", **f}) for f in ({"ranges": "entropy"}, {"rounding_images": 0}, {"bits": 4})),
    (Quantize, {"rounding_images": 77}),
    (QuantizeAware, {"rounding_images": 77}),
    (MixedPrecision, {"latency": 0.5, "choices": (2, 8)}),
    (MixedPrecision, {"latency": 0.5, "images": 100}),
    (MixedPrecision, {"choices": (4, 4)}),
    (MixedPrecision, {"choices": (4, 8, 4)}),
]
EFFECTIVE = [
    *((Quantize, {"scheme": s, "calibration_images": 10, "calibrate_on": "synthetic"}) for s in ("int8", "int16")),
    (Quantize, {"ranges": "percentile", "percentile": 99.0}),
    (Quantize, {"scheme": "weight_only", "bits": 4, "calibrate_on": "synthetic"}),
    (Quantize, {"scheme": "dynamic", "bias_correction": True, "calibrate_on": "synthetic"}),
    (QuantizeAware, {"scheme": "tfmot", "calibration_images": 10}),
    (QuantizeAware, {"ranges": "entropy", "bits": 4, "rounding_images": 0}),
    (MixedPrecision, {"bytes": 0.3, "choices": (2, 8), "images": 100}),
    (MixedPrecision, {"latency": 0.5, "ranges": "minmax"}),
]


def with_defaults(kind: type, given: dict) -> dict:
    """All fields, as a configuration gives them."""
    return {**{field.name: field.default for field in dataclasses.fields(kind)}, **given}


@pytest.mark.parametrize(("kind", "given"), IDLE, ids=str)
def test_no_effect(kind, given):
    with pytest.raises(ValueError, match=r"only beside|choices that differ") as caught:
        kind(**with_defaults(kind, given))
    assert any(name in str(caught.value) for name in given)


@pytest.mark.parametrize(("kind", "given"), EFFECTIVE, ids=str)
def test_some_effect(kind, given):
    made = kind(**with_defaults(kind, given))
    assert {name: getattr(made, name) for name in given} == given


@pytest.mark.parametrize("scheme", ["int8", "int16", "dynamic", "weight_only", "float16"])
def test_defaults_go_with_every_scheme(scheme):
    assert Quantize(**with_defaults(Quantize, {"scheme": scheme})).scheme == scheme
