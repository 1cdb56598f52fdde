"""The program that MLflow runs to serve a ``.tflite`` file; logged with the run as it stands here.

It imports nothing of this project: LiteRT, NumPy and MLflow are all that a server needs. MLflow copies this file beside
the model and runs it there ("models from code"): nothing is unpickled.
"""

import threading

import mlflow
import numpy as np
from ai_edge_litert.interpreter import Interpreter


class TFLiteClassifier(mlflow.pyfunc.PythonModel):
    """Answers a batch of inputs [n, ...], as the file reads them, with a class and the probabilities for each."""

    def load_context(self, context):  # type: ignore[no-untyped-def]
        """Open the file."""
        self._config = context.model_config
        self._interpreter = Interpreter(model_path=context.artifacts["model"])
        self._interpreter.allocate_tensors()
        self._input = self._interpreter.get_input_details()[0]
        self._output = self._interpreter.get_output_details()[0]
        # An interpreter computes one thing at a time; a server asks from several threads.
        self._lock = threading.Lock()

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """Return for each sample the label, its probability, and the probabilities of all classes."""
        values = np.asarray(model_input, np.float32)
        wanted = tuple(int(size) for size in self._input["shape"][1:])
        if values.shape[1:] != wanted:
            raise mlflow.exceptions.MlflowException(
                f"expected inputs of shape [n, {', '.join(map(str, wanted))}]; received {list(values.shape)}",
                error_code=mlflow.protos.databricks_pb2.INVALID_PARAMETER_VALUE,
            )
        with self._lock:
            scores = np.array([self._scores(sample) for sample in values]).reshape(len(values), -1)
        if self._config["scores"] == "logits" and len(scores):
            powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
            scores = powers / powers.sum(axis=-1, keepdims=True)
        best = scores.argmax(axis=-1) if len(scores) else []
        return [
            {
                "label": self._config["labels"][index],
                "probability": float(row[index]),
                "probabilities": [float(value) for value in row],
            }
            for row, index in zip(scores, best, strict=True)
        ]

    def _scores(self, sample: np.ndarray) -> np.ndarray:
        scale, zero = self._input["quantization"]
        kind = np.dtype(self._input["dtype"])
        if scale and kind.kind in "iu":
            limits = np.iinfo(kind)
            sample = np.clip(np.round(sample / scale) + zero, limits.min, limits.max)
        self._interpreter.set_tensor(self._input["index"], sample[None].astype(kind))
        # A recurrent layer must not remember the sample before.
        self._interpreter.reset_all_variables()
        self._interpreter.invoke()
        raw = self._interpreter.get_tensor(self._output["index"])[0].astype(np.float32)
        scale, zero = self._output["quantization"]
        return np.asarray((raw - zero) * scale if scale else raw)


mlflow.models.set_model(TFLiteClassifier())
