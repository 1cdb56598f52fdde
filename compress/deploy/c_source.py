"""A model as C source: for microcontrollers, which have no files."""

from __future__ import annotations

import numpy as np

from compress.deploy.interface import Interface

_COLUMNS = 16
_WIDTH = 5
"""Characters of a byte in the source, ``0x1c,``."""


def c_header(interface: Interface, size: int, peak_memory_bytes: int) -> str:
    """Return ``model.h``: what the array is called, and the numbers that a program needs around it."""
    source, target = interface.input, interface.output
    lines = [
        f"/* {_comment(interface.name)}: the .tflite file as an array, for TensorFlow Lite for Microcontrollers. */",
        "#ifndef MODEL_H_",
        "#define MODEL_H_",
        "",
        f"#define MODEL_TFLITE_BYTES {size}u",
        f"/* Activations alive at once; the tensor arena must be larger than this. */\n"
        f"#define MODEL_ACTIVATION_BYTES {peak_memory_bytes}u",
        "",
        f"/* Input: {'x'.join(map(str, source.shape))} {source.dtype}, output: {'x'.join(map(str, target.shape))} "
        f"{target.dtype} ({interface.scores}). */",
        f"#define MODEL_INPUT_SIZE {int(np.prod(source.shape))}u",
        f"#define MODEL_CLASSES {target.shape[-1]}u",
    ]
    for side, end in (("INPUT", source), ("OUTPUT", target)):
        if end.scale:
            lines.append(f"/* value = scale * (number - zero point) */\n#define MODEL_{side}_SCALE {end.scale!r}f")
            lines.append(f"#define MODEL_{side}_ZERO_POINT ({end.zero_point})")
    if interface.channels is not None:
        lines.append(
            f"/* A pixel p of 0 to 255 goes in as (p - mean) / std. */\n#define MODEL_MEAN {interface.mean!r}f"
        )
        lines.append(f"#define MODEL_STD {interface.std!r}f")
    return "\n".join(
        [
            *lines,
            "",
            "#ifdef __cplusplus",
            'extern "C" {',
            "#endif",
            "extern const unsigned char model_tflite[MODEL_TFLITE_BYTES];",
            "extern const char *const model_labels[MODEL_CLASSES];",
            "#ifdef __cplusplus",
            "}",
            "#endif",
            "",
            "#endif",
            "",
        ]
    )


def c_source(content: bytes, interface: Interface) -> str:
    """Return ``model.c``: the bytes of the file, aligned as the runtime wants them, and the classes' names."""
    labels = [f"    {_string(name)}," for name in interface.class_names]
    return "\n".join(
        [
            '#include "model.h"',
            "",
            "#if defined(__GNUC__)",
            "#define MODEL_ALIGNED __attribute__((aligned(16)))",
            "#elif defined(__STDC_VERSION__) && __STDC_VERSION__ >= 201112L",
            "#define MODEL_ALIGNED _Alignas(16)",
            "#else",
            "#define MODEL_ALIGNED",
            "#endif",
            "",
            "MODEL_ALIGNED const unsigned char model_tflite[MODEL_TFLITE_BYTES] = {",
            _bytes(content) + "};",
            "",
            "const char *const model_labels[MODEL_CLASSES] = {",
            *labels,
            "};",
            "",
        ]
    )


def _bytes(content: bytes) -> str:
    """Return the bytes as lines of hexadecimal numbers."""
    spelled = np.frombuffer("".join(f"0x{value:02x}," for value in range(256)).encode(), np.uint8).reshape(256, _WIDTH)
    values = np.frombuffer(content, np.uint8)
    whole = len(values) // _COLUMNS * _COLUMNS
    rows = spelled[values[:whole]].reshape(-1, _COLUMNS * _WIDTH)
    lines = np.concatenate([rows, np.full((len(rows), 1), ord("\n"), np.uint8)], axis=1)
    rest = spelled[values[whole:]].tobytes().decode()
    return lines.tobytes().decode() + (f"{rest}\n" if rest else "")


def _string(text: str) -> str:
    """Return text as a C string literal: plain letters as they are, all other bytes of its UTF-8 in octal."""
    # Three octal digits end by themselves; a question mark could begin a trigraph.
    plain = (chr(b) if 32 <= b < 127 and chr(b) not in '"\\?' else f"\\{b:03o}" for b in text.encode())
    return f'"{"".join(plain)}"'


def _comment(text: str) -> str:
    return text.replace("*/", "* /")
