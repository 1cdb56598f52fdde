"""What was exported, held against what it was made from, and against what a runtime has kernels for."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from compress.boards.board import Board
from compress.boards.micro_kernels import MICRO_KERNELS
from compress.candidate import Scheme
from compress.errors import CompressError
from compress.metrics.tflite_file import TFLiteFile
from compress.words import counted

LEAST_SAME_CLASS = 99.0
"""Percent of the samples that file and Keras model must put into the same class, or the report says so."""
LARGEST_DIFFERENCE = 1e-3
"""Of the outputs of a float file, as a share of the largest output; more is said in the report."""

_OPERATOR_NAMES = {code: name for name, code in vars(schema.BuiltinOperator).items() if not name.startswith("_")}


@dataclass(frozen=True)
class Agreement:
    """How far a file's outputs are from those of its Keras model, on the same samples."""

    samples: int
    max_difference: float
    mean_difference: float
    largest_output: float
    """Of the Keras model, in magnitude: what the differences are to be compared with."""
    same_class: float
    """Percent of the samples whose highest score is the same one."""


@dataclass(frozen=True)
class OperatorUse:
    """An operator that a file needs: a builtin one by its name, any other by the name that it is registered under."""

    name: str
    count: int
    version: int
    builtin: bool = True


@dataclass(frozen=True)
class Verification:
    """What is known about the last stage's file before it is deployed."""

    agreement: Agreement | None
    """None: there is no Keras model to compare with."""
    operators: tuple[OperatorUse, ...]
    board: str
    lacking: tuple[str, ...]
    """Operators that the board says it has no kernel for."""
    micro_lacking: tuple[str, ...]
    """Operators that TensorFlow Lite for Microcontrollers has no kernel for."""
    float_operators: tuple[str, ...] = ()
    """Operators that compute with floats in a file whose others compute with integers."""

    def to_json(self) -> dict[str, Any]:
        """Return it under the keys of the report."""
        return asdict(self)


def agreement(keras: np.ndarray, file: np.ndarray) -> Agreement:
    """Compare outputs [n, classes] of a Keras model and of the file made from it."""
    difference = np.abs(file.astype(np.float64) - keras.astype(np.float64))
    return Agreement(
        samples=len(keras),
        max_difference=float(difference.max()),
        mean_difference=float(difference.mean()),
        largest_output=float(np.abs(keras).max()),
        same_class=float(100.0 * np.mean(keras.argmax(axis=-1) == file.argmax(axis=-1))),
    )


def operators_in(content: bytes, name: str = "model.tflite") -> tuple[OperatorUse, ...]:
    """Return the operators of all subgraphs of a ``.tflite`` file, the most frequent first.

    Raises:
        CompressError: if it is damaged.
    """
    try:
        return _operators(content)
    except (struct.error, ValueError, TypeError, IndexError, AttributeError) as error:
        raise CompressError(
            name, expected="a whole TFLite file", received=f"a damaged one ({error})", fix="Export the model again."
        ) from error


def _operators(content: bytes) -> tuple[OperatorUse, ...]:
    model = schema.Model.GetRootAs(content, 0)
    graphs = [model.Subgraphs(i) for i in range(model.SubgraphsLength())]
    counts = Counter(graph.Operators(i).OpcodeIndex() for graph in graphs for i in range(graph.OperatorsLength()))
    found: dict[tuple[str, bool], OperatorUse] = {}
    for index, count in counts.items():
        code = model.OperatorCodes(index)
        number = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())
        builtin = number != schema.BuiltinOperator.CUSTOM
        name = _OPERATOR_NAMES.get(number, f"BUILTIN_{number}") if builtin else (code.CustomCode() or b"?").decode()
        before = found.get((name, builtin), OperatorUse(name, 0, 1, builtin))
        use = OperatorUse(name, before.count + count, max(before.version, code.Version()), builtin)
        found[name, builtin] = use
    return tuple(sorted(found.values(), key=lambda use: (-use.count, use.name)))


def verify(content: bytes, agreed: Agreement | None, board: Board) -> Verification:
    """Return what is known about a ``.tflite`` file.

    Args:
        content: the file.
        agreed: how it agrees with its Keras model.
        board: where it is to run.
    """
    operators = operators_in(content)
    names = [use.name for use in operators]
    return Verification(
        agreed,
        operators,
        board.name,
        lacking=tuple(sorted(board.lacks(names))),
        micro_lacking=tuple(name for name in names if name not in MICRO_KERNELS),
        float_operators=tuple(sorted(float_operators(TFLiteFile(content)))),
    )


