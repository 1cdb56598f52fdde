"""Shares of channels that are given for each layer: how many each group keeps, and which residual blocks go."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import tf_keras
from annotated_types import Ge, Le, MinLen
from pydantic import AfterValidator

from compress.candidate import Skipped
from compress.graph.channels.groups import Group
from compress.graph.residual import ResidualBlock, residual_blocks
from compress.strategies.by_layer import by_layer, patterns

_NO_BLOCK = "it stands in no residual block that can go"
Share = Annotated[float, Ge(0), Le(1)]
LayerShares = Annotated[dict[str, Share], MinLen(1), AfterValidator(patterns)]
"""Regular expression on the whole name of a layer -> share of the channels that it keeps; the first that matches."""


@dataclass(frozen=True)
class Shares:
    """What is asked of the groups of a model.

    Args:
        kept: name of a group -> share of its channels that stays; 1 in blocks that go.
        gone: the blocks around groups that keep nothing.
        outside: groups that should keep nothing, and stand in no such block.
    """

    kept: Mapping[str, float]
    gone: tuple[ResidualBlock, ...]
    outside: tuple[Skipped, ...]

    def counts(self, groups: Sequence[Group], floors: Sequence[int], multiple: int) -> list[int]:
        """Return how many units of each group stay: at least its floor, and a multiple, where it has that many."""
        found = []
        for group, floor in zip(groups, floors, strict=True):
            share, size = self.kept.get(group.name, 1.0), len(group)
            count = size if share == 1 else max(math.ceil(share * size - 1e-9), floor)
            found.append(min(-(-count // multiple) * multiple, size))
        return found

    @property
    def narrows(self) -> bool:
        """Whether a group outside these blocks loses channels."""
        return any(share < 1 for share in self.kept.values())


def read_shares(
    model: tf_keras.Model, groups: Sequence[Group], share: float, single: Mapping[str, float] | None, where: str
) -> Shares:
    """Return what is asked of each group.

    Args:
        model: that the groups are of.
        groups: those that may lose channels.
        share: of the groups that ``single`` says nothing of; 0: the block around them goes.
        single: see :data:`LayerShares`; a group goes by the least share of the layers that write it.
        where: the key of ``single``, for the error.

    Raises:
        CompressError: if a rule of ``single`` matches no layer that writes one of the groups.
    """
    writers = list(dict.fromkeys(name for group in groups for name in group.writers))
    expected = "names of layers, or regular expressions on them, whose channels this stage may remove"
    of_layer = by_layer(writers, share, single, where, expected)
    wanted = {group.name: min((of_layer[name] for name in group.writers), default=1.0) for group in groups}
    blocks = {block.add: block for block in residual_blocks(model)}
    around = {group.name: _innermost(group, blocks.values()) for group in groups if wanted[group.name] == 0}
    gone = tuple(block for block in blocks.values() if block in around.values())
    outside = tuple(Skipped(name, _NO_BLOCK, True) for name, block in around.items() if block is None)
    inside = {name for block in gone for name in block.layers}
    kept = {g.name: 1.0 if g.name in around or set(g.writers) <= inside else wanted[g.name] for g in groups}
    return Shares(kept, gone, outside)


def _innermost(group: Group, blocks: Iterable[ResidualBlock]) -> ResidualBlock | None:
    """Return the smallest block inside which the channels of the group are written; None if there is none."""
    around = [block for block in blocks if group.writers and set(group.writers) <= set(block.layers)]
    return min(around, key=lambda block: len(block.layers), default=None)
