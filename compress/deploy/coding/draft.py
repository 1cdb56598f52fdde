"""Parts of the packed file that are weighed before they are written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from compress.deploy.coding.frequencies import Frequencies


@dataclass(frozen=True)
class Tables:
    """The frequency tables that streams have brought so far; later streams may use them, too."""

    known: tuple[Frequencies, ...] = ()

    def of_alphabet(self, size: int) -> list[tuple[int, Frequencies]]:
        """Return number and table of those for an alphabet of ``size`` symbols."""
        return [(i, table) for i, table in enumerate(self.known) if len(table.parts) == size]

    def with_table(self, table: Frequencies) -> Tables:
        """Return these and one more."""
        return replace(self, known=(*self.known, table))


@dataclass(frozen=True)
class Draft:
    """Bytes that could be written. Most drafts lose against another one and never are."""

    size: float
    """Number of bytes; of streams, almost exactly."""
    tables: Tables = field(default_factory=Tables)
    """Those known after it."""
    write: Callable[[], bytes] = bytes
    """Returns the bytes."""

    @classmethod
    def of(cls, content: bytes, tables: Tables) -> Draft:
        """Return the draft of bytes that are there already."""
        return cls(len(content), tables, lambda: content)

    def after(self, *earlier: Draft | bytes) -> Draft:
        """Return the draft of all that, and then this."""
        parts = [Draft.of(part, self.tables) if isinstance(part, bytes) else part for part in earlier]
        size = sum(part.size for part in parts) + self.size
        return Draft(size, self.tables, lambda: b"".join(part.write() for part in (*parts, self)))


def smallest(drafts: list[Draft]) -> Draft:
    """Return the draft with the fewest bytes, the first of several."""
    return min(drafts, key=lambda draft: draft.size)
