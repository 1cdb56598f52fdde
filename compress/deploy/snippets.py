"""Small programs for one very model: Python and Kotlin that load it, give it a photo, and name the class."""

from __future__ import annotations

import math

from compress.deploy.card import input_in_words
from compress.deploy.interface import Interface, TensorType

MODEL_FILE = "model.tflite"
LABELS_FILE = "labels.txt"


def python_snippet(interface: Interface) -> str:
    """Return ``predict.py``: needs ai-edge-litert and NumPy, and Pillow for photos; nothing of this project."""
    image = interface.channels is not None
    shape = list(interface.input.shape)
    lines = [
        f'"""Classifies {"photos" if image else "samples"} with {MODEL_FILE}, which lies beside this file.',
        "",
        f"    pip install ai-edge-litert numpy{' pillow' if image else ''}",
        f"    python predict.py {'photo.jpg' if image else 'sample.npy'}",
        "",
        f"Input: {input_in_words(interface)}.",
        '"""',
        "",
        "import sys",
        "from pathlib import Path",
        "",
        "import numpy as np",
        "from ai_edge_litert.interpreter import Interpreter",
        *(["from PIL import Image, ImageOps"] if image else []),
        "",
        "HERE = Path(__file__).resolve().parent",
        f'LABELS = (HERE / "{LABELS_FILE}").read_text(encoding="utf-8").splitlines()',
        f'interpreter = Interpreter(model_path=str(HERE / "{MODEL_FILE}"))',
        "interpreter.allocate_tensors()",
        'source = interpreter.get_input_details()[0]["index"]',
        'target = interpreter.get_output_details()[0]["index"]',
        "",
        "",
        "def read(path):",
    ]
    if image:
        rows, columns = interface.input.shape[1:3]
        color = "L" if interface.channels == 1 else "RGB"
        lines += [
            '    """Return the input\'s values for a photo."""',
            "    with Image.open(path) as photo:",
            f'        pixels = ImageOps.exif_transpose(photo).convert("{color}")',
            f"    pixels = pixels.resize(({columns}, {rows}), Image.Resampling.BILINEAR)",
            f"    return (np.asarray(pixels, np.float32) - {interface.mean!r}) / {interface.std!r}",
        ]
    else:
        lines += ['    """Return the input\'s values from a NumPy file."""', "    return np.load(path)"]
    lines += [
        "",
        "",
        "def classify(values):",
        '    """Return a probability for each class."""',
        f"    values = np.asarray(values, np.float32).reshape({shape})",
        *_quantize(interface.input),
        "    interpreter.set_tensor(source, values)",
        "    interpreter.invoke()",
        "    scores = interpreter.get_tensor(target)[0].astype(np.float32)",
        *_dequantize(interface.output),
    ]
    if interface.scores == "logits":
        lines += ["    powers = np.exp(scores - scores.max())", "    return powers / powers.sum()"]
    else:
        lines.append("    return scores")
    lines += [
        "",
        "",
        'if __name__ == "__main__":',
        "    for path in sys.argv[1:]:",
        "        probabilities = classify(read(path))",
        "        for index in probabilities.argsort()[::-1][:3]:",
        '            print(f"{path}: {LABELS[index]} {probabilities[index]:.1%}")',
    ]
    return "\n".join(lines) + "\n"


def _quantize(end: TensorType) -> list[str]:
    if not end.scale:
        return [] if end.dtype == "float32" else [f"    values = values.astype(np.{end.dtype})"]
    return [
        f"    limits = np.iinfo(np.{end.dtype})",
        f"    values = np.round(values / {end.scale!r}) + {end.zero_point}",
        f"    values = np.clip(values, limits.min, limits.max).astype(np.{end.dtype})",
    ]


def _dequantize(end: TensorType) -> list[str]:
    return [f"    scores = (scores - {end.zero_point}) * {end.scale!r}"] if end.scale else []


_KOTLIN_TYPES = {
    # Bytes of a number; how one is written into a buffer; how one is read from it.
    "float32": (4, "putFloat(VALUE)", "float"),
    "int8": (1, "put(VALUE.toInt().toByte())", "get().toFloat()"),
    "uint8": (1, "put(VALUE.toInt().toByte())", "(get().toInt() and 0xff).toFloat()"),
    "int16": (2, "putShort(VALUE.toInt().toShort())", "short.toFloat()"),
    "int32": (4, "putInt(VALUE.toInt())", "int.toFloat()"),
    "int64": (8, "putLong(VALUE.toLong())", "long.toFloat()"),
}


