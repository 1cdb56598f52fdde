"""The pipeline: what a failure leaves, whose seed a stage gets, when a rule is refused, what a release resets."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from compress.boards.board import Board
from compress.cache.store import StageCache
from compress.candidate import Artifact, Candidate, Measurement, Skipped, Storage
from compress.cli.build import make_plan
from compress.cli.compose import compose_config
from compress.data.source import Split
from compress.errors import CompressError
from compress.pipeline.refusals import refuse_clashes
from compress.pipeline.stage import Stage
from compress.strategies.distillation.finetune import Finetune
from compress.strategies.pruning.prune import Prune
from compress.strategies.quantization.stored import Stored
from compress.strategies.strategy import Context, Strategy
from compress.tracking.report import notes
from compress.training import Recovery

layers = tf_keras.layers


@dataclasses.dataclass(frozen=True)
class SeedWitness(Strategy):
    """Notes the seed that it is given."""

    seeds: list[int] = dataclasses.field(default_factory=list, compare=False)

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        self.seeds.append(context.seed)
        return candidate


@dataclasses.dataclass(frozen=True)
class Idle(Strategy):
    """Says nothing of layers that it leaves alone."""

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        return candidate


@dataclasses.dataclass(frozen=True)
class Failing(Strategy):
    """Stops."""

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        raise CompressError(f"stage {context.stage}", expected="nothing", received="this", fix="Nothing.")


@dataclasses.dataclass(frozen=True)
class Away(Board):
    """Is not there."""

    name: ClassVar[str] = "away"

    def measure(self, artifact: Artifact) -> Measurement:
        return Measurement(self.name, failure="it does not answer")

    def unreachable(self) -> str | None:
        return "it does not answer"


def recurrent() -> tf_keras.Model:
    values = tf_keras.Input((5, 3))
    x = layers.LSTM(16, name="memory")(values)
    return tf_keras.Model(values, layers.Dense(3, name="dense")(x))


def test_a_stage_that_fails_leaves_no_file(pipeline, tmp_path):
    whole = pipeline("strategy=finetune", "model.train.epochs=1", "recovery.epochs=0.1")
    with pytest.raises(CompressError, match="stage bad"):
        dataclasses.replace(whole, stages=(*whole.stages, Stage("bad", Failing()))).run(tmp_path)
    assert list(tmp_path.iterdir()) == []
    result = whole.run(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.cmp", "model.tflite"]
    assert result.artifact.path == tmp_path / "model.tflite"
    assert [stage.cached for stage in result.stages] == [True], "what was finished before the failure is kept"


def test_a_stage_has_a_seed_of_its_own_whatever_was_cached(pipeline, tmp_path):
    base = pipeline("strategy=none", "model.train.epochs=1")

    def seeds(cache: StageCache) -> list[int]:
        witness = SeedWitness()
        stages = (Stage("a", Finetune(), recovery=Recovery(epochs=0.1)), Stage("b", witness), Stage("c", witness))
        dataclasses.replace(base, stages=stages, cache=cache).run(tmp_path)
        return witness.seeds

    cache = StageCache(tmp_path / "cache")
    first = seeds(cache)
    assert len(set(first)) == 2
    assert seeds(StageCache(None)) == first
    # Only the stages after the first are made anew; their seeds are still the same.
    for entry in sorted(cache.folder.iterdir(), key=lambda e: e.stat().st_mtime)[2:]:
        for file in entry.iterdir():
            file.unlink()
        entry.rmdir()
    assert seeds(cache) == first


def test_a_model_of_no_epochs_stays_as_initialised_and_it_is_said(pipeline, tmp_path):
    whole = pipeline("strategy=none", "model.train.epochs=0")
    result = whole.run(tmp_path)
    for found, initial in zip(
        result.candidate.model.get_weights(), whole.model.build(whole.data, whole.seed).get_weights(), strict=True
    ):
        np.testing.assert_array_equal(found, initial)
    assert result.untrained
    assert any("untrained" in note for note in notes(result))


def test_a_board_that_cannot_be_reached_is_told_before_anything_is_trained(pipeline, tmp_path, monkeypatch):
    whole = dataclasses.replace(pipeline("strategy=none"), board=Away(), cache=StageCache(tmp_path / "cache"))
    monkeypatch.setattr("compress.pipeline.pipeline.make_reference", lambda *given: pytest.fail("trained"))
    with pytest.raises(CompressError, match="board away: expected one that can be reached; received it does not"):
        whole.run(tmp_path)


def test_a_board_that_goes_away_meanwhile_ends_the_run_and_nothing_of_it_is_kept(pipeline, tmp_path, monkeypatch):
    answers = [None, "it does not answer"]
    monkeypatch.setattr(Away, "unreachable", lambda self: answers.pop(0))
    cache = StageCache(tmp_path / "cache")
    whole = dataclasses.replace(pipeline("strategy=none", "model.train.epochs=0"), board=Away(), cache=cache)
    with pytest.raises(CompressError, match="board away"):
        whole.run(tmp_path)
    assert answers == []
    # There, and without an answer for this file: that is a result.
    monkeypatch.setattr(Away, "unreachable", lambda self: None)
    result = whole.run(tmp_path)
    assert not result.baseline.cached
    assert result.final.latency_failure == "it does not answer"
    # What is in the cache needs no board.
    monkeypatch.setattr(Away, "unreachable", lambda self: "it does not answer")
    assert whole.run(tmp_path).baseline.cached


def stages(pipeline, *overrides: str) -> tuple[Stage, ...]:
    return pipeline(*overrides).stages


def test_a_rule_for_a_layer_that_an_earlier_stage_will_make_is_not_refused_early(pipeline):
    model = tf_keras.Sequential([layers.Dense(8, input_shape=(4,), name="first"), layers.Dense(3, name="last")])
    rule = "strategy.prune.only={name: first_reduce}"
    refuse_clashes(stages(pipeline, "strategy=lowrank+prune", rule), model)
    with pytest.raises(CompressError, match=r"strategy\.prune\.only"):
        refuse_clashes(stages(pipeline, "strategy=finetune+prune", rule), model)


def test_a_rule_that_matches_nothing_in_the_end_is_refused_by_the_stage(pipeline, tmp_path):
    run = pipeline("strategy=lowrank+prune", "model.train.epochs=1", "strategy.prune.only={name: nothing}")
    with pytest.raises(CompressError, match=r"strategy\.prune\.only"):
        run.run(tmp_path)


def test_what_one_stage_left_alone_is_not_said_of_the_next(context):
    given = Candidate(recurrent(), skipped=(Skipped("memory", "too small"),))
    assert Stage("idle", Idle()).apply(given, context).skipped == ()


def test_releasing_a_quantization_resets_how_weights_are_written(context):
    model = tf_keras.Sequential([layers.Dense(3, input_shape=(4,), name="dense")])
    before = Candidate(model, storage=Storage("int8"), guarantees=(Stored("quantize", "int8"),))
    kept = Stage("witness", SeedWitness()).apply(before, context)
    assert kept.storage.scheme == "int8"
    given_up = Stage("witness", SeedWitness(), release=("quantize",)).apply(before, context)
    assert given_up.storage == Storage()
    assert given_up.guarantees == ()
    assert "quantize" in given_up.released[0]


@pytest.mark.parametrize(
    ("order", "scheme", "given", "wanted"),
    [
        ("quantize+qat", "strategy.quantize.scheme=int16", "int16", "int8"),
        ("quantize+mixed_precision", "strategy.quantize.scheme=dynamic", "dynamic", "int8"),
        ("quantize+qat", "strategy.quantize.scheme=float16", "float16", "int8"),
        ("qat+quantize", "strategy.quantize.scheme=float16", "int8", "float16"),
        ("quantize+finetune+quantize", "strategy.quantize2.scheme=weight_only", "int8", "weight_only"),
    ],
)
def test_two_ways_to_store_the_weights_clash_on_whatever_layers(order, scheme, given, wanted, pipeline):
    model = tf_keras.Sequential([layers.Dense(8, input_shape=(4,), name="a"), layers.Dense(3, name="b")])
    first, last = order.partition("+")[0], order.rpartition("+")[2]
    last = f"{last}2" if last == first else last
    apart = [f"strategy.{first}.skip=last", f"strategy.{last}.skip=first"]
    for rules in ([], apart):
        with pytest.raises(CompressError) as caught:
            refuse_clashes(stages(pipeline, f"strategy={order}", scheme, *rules), model)
        assert caught.value.where == f"stage {last} after stage {first}"
        assert given in caught.value.expected
        assert wanted in caught.value.received
    refuse_clashes(stages(pipeline, f"strategy={order}", scheme, f"strategy.{last}.release=[{first}]"), model)


@pytest.mark.parametrize("order", ["quantize+qat", "quantize+mixed_precision", "mixed_precision+quantize"])
def test_one_way_to_store_the_weights_does_not_clash(order, pipeline):
    model = tf_keras.Sequential([layers.Dense(3, input_shape=(4,), name="dense")])
    refuse_clashes(stages(pipeline, f"strategy={order}"), model)


@pytest.mark.parametrize("last", ["quantize", "mixed_precision"])
def test_trained_ranges_are_not_thrown_away(last, pipeline):
    model = tf_keras.Sequential([layers.Dense(3, input_shape=(4,), name="dense")])
    with pytest.raises(CompressError, match=f"{last} after stage qat.*chooses how its weights are written"):
        refuse_clashes(stages(pipeline, f"strategy=qat+{last}"), model)
    refuse_clashes(stages(pipeline, f"strategy=qat+{last}", f"strategy.{last}.release=[qat]"), model)


@pytest.mark.parametrize("last", ["quantize", "qat", "mixed_precision"])
@pytest.mark.parametrize(
    "first",
    [
        ("mixed_precision", "latency=0.5"),
        ("quantize", "float_fallback={accuracy_drop: 1}"),
        ("quantize", "float_fallback={accuracy_drop: 1}", "bits=4"),
    ],
    ids=" ".join,
)
def test_floats_that_were_chosen_are_not_thrown_away(first, last, pipeline):
    model = tf_keras.Sequential([layers.Dense(3, input_shape=(4,), name="dense")])
    name = first[0]
    settings = [f"strategy.{name}.{item}" for item in first[1:]]
    later = f"{last}2" if last == name else last
    with pytest.raises(CompressError, match=f"{later} after stage {name}.*chooses how its weights are written"):
        refuse_clashes(stages(pipeline, f"strategy={name}+{last}", *settings), model)
    refuse_clashes(stages(pipeline, f"strategy={name}+{last}", *settings, f"strategy.{later}.release=[{name}]"), model)


@pytest.mark.parametrize("first", ["quantize", "qat", "mixed_precision"])
@pytest.mark.parametrize("last", ["mixed_precision.latency=0.5", "quantize.float_fallback={accuracy_drop: 1}"])
def test_floats_are_not_chosen_of_what_is_stored_as_integers(first, last, pipeline):
    model = tf_keras.Sequential([layers.Dense(3, input_shape=(4,), name="dense")])
    name, _, setting = last.partition(".")
    later = f"{name}2" if name == first else name
    with pytest.raises(CompressError, match=f"{later} after stage {first}.*it leaves layers as floats"):
        refuse_clashes(stages(pipeline, f"strategy={first}+{name}", f"strategy.{later}.{setting}"), model)


@pytest.mark.parametrize(
    ("order", "settings", "advice"),
    [
        ("quantize+quantize", ["strategy.quantize.bits=4", "strategy.quantize2.bits=4"], "Leave one"),
        ("qat+quantize", ["strategy.qat.only={name: a}", "strategy.quantize.skip={name: a}"], "Leave one"),
        ("quantize+qat", ["strategy.quantize.float_fallback={accuracy_drop: 1}"], "Leave one"),
        ("prune+lowrank", [], "Put lowrank before prune"),
    ],
)
def test_the_advice_about_a_clash_can_be_followed(order, settings, advice, pipeline):
    model = tf_keras.Sequential([layers.Dense(8, input_shape=(4,), name="a"), layers.Dense(3, name="b")])
    with pytest.raises(CompressError) as caught:
        refuse_clashes(stages(pipeline, f"strategy={order}", *settings), model)
    assert caught.value.fix.startswith(advice)
    assert ("different layers" in caught.value.fix) == (advice != "Leave one")
    first, last = (part for part in caught.value.where.removeprefix("stage ").split(" after stage "))
    refuse_clashes(stages(pipeline, f"strategy={order}", *settings, f"strategy.{first}.release=[{last}]"), model)


@pytest.mark.parametrize("first", ["qat", "quantize", "mixed_precision.latency=0.5"])
def test_the_coder_of_the_packed_file_clashes_with_nothing(first, pipeline):
    model = tf_keras.Sequential([layers.Dense(3, input_shape=(4,), name="dense")])
    name = first.partition(".")[0]
    settings = [f"strategy.{first}"] if "." in first else []
    refuse_clashes(stages(pipeline, f"strategy={name}+pack", *settings), model)


def test_what_a_stage_between_has_released_does_not_clash(pipeline):
    model = tf_keras.Sequential([layers.Dense(3, input_shape=(4,), name="dense")])
    between = ("strategy=quantize+prune+qat", "strategy.quantize.scheme=int16")
    with pytest.raises(CompressError, match="qat after stage quantize"):
        refuse_clashes(stages(pipeline, *between), model)
    refuse_clashes(stages(pipeline, *between, "strategy.prune.release=[quantize]"), model)


def test_releasing_one_of_two_quantizations_leaves_the_other(context):
    model = tf_keras.Sequential([layers.Dense(3, input_shape=(4,), name="dense")])
    guarantees = (Stored("quantize", "int8"), Stored("qat", "int8"))
    samples = np.zeros((2, 4), np.float32)
    before = Candidate(model, storage=Storage("int8"), guarantees=guarantees, samples=samples)
    one = Stage("witness", SeedWitness(), release=("quantize",)).apply(before, context)
    assert (one.storage.scheme, one.guarantees, one.samples is samples) == ("int8", guarantees[1:], True)
    both = Stage("witness", SeedWitness(), release=("quantize", "qat")).apply(before, context)
    assert (both.storage, both.guarantees, both.samples) == (Storage(), (), None)


@pytest.fixture
def context(pipeline) -> Context:
    data = pipeline("strategy=none", "model.train.epochs=0").data
    return Context("stage", data, recurrent(), Recovery(method="none"), 0)


UNSUPPORTED = {
    "prune": {"memory", "other"},
    "share": {"memory", "other"},
    "lowrank": {"memory", "other", "line"},
    "compact": {"line"},
    "prune_channels": {"tf.math.cumsum"},
}


def of_many_kinds() -> tf_keras.Model:
    """Something to do for every strategy, and something that it cannot handle."""
    tf_keras.backend.reset_uids()
    image = tf_keras.Input((8, 8, 8))
    x = layers.Conv2D(16, 3, name="second")(layers.Conv2D(16, 3, name="first")(image))
    x = layers.Conv1D(8, 3, name="line")(tf.math.cumsum(layers.Reshape((16, 16))(x), axis=-1))
    x = layers.LSTM(16, name="other")(layers.LSTM(16, return_sequences=True, name="memory")(x))
    return tf_keras.Model(image, layers.Dense(3, name="dense")(x))


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_what_a_stage_cannot_handle_is_listed_and_an_error_in_strict_mode(name, pipeline, context):
    stage = stages(pipeline, f"strategy={name}", "recovery=none")[0]
    model, data = of_many_kinds(), context.data
    images = Split(np.random.default_rng(0).normal(size=(20, 8, 8, 8)).astype(np.float32), np.arange(20) % 3)
    context = dataclasses.replace(context, data=dataclasses.replace(data, train=images, test=images))
    result = stage.apply(Candidate(model), context)
    assert {item.layer for item in result.skipped if not item.by_choice} == UNSUPPORTED[name]
    assert all(item.reason for item in result.skipped)
    with pytest.raises(CompressError) as caught:
        stage.apply(Candidate(model), dataclasses.replace(context, strict=True))
    assert caught.value.where.startswith(f"stage {name}, layer ")
    for layer in UNSUPPORTED[name]:
        assert layer in caught.value.received
    assert "strict=false" in caught.value.fix


@pytest.mark.parametrize(("name", "suffix"), [("lowrank", "reduce"), ("compact", "depthwise")])
def test_a_name_that_is_taken_is_skipped(name, suffix, pipeline, context):
    image = tf_keras.Input((8, 8, 8))
    x = layers.Conv2D(16, 3, name="conv")(image)
    x = layers.Conv2D(16, 3, name=f"conv_{suffix}")(x)
    x = layers.Conv2D(16, 3, name="other")(x)
    model = tf_keras.Model(image, layers.Dense(3, name="dense")(layers.Flatten()(x)))
    result = stages(pipeline, f"strategy={name}", "recovery=none")[0].apply(Candidate(model), context)
    assert [(item.layer, item.reason) for item in result.skipped if "taken" in item.reason] == [
        ("conv", f"the name conv_{suffix} is taken")
    ]
    assert f"other_{suffix}" in {layer.name for layer in result.model.layers}


@pytest.mark.parametrize("dtype", ["mixed_float16", "float16", "mixed_bfloat16", "float64"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "wrapped"])
def test_a_model_of_another_precision_becomes_float32(dtype, wrapped):
    from compress.graph.rewrite import copy_model

    tf_keras.utils.set_random_seed(0)
    values = tf_keras.Input((2, 6), dtype=dtype.removeprefix("mixed_") if dtype == "float64" else None)
    dense = layers.Dense(5, activation="relu", dtype=dtype)
    x = layers.TimeDistributed(dense, dtype=dtype)(values) if wrapped else dense(values)
    model = tf_keras.Model(values, layers.Dense(3, dtype=dtype)(x))
    copy = copy_model(model)
    assert copy.outputs[0].dtype == "float32"
    assert {layer.compute_dtype for layer in copy._flatten_layers()} == {"float32"}
    sample = np.random.default_rng(0).normal(size=(4, 2, 6)).astype(np.float32)
    np.testing.assert_allclose(copy(sample), np.asarray(model(sample), np.float32), atol=0.05)


def test_what_is_measured_of_the_reference_is_kept_for_any_board(tmp_path):
    """Sensitivities do not depend on the board; what depends on it can tell boards apart."""
    said, boards = [], []
    for board in ("host", "roofline"):
        quick = [f"board={board}", f"cache.dir={tmp_path}/cache", "model.train.epochs=0.1", "data.train_limit=64"]
        plan = make_plan(compose_config(["strategy=none", *quick, *(["board.runs=100"] if board == "host" else [])]))
        _, _, context = plan.pipeline().before_first(Stage("search", Prune()), tmp_path)
        said.append(context.remember("sensitivity", [1], lambda board=board: board))
        boards.append(context.board)
    assert said == ["host", "host"]
    assert boards[0] != boards[1]
