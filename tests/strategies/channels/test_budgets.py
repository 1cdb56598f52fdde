"""Channel pruning: budgets that are counted and measured, what rounding leaves of them, several steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import tf_keras
from hypothesis import example, given, settings
from hypothesis import strategies as st

from compress.candidate import Artifact, Candidate, Latency, Measurement
from compress.deploy.tflite import export
from compress.errors import CompressError
from compress.metrics.counts import count_params
from compress.strategies.pruning.channels import PruneChannels
from compress.strategies.pruning.measured import largest_share, measured_once
from compress.training import Recovery
from tests.strategies.channels.networks import macs

layers = tf_keras.layers


@pytest.mark.parametrize("ranking", ["global", "layer"])
@pytest.mark.parametrize(("unit", "keep"), [("macs", 0.5), ("macs", 0.25), ("params", 0.5), ("channels", 0.5)])
def test_a_budget_is_met_and_not_by_far(ranking, unit, keep, model, context):
    result = PruneChannels(**{unit: keep}, ranking=ranking).apply(Candidate(model), context)
    if unit == "channels":
        left = sum(result.model.get_layer(name).output_shape[-1] for name in ("stem", "inner")) / 40
    else:
        count = {"macs": macs, "params": count_params}[unit]
        left = count(result.model) / count(model)
    assert keep - 0.07 <= left <= keep + 1e-9
    assert result.measured["oracle_difference"] < 1e-5
    assert result.model.get_layer("stem").output_shape == result.model.get_layer("outer").output_shape


def test_round_to_leaves_multiples(model, context):
    result = PruneChannels(macs=0.4, round_to=8).apply(Candidate(model), context)
    assert [result.model.get_layer(name).output_shape[-1] % 8 for name in ("stem", "inner", "outer")] == [0, 0, 0]


@pytest.mark.parametrize("criterion", ["l2", "reconstruction"])
def test_what_rounding_leaves_of_the_budget_is_spent(criterion, deep, context):
    budget = 0.7
    result = PruneChannels(macs=budget, round_to=4, criterion=criterion, images=32).apply(Candidate(deep), context)
    stem, *inner = (result.model.get_layer(name).filters for name in ("stem", *(f"inner{n}" for n in range(4))))
    kept = result.measured["macs_kept"]
    assert kept <= budget
    assert all(width % 4 == 0 for width in (stem, *inner))
    # No inner group may be wider: the multiply-adds of the two convolutions around it are linear in its width.
    assert min(inner) == 8 or kept + 2 * 64 * 9 * stem * 4 / macs(deep) > budget


def test_a_budget_out_of_reach_names_the_groups_and_what_was_reached(model, context):
    with pytest.raises(CompressError) as caught:
        PruneChannels(macs=0.01, most=0.5).apply(Candidate(model), context)
    assert "inner" in caught.value.received
    assert "0.01" in caught.value.received
    assert "allow_partial" in caught.value.fix
    result = PruneChannels(macs=0.01, most=0.5, allow_partial=True).apply(Candidate(model), context)
    assert result.model.get_layer("inner").output_shape[-1] == 12


def test_several_steps_reach_the_same_budget(model, context):
    training = dataclasses.replace(context, recovery=Recovery(epochs=1, batch_size=32, learning_rate=1e-3))
    result = PruneChannels(macs=0.5, steps=3).apply(Candidate(model), training)
    assert 0.43 <= macs(result.model) / macs(model) <= 0.5


def test_a_budget_in_bytes_is_that_of_the_exported_file(model, context, tmp_path):
    def size(of: tf_keras.Model) -> int:
        return export(Candidate(of), context.data, tmp_path / "model.tflite").path.stat().st_size

    result = PruneChannels(bytes=0.6).apply(Candidate(model), context)
    assert 0.5 <= size(result.model) / size(model) <= 0.6
    with pytest.raises(CompressError, match="clamped: "):
        PruneChannels(bytes=0.05).apply(Candidate(model), context)


def test_a_budget_in_latency_asks_the_board(model, context):
    asked: list[int] = []

    def measure(artifacts: Sequence[Artifact]) -> list[Measurement]:
        """A board whose time is what it has to read."""
        (size,) = (artifact.path.stat().st_size for artifact in artifacts)
        asked.append(size)
        return [Measurement("board", Latency(size / 1e4, size / 1e4, size / 1e4, size / 1e4, 100, 1))]

    result = PruneChannels(latency=0.8).apply(Candidate(model), dataclasses.replace(context, measure=measure))
    assert 2 <= len(asked) <= 14
    assert any(0.76 <= size / asked[0] <= 0.8 for size in asked)
    assert macs(result.model) < 0.8 * macs(model)
    for silent in (None, lambda artifacts: [Measurement("board", None, "it is switched off")]):
        with pytest.raises(CompressError, match=r"no board|switched off"):
            PruneChannels(latency=0.7).apply(Candidate(model), dataclasses.replace(context, measure=silent))


def test_reconstruction_meets_a_budget_in_bytes(model, context, tmp_path):
    def size(of: tf_keras.Model) -> int:
        return export(Candidate(of), context.data, tmp_path / "model.tflite").path.stat().st_size

    result = PruneChannels(bytes=0.8, criterion="reconstruction", images=64).apply(Candidate(model), context)
    assert 0.65 <= size(result.model) / size(model) <= 0.8


@example(0.0546875, 0.01171875, 0.5)
@given(st.floats(0.05, 0.95), st.floats(0.0, 0.4), st.floats(0.5, 2.5))
@settings(max_examples=500)
def test_the_largest_share_is_found_in_a_few_probes(goal, fixed, power):
    asked = []

    def measured(share: float) -> float:
        asked.append(share)
        return fixed + (1 - fixed) * share**power

    share, value = largest_share(measured, goal)
    assert len(asked) <= 12
    assert value == measured(share)
    if measured(1e-3) < 0.9 * goal:
        assert 0.85 * goal <= value <= goal


def test_shares_that_leave_the_same_units_are_measured_once():
    asked = []

    def measure(stay: np.ndarray) -> float:
        asked.append(int(stay.sum()))
        return stay.mean()

    share = measured_once(lambda share: np.arange(4) < int(4 * share), measure)
    assert [share(x) for x in (0.5, 0.6, 0.55, 1.0)] == [0.5, 0.5, 0.5, 1.0]
    assert asked == [2, 4]


def test_the_board_says_what_widths_are_rounded_to(model, context):
    board = dataclasses.replace(context, channel_multiple=8)
    result = PruneChannels(macs=0.4).apply(Candidate(model), board)
    assert [result.model.get_layer(name).output_shape[-1] % 8 for name in ("stem", "inner")] == [0, 0]
    result = PruneChannels(channels=0.85, round_to=1).apply(Candidate(model), board)
    assert [result.model.get_layer(name).output_shape[-1] % 8 for name in ("stem", "inner")] != [0, 0]


def test_the_limit_of_a_group_holds_over_all_steps(model, context):
    strategy = PruneChannels(macs=0.1, most=0.5, steps=3, allow_partial=True)
    result = strategy.apply(Candidate(model), context)
    assert result.model.get_layer("inner").output_shape[-1] == 12
    assert result.model.get_layer("stem").output_shape[-1] == 8
    assert result.measured["macs_kept"] == pytest.approx(macs(result.model) / macs(model))
    with pytest.raises(CompressError, match="clamped"):
        dataclasses.replace(strategy, allow_partial=False).apply(Candidate(model), context)


def test_a_rounding_that_leaves_nothing_to_cut_is_named(model, context):
    with pytest.raises(CompressError, match="multiples of 64"):
        PruneChannels(macs=0.5, round_to=64).apply(Candidate(model), context)
    with pytest.raises(CompressError, match="round_to"):
        PruneChannels(macs=0.5, round_to=64, allow_partial=True).apply(Candidate(model), context)
