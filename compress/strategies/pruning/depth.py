"""Depth pruning: whole residual blocks go where the branch adds least to the sum."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import tensorflow as tf
import tf_keras

from compress.candidate import Candidate
from compress.errors import CompressError
from compress.graph.channels.surgery import oracle_difference
from compress.graph.kernels import kernels
from compress.graph.residual import ResidualBlock, residual_blocks, without_blocks, without_branches
from compress.strategies.budget import Budget
from compress.strategies.pruning.cut import oracle_samples, require_equal
from compress.strategies.pruning.plan import Plan, Size
from compress.strategies.strategy import Context

_BATCH = 128
_LOG = logging.getLogger("compress")


def droppable_blocks(model: tf_keras.Model, context: Context) -> list[ResidualBlock]:
    """Return the blocks all of whose layers with kernels are selected.

    Raises:
        CompressError: if there is none.
    """
    names, weighted = context.selection.names(model), {kernel.layer.name for kernel in kernels(model)}
    blocks = [block for block in residual_blocks(model) if set(block.layers) & weighted <= names]
    if not blocks:
        raise CompressError(
            f"strategy.{context.stage}.blocks",
            expected="a residual block, all of whose layers may go, beside a shortcut that changes nothing",
            received=f"none in {model.name}",
            fix=f"Write strategy.{context.stage}.blocks=false, or widen its only and skip.",
        )
    return blocks


def take_out(candidate: Candidate, gone: tuple[ResidualBlock, ...], context: Context) -> tuple[Candidate, float]:
    """Return the candidate without these blocks, and how far it is from the model whose branches there give nothing.

    Raises:
        CompressError: if that is too far.
    """
    model = candidate.model
    _LOG.info("%s: residual blocks that go: %s", context.stage, ", ".join(block.add for block in gone))
    smaller, samples = without_blocks(model, gone), oracle_samples(context, model)
    difference = oracle_difference(without_branches(model, gone), smaller, samples)
    require_equal(difference, f"taking out {', '.join(block.add for block in gone[:5])}", context, model)
    lost = frozenset(name for block in gone for name in (*block.layers, block.add))
    guarantees = (g.without(lost) if g.layers & lost else g for g in candidate.guarantees)
    left = tuple(g for g, old in zip(guarantees, candidate.guarantees, strict=True) if g.layers or not old.layers)
    return candidate.evolve(model=smaller, guarantees=left), difference


def branch_shares(model: tf_keras.Model, blocks: Sequence[ResidualBlock], samples: np.ndarray) -> np.ndarray:
    """Return, for each block, the share of the squares of its sum that its branch makes up: [blocks], 0 to 1.

    A branch of zeros has none, and its block does nothing. ``samples``: unlabelled inputs. The measure is that of block
    influence (Men et al., ShortGPT, arXiv 2403.03853): how much a block changes what passes it.
    """
    pairs = []
    for block in blocks:
        inputs = model.get_layer(block.add).inbound_nodes[0].keras_inputs
        pairs.append([inputs[block.shortcut], inputs[1 - block.shortcut]])
    look = tf_keras.Model(model.inputs, pairs)

    def squares(x: tf.Tensor) -> tf.Tensor:
        return tf.stack([[tf.reduce_sum(tf.square(t)) for t in pair] for pair in look(x, training=False)])

    compiled, total = tf.function(squares, reduce_retracing=True), np.zeros((len(blocks), 2))
    for start in range(0, len(samples), _BATCH):
        total += compiled(tf.constant(samples[start : start + _BATCH])).numpy()
    return total[:, 1] / np.maximum(total.sum(1), 1e-30)


def lowest_blocks(
    plan: Plan, blocks: Sequence[ResidualBlock], shares: np.ndarray, budget: Budget, start: Size
) -> tuple[ResidualBlock, ...]:
    """Return the blocks that go when blocks and single units are ranked together and the budget is met.

    A block's score is its share divided by the mean of all blocks' shares, as the units' scores are divided by the mean
    of their group.
    """
    scores = shares / max(float(shares.mean()), 1e-30)
    inside = [_units_inside(plan, block) for block in blocks]

    def stay(threshold: float) -> np.ndarray:
        left = plan.below(threshold)
        for units, score in zip(inside, scores, strict=True):
            if score < threshold:
                left[units] = False
        return left

    every = np.concatenate([*plan.scores, scores])
    thresholds = np.append(np.unique(every[np.isfinite(every)]), np.inf)
    low, high = 0, len(thresholds) - 1
    while high - low > 1:
        middle = (low + high) // 2
        if plan.cost(stay(thresholds[middle]), budget.unit, start) <= budget.keep + 1e-9:
            high = middle
        else:
            low = middle
    return tuple(block for block, score in zip(blocks, scores, strict=True) if score < thresholds[high])


def _units_inside(plan: Plan, block: ResidualBlock) -> np.ndarray:
    """Return the units of the groups that only layers of the block write."""
    names = set(block.layers)
    own = [group.units for group in plan.channels.groups if group.writers and set(group.writers) <= names]
    return np.concatenate([np.zeros(0, np.int64), *own])
