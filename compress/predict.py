"""``python -m compress.predict``: ask a model what is on a photo.

    python -m compress.predict model=out/model.tflite input=photo.jpg
    python -m compress.predict model=out/model.tflite input=photos top=1     a folder: every image in it
    cat photo.jpg | python -m compress.predict model=out/model.tflite input=-

model   a .tflite, .cmp or .keras file
input   an image, a folder of images, - for an image on standard input, or samples as the model reads them (.npy)
top     how many classes are shown (default 3)

The file's metadata say how a photo goes in and what the classes are called; for a file without any, the report.json of
the run that made it does, if it lies beside it. A photo is turned upright and resized to the model's size as a whole;
what is transparent lies on white.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compress.cli.errors import guarded
from compress.cli.words import key_values
from compress.errors import CompressError

if TYPE_CHECKING:
    import numpy as np

    from compress.deploy.predictor import Predictor

_KEYS = ("model", "input", "top", "debug")
_TOP = 3
_AT_ONCE = 256
_LARGEST_INPUT = 1 << 30
"""Bytes that are read from standard input."""


@dataclass(frozen=True)
class Request:
    """The command line, read."""

    model: Path
    input: str
    top: int = _TOP


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0, or 2 after a user's mistake."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    sys.exit(guarded(lambda: predict(given), given))


def predict(arguments: Sequence[str]) -> list[CompressError]:
    """Print the classes of each input; return what is wrong with single photos of a folder."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return []
    request = read_arguments(arguments)
    from compress.deploy.predictor import load_predictor

    predictor = load_predictor(request.model)
    if not predictor.described:
        print(
            f"{request.model} does not say what its inputs and classes are: "
            "pixels go in as 0 to 255, classes are numbers.",
            file=sys.stderr,
        )
    failures: list[CompressError] = []
    for names, outputs in _answers(predictor, request.input, failures):
        for name, row in zip(names, outputs, strict=True):
            print(name)
            for index in row.argsort()[::-1][: request.top]:
                print(f"  {100 * row[index]:6.2f} %  {predictor.class_names[index]}")
    return failures


def read_arguments(arguments: Sequence[str]) -> Request:
    """Return what ``key=value`` words ask for.

    Raises:
        CompressError: if a key is unknown or missing, or a value is none.
    """
    values = key_values(arguments, _KEYS[:-1], _KEYS[-1:])
    for key in ("model", "input"):
        if not values.get(key):
            raise CompressError(
                key,
                expected="the path of a model's file" if key == "model" else "an image, a folder, or -",
                received="nothing",
                fix="Write python -m compress.predict model=out/model.tflite input=photo.jpg.",
            )
    top = values.get("top", str(_TOP))
    if not top.isdecimal() or int(top) < 1:
        raise CompressError("top", expected="a whole number from 1", received=top, fix="Write top=3.")
    return Request(Path(values["model"]).expanduser(), values["input"], int(top))


def _answers(predictor: Predictor, given: str, failures: list[CompressError]) -> Iterator[tuple[list[str], np.ndarray]]:
    """Yield names of inputs and their probabilities; what cannot be read in a folder goes to ``failures``."""
    import numpy as np

    from compress.deploy.photo import read_photo

    shape, channels = predictor.interface.input.shape, predictor.interface.channels
    if given.endswith(".npy"):
        values = _read_array(Path(given).expanduser(), shape[1:])
        yield [f"{given} {index}" for index in range(len(values))], predictor.of_values(values)
        return
    if channels is None:
        raise CompressError(
            f"input={given}",
            expected=f"a .npy file of samples of shape {list(shape[1:])}, which this model reads",
            received="an image",
            fix="Save them with numpy.save('samples.npy', samples).",
        )
    size = (shape[1], shape[2])
    if given == "-":
        content = sys.stdin.buffer.read(_LARGEST_INPUT)
        yield ["-"], predictor.of_pixels(read_photo(content, "input=-", size, channels)[None])
        return
    path = Path(given).expanduser()
    if not path.is_dir():
        yield [given], predictor.of_pixels(read_photo(path, f"input={given}", size, channels)[None])
        return
    files = _photos(path)
    for start in range(0, len(files), _AT_ONCE):
        names, pixels = [], []
        for file in files[start : start + _AT_ONCE]:
            try:
                pixels.append(read_photo(file, str(file), size, channels))
                names.append(str(file))
            except CompressError as error:
                failures.append(error)
        if names:
            yield names, predictor.of_pixels(np.stack(pixels))


def _photos(folder: Path) -> list[Path]:
    from compress.deploy.photo import SUFFIXES

    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise CompressError(
            f"input={folder}",
            expected=f"a folder with images in it ({', '.join(SUFFIXES)})",
            received="none of these",
            fix="Name the folder that holds the images itself; folders inside it are not searched.",
        )
    return files


def _read_array(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Return the samples [n, ...] of a ``.npy`` file."""
    import numpy as np

    try:
        values = np.load(path, allow_pickle=False)
        received = f"{values.dtype} of shape {list(values.shape)}"
        fits = values.dtype.kind in "fiub" and len(values) > 0 and values.size == len(values) * np.prod(shape)
    except (OSError, ValueError, EOFError, TypeError, AttributeError) as error:
        fits, received = False, "no such file" if isinstance(error, FileNotFoundError) else str(error)[:200]
    if not fits:
        raise CompressError(
            f"input={path}",
            expected=f"a .npy file of numbers of shape [n, {', '.join(map(str, shape))}]",
            received=received,
            fix="Save them with numpy.save('samples.npy', samples).",
        )
    return np.asarray(values)


if __name__ == "__main__":
    main()
