"""``python -m compress.deploy.unpack model.cmp -o model.keras``: the network of a packed file.

The output's name says what is wanted: ``.keras``, ``.tflite``, or ``.npz`` for the weights alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from compress.errors import run_command


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0, or 2 after a user's mistake."""
    from compress.deploy.packed import DEFAULT_LIMIT
    from compress.deploy.packing import unpack

    parser = argparse.ArgumentParser(prog="python -m compress.deploy.unpack", description=__doc__.partition(":")[2])
    parser.add_argument("source", type=Path, help="a packed file (.cmp)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the file to write: .keras, .tflite or .npz")
    parser.add_argument(
        "--limit", type=int, default=DEFAULT_LIMIT, help="bytes of memory that it may take (default: %(default)s)"
    )
    given = parser.parse_args(arguments)

    def body() -> None:
        unpack(given.source, given.output, given.limit)
        print(f"{given.output}: {given.output.stat().st_size:,} bytes")

    sys.exit(run_command(body))


if __name__ == "__main__":
    main()