def float_operators(file: TFLiteFile) -> dict[str, int]:
    """Return the operators that compute with floats in a file whose others compute with integers, and their number.

    Those that only turn integers into floats are left out. Empty for a file that computes with floats as a whole.
    """
    outputs = [(op.name, [file.tensors[index] for index in op.outputs]) for op in file.operators]
    computed = [(name, tensor) for name, tensors in outputs for tensor in tensors if tensor.data is None]
    if not any(tensor.scales.size and name != "QUANTIZE" for name, tensor in computed):
        return {}
    return Counter(
        name
        for name, tensors in outputs
        if name not in ("DEQUANTIZE", "DENSIFY") and any(tensor.dtype == np.float32 for tensor in tensors)
    )


def complaints(verification: Verification, scheme: Scheme) -> list[str]:
    """Say what is wrong with the file; nothing, where nothing is."""
    found: list[str] = []
    agreed = verification.agreement
    if agreed is not None:
        worst = agreed.max_difference / agreed.largest_output if agreed.largest_output else agreed.max_difference
        if agreed.same_class < LEAST_SAME_CLASS:
            found.append(
                f"The exported file puts {100 - agreed.same_class:.2f} % of {counted(agreed.samples, 'sample')} into "
                f"another class than the Keras model (limit {100 - LEAST_SAME_CLASS:g} %)."
            )
        elif scheme == "float32" and worst > LARGEST_DIFFERENCE:
            found.append(
                f"The exported float file's outputs differ from the Keras model's by up to {100 * worst:.2g} % of the "
                f"largest output (limit {100 * LARGEST_DIFFERENCE:g} %)."
            )
    if verification.lacking:
        found.append(f"The board {verification.board} has no kernel for {', '.join(verification.lacking)}.")
    return found


def micro_resolver(operators: Sequence[OperatorUse], lacking: Sequence[str]) -> str:
    """Return C++ that registers the kernels of a file with TensorFlow Lite for Microcontrollers, and no others."""
    names = sorted(use.name for use in operators if use.name not in lacking)
    lines = [f"  if (resolver.{MICRO_KERNELS[name]}() != kTfLiteOk) return kTfLiteError;" for name in names]
    missing = [f"// It has no kernel for {name}: this file will not run there as it is." for name in lacking]
    if "DENSIFY" in lacking:
        missing.append(
            "// DENSIFY expands kernels stored without their zeros: board=microcontroller makes a file without."
        )
    return "\n".join(
        [
            "// The kernels that this model needs, for TensorFlow Lite for Microcontrollers.",
            *missing,
            "#pragma once",
            '#include "tensorflow/lite/micro/micro_mutable_op_resolver.h"',
            "",
            f"using ModelOpResolver = tflite::MicroMutableOpResolver<{len(names)}>;",
            "",
            "inline TfLiteStatus RegisterModelOps(ModelOpResolver& resolver) {",
            *lines,
            "  return kTfLiteOk;",
            "}",
            "",
        ]
    )


def selective_build(operators: Sequence[OperatorUse]) -> str:
    """Return C++ that registers the builtin kernels of a file with LiteRT, and no others, each up to its version."""
    lines = [
        f"  resolver->AddBuiltin(::tflite::BuiltinOperator_{use.name}, ::tflite::ops::builtin::Register_{use.name}(), "
        f"1, {use.version});"
        for use in sorted(operators, key=lambda use: use.name)
        if use.builtin
    ]
    others = [f"// Not builtin, to be added by hand: {use.name}" for use in operators if not use.builtin]
    return "\n".join(
        [
            "// The kernels that this model needs, for a LiteRT runtime without the others.",
            *others,
            '#include "tensorflow/lite/kernels/builtin_op_kernels.h"',
            '#include "tensorflow/lite/mutable_op_resolver.h"',
            "",
            "void RegisterSelectedOps(::tflite::MutableOpResolver* resolver) {",
            *lines,
            "}",
            "",
        ]
    )


def uses_from_json(rows: Sequence[Mapping[str, Any]]) -> tuple[OperatorUse, ...]:
    """Rebuild the operators from the report."""
    return tuple(OperatorUse(**row) for row in rows)
