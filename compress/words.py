"""Numbers with their nouns, for what users read."""

from __future__ import annotations


def counted(number: int, one: str, many: str = "") -> str:
    """Return ``1 layer`` or ``1,234 layers``; ``many``: the plural, where it is not ``one`` with an s."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"
