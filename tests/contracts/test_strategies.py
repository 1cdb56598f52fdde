"""What every strategy in ``conf/strategy`` must keep; a new YAML is picked up by itself."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import tf_keras

from compress.candidate import Candidate
from compress.cli.build import make_plan
from compress.cli.compose import compose_config
from compress.cli.places import conf_dir
from compress.data.digits import Digits
from compress.deploy.tflite import export
from compress.errors import CompressError
from compress.metrics.accuracy import file_outputs, keras_outputs
from compress.metrics.counts import count_macs, count_nonzero_params, count_params
from compress.models.small import DigitsCnn
from compress.models.source import Schedule
from compress.reference import make_reference
from compress.strategies.strategy import Context
from compress.training import Recovery

STRATEGIES = sorted(file.stem for file in (conf_dir() / "strategy").glob("*.yaml"))
CALIBRATED = ("mixed_precision", "rate_distortion", "hashed", "product_quantization", "transferred")
QUICK: dict[str, dict[str, object]] = {name: {"images": 64} for name in CALIBRATED} | {
    "auto": {
        "bytes": 70_000,
        "images": 32,
        "techniques": "{prune_channels:{channels:[0.75],ranking:layer},quantize:{bits:[8],trained:qat}}",
    }
}
"""Fields that save time, and change nothing that is tested here; and those that a strategy cannot do without."""
BUDGETS = ("macs", "params", "weights", "sparsity", "channels")


@pytest.fixture(scope="module")
def data():
    return Digits(train_limit=512, test_limit=128).load()


@pytest.fixture(scope="module")
def reference(data) -> tf_keras.Model:
    return make_reference(DigitsCnn(train=Schedule(epochs=4)), data, 0)


@pytest.fixture(scope="module")
def context(data, reference) -> Context:
    recovery = Recovery(epochs=1.0, batch_size=64)
    return Context(stage="stage", data=data, reference=reference, recovery=recovery, seed=7)


def make(name: str, **fields):
    overrides = [f"strategy={name}", *(f"strategy.{name}.{key}={value}" for key, value in fields.items())]
    return make_plan(compose_config(overrides)).stages[0].strategy


def fingerprint(model: tf_keras.Model) -> tuple[str, bytes]:
    return model.to_json(), b"".join(np.ascontiguousarray(w).tobytes() for w in model.get_weights())


@pytest.fixture(scope="module", params=STRATEGIES)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def before(reference) -> tuple[str, bytes]:
    return fingerprint(reference)


@pytest.fixture(scope="module")
def result(name, before, context, reference) -> Candidate:
    """What the strategy makes of the reference, with its defaults; made once for all tests."""
    return make(name, **QUICK.get(name, {})).apply(Candidate(reference), context)


@pytest.fixture(scope="module")
def artifact(result, data, tmp_path_factory):
    return export(result, data, tmp_path_factory.mktemp("exported") / "model.tflite")


def test_never_changes_its_input_and_keeps_shapes(result, before, reference):
    assert fingerprint(reference) == before
    assert result.model is not reference
    assert result.model.input_shape == reference.input_shape
    assert result.model.output_shape == reference.output_shape
    shared = {id(w) for w in reference.weights} & {id(w) for w in result.model.weights}
    assert not shared


def test_same_seed_same_weights(name, result, context, reference):
    again = make(name, **QUICK.get(name, {})).apply(Candidate(reference), context)
    for a, b in zip(result.model.get_weights(), again.model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_exported_file_agrees_with_keras(result, artifact, data):
    ours, theirs = file_outputs(artifact.path, data.test.x), keras_outputs(result.model, data.test.x)
    spread = np.abs(theirs).max()
    tolerance = {"float32": 1e-5, "float16": 1e-2, "dynamic": 0.05, "int8": 0.15}[result.storage.scheme]
    assert np.abs(ours - theirs).max() <= tolerance * spread
    assert (ours.argmax(1) == theirs.argmax(1)).mean() >= 0.97


def test_guarantees_hold_after_save_and_load(result, artifact, data, tmp_path):
    from compress.cache.store import Entry, StageCache
    from compress.metrics.tflite_file import TFLiteFile

    cache = StageCache(tmp_path / "cache")
    cache.store("key", Entry(result, {"skipped": []}, artifact.path.read_bytes(), b""))
    entry = cache.load("key")
    assert entry is not None
    assert len(entry.candidate.guarantees) == len(result.guarantees)
    for guarantee in entry.candidate.guarantees:
        assert guarantee.check(entry.candidate.model) == []
        assert guarantee.check_file(TFLiteFile(entry.tflite)) == []
    np.testing.assert_array_equal(
        keras_outputs(entry.candidate.model, data.test.x), keras_outputs(result.model, data.test.x)
    )


def budgets() -> list[tuple[str, str]]:
    found = []
    for name in STRATEGIES:
        fields = {item.name for item in dataclasses.fields(make(name, **QUICK.get(name, {})))}
        found += [(name, unit) for unit in BUDGETS if unit in fields]
    return found


@pytest.mark.parametrize(("strategy", "unit"), budgets())
@pytest.mark.parametrize("keep", [0.6, 0.8])
def test_a_budget_is_met(strategy, unit, keep, context, reference):
    if strategy == "compact" and keep == 0.6:
        keep = 0.7
    result = make(strategy, **QUICK.get(strategy, {}), **{unit: keep}).apply(Candidate(reference), context)
    sparse = strategy == "prune"
    kernels = {w.name: np.asarray(w) for w in result.model.trainable_weights if "kernel" in w.name}
    if strategy == "hashed":
        # The hash leaves some buckets out, of those that are: e**(-1 / keep).
        numbers = sum(len(np.unique(np.abs(k))) for k in kernels.values()) / sum(k.size for k in kernels.values())
        assert numbers == pytest.approx(keep * (1 - np.exp(-1 / keep)), abs=0.02)
    elif unit in ("sparsity", "weights"):
        zeros = np.mean(np.concatenate([k.ravel() for k in kernels.values()]) == 0)
        reached = zeros if unit == "sparsity" else 1 - zeros
        assert reached == pytest.approx(keep, abs=1e-3)
    elif unit == "channels":
        names = {name for guarantee in result.guarantees for name in guarantee.layers}
        left, before = (sum(m.get_layer(n).output_shape[-1] for n in names) for m in (result.model, reference))
        assert left / before == pytest.approx(keep, abs=0.05)
    elif unit == "params":
        count = count_nonzero_params if sparse else count_params
        assert count(result.model) / count_params(reference) == pytest.approx(keep, abs=0.001 if sparse else 0.05)
        assert count(result.model) / count_params(reference) <= keep + 0.001
    elif sparse:
        from compress.graph.kernels import kernels as kernels_of

        done = sum(k.macs * np.mean(k.value != 0) for k in kernels_of(result.model))
        assert done / count_macs(reference) == pytest.approx(keep, abs=0.001)
    else:
        assert count_macs(result.model) / count_macs(reference) <= keep + 1e-9
        if strategy != "compact":  # a convolution is replaced as a whole or not at all
            assert count_macs(result.model) / count_macs(reference) >= keep - 0.05


def test_a_wrong_field_is_a_clear_error(name):
    with pytest.raises(CompressError) as caught:
        make_plan(compose_config([f"strategy={name}", f"+strategy.{name}.onyl=1"]))
    assert caught.value.where == f"strategy.{name}.onyl"
    assert "only" in caught.value.fix


def test_a_stage_yaml_names_only_its_own_fields(name):
    text = (conf_dir() / "strategy" / f"{name}.yaml").read_text()
    fields = {item.name for item in dataclasses.fields(make(name, **QUICK.get(name, {})))}
    keys = {line.partition(":")[0].strip() for line in text.splitlines() if ":" in line and not line.startswith("#")}
    assert keys - {"_target_"} == fields
    assert text.startswith("#"), "a first comment says what it does"
    assert Path(conf_dir()).is_dir()
