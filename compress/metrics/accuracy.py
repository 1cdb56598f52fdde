"""Accuracy of a Keras model and of an exported file, on the same data."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compress.data.source import Split
from compress.errors import CompressError

if TYPE_CHECKING:
    import tf_keras

_WORKER = Path(__file__).with_name("interpreter_worker.py")


def accuracy(outputs: np.ndarray, labels: np.ndarray) -> float:
    """Return the top-1 accuracy in percent; ``outputs`` [n, classes], ``labels`` [n]."""
    return float(100.0 * np.mean(np.argmax(outputs, axis=-1) == labels))


def keras_outputs(model: tf_keras.Model, inputs: np.ndarray, batch: int = 256) -> np.ndarray:
    """Return the model's outputs [n, ...] in inference mode; a model that says its batch size gets that one."""
    from compress.data.untuned import in_batches

    return np.asarray(model.predict(in_batches(inputs, model.inputs[0].shape[0] or batch), verbose=0))


def keras_accuracy(model: tf_keras.Model, split: Split) -> float:
    """Return the Keras model's accuracy in percent."""
    return accuracy(keras_outputs(model, split.x), split.y)


def _own_share() -> int:
    """Return the threads that TensorFlow may use in this process: a launcher divides them; else one for each core."""
    tensorflow = sys.modules.get("tensorflow")
    threads = 0 if tensorflow is None else tensorflow.config.threading.get_intra_op_parallelism_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(threads or cores)


def file_outputs(path: Path, inputs: np.ndarray, *, batch: int = 128, threads: int | None = None) -> np.ndarray:
    """Return the outputs of a ``.tflite`` file, run by LiteRT in a child process.

    ``threads``: None: as many as TensorFlow may use in this process.

    Raises:
        CompressError: if the runtime rejects the file or crashes on it.
    """
    threads = threads or _own_share()
    with tempfile.TemporaryDirectory(prefix="compress-") as folder:
        source, target = Path(folder, "inputs.npy"), Path(folder, "outputs.npy")
        np.save(source, inputs, allow_pickle=False)
        command = [sys.executable, "-P", str(_WORKER), str(path), str(source), str(target), str(batch), str(threads)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode != 0:
            raise CompressError(
                f"LiteRT run of {path.name}",
                expected="a file that the runtime accepts",
                received=f"a crash (signal {-done.returncode})"
                if done.returncode < 0
                else _last_line(done.stderr) or f"exit code {done.returncode}",
                fix="Choose another storage, e.g. quantize with scheme=dynamic, or report the model.",
            )
        return np.asarray(np.load(target, allow_pickle=False))


def file_accuracy(path: Path, split: Split) -> float:
    """Return the exported file's accuracy in percent."""
    return accuracy(file_outputs(path, split.x), split.y)


def _last_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
