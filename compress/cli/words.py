"""Command lines of words ``key=value``, of the commands that Hydra does not compose."""

from __future__ import annotations

from collections.abc import Sequence

from compress.errors import CompressError, did_you_mean


def key_values(arguments: Sequence[str], keys: Sequence[str], unlisted: Sequence[str] = ()) -> dict[str, str]:
    """Return key -> value; ``unlisted``: keys that are taken, too, and not offered.

    Raises:
        CompressError: if a word has no ``=``, or its key is unknown.
    """
    values: dict[str, str] = {}
    for argument in arguments:
        key, sign, value = argument.partition("=")
        if not sign or key not in (*keys, *unlisted):
            raise CompressError(
                argument,
                expected=f"words of the form key=value; the keys are {', '.join(keys)}",
                received=key,
                fix=did_you_mean(key, keys),
            )
        values[key] = value
    return values
