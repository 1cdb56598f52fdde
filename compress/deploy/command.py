"""What the small commands of this room share: a user's mistake is one paragraph and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable

from compress.errors import USER_ERROR, CompressError, paragraph


def run_command(body: Callable[[], None]) -> int:
    """Run ``body`` and return the exit code."""
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
