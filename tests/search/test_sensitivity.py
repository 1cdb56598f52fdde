"""The sensitivity table: against formulas, against built files, and stopped in the middle."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
import tf_keras

from compress.cache.store import StageCache
from compress.candidate import Candidate
from compress.errors import CompressError
from compress.graph.rewrite import copy_model
from compress.graph.selection import Rule, Selection
from compress.pipeline.pipeline import digest_of
from compress.search import sensitivity
from compress.search.sensitivity import Sensitivity, measure_sensitivity
from compress.search.stored import measure_files
from compress.search.table import heat_map, markdown
from compress.search.technique import stage
from tests.search.toys import Memory, context_of, techniques

IMAGES = 40
CHOSEN = {
    "prune_channels": {"channels": [0.5], "ranking": "layer"},
    "prune": {"sparsity": [0.5, 0.9]},
    "share": {"clusters": [8]},
    "quantize": {"bits": [8, 3], "rounding": "second_order"},
}


@pytest.fixture(scope="module")
def found(model, data) -> Sensitivity:
    return measure_sensitivity(Candidate(model), techniques(**CHOSEN), context_of(model, data), IMAGES)


def probe_of(found: Sensitivity, layer: str, technique: str, value: float):
    (probe,) = [p for p in found.probes if (p.layer, p.technique, p.value) == (layer, technique, value)]
    return probe


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


@pytest.mark.parametrize("layer", ["conv1", "fc1"])
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_divergence_and_accuracy_are_those_of_the_layer_pruned_alone(layer, sparsity, found, model, data):
    changed = copy_model(model)
    kernel = changed.get_layer(layer).kernel
    value = np.asarray(kernel)
    least = np.sort(np.abs(value), axis=None)[round(sparsity * value.size) - 1]
    kernel.assign(np.where(np.abs(value) <= least, 0, value))
    images, labels = data.validation.x[:IMAGES].astype(np.float32), data.validation.y[:IMAGES]
    before, after = (np.asarray(net(images, training=False)) for net in (model, changed))
    p, q = softmax(before), softmax(after)
    probe = probe_of(found, layer, "prune", sparsity)
    assert probe.divergence == pytest.approx(np.mean(np.sum(p * np.log(p / q), 1)), rel=1e-3)
    gained = 100 * (np.mean(after.argmax(1) == labels) - np.mean(before.argmax(1) == labels))
    assert probe.accuracy_change == pytest.approx(gained)
    assert probe.macs_saved == 0
    assert probe.per_kilobyte == pytest.approx(1000 * probe.divergence / probe.bytes_saved)
    assert probe.per_mmac is None


def test_channels_save_in_the_layer_that_reads_them(found):
    probe = probe_of(found, "conv1", "prune_channels", 0.5)
    assert probe.macs_kept == pytest.approx({"conv1": 0.5, "conv2": 0.5})
    # 6 x 6 places of conv1, 4 x 4 of conv2.
    assert probe.macs_saved == 36 * 9 * 8 + 16 * 9 * 24 * 8
    assert set(probe.bytes_kept) == {"conv1", "conv2"}


def test_what_a_strategy_refuses_is_listed_with_its_reason(found, tmp_path):
    probe = probe_of(found, "logits", "prune_channels", 0.5)
    assert "output of the model" in str(probe.refused)
    page = markdown(found, "small")
    assert "an output of the model" in page
    assert page.count("| conv1 |") == 6
    heat_map(found, "small", tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads(json.dumps(found.to_json()))["images"] == IMAGES


@pytest.mark.parametrize(("technique", "value"), [("prune", 0.9), ("share", 8), ("quantize", 3)])
def test_bytes_add_up_to_those_of_the_built_file(technique, value, found, model, data):
    context = context_of(model, data)
    own = {t.name: t for t in techniques(**CHOSEN)}[technique]
    built = {}
    for names in ([], ["conv2"], ["conv2", "fc1"]):
        names = ["conv1", *names, "logits"]
        made = stage("auto", own.levels[value], names).apply(Candidate(model), context)
        built[len(names)] = measure_files(made, context, latency=False)[0]
    saved = [probe_of(found, layer, technique, value).bytes_saved for layer in ("conv2", "fc1")]
    # Floats beside integers are stored otherwise than in a float file, by a few bytes for each layer.
    assert built[2] - built[3] == pytest.approx(saved[0], rel=0.05, abs=150)
    assert built[3] - built[4] == pytest.approx(saved[1], rel=0.05, abs=150)


@pytest.mark.parametrize("values", [("share", 8), ("quantize", 3)])
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_bytes_of_zeros_and_few_values_together_are_those_of_the_built_file(values, sparsity, found, model, data):
    context = context_of(model, data)
    own = {t.name: t for t in techniques(**CHOSEN)}
    last = stage(values[0], own[values[0]].levels[values[1]], ["conv1", "conv2", "fc1", "logits"])
    zeros = stage("prune", own["prune"].levels[sparsity], ["conv2", "fc1"])
    sizes = []
    for stages in ([last], [zeros, last]):
        made = Candidate(model)
        for one in stages:
            made = one.apply(made, context)
        sizes.append(measure_files(made, context, latency=False)[0])
    together = apart = 0.0
    for layer in ("conv2", "fc1"):
        (pair,) = [p for p in found.pairs if (p.layer, p.zeros, p.values) == (layer, ("prune", sparsity), values)]
        whole = found.layers[layer].bytes
        one, other = (probe_of(found, layer, *level).bytes_kept[layer] for level in (("prune", sparsity), values))
        together += (other - pair.bytes_kept) * whole
        apart += (other - one * other) * whole
    assert sizes[0] - sizes[1] == pytest.approx(together, rel=0.2, abs=100)
    # Few levels are coded in few bits, zeros or not.
    assert apart > 1.1 * (sizes[0] - sizes[1])


def test_a_pass_that_was_stopped_goes_on_where_it_was(model, data, tmp_path, monkeypatch, found):
    cache = StageCache(tmp_path / "cache")

    def remember(name, settings, make):
        return cache.remembered(digest_of([name, *settings]), make)

    measured = []
    inner = sensitivity.Bench.loss

    def counted(bench, network):
        if len(measured) == 7 and stop:
            raise KeyboardInterrupt
        measured.append(1)
        return inner(bench, network)

    monkeypatch.setattr(sensitivity.Bench, "loss", counted)
    again = functools.partial(
        measure_sensitivity, Candidate(model), techniques(**CHOSEN), context_of(model, data, remember), IMAGES
    )
    stop = True
    with pytest.raises(KeyboardInterrupt):
        again()
    stop = False
    whole = sum(probe.refused is None for probe in found.probes)
    assert again() == found
    assert len(measured) == whole
    assert again() == found
    assert len(measured) == whole, "nothing is measured a second time"


def test_other_levels_share_what_is_known(model, data):
    memory = Memory()
    context = context_of(model, data, memory)
    measure_sensitivity(Candidate(model), techniques(prune={"sparsity": [0.5]}), context, IMAGES)
    assert memory.made == 4
    measure_sensitivity(Candidate(model), techniques(prune={"sparsity": [0.5, 0.8]}), context, IMAGES)
    assert memory.made == 8
    measure_sensitivity(Candidate(model), techniques(prune={"sparsity": [0.8], "ranking": "global"}), context, IMAGES)
    assert memory.made == 12


def test_only_selected_layers_are_looked_at(model, data):
    context = context_of(model, data).for_stage("auto", selection=Selection(only=(Rule(type="Dense"),)))
    found = measure_sensitivity(Candidate(model), techniques(prune={"sparsity": [0.5]}), context, IMAGES)
    assert [probe.layer for probe in found.probes] == ["fc1", "logits"]
    assert set(found.layers) == {"conv1", "conv2", "fc1", "logits"}


@pytest.mark.parametrize(
    ("chosen", "where", "said"),
    [
        ({"prun": {"sparsity": [0.5]}}, "techniques.prun", "prune"),
        ({"prune": {"sparsty": [0.5]}}, "techniques.prune.sparsty", "sparsity"),
        ({"prune": {"sparsity": [1.5]}}, "techniques.prune.sparsity", "1.5"),
        ({"prune": {"sparsity": 0.5}}, "techniques.prune", "list of levels"),
        ({"prune": {"sparsity": ["half"]}}, "techniques.prune.sparsity", "half"),
        ({"quantize": {"bits": [8, 8]}}, "techniques.quantize.bits", "different"),
        ({"quantize": {"bits": [8], "trained": "qatt"}}, "techniques.quantize.trained", "qat"),
        ({"quantize": {"bits": [8], "trained": {"bits": [4]}}}, "techniques.quantize.trained", "bits=[4]"),
        ({"quantize": {"bits": [8], "trained": "prune"}}, "techniques.quantize.trained", "prune, which has none"),
        ({"quantize": {"bits": [8], "trained": {5: 1}}}, "techniques.quantize.trained.5", "a key that exists"),
        (
            {"prune": {"sparsity": [0.5], "trained": {"criterio": "snip"}}},
            "techniques.prune.trained.criterio",
            "criterion",
        ),
        ({"auto": {"images": [8]}}, "techniques.auto", "no search"),
        ({}, "techniques", "strategies"),
    ],
)
def test_what_is_no_technique_is_refused(chosen, where, said):
    with pytest.raises(CompressError) as caught:
        techniques(**chosen)
    assert caught.value.where == where
    assert said in str(caught.value)


def test_a_layer_is_not_taken_for_others_whose_names_begin_like_its_own(data):
    """As Keras names them: conv2d, conv2d_1."""
    tf_keras.utils.set_random_seed(0)
    image = tf_keras.Input((8, 8, 1))
    x = tf_keras.layers.Conv2D(4, 3, name="conv2d")(image)
    x = tf_keras.layers.Conv2D(32, 3, name="conv2d_1")(x)
    x = tf_keras.layers.Dense(10, name="logits")(tf_keras.layers.Flatten()(x))
    model = tf_keras.Model(image, x)
    chosen = techniques(prune={"sparsity": [0.5]}, share={"clusters": [8]})
    whole = measure_sensitivity(Candidate(model), chosen, context_of(model, data), IMAGES)
    only = context_of(model, data).for_stage("auto", selection=Selection(only=(Rule(name="conv2d"),)))
    alone = measure_sensitivity(Candidate(model), chosen, only, IMAGES)
    (pair,) = alone.pairs
    (same,) = [pair for pair in whole.pairs if pair.layer == "conv2d"]
    assert pair.bytes_kept == pytest.approx(same.bytes_kept)
    assert pair.bytes_kept < 1
