"""The one exception that a user's mistake raises, and the paragraph that it prints."""

from __future__ import annotations

import difflib
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence

from compress.quiet import ending_with_the_reader

USER_ERROR = 2
"""Exit code after a user's mistake."""


class CompressError(Exception):
    """A mistake that the user can mend: says where, what was expected, what was received, what to do.

    Entry points print it as one paragraph and exit with code 2.
    """

    def __init__(self, where: str, *, expected: str, received: str, fix: str) -> None:
        self.where = where
        self.expected = expected
        self.received = received
        self.fix = fix
        super().__init__(f"{where}: expected {_unended(expected)}; received {_unended(received)}. {fix}")

    def __reduce__(self) -> tuple[object, ...]:
        """Survive pickling, so that launchers in other processes report the same error."""
        return (_rebuild, (self.where, self.expected, self.received, self.fix))


class GivenUp(Exception):
    """A pipeline was stopped because a search has no hope for it: neither a mistake nor a defect."""


def paragraph(error: CompressError) -> str:
    """Return the error as it is shown to the user."""
    return textwrap.fill(f"Error in {error}", width=110, break_long_words=False, break_on_hyphens=False)


def run_command(body: Callable[[], None]) -> int:
    """Run what a small command does and return its exit code; a user's mistake is printed as one paragraph."""
    with ending_with_the_reader():
        return _run(body)


def _run(body: Callable[[], None]) -> int:
    try:
        body()
    except CompressError as error:
        print(paragraph(error), file=sys.stderr)
        return USER_ERROR
    except OSError as error:
        failure = CompressError(
            str(error.filename or "files"),
            expected="a file that can be read, a folder that can be written",
            received=str(error.strerror or error),
            fix="Check the path and the rights.",
        )
        print(paragraph(failure), file=sys.stderr)
        return USER_ERROR
    return 0


def _unended(part: str) -> str:
    """Return a part of the paragraph without a full stop of its own, as quoted messages have one."""
    return part if part.endswith("...") else part.removesuffix(".")


def _rebuild(where: str, expected: str, received: str, fix: str) -> CompressError:
    return CompressError(where, expected=expected, received=received, fix=fix)


def nearest(name: str, valid: Iterable[str], *, most: int = 3) -> list[str]:
    """Return the valid names most like ``name``, best first; all of them (sorted) when none is alike."""
    names = sorted(set(valid))
    return _alike(name, names, most) or names


def _alike(name: str, names: Sequence[str], most: int) -> list[str]:
    return difflib.get_close_matches(name, names, n=most, cutoff=0.5)


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """Return the sentence that names the valid spellings nearest to ``name``."""
    names = nearest(name, valid)
    if not names:
        return "There is no valid name here."
    return f"Valid names{' nearest to it' if _alike(name, names, 1) else ''}: {', '.join(names)}."
