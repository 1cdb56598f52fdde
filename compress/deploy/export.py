"""``python -m compress.deploy.export model.keras -o model.tflite``: a Keras file as a float ``.tflite`` file.

Nothing is compressed and nothing measured: that is what ``compress.run`` is for. ``--size 64x64`` writes the file for
images of another size, if no layer of the model asks for its own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from compress.errors import CompressError, run_command


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0, or 2 after a user's mistake."""
    parser = argparse.ArgumentParser(prog="python -m compress.deploy.export", description=__doc__.partition(":")[2])
    parser.add_argument("source", type=Path, help="a .keras or .h5 file")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the file to write, .tflite")
    parser.add_argument(
        "--select-tf-ops",
        action="store_true",
        help="allow operators of TensorFlow itself where LiteRT has none; the file then needs a runtime with them",
    )
    parser.add_argument("--size", help="height and width of the images that the file reads, e.g. 64x64")
    given = parser.parse_args(arguments)

    def body() -> None:
        if given.output.suffix != ".tflite":
            raise CompressError(
                f"-o {given.output}",
                expected="a name that ends in .tflite",
                received=given.output.name,
                fix=f"Write -o {given.output.with_suffix('.tflite')}.",
            )
        from compress.quiet import import_tensorflow

        import_tensorflow()
        from compress.deploy.tflite import export_float
        from compress.deploy.verification import operators_in
        from compress.graph.resize import with_input_size
        from compress.models.file import load_model_file

        model = load_model_file(given.source, allow_code=False)
        if given.size is not None:
            model = with_input_size(model, read_size(given.size))
        export_float(model, given.output, select_tf_ops=given.select_tf_ops)
        uses = operators_in(given.output.read_bytes(), str(given.output))
        print(f"{given.output}: {given.output.stat().st_size:,} bytes")
        print("operators: " + ", ".join(f"{use.count} {use.name}" for use in uses))
        others = [use.name for use in uses if not use.builtin]
        if others:
            print(f"LiteRT has no kernel for {', '.join(others)}: the file needs a runtime with the Flex delegate.")

    sys.exit(run_command(body))


def read_size(text: str) -> tuple[int, int]:
    """Return height and width of ``64x48``.

    Raises:
        CompressError: if it is written otherwise.
    """
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise CompressError(
            f"--size {text}",
            expected="height and width in pixels",
            received=text,
            fix="Write them as in --size 64x48.",
        )
    return int(parts[0]), int(parts[1])


if __name__ == "__main__":
    main()
