"""``python -m compress.deploy <run folder> -o <folder>``: the bundle of a finished run, ready to be used elsewhere.

It holds the ``.tflite`` file with metadata, the packed file, labels, a C array for microcontrollers, the kernels to
register, a model card, and Python and Kotlin programs for this very model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from compress.errors import run_command


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0, or 2 after a user's mistake."""
    parser = argparse.ArgumentParser(prog="python -m compress.deploy", description=__doc__.partition(":")[2])
    parser.add_argument("run", type=Path, help="the output folder of a finished compress.run")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the folder to write")
    parser.add_argument("--zip", action="store_true", help="write <folder>.zip as well")
    parser.add_argument("--author", default="", help="for the model card and the file's metadata")
    parser.add_argument("--licence", "--license", default="", help="of the model, e.g. Apache-2.0")
    parser.add_argument("--data-licence", "--data-license", default="", help="of the data that it was trained on")
    given = parser.parse_args(arguments)

    def body() -> None:
        from compress.deploy.bundle import Signature, write_bundle, write_zip
        from compress.quiet import import_tensorflow

        import_tensorflow()
        signature = Signature(given.author, given.licence, given.data_licence)
        for path in write_bundle(given.run, given.output, signature):
            print(f"{path}  {path.stat().st_size:,} bytes")
        if given.zip:
            archive = given.output.with_name(given.output.name + ".zip")
            write_zip(given.output, archive)
            print(f"{archive}  {archive.stat().st_size:,} bytes")

    sys.exit(run_command(body))


if __name__ == "__main__":
    main()
