"""``python -m compress.deploy.pack model.keras -o model.cmp``: a model's file into a packed one.

It is lossless: ``python -m compress.deploy.unpack`` gives the very same weights back.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from compress.errors import run_command


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0, or 2 after a user's mistake."""
    from compress.deploy.packing import CODER_CHOICES, write_cmp

    parser = argparse.ArgumentParser(prog="python -m compress.deploy.pack", description=__doc__.partition(":")[2])
    parser.add_argument("source", type=Path, help="a .keras or .tflite file")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the packed file, usually .cmp")
    parser.add_argument("--coder", choices=list(CODER_CHOICES), default="ans", help="of the streams (default: ans)")
    given = parser.parse_args(arguments)

    def body() -> None:
        write_cmp(given.output, given.source, given.coder)
        before, after = given.source.stat().st_size, given.output.stat().st_size
        print(f"{given.output}: {after:,} bytes, {before / after:.2f} times smaller than {given.source.name}")

    sys.exit(run_command(body))


if __name__ == "__main__":
    main()
