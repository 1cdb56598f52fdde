"""A ``.keras`` file into a packed one and back: its configuration and its weights, for Keras 2 and Keras 3 alike.

Neither way runs Keras: a ``.keras`` file is a zip archive of JSON and HDF5.
"""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import h5py
import numpy as np

from compress.deploy.packed import Packed, can_hold
from compress.errors import CompressError

_CONFIG, _METADATA, _WEIGHTS = "config.json", "metadata.json", "model.weights.h5"
_DATE = (1980, 1, 1, 0, 0, 0)


def from_keras(path: Path) -> Packed:
    """Return what a packed file holds of a ``.keras`` file.

    Raises:
        CompressError: if it is absent, damaged, no ``.keras`` file, or holds more than configuration and weights.
    """
    # Needs TensorFlow, which unpacking does without.
    from compress.models.file import check_file

    check_file(path)
    if not zipfile.is_zipfile(path):
        raise CompressError(
            str(path),
            expected="a .keras file: a zip archive",
            received="an HDF5 file",
            fix="Load it with tf_keras and save it again with model.save('model.keras').",
        )
    with zipfile.ZipFile(path) as archive:
        others = sorted({member for member in archive.namelist() if not member.endswith("/")} - {_CONFIG, _METADATA})
        if others != [_WEIGHTS]:
            raise CompressError(
                str(path),
                expected=f"{_CONFIG}, {_METADATA} and {_WEIGHTS} in the archive",
                received=", ".join(others[:6]),
                fix="Pack a model without vocabularies or other assets.",
            )
        config = json.loads(archive.read(_CONFIG))
        metadata = json.loads(archive.read(_METADATA)) if _METADATA in archive.namelist() else {}
        weights = archive.read(_WEIGHTS)
    # Two files of one network are to be packed into the same bytes.
    metadata.pop("date_saved", None)
    arrays: dict[str, np.ndarray] = {}
    groups: list[str] = []

    def look(place: str, item: h5py.Dataset | h5py.Group) -> None:
        if isinstance(item, h5py.Dataset):
            arrays[place] = np.asarray(item[()])
        elif not len(item):
            groups.append(place)

    with h5py.File(io.BytesIO(weights)) as file:
        file.visititems(look)
    unknown = next((place for place, array in arrays.items() if not can_hold(array)), None)
    if unknown is not None:
        raise CompressError(
            f"{path}, weight {unknown}",
            expected="whole numbers, floats of 16, 32 or 64 bits, or truth values",
            received=str(arrays[unknown].dtype),
            fix="Convert the weight, or leave the layer out.",
        )
    return Packed("keras", arrays, {"config": config, "metadata": metadata, "empty": groups})


def to_keras(packed: Packed, name: str) -> bytes:
    """Return the ``.keras`` file of a packed one; its weights are those that went in, bit by bit.

    Raises:
        CompressError: if what the packed file holds is no Keras model.
    """
    buffer = io.BytesIO()
    try:
        with h5py.File(buffer, "w") as file:
            for group in packed.structure["empty"]:
                file.require_group(group)
            for place, array in packed.arrays.items():
                file.create_dataset(place, data=array)
        members = {
            _METADATA: json.dumps(packed.structure["metadata"]).encode(),
            _CONFIG: json.dumps(packed.structure["config"]).encode(),
            _WEIGHTS: buffer.getvalue(),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise CompressError(
            name,
            expected="the configuration and the weights of a Keras model",
            received=str(error)[:200],
            fix="Pack the model again.",
        ) from error
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for member, data in members.items():
            archive.writestr(zipfile.ZipInfo(member, _DATE), data)
    return out.getvalue()
