"""The table of handlers: which layer does what with channels."""

from __future__ import annotations

from collections.abc import Mapping

from compress.graph.channels.moving import moving_handlers
from compress.graph.channels.operations import operation_handlers
from compress.graph.channels.trace import Handler
from compress.graph.channels.weighted import weighted_handlers


def default_handlers() -> dict[type, Handler]:
    """Return the handlers of Keras' own layers by class, a new table each time."""
    weighted = {**weighted_handlers(), **operation_handlers()}
    return {**weighted, **moving_handlers(weighted)}


def with_handler(kind: type, handler: Handler, handlers: Mapping[type, Handler] | None = None) -> dict[type, Handler]:
    """Return the table with a handler for one more layer class.

    The other way is a method ``trace_channels(self, call)`` of the layer itself.
    """
    return {**(default_handlers() if handlers is None else handlers), kind: handler}
