"""The table of handlers: which layer does what with channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.graph.channels.moving import moving_handlers
from compress.graph.channels.operations import operation_handlers
from compress.graph.channels.trace import Call, ChannelIds, Handler
from compress.graph.channels.weighted import weighted_handlers


def default_handlers() -> dict[type, Handler]:
    """Return the handlers of Keras' own layers by class, a new table each time."""
    weighted = {**weighted_handlers(), **operation_handlers()}
    return {**weighted, **moving_handlers(weighted)}


def with_handler(kind: type, handler: Handler, handlers: Mapping[type, Handler] | None = None) -> dict[type, Handler]:
    """Return the table with a handler for one more layer class, for :class:`Channels`.

    Strategies make their own tables: for these, a layer class has a method ``trace_channels(self, call)``, which may
    also be given to a class of somebody else's: :func:`register_handler`.
    """
    return {**(default_handlers() if handlers is None else handlers), kind: handler}


def register_handler(kind: type, handler: Handler) -> None:
    """Have all strategies ask ``handler`` what layers of a class that you cannot edit do with channels.

    The class itself remembers it, as its method ``trace_channels``; nothing is kept here.
    """

    def trace_channels(self: Any, call: Call) -> list[ChannelIds]:
        return handler(call)

    kind.trace_channels = trace_channels  # type: ignore[attr-defined]
