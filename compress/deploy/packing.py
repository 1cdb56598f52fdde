"""Packs model files, and unpacks them again."""

from __future__ import annotations

import json
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from compress.candidate import Coder, Hash, Transfer
from compress.deploy.coding.draft import Tables
from compress.deploy.coding.symbols import CODERS, Ans, Deflate, FixedWidth, Huffman, SymbolCoder
from compress.deploy.coding.tensors import FORMS, Hashed, Transferred, draft_array
from compress.deploy.packed import DEFAULT_LIMIT, Packed, read_packed, write_packed
from compress.deploy.packed_keras import from_keras, to_keras
from compress.errors import CompressError
from compress.quiet import import_tensorflow

if TYPE_CHECKING:
    import tf_keras

CODER_CHOICES: Mapping[Coder, tuple[SymbolCoder, ...]] = MappingProxyType(
    {
        "ans": (FixedWidth(), Ans()),
        "huffman": (FixedWidth(), Huffman(), Deflate()),
        "smallest": CODERS,
        "none": (FixedWidth(),),
    }
)
"""Coders by the names that users know them by."""


def write_cmp(
    target: Path, source: Path, coder: Coder = "ans", hashes: Iterable[Hash] = (), transfers: Iterable[Transfer] = ()
) -> None:
    """Pack a ``.keras`` or ``.tflite`` file. Written to a temporary name and renamed.

    Args:
        target: the packed file.
        source: the model's file.
        coder: one of ``CODER_CHOICES``.
        hashes: by which arrays may share their numbers; those of float32 are found without.
        transfers: how the filters of kernels may follow from fewer ones.

    Raises:
        CompressError: if the source is neither, or damaged.
    """
    plain = (form for form in FORMS if not isinstance(form, (Hashed, Transferred)))
    forms = (*plain, Hashed(tuple(hashes)), Transferred(tuple(transfers)))
    _write(target, write_packed(read_model(source), CODER_CHOICES[coder], forms))


def packed_bytes(array: np.ndarray, coder: Coder) -> int:
    """Return about how many bytes an array takes in a packed file, if no other one lends it a frequency table."""
    return round(draft_array(array, Tables(), CODER_CHOICES[coder]).size)


def packed_model_bytes(model: tf_keras.Model, coder: Coder) -> int:
    """Return about how many bytes a packed file of the Keras model has, without writing one."""
    arrays = {weight.name: weight.numpy() for weight in model.weights}
    packed = Packed("keras", arrays, {"config": json.loads(model.to_json())})
    return len(write_packed(packed, CODER_CHOICES[coder]))


def read_model(source: Path) -> Packed:
    """Return what a packed file holds of a ``.keras`` or ``.tflite`` file.

    Raises:
        CompressError: if it is neither, or damaged.
    """
    import_tensorflow()
    if source.suffix == ".keras":
        return from_keras(source)
    if source.suffix == ".tflite" and source.is_file():
        from compress.deploy.packed_tflite import from_tflite

        return from_tflite(source.read_bytes(), str(source))
    raise CompressError(
        str(source),
        expected="a model's file: .keras or .tflite",
        received="no such file" if not source.exists() else f"the ending {source.suffix or '(none)'}",
        fix="Check the path. An .h5 file can be loaded and saved again with model.save('model.keras').",
    )


def unpack(source: Path, target: Path, limit: int = DEFAULT_LIMIT) -> None:
    """Write the network of a packed file to ``target``: ``.keras``, ``.tflite``, or ``.npz`` for the arrays alone.

    Raises:
        CompressError: if the packed file is damaged, takes more than ``limit`` bytes of memory, or cannot become such a
            file.
    """
    if not source.is_file():
        raise CompressError(str(source), expected="a .cmp file", received="no such file", fix="Check the path.")
    packed = read_packed(source.read_bytes(), str(source), limit)
    if target.suffix == ".npz":
        with _unfinished(target) as partial:
            _write_arrays(partial, packed.arrays)
    elif target.suffix == f".{packed.kind}":
        _write(target, _unpacked(packed, str(source)))
    elif target.suffix == ".tflite":
        _convert(_unpacked(packed, str(source)), target)
    else:
        raise CompressError(
            f"-o {target}",
            expected="a name that ends in .keras, .tflite or .npz"
            if packed.kind == "keras"
            else "a name that ends in .tflite or .npz: what was packed is a .tflite file",
            received=target.name,
            fix=f"Write -o {target.with_suffix(f'.{packed.kind}')}.",
        )


def _unpacked(packed: Packed, name: str) -> bytes:
    if packed.kind == "keras":
        return to_keras(packed, name)
    import_tensorflow()
    from compress.deploy.packed_tflite import to_tflite

    return to_tflite(packed, name)


def _convert(keras: bytes, target: Path) -> None:
    """Export the model of a ``.keras`` file."""
    import_tensorflow()
    from compress.deploy.tflite import export_float
    from compress.models.file import load_model_file

    with tempfile.TemporaryDirectory(prefix="compress-") as folder:
        file = Path(folder, "model.keras")
        file.write_bytes(keras)
        export_float(load_model_file(file, allow_code=False), target)


def _write_arrays(target: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an ``.npz`` file. ``np.savez`` has names of its own that no array may have."""
    with zipfile.ZipFile(target, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)


def _write(target: Path, content: bytes) -> None:
    with _unfinished(target) as partial:
        partial.write_bytes(content)


@contextmanager
def _unfinished(target: Path) -> Iterator[Path]:
    """Give a temporary name, whose file takes the target's place in the end, or is gone if anything went wrong."""
    partial = target.with_name(f".{target.name}.partial")
    try:
        yield partial
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