def kotlin_snippet(interface: Interface) -> str:
    """Return ``Classifier.kt`` for Android: LiteRT's interpreter, a bitmap in, classes with probabilities out."""
    source, target = interface.input, interface.output
    inside, put, _ = _KOTLIN_TYPES[source.dtype]
    outside, _, get = _KOTLIN_TYPES[target.dtype]
    size, classes = math.prod(source.shape), target.shape[-1]
    value = "value"
    if source.scale:
        low, high = (0, 255) if source.dtype == "uint8" else (-(1 << 8 * inside - 1), (1 << 8 * inside - 1) - 1)
        value = f"Math.round(value / {source.scale!r}f + {source.zero_point}f).coerceIn({low}, {high})"
    score = f"({get} - {target.zero_point}f) * {target.scale!r}f" if target.scale else get
    lines = [
        f"// Classifies {'photos' if interface.channels is not None else 'samples'} with {MODEL_FILE}.",
        f"// Input: {input_in_words(interface)}.",
        "//",
        "// Copy model.tflite and labels.txt to app/src/main/assets/, and into app/build.gradle.kts write",
        '//     android { androidResources { noCompress += "tflite" } }',
        '//     dependencies { implementation("com.google.ai.edge.litert:litert:1.4.0") }',
        "",
        "import android.content.Context",
        *(["import android.graphics.Bitmap", "import android.graphics.Color"] if interface.channels else []),
        "import java.io.FileInputStream",
        "import java.nio.ByteBuffer",
        "import java.nio.ByteOrder",
        "import java.nio.channels.FileChannel",
        *(["import kotlin.math.exp"] if interface.scores == "logits" else []),
        "import org.tensorflow.lite.Interpreter",
        "",
        "class Classifier(context: Context) : AutoCloseable {",
        f'    private val labels = context.assets.open("{LABELS_FILE}").bufferedReader().readLines()',
        f'    private val interpreter = context.assets.openFd("{MODEL_FILE}").use {{ file ->',
        "        val channel = FileInputStream(file.fileDescriptor).channel",
        "        Interpreter(channel.map(FileChannel.MapMode.READ_ONLY, file.startOffset, file.declaredLength))",
        "    }",
        "",
        *_kotlin_entry(interface),
        "    private fun run(values: FloatArray): List<Pair<String, Float>> {",
        f"        val input = ByteBuffer.allocateDirect({inside} * {size}).order(ByteOrder.nativeOrder())",
        f"        for (value in values) input.{put.replace('VALUE', value)}",
        "        input.rewind()",
        f"        val output = ByteBuffer.allocateDirect({outside} * {classes}).order(ByteOrder.nativeOrder())",
        "        interpreter.run(input, output)",
        "        output.rewind()",
        f"        val scores = FloatArray({classes}) {{ with(output) {{ {score} }} }}",
    ]
    if interface.scores == "logits":
        lines += [
            "        val largest = scores.max()",
            "        val powers = scores.map { exp(it - largest) }",
            "        val sum = powers.sum()",
            "        return labels.zip(powers.map { it / sum }).sortedByDescending { it.second }",
        ]
    else:
        lines.append("        return labels.zip(scores.toList()).sortedByDescending { it.second }")
    lines += ["    }", "", "    override fun close() = interpreter.close()", "}"]
    return "\n".join(lines) + "\n"


def _kotlin_entry(interface: Interface) -> list[str]:
    if interface.channels is None:
        return ["    fun classify(values: FloatArray) = run(values)", ""]
    rows, columns = interface.input.shape[1:3]
    scaled = f"(VALUE - {interface.mean!r}f) / {interface.std!r}f"
    if interface.channels == 1:
        # The weights that Pillow uses, those of ITU-R 601-2.
        gray = "0.299f * Color.red(pixel) + 0.587f * Color.green(pixel) + 0.114f * Color.blue(pixel)"
        body = [f"            values[index] = {scaled.replace('VALUE', f'({gray})')}"]
    else:
        body = [
            f"            values[3 * index + {place}] = {scaled.replace('VALUE', f'Color.{name}(pixel)')}"
            for place, name in enumerate(("red", "green", "blue"))
        ]
    return [
        "    fun classify(photo: Bitmap): List<Pair<String, Float>> {",
        f"        val small = Bitmap.createScaledBitmap(photo, {columns}, {rows}, true)",
        f"        val pixels = IntArray({columns * rows})",
        f"        small.getPixels(pixels, 0, {columns}, 0, 0, {columns}, {rows})",
        f"        val values = FloatArray({columns * rows * interface.channels})",
        "        for ((index, pixel) in pixels.withIndex()) {",
        *body,
        "        }",
        "        return run(values)",
        "    }",
        "",
    ]
