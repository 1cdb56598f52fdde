"""Shares of channels that are given for each layer: how many each group keeps, and which residual blocks go."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
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
        """Return how many units of each group stay: at most its share, but one, its floor and a multiple at least."""
        found = []
        for group, floor in zip(groups, floors, strict=True):
            share, size = self.kept.get(group.name, 1.0), len(group)
            count = size if share == 1 else max(int(share * size + 1e-9), floor, 1)
            down = count // multiple * multiple
            found.append(count if count == size else down if down >= max(floor, 1) else min(down + multiple, size))
        return found

    def exceeded(self, groups: Sequence[Group], counts: Sequence[int]) -> list[str]:
        """Return the groups that keep more than their share, and more than one unit."""
        return [
            f"{group.name} ({count} of {len(group)} for a share of {share:g})"
            for group, count in zip(groups, counts, strict=True)
            if count > max((share := self.kept.get(group.name, 1.0)) * len(group), 1) + 1e-9
        ]

    @property
    def narrows(self) -> bool:
        """Whether a group outside these blocks loses channels."""
        return any(share < 1 for share in self.kept.values())


def read_shares(
    model: tf_keras.Model,
    groups: Sequence[Group],
    names: Iterable[str],
    share: float,
    single: Mapping[str, float] | None,
    where: str,
) -> Shares:
    """Return what is asked of each group.

    Args:
        model: that the groups are of.
        groups: those that may lose channels.
        names: layers that write channels, and more of these groups than they may: a rule may mean one of them.
        share: of the groups that ``single`` says nothing of; 0: the block around them goes.
        single: see :data:`LayerShares`; a group goes by the least share of the layers that write it, of those outside
            blocks that go.
        where: the key of ``single``, for the error.

    Raises:
        CompressError: if a rule of ``single`` matches none of the names.
    """
    expected = "names of layers, or regular expressions on them, whose channels this stage may remove"
    of_layer = by_layer(names, share, single, where, expected)
    blocks = residual_blocks(model)

    def asked(group: Group, beside: Collection[str] = ()) -> list[float]:
        return [of_layer[name] for name in group.writers if name in of_layer and name not in beside]

    nothing = [group for group in groups if set(asked(group)) == {0}]
    around = {group.name: _innermost(group, blocks) for group in nothing}
    gone = tuple(block for block in blocks if block in around.values())
    inside = {name for block in gone for name in block.layers}
    kept, outside = {}, []
    for group in groups:
        least = min(asked(group, inside), default=1.0)
        if least == 0:
            outside.append(Skipped(group.name, _NO_BLOCK, True))
        kept[group.name] = least or 1.0
    return Shares(kept, gone, tuple(outside))


def _innermost(group: Group, blocks: Iterable[ResidualBlock]) -> ResidualBlock | None:
    """Return the smallest block inside which the channels of the group are written; None if there is none."""
    around = [block for block in blocks if group.writers and set(group.writers) <= set(block.layers)]
    return min(around, key=lambda block: len(block.layers), default=None)
