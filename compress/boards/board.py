"""The contract of a board."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from compress.candidate import Artifact, Measurement


class Board(ABC):
    """A place where an artifact runs. Subclasses are frozen dataclasses whose fields are the configuration."""

    name: ClassVar[str]

    channel_multiple: int = 1
    """It computes as long for fewer channels than the next multiple of this."""

    @abstractmethod
    def measure(self, artifact: Artifact) -> Measurement:
        """Run the artifact and return its latency; a failure of the board is returned, not raised."""
