"""Channel pruning: residual blocks that go as a whole."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tf_keras

from compress.candidate import Candidate
from compress.errors import CompressError
from compress.graph.rewrite import copy_model, rewrite
from compress.graph.selection import Rule, Selection
from compress.strategies.pruning.channels import PruneChannels
from compress.strategies.pruning.prune import Prune
from tests.strategies.channels.networks import macs

layers = tf_keras.layers


def test_the_block_whose_branch_adds_least_goes_as_a_whole(deep, context):
    pruned = Prune(sparsity=0.5).apply(Candidate(deep), context)
    result = PruneChannels(macs=0.76, blocks=True, images=64).apply(pruned, context)
    names = {layer.name for layer in result.model.layers}
    assert not names & {"inner2", "outer2", "sum2"}
    assert {"inner0", "outer0"} <= names
    assert 0.7 <= macs(result.model) / macs(deep) <= 0.76
    assert result.measured["oracle_difference"] < 1e-5
    assert result.measured["blocks_removed"] == 1
    assert all(guarantee.layers <= names for guarantee in result.guarantees)
    assert all(guarantee.check(result.model) == [] for guarantee in result.guarantees)
    kept = PruneChannels(macs=0.6, images=64).apply(pruned, context)
    assert "sum2" in {layer.name for layer in kept.model.layers}


def test_where_a_block_is_enough_no_channel_goes(deep, context):
    result = PruneChannels(macs=0.79, blocks=True, images=64).apply(Candidate(deep), context)
    assert result.measured["blocks_removed"] == 1
    assert {layer.filters for layer in result.model.layers if isinstance(layer, layers.Conv2D)} == {8}


def test_a_share_of_the_channels_counts_those_of_the_blocks_that_go(deep, context):
    result = PruneChannels(channels=0.6, blocks=True, images=64).apply(Candidate(deep), context)
    widths = {x.name: x.filters for x in result.model.layers if isinstance(x, layers.Conv2D)}
    left = sum(width for name, width in widths.items() if name.startswith(("stem", "inner")))
    assert result.measured["blocks_removed"] >= 1
    assert 0.5 <= left / 40 <= 0.6
    assert result.measured["channels_kept"] == pytest.approx(left / 40)


def test_blocks_that_are_not_selected_stay(deep, context):
    chosen = dataclasses.replace(context, selection=Selection(skip=(Rule(name="outer2"),)))
    result = PruneChannels(macs=0.6, blocks=True, images=64).apply(Candidate(deep), chosen)
    assert "outer2" in {layer.name for layer in result.model.layers}


def test_without_any_channel_the_block_goes(deep, context):
    chosen = dataclasses.replace(context, selection=Selection(only=(Rule(name="inner[12]"),)))
    pruned = Prune(sparsity=0.5).apply(Candidate(deep), context)
    result = PruneChannels(channels=0).apply(pruned, chosen)
    names = {layer.name for layer in result.model.layers}
    assert not names & {"inner1", "outer1", "sum1", "inner2", "outer2", "sum2"}
    assert {"inner0", "outer0", "sum0", "inner3"} <= names
    assert result.measured["blocks_removed"] == 2
    assert result.measured["oracle_difference"] < 1e-5
    assert all(guarantee.layers <= names for guarantee in result.guarantees)
    x = np.random.default_rng(0).uniform(0, 16, (8, 8, 8, 1)).astype(np.float32)
    silent = copy_model(pruned.model)
    for name in ("outer1", "outer2"):
        silent.get_layer(name).set_weights([np.zeros_like(w) for w in silent.get_layer(name).get_weights()])
    np.testing.assert_allclose(result.model(x), silent(x), rtol=1e-4, atol=1e-5)


def test_of_blocks_inside_each_other_the_inner_one_goes(context):
    image = tf_keras.Input((8, 8, 1))
    start = layers.Conv2D(8, 3, padding="same", name="stem")(image)
    x = layers.Conv2D(8, 3, padding="same", name="first")(start)
    y = layers.Conv2D(8, 3, padding="same", activation="relu", name="inner")(x)
    x = layers.Add(name="inner_sum")([x, layers.Conv2D(8, 3, padding="same", name="outer")(y)])
    x = layers.Add(name="outer_sum")([start, layers.Conv2D(8, 3, padding="same", name="last")(x)])
    nested = rewrite(tf_keras.Model(image, layers.Dense(10)(layers.GlobalAveragePooling2D()(x))))
    chosen = dataclasses.replace(context, selection=Selection(only=(Rule(name="inner"),)))
    names = {layer.name for layer in PruneChannels(channels=0).apply(Candidate(nested), chosen).model.layers}
    assert not names & {"inner", "outer", "inner_sum"}
    assert {"first", "last", "outer_sum"} <= names


def test_channels_in_no_block_cannot_all_go(deep, context):
    chosen = dataclasses.replace(context, selection=Selection(only=(Rule(name="stem"),)))
    with pytest.raises(CompressError, match="channels inside a residual block"):
        PruneChannels(channels=0).apply(Candidate(deep), chosen)
    with pytest.raises(ValueError, match="channels=0"):
        PruneChannels(channels=0, steps=2)
    with pytest.raises(ValueError, match="round_to=8 only beside channels above 0"):
        PruneChannels(channels=0, round_to=8)


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ValueError, match="reconstruction"):
        PruneChannels(criterion="reconstruction", blocks=True)
    with pytest.raises(ValueError, match=r"strength=1\.0 only beside a regularisation"):
        PruneChannels(strength=1.0)
    with pytest.raises(ValueError, match="one of macs"):
        PruneChannels(bytes=0.5, macs=0.5)


def test_blocks_where_there_are_none(model, context):
    image = tf_keras.Input((8, 8, 1))
    x = layers.Conv2D(8, 3, name="conv")(image)
    plain = rewrite(tf_keras.Model(image, layers.Dense(10, name="logits")(layers.GlobalAveragePooling2D()(x))))
    with pytest.raises(CompressError, match="residual block"):
        PruneChannels(blocks=True).apply(Candidate(plain), context)
