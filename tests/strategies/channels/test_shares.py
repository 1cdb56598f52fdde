"""Channel pruning with a share for each layer: one cut, blocks among it, repaired as a whole where it is repaired."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tf_keras
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.candidate import Candidate
from compress.errors import CompressError
from compress.graph.channels.groups import Group
from compress.graph.channels.trace import Event
from compress.graph.kernels import kernels
from compress.graph.selection import Rule, Selection
from compress.graph.walk import Walk
from compress.strategies.pruning.channels import PruneChannels
from compress.strategies.pruning.shares import Shares
from compress.strategies.repair import change_of_logits, outputs_of

layers = tf_keras.layers
INNER = Selection(only=(Rule(name="inner."),))


@pytest.fixture
def inner(context, deep):
    return dataclasses.replace(context, selection=INNER, reference=deep)


def widths(model: tf_keras.Model) -> dict[str, int]:
    return {layer.name: layer.filters for layer in model.layers if isinstance(layer, layers.Conv2D)}


@pytest.mark.parametrize("criterion", ["l2", "reconstruction"])
def test_each_layer_keeps_its_share(criterion, deep, inner):
    shares = {"inner0": 0.25, "inner[12]": 0.75, "inner1": 0.5}
    pruning = PruneChannels(channels=0.5, layer_channels=shares, criterion=criterion, images=64)
    result = pruning.apply(Candidate(deep), inner)
    before, after = widths(deep), widths(result.model)
    # The first rule that matches counts; the last layer keeps what no rule says.
    wanted = {"inner0": 0.25, "inner1": 0.75, "inner2": 0.75, "inner3": 0.5}
    assert after == {name: round(width * wanted.get(name, 1.0)) for name, width in before.items()}
    assert result.measured["channels_kept"] == pytest.approx(np.mean(list(wanted.values())))
    assert result.measured["oracle_difference"] < 1e-5
    (guarantee,) = result.guarantees
    assert guarantee.channels == {name: after[name] for name in wanted}
    assert guarantee.check(result.model) == []


def test_the_channels_of_largest_norm_stay(deep, inner):
    pruning = PruneChannels(channels=0.5, layer_channels={"inner0": 0.25}, criterion="l1_filter")
    result = pruning.apply(Candidate(deep), inner)
    for name, count in (("inner0", 2), ("inner1", 4)):
        (kernel,) = (kernel.value for kernel in kernels(deep) if kernel.layer.name == name)
        largest = np.sort(np.argsort(np.abs(kernel).sum((0, 1, 2)))[-count:])
        left = result.model.get_layer(name).kernel.numpy()
        np.testing.assert_array_equal(left, kernel[..., largest])


@pytest.mark.parametrize("criterion", ["l2", "reconstruction"])
def test_blocks_of_layers_that_keep_nothing_go_and_others_may_stay_whole(criterion, deep, inner):
    shares = {"inner1": 0, "inner2": 1}
    pruning = PruneChannels(channels=0.5, layer_channels=shares, criterion=criterion, images=64)
    result = pruning.apply(Candidate(deep), inner)
    left = widths(result.model)
    assert not {"inner1", "outer1"} & left.keys()
    assert [left[name] / widths(deep)[name] for name in ("inner0", "inner2", "inner3")] == [0.5, 1, 0.5]
    assert result.measured["blocks_removed"] == 1
    assert result.measured["oracle_difference"] < 1e-5


@pytest.mark.parametrize("criterion", ["l2", "reconstruction"])
def test_rules_of_only_may_name_a_layer_of_a_block_that_goes(criterion, deep, context):
    """As a search selects: one rule for each layer."""
    selection = Selection(only=tuple(Rule(name=f"inner{number}") for number in range(4)))
    chosen = dataclasses.replace(context, selection=selection, reference=deep)
    pruning = PruneChannels(channels=0.5, layer_channels={"inner1": 0}, criterion=criterion, images=64)
    left = widths(pruning.apply(Candidate(deep), chosen).model)
    assert [left.get(f"inner{number}", 0) for number in range(4)] == [4, 0, 4, 4]


def test_what_layers_of_a_block_that_goes_are_given_says_nothing_of_the_sum_outside(deep, context):
    pruning = PruneChannels(channels=0.5, layer_channels={"(inner|outer)1": 0})
    left = widths(pruning.apply(Candidate(deep), dataclasses.replace(context, reference=deep)).model)
    assert set(left.values()) == {4}
    assert not {"inner1", "outer1"} & left.keys()


def test_a_layer_that_cannot_lose_channels_may_have_a_share_and_is_listed(deep, context):
    chosen = dataclasses.replace(context, reference=deep)
    shares = {"outer.": 0.5, "logits": 0.5}
    pruning = PruneChannels(channels=0.75, layer_channels=shares, criterion="reconstruction", images=64)
    result = pruning.apply(Candidate(deep), chosen)
    assert {widths(result.model)[f"{part}0"] for part in ("inner", "outer")} == {6, 8}
    assert any("one linear layer reads" in item.reason for item in result.skipped)
    assert len(result.skipped) == len(set(result.skipped))


@settings(deadline=None, max_examples=60)
@given(
    size=st.integers(1, 40), share=st.floats(0.01, 0.99), most=st.floats(0.1, 1), multiple=st.sampled_from([1, 4, 8])
)
def test_a_group_keeps_at_most_its_share_unless_it_may_not(size, share, most, multiple):
    group = Group(0, np.arange(size), (), (Event("conv", "writes", np.arange(size)),), None)
    floor = max(1, int(np.ceil((1 - most) * size - 1e-9)))
    shares = Shares({"conv": share}, (), ())
    (count,) = shares.counts([group], [floor], multiple)
    assert floor <= count <= size
    assert count % multiple == 0 or count == size
    largest = int((share * size + 1e-9) // multiple) * multiple
    if largest >= floor:
        assert count == largest
        assert not shares.exceeded([group], [count])
    elif count > max(share * size, 1) + 1e-9:
        assert shares.exceeded([group], [count]) == [f"conv ({count} of {size} for a share of {share:g})"]


@pytest.mark.parametrize("fields", [{"most": 0.6}, {"round_to": 8}])
@pytest.mark.parametrize("criterion", ["l2", "reconstruction"])
def test_a_share_that_may_not_be_kept_to_is_refused_or_kept_as_far_as_may_be(fields, criterion, deep, inner):
    fields = {"channels": 0.75, "layer_channels": {"inner0": 0.25}, "criterion": criterion, "images": 64, **fields}
    with pytest.raises(CompressError, match=r"inner0 .* for a share of 0\.25") as caught:
        PruneChannels(**fields).apply(Candidate(deep), inner)
    assert caught.value.where == "strategy.prune_channels.layer_channels"
    if "most" in fields:
        result = PruneChannels(allow_partial=True, **fields).apply(Candidate(deep), inner)
        assert widths(result.model)["inner0"] == 4


def test_what_follows_a_block_that_goes_makes_up_for_it(deep, inner, data):
    """The logits of the original, on images that nothing was solved on."""
    chosen = dataclasses.replace(inner, selection=Selection(only=(Rule(name="inner1"),)))
    x = data.test.x.astype(np.float32)
    lost = {}
    for criterion in ("l2", "reconstruction"):
        result = PruneChannels(channels=0, criterion=criterion, images=200).apply(Candidate(deep), chosen)
        assert "inner1" not in {layer.name for layer in result.model.layers}
        lost[criterion] = change_of_logits(deep, outputs_of(result.model, x), outputs_of(deep, x))
    assert lost["reconstruction"] < 0.5 * lost["l2"]


def test_one_repair_towards_the_original_is_better_than_one_after_the_other(deep, inner, data):
    x, shares = data.test.x.astype(np.float32), {"inner0": 0.25, "inner1": 0.5, "inner2": 0.75, "inner3": 0.25}
    settings = {"criterion": "reconstruction", "ranking": "layer", "images": 200}
    together = PruneChannels(channels=0.25, layer_channels=shares, **settings).apply(Candidate(deep), inner)
    apart = Candidate(deep)
    for name, share in shares.items():
        chosen = dataclasses.replace(inner, selection=Selection(only=(Rule(name=name),)))
        apart = PruneChannels(channels=share, **settings).apply(apart, chosen)
    assert widths(together.model) == widths(apart.model)
    wanted = outputs_of(deep, x)
    lost = [change_of_logits(deep, outputs_of(made.model, x), wanted) for made in (together, apart)]
    assert lost[0] < lost[1]


def test_a_silenced_input_is_zero_from_there_on(deep, data):
    x = data.train.x[:20].astype(np.float32)
    for step in (walk := Walk(deep, deep, x)):
        if step.layer.name == "sum1":
            (place,) = [n for n, t in enumerate(step.node.keras_inputs) if t.node.layer.name != "sum0"]
            walk.silence(step, place)
            other = step.changed_inputs[1 - place]
            assert not step.untouched
        if step.layer.name == "inner2":
            np.testing.assert_array_equal(step.changed_inputs[0], other)
            assert np.abs(step.inputs[0] - other).max() > 0


@pytest.mark.parametrize(
    "fields",
    [{}, {"macs": 0.5}, {"channels": 0.5, "steps": 2}, {"channels": 0.5, "blocks": True}],
    ids=["no channels", "macs", "steps", "blocks"],
)
def test_what_does_not_go_with_shares_is_refused(fields):
    with pytest.raises(ValueError, match="layer_channels"):
        PruneChannels(layer_channels={"conv": 0.5}, **fields)


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_is_between_nothing_and_all(share):
    with pytest.raises(ValueError, match="equal to"):
        PruneChannels(channels=0.5, layer_channels={"conv": share})


def test_a_rule_that_matches_no_layer_is_refused(deep, inner):
    with pytest.raises(CompressError, match="nearest to it: inner3") as caught:
        PruneChannels(channels=0.5, layer_channels={"iner3": 0.5}).apply(Candidate(deep), inner)
    assert caught.value.where == "strategy.prune_channels.layer_channels"


def test_shares_that_leave_everything_are_refused(deep, inner):
    with pytest.raises(CompressError, match="channels that may go"):
        PruneChannels(channels=0.5, layer_channels={".*": 1}).apply(Candidate(deep), inner)
