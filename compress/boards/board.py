"""The contract of a board."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import ClassVar

from compress.candidate import Artifact, Measurement


class Board(ABC):
    """A place where an artifact runs. Subclasses are frozen dataclasses whose fields are the configuration."""

    name: ClassVar[str]

    channel_multiple: int = 1
    """It computes as long for fewer channels than the next multiple of this."""

    @property
    def place(self) -> str:
        """What its answers depend on beside its fields: empty, unless it times this machine."""
        return ""

    def unreachable(self) -> str | None:
        """Say why nothing at all can be measured there now, if that is known; None: it is there."""
        return None

    @abstractmethod
    def measure(self, artifact: Artifact) -> Measurement:
        """Return what the board says of the artifact; a failure of the board is returned, not raised."""

    def measure_all(self, artifacts: Sequence[Artifact]) -> list[Measurement]:
        """Return what it says of each, so that they can be compared: in turns, where its times are noisy."""
        return [self.measure(artifact) for artifact in artifacts]

    def lacks(self, operators: Collection[str]) -> frozenset[str]:
        """Return which of a file's operators the board is known to have no kernel for; none, if it does not say."""
        return frozenset()
