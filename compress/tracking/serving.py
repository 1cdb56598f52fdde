"""Logs a run's ``.tflite`` file as an MLflow model, which ``mlflow models serve`` answers with over HTTP."""

from __future__ import annotations

import json
import platform
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from compress.deploy.interface import Interface

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

ARTIFACT = "model"
_PROGRAM = Path(__file__).with_name("served_model.py")
_REQUIREMENTS = ("mlflow", "ai-edge-litert", "numpy")


def log_served_model(client: MlflowClient, run: str, tflite: Path, interface: Interface) -> None:
    """Log the file under the run's artifact ``model``; ``runs:/<run>/model`` is what a server is given."""
    with tempfile.TemporaryDirectory(prefix="compress-") as work:
        folder = Path(work, ARTIFACT)
        save_served_model(folder, tflite, interface)
        client.log_artifacts(run, str(folder), ARTIFACT)


def save_served_model(folder: Path, tflite: Path, interface: Interface) -> None:
    """Write the MLflow model: the file, the program that runs it, and what it reads.

    From MLflow's own parts, for ``mlflow.pyfunc.save_model`` looks through every installed package, which takes longer
    than all else that a run logs, and copies a ``uv.lock`` that lies in the working directory.
    """
    import mlflow.pyfunc
    import numpy as np
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    (folder / "artifacts").mkdir(parents=True)
    shutil.copyfile(tflite, folder / "artifacts" / "model.tflite")
    shutil.copyfile(_PROGRAM, folder / _PROGRAM.name)
    requirements = [f"{name}=={version(name)}" for name in _REQUIREMENTS]
    (folder / "requirements.txt").write_text("\n".join(requirements) + "\n")
    # YAML reads what JSON writes.
    environment = {"python": platform.python_version(), "dependencies": ["-r requirements.txt"]}
    (folder / "python_env.yaml").write_text(json.dumps(environment) + "\n")
    image = TensorSpec(np.dtype(np.float32), (-1, *interface.input.shape[1:]))
    model = Model(signature=ModelSignature(inputs=Schema([image])))
    mlflow.pyfunc.add_to_model(
        model,
        loader_module="mlflow.pyfunc.loaders.code_model",
        python_env="python_env.yaml",
        model_config={"labels": list(interface.class_names), "scores": interface.scores},
        model_code_path=_PROGRAM.name,
        streamable=False,
        artifacts={"model": {"path": "artifacts/model.tflite", "uri": "model.tflite"}},
    )
    model.save(str(folder / "MLmodel"))
