"""The two files that a pipeline delivers of a candidate: the exported one, and the packed one beside it."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path

import tf_keras

from compress.candidate import Artifact, Candidate
from compress.data.source import Data
from compress.deploy.packing import write_cmp
from compress.deploy.tflite import export
from compress.graph.saved_graph import has_layers

Save = Callable[[tf_keras.Model, Path], None]


def save_flat(model: tf_keras.Model, path: Path) -> None:
    """Save the model as it is."""
    model.save(str(path))


def write_files(
    candidate: Candidate, data: Data, folder: Path, *, sparse: bool = True, save: Save = save_flat
) -> Artifact:
    """Write ``model.tflite`` and ``model.cmp`` into ``folder``.

    Args:
        candidate: what is written.
        data: as for :func:`compress.deploy.tflite.export`.
        folder: where to.
        sparse: whether kernels of many zeros may be exported sparsely.
        save: writes the Keras file that floats are packed from.

    Raises:
        CompressError: if the converter refuses the model.
    """
    artifact = export(candidate, data, folder / "model.tflite", sparse=sparse)
    packed = artifact.path.with_suffix(".cmp")
    hashes = [found for guarantee in candidate.guarantees for found in guarantee.hashes().values()]
    transfers = [found for guarantee in candidate.guarantees for found in guarantee.transfers().values()]
    # Whole numbers are the exported file's; floats are the Keras model's, which conversion only copies.
    if candidate.storage.scheme == "float32" and has_layers(candidate.model):
        with tempfile.TemporaryDirectory(prefix="compress-") as saved:
            source = Path(saved, "model.keras")
            save(candidate.model, source)
            write_cmp(packed, source, candidate.coder, hashes, transfers)
    else:
        write_cmp(packed, artifact.path, candidate.coder, hashes, transfers)
    return dataclasses.replace(artifact, packed=packed)
