"""Runs a ``.tflite`` file in TensorFlow Lite for Microcontrollers; a program of its own, so that a crash stays outside.

    python -P microcontroller_worker.py MODEL.tflite ARENA SPANS

Imports nothing of this project. Runs random inputs there and in LiteRT, with an arena of ARENA bytes. Prints one JSON
object: the largest difference of the outputs, as a share of their span, and how many numbers were compared. SPANS is a
JSON list, one for each output; null: all that its integers can be, or the largest float that LiteRT gives. The runtime
itself writes how much of the arena it used to standard error.
"""

import json
import sys

import numpy as np
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from tflite_micro import runtime

SAMPLES = 4


def main() -> None:
    """Read the arguments, run, print."""
    model, arena, spans = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    # The reference kernels: TFLM rounds nearly as they do. The fast ones do not, which adds up in deep networks.
    phone = Interpreter(model_path=model, experimental_op_resolver_type=OpResolverType.BUILTIN_REF)
    phone.allocate_tensors()
    micro = runtime.Interpreter.from_file(model, arena_size=arena)
    generator = np.random.default_rng(0)
    largest, compared = 0.0, 0
    for sample in range(SAMPLES):
        for number, detail in enumerate(phone.get_input_details()):
            # Some models read pixels, others numbers below one.
            values = random_values(generator, detail["shape"], detail["dtype"], 255 if sample % 2 else 1)
            phone.set_tensor(detail["index"], values)
            micro.set_input(values, number)
        phone.reset_all_variables()
        phone.invoke()
        micro.invoke()
        for number, detail in enumerate(phone.get_output_details()):
            wanted = phone.get_tensor(detail["index"])
            given = np.asarray(micro.get_output(number)).reshape(wanted.shape)
            largest = max(largest, difference(given, wanted, spans[number]))
            compared += wanted.size
        micro.reset()
    micro.print_allocations()
    print(json.dumps({"difference": largest, "compared": compared}))


def difference(given: np.ndarray, wanted: np.ndarray, span: float | None) -> float:
    """Return the largest difference as a share of ``span``; None: all that an integer can be, or the largest float."""
    most = span if span is not None else np.abs(wanted).max(initial=0)
    if np.issubdtype(wanted.dtype, np.integer):
        most = np.iinfo(wanted.dtype).max - np.iinfo(wanted.dtype).min
    distance = np.abs(given.astype(np.float64) - wanted.astype(np.float64)).max(initial=0)
    return float(distance / most) if most else float(distance)


def random_values(generator: np.random.Generator, shape: np.ndarray, dtype: type, largest: int) -> np.ndarray:
    """Return an input: all integers of small types, floats up to ``largest``, zeros of larger integers (indices)."""
    if np.issubdtype(dtype, np.floating):
        return generator.uniform(0, largest, shape).astype(dtype)
    if np.dtype(dtype).itemsize > 1:
        return np.zeros(shape, dtype)
    limits = np.iinfo(dtype)
    return generator.integers(limits.min, limits.max + 1, shape).astype(dtype)


if __name__ == "__main__":
    main()
