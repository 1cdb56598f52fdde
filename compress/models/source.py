"""What a model source gives: the trained reference model that a pipeline starts from."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tf_keras
from annotated_types import Ge, Gt, Le, Lt
from pydantic.dataclasses import dataclass as checked_dataclass

from compress.data.source import STRICT, Data, find_file
from compress.errors import CompressError

SCRATCH = "scratch"
RANDOM = "random"


@checked_dataclass(frozen=True, config=STRICT)
class Schedule:
    """How a model is trained from scratch when there are no weights for it; for 0 epochs it stays as initialised."""

    epochs: Annotated[float, Ge(0), Le(1e6)] = 30.0
    learning_rate: Annotated[float, Gt(0), Lt(float("inf"))] = 0.05
    batch_size: Annotated[int, Gt(0), Le(1_000_000)] = 64
    weight_decay: Annotated[float, Ge(0), Le(1e3)] = 1e-4


@dataclass(frozen=True)
class Origin:
    """Where the reference weights come from: a file, or training with these settings."""

    file: Path | None
    """A SavedModel is a folder."""
    schedule: Schedule | None

    def digest(self) -> str | None:
        """Return a digest of the file, or of all files of the folder."""
        if self.file is None:
            return None
        if not self.file.is_dir():
            return hashlib.sha256(self.file.read_bytes()).hexdigest()
        digest = hashlib.sha256()
        for file in sorted(path for path in self.file.rglob("*") if path.is_file()):
            digest.update(f"{file.relative_to(self.file)}\0{file.stat().st_size}\0".encode() + file.read_bytes())
        return digest.hexdigest()

    @property
    def untrained(self) -> bool:
        """Whether the weights stay as they were initialised: good for counting, not for accuracies."""
        return self.schedule is not None and self.schedule.epochs == 0


class ModelSource(ABC):
    """Makes the reference model. Subclasses are frozen dataclasses whose fields are the configuration."""

    @abstractmethod
    def origin(self) -> Origin:
        """Say where the weights will come from, without reading them.

        Raises:
            CompressError: if a file that is asked for is not there.
        """

    def exported(self) -> Path | None:
        """Return the file of a model that is exported already: it can be measured, and nothing else."""
        return None

    @abstractmethod
    def build(self, data: Data, seed: int) -> tf_keras.Model:
        """Return the flat functional model: with its weights, or untrained if they are to be trained."""

    def save(self, model: tf_keras.Model, path: Path) -> None:
        """Write the compressed ``model`` to ``path``, in the format that the reference came in."""
        model.save(str(path))


def check_finite(model: tf_keras.Model) -> None:
    """Refuse a model with NaN or infinite weights.

    Raises:
        CompressError: naming the first such layer.
    """
    for layer in model.layers:
        for weight in layer.weights:
            values = np.asarray(weight)
            if values.dtype.kind == "f" and not np.isfinite(values).all():
                bad = int((~np.isfinite(values)).sum())
                raise CompressError(
                    f"model {model.name}, layer {layer.name}",
                    expected="finite weights",
                    received=f"{bad} NaN or infinite values of {values.size} in {weight.name}",
                    fix="Bring weights from before the training diverged.",
                )


@checked_dataclass(frozen=True, config=STRICT)
class TrainableSource(ModelSource):
    """A model of ours: weights from a file, or trained from scratch.

    ``weights``: ``scratch``, ``random`` (as initialised: good for sizes and latencies), or a file name that is looked
    for as it is and in ``$COMPRESS_DATA_DIR``.
    """

    weights: str = SCRATCH
    train: Schedule = Schedule()

    def origin(self) -> Origin:
        """Look for the weights."""
        if self.weights == SCRATCH:
            return Origin(None, self.train)
        if self.weights == RANDOM:
            return Origin(None, Schedule(epochs=0))
        direct = Path(self.weights).expanduser()
        found = direct if direct.is_file() else find_file(None, self.weights)
        if found is None:
            raise CompressError(
                "model.weights",
                expected=f"the file {self.weights}, here or in $COMPRESS_DATA_DIR",
                received="no such file",
                fix="Set COMPRESS_DATA_DIR to the folder with the weights, or train anew: model.weights=scratch.",
            )
        return Origin(found, None)
