"""Channels in another order: the same network, with the units of a group renumbered in every layer that knows them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import tf_keras

from compress.graph.channels.groups import Channels, Group, IndexMap
from compress.graph.rewrite import copy_model


def can_be_ordered(group: Group) -> bool:
    """Say whether every weight of the group holds all its units, each as often: then any order of them will do."""
    counts = [np.bincount(member.units, minlength=len(group)) for member in group.members]
    return all((count == count[0]).all() for count in counts)


@dataclass(frozen=True)
class Order:
    """New orders of groups: ``moves``: for each (layer, attribute) the axes that change, and what is taken where."""

    moves: Mapping[tuple[str, str], list[tuple[int, np.ndarray]]]
    indices: Mapping[tuple[str, str], int]
    """Position of each weight among those of its layer."""

    @classmethod
    def of(cls, channels: Channels, orders: Mapping[str, np.ndarray]) -> Order:
        """Return the orders in which channel ``i`` of a layer is what was channel ``order[i]``; layer -> order.

        Each layer is the only one that writes its group, and the group :func:`can_be_ordered`.
        """
        moves: dict[tuple[str, str], list[tuple[int, np.ndarray]]] = {}
        indices: dict[tuple[str, str], int] = {}
        for group in channels.groups:
            (writer, *others) = group.writers or ("",)
            if writer not in orders or others:
                continue
            written = next(m for m in group.members if m.weight.layer == writer and not m.reads)
            unit_at = written.units[np.argsort(written.places)]
            wanted = np.empty_like(unit_at)
            wanted[unit_at] = unit_at[orders[writer]]
            for member in group.members:
                key = member.weight.layer, member.weight.attribute
                size = channels.model.get_layer(key[0]).weights[member.weight.index].shape[member.axis]
                moves.setdefault(key, []).append((member.axis, _taken(member, wanted, int(size))))
                indices[key] = member.weight.index
        return cls(moves, indices)

    def model(self, model: tf_keras.Model) -> tf_keras.Model:
        """Return a copy of the model with its channels in the new order."""
        result = copy_model(model)
        for (layer, attribute), index in self.indices.items():
            variable = result.get_layer(layer).weights[index]
            variable.assign(self.array(f"{layer}/{attribute}", np.asarray(variable)))
        return result

    def array(self, name: str, value: np.ndarray, without: int | None = None) -> np.ndarray:
        """Return an array in the shape of the weight ``"<layer>/<attribute>"`` in the new order.

        The axis ``without`` stays as it is, and may have another length.
        """
        layer, _, attribute = name.rpartition("/")
        for axis, taken in self.moves.get((layer, attribute), []):
            value = value if axis == without else np.take(value, taken, axis)
        return value


def _taken(member: IndexMap, wanted: np.ndarray, size: int) -> np.ndarray:
    """Return where each place of an axis takes its values from; places of one unit keep their order."""
    table = member.places[np.argsort(member.units, kind="stable")].reshape(len(wanted), -1)
    index = np.arange(size)
    index[table] = table[wanted]
    return index
