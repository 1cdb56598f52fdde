"""A cut carried out, and compared with the masked original; what may be cut, and why the rest may not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tf_keras

from compress.candidate import Candidate, Skipped
from compress.errors import CompressError
from compress.graph.channels.groups import Channels, Group
from compress.graph.channels.surgery import oracle_difference, remove_channels
from compress.strategies.pruning.gradients import inputs_of
from compress.strategies.strategy import Context

_ORACLE_TOLERANCE = 1e-4


def cut(
    candidate: Candidate,
    oracle: tf_keras.Model,
    channels: Channels,
    stay: np.ndarray,
    groups: Sequence[Group],
    context: Context,
) -> tuple[Candidate, float]:
    """Return the candidate without the channels that go, and how far it is from the oracle: all channels, unread."""
    model = remove_channels(channels, stay)
    difference = oracle_difference(oracle, model, oracle_samples(context, model))
    require_equal(difference, _lost(groups, stay), context, candidate.model)
    kept = channels.kept(stay | channels.pinned)
    guarantees = [g.cut(lambda name, value: channels.cut(name, value, kept)) for g in candidate.guarantees]
    return candidate.evolve(model=model, guarantees=tuple(guarantees)), difference


def require_equal(difference: float, done: str, context: Context, model: tf_keras.Model) -> None:
    """Refuse a cut that is not what its oracle says.

    Raises:
        CompressError: saying after what.
    """
    if not difference <= _ORACLE_TOLERANCE:
        own = [layer for layer in model.layers if not type(layer).__module__.startswith("tf_keras.")]
        names = ", ".join(layer.name for layer in own[:3])
        advice = (
            f" A layer of your own ({names}) that mixes channels says so in a method trace_channels." if own else ""
        )
        raise CompressError(
            f"stage {context.stage}",
            expected=f"the outputs of the masked original, within {_ORACLE_TOLERANCE:g}",
            received=f"a difference of {difference:.2g} after {done}",
            fix=f"Leave the layers out with strategy.{context.stage}.skip, and report this model.{advice}",
        )


def may_go(group: Group, names: frozenset[str]) -> bool:
    """Say whether a group can lose units and all layers that write it are selected."""
    owners = {member.weight.layer for member in group.members}
    return group.kept_because is None and bool(owners) and set(group.writers) & owners <= names


def left_out(channels: Channels, names: frozenset[str]) -> list[Skipped]:
    """Return what cannot be cut and why, of what is selected."""
    listed = [Skipped(name, reason) for name, reason in channels.trace.unsupported.items() if name in names]
    for group in channels.groups:
        if group.kept_because is not None and group.members and set(group.writers) & names:
            listed.append(Skipped(group.name, group.kept_because, True))
    return listed


def oracle_samples(context: Context, model: tf_keras.Model) -> list[np.ndarray]:
    """Return samples to compare a cut with its oracle on, for each input."""
    found = inputs_of(model, context.data.train.x[:16].astype(np.float32), f"stage {context.stage}")
    return list(found) if isinstance(found, tuple) else [found]


def _lost(groups: Sequence[Group], stay: np.ndarray) -> str:
    parts = [f"{group.name} ({int((~stay[group.units]).sum())} of {len(group)})" for group in groups]
    return f"cutting {', '.join(parts[:5])}{', ...' if len(parts) > 5 else ''}"
