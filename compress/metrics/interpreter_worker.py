"""Runs a ``.tflite`` file on an array of inputs; a program of its own, so that a crash stays outside.

    python -P interpreter_worker.py MODEL.tflite INPUTS.npy OUTPUTS.npy BATCH THREADS

Imports nothing of this project. Tries one resize to a batch; a file whose graph is written for one
sample at a time (its output does not grow with the batch) is run sample by sample.
"""

import sys
import time

import numpy as np
from ai_edge_litert.interpreter import Interpreter


def main() -> None:
    """Read the arguments, run, write the outputs."""
    model, inputs_path, outputs_path, batch, threads = sys.argv[1:6]
    inputs = np.load(inputs_path, mmap_mode="r", allow_pickle=False)
    outputs = run(model, inputs, int(batch), int(threads))
    np.save(outputs_path, outputs, allow_pickle=False)


def run(model: str, inputs: np.ndarray, batch: int, threads: int) -> np.ndarray:
    """Return the outputs for all inputs, in order."""
    single = _Runner(model, 1, threads)
    batched: _Runner | None = None
    if batch > 1 and len(inputs) > 1:
        try:
            batched = _Runner(model, min(batch, len(inputs)), threads)
            first = batched(inputs[: batched.batch])
            if first.shape[0] != batched.batch or not _same_rows(first, single, inputs):
                batched = None
        except (RuntimeError, ValueError):
            batched = None
    runner = batched or single
    whole = len(inputs) // runner.batch * runner.batch
    parts, last = [], time.monotonic()
    for start in range(0, whole, runner.batch):
        parts.append(runner(inputs[start : start + runner.batch]))
        if time.monotonic() - last > 10:
            last = time.monotonic()
            print(f"{start}/{len(inputs)}", file=sys.stderr, flush=True)
    parts.extend(single(inputs[i : i + 1]) for i in range(whole, len(inputs)))
    return np.concatenate(parts)


def _same_rows(outputs: np.ndarray, single: "_Runner", inputs: np.ndarray) -> bool:
    """Compare the first, a middle and the last sample of a batch with what the file says of each alone."""
    tolerance = 1e-3 * max(1.0, float(np.abs(outputs).max()))
    return all(
        np.allclose(outputs[row], single(inputs[row : row + 1])[0], rtol=1e-3, atol=tolerance)
        for row in (0, len(outputs) // 2, len(outputs) - 1)
    )


class _Runner:
    def __init__(self, model: str, batch: int, threads: int) -> None:
        self.batch = batch
        self._interpreter = Interpreter(model_path=model, num_threads=threads)
        detail = self._interpreter.get_input_details()[0]
        if int(detail["shape"][0]) != batch:
            self._interpreter.resize_tensor_input(detail["index"], [batch, *detail["shape"][1:]], strict=False)
        self._interpreter.allocate_tensors()
        self._input = self._interpreter.get_input_details()[0]
        self._output = self._interpreter.get_output_details()[0]

    def __call__(self, values: np.ndarray) -> np.ndarray:
        self._interpreter.set_tensor(self._input["index"], _quantized(values, self._input))
        # A recurrent layer must not remember the sample before.
        self._interpreter.reset_all_variables()
        self._interpreter.invoke()
        raw = self._interpreter.get_tensor(self._output["index"])
        scale, zero = self._output["quantization"]
        if scale:
            return np.asarray((raw.astype(np.float32) - zero) * scale)
        return np.array(raw, np.float32)


def _quantized(values: np.ndarray, detail: dict) -> np.ndarray:
    scale, zero = detail["quantization"]
    dtype = np.dtype(detail["dtype"])
    if scale and dtype.kind in "iu":
        limits = np.iinfo(dtype)
        return np.asarray(np.clip(np.round(values / scale) + zero, limits.min, limits.max), dtype)
    return np.ascontiguousarray(values, dtype)


if __name__ == "__main__":
    main()
