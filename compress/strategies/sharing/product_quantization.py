"""Product quantization: a kernel's weights are vectors along its inputs, of which there are few distinct ones.

Sources: Gong et al. (arXiv 1412.6115) and Wu et al. (arXiv 1512.06473) for layers whose error each later one makes up
for; Stock et al., And the Bit Goes Down (arXiv 1907.05686), for codewords that fit what the layer reads, and the limit
of a quarter as many codewords as vectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass as plain_dataclass
from typing import Annotated

import numpy as np
import tf_keras
from annotated_types import Ge, Le
from pydantic.dataclasses import dataclass

from compress.candidate import Candidate, Effect, Skipped
from compress.graph.fold import merged_on_export
from compress.graph.kernels import Kernel, get_variable, kernels, without_kernel
from compress.graph.rewrite import calls, copy_model
from compress.graph.walk import Step, Walk
from compress.progress import progress
from compress.strategies.least_squares import Moments, assign_matrix, is_linear, matrix_of, rows_of
from compress.strategies.repair import REPAIR_RIDGE, RIDGE, Repair, change_of_logits, outputs_of
from compress.strategies.sharing import vectors
from compress.strategies.sharing.vector_codebook import VectorCodebook
from compress.strategies.strategy import STRICT, Context, Strategy
from compress.words import counted

layers = tf_keras.layers

_VECTORS_PER_CODEWORD = 4
_ROUNDS = 4
"""Turns of new labels and a new book."""
_BATCH = 64
_UNSEEN = 1e-2
"""Part of an input's usual square that is added where a layer is too large to be solved for."""


@dataclass(frozen=True, config=STRICT)
class ProductQuantization(Strategy):
    """Put the selected Dense and Conv2D kernels together from few vectors of ``length`` weights.

    Batch norms are folded. Layer after layer is solved for what the original gives, so that it makes up for those
    before it, and cut into vectors; k-means weighs them by what the layer reads, and then vectors and codewords are
    chosen so that they make up for one another. Recovery trains the codewords by the mean of their weights' gradients,
    and no vector changes its codeword. Zeros of an earlier stage cannot be kept: a vector with a zero in one place and
    the same without would be two, and their positions would take more bytes than vectors save.

    Args:
        codewords: distinct vectors of a kernel, at most; a quarter of its vectors where these are few.
        length: of a vector, along the inputs; where it does not divide a layer's inputs, the longest that does.
        bits: of each number of a codeword: after training they are rounded to a grid of their kernel; None: floats. (A
            later stage that trains makes floats of them again.)
        images: unlabelled calibration images.
    """

    codewords: Annotated[int, Ge(2), Le(4096)] = 256
    length: Annotated[int, Ge(2), Le(32)] = 4
    bits: Annotated[int, Ge(4), Le(8)] | None = 8
    images: Annotated[int, Ge(1), Le(100_000)] = 500

    effects = frozenset({Effect.TRAIN, Effect.SHARE, Effect.LEVEL, Effect.FILL})
    establishes = VectorCodebook

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        """Fold; quantize layer after layer; train the codewords; round them."""
        names = context.selection.names(candidate.model)
        repair = Repair(candidate.model, context.calibration_samples(self.images), context.seed, candidate.guarantees)
        times, merged = calls(repair.folded), merged_on_export(repair.folded)
        skipped = [
            Skipped(layer.name, f"weights of {type(layer).__name__} layers are not cut into vectors")
            for layer in without_kernel(repair.folded)
            if layer.name in names
        ]
        sizes: dict[str, tuple[int, int]] = {}
        for kernel in kernels(repair.folded):
            name = kernel.layer.name
            if name not in names:
                continue
            obstacle = _obstacle(kernel)
            if times[name] > 1:
                obstacle = "it is called more than once"
            elif name in merged:
                obstacle = "the export merges a normalisation next to it into its kernel"
            size = obstacle or self._sizes(kernel)
            if isinstance(size, str):
                skipped.append(Skipped(name, size, by_choice=obstacle is None))
            else:
                sizes[name] = size
        if not sizes:
            raise context.nothing_done("a Dense or an ordinary Conv2D with vectors to share", skipped)
        found = quantize_layers(repair, sizes, context.seed)
        shapes = {name: list(get_variable(found.model, name).shape) for name in found.labels}
        guarantee = VectorCodebook(context.stage, max(count for _, count in sizes.values()), found.labels, shapes)
        outputs = (outputs_of(model, repair.samples) for model in (found.model, repair.folded))
        change = change_of_logits(repair.folded, *outputs)
        result = candidate.evolve(
            model=found.model, skipped=context.skip(skipped), measured={"change_of_logits": change}
        )
        result = context.recover(result.with_guarantee(guarantee))
        if self.bits is not None:
            for name in found.labels:
                variable = get_variable(result.model, name)
                variable.assign(rounded(np.asarray(variable), self.bits))
        return result

    def _sizes(self, kernel: Kernel) -> tuple[int, int] | str:
        """Return length and number of a kernel's codewords, or why it is left alone."""
        inputs, outputs = kernel.value.reshape(-1, kernel.value.shape[-1]).shape
        length = max(n for n in range(1, self.length + 1) if inputs % n == 0)
        codewords = min(self.codewords, inputs // length * outputs // _VECTORS_PER_CODEWORD)
        if length == 1:
            return f"no vector of at most {self.length} weights divides its {inputs} inputs"
        if codewords < 2:
            return f"{counted(inputs // length * outputs, 'vector')} of {length} weights: too few to share"
        return length, codewords


@plain_dataclass(frozen=True)
class Quantized:
    """A folded model with quantized kernels, and for each of these which codeword every vector is."""

    model: tf_keras.Model
    labels: Mapping[str, np.ndarray]


def quantize_layers(repair: Repair, sizes: Mapping[str, tuple[int, int]], seed: int) -> Quantized:
    """Quantize the kernels of some layers, layer after layer, each making up for those before it.

    Args:
        repair: the model, made ready.
        sizes: layer -> length and number of its codewords.
        seed: of the draws where k-means starts.
    """
    repair.measure_importance(sizes)
    changed = copy_model(repair.folded)
    labels: dict[str, np.ndarray] = {}
    rng = np.random.default_rng(seed)
    with progress("quantizing") as shown:
        for step in (walk := Walk(repair.folded, changed, repair.samples)):
            shown.advance(step.position + 1, len(walk.nodes), step.layer.name)
            layer = step.layer
            if layer.name not in sizes:
                continue
            length, codewords = sizes[layer.name]
            if is_linear(layer):
                before, known = matrix_of(layer), repair.moments(step, repair.target(walk, step))
                repair.put(walk, step, known, before, REPAIR_RIDGE)
                matrix, label = quantize_matrix(known, matrix_of(layer), length, codewords, rng)
                assign_matrix(layer, matrix)
            else:
                metrics = _metrics(step, length)
                cut = vectors.cut(np.asarray(layer.kernel).reshape(-1, layer.kernel.shape[-1]), length)
                book = vectors.cluster(cut, metrics, codewords, rng)
                label, _ = vectors.assign(cut, metrics, book)
                layer.kernel.assign(vectors.together(book, label).reshape(layer.kernel.shape))
            labels[f"{layer.name}/kernel"] = label
    return Quantized(changed, labels)


def quantize_matrix(
    known: Moments, matrix: np.ndarray, length: int, codewords: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return a matrix whose rows above the last are put together from few vectors, near to another by its outputs.

    Args:
        known: the moments of the layer's inputs.
        matrix: the weights with the bias in the last row [d + 1, outputs]; the bias stays free.
        length: of a vector.
        codewords: distinct vectors, at most.
        rng: what k-means draws its start with.

    Returns:
        The matrix [d + 1, outputs], and the labels [d / length, outputs].
    """
    wanted, constant = matrix[:-1], known.inputs[-1, -1]
    # Whatever the weights are, the bias takes over the mean of their error: what is left is the inputs' covariance.
    tied = known.inputs[:-1, -1] / constant
    gram = known.inputs[:-1, :-1] - constant * np.outer(tied, tied)
    strength = RIDGE * max(float(np.mean(np.diag(known.inputs)[:-1])), 1e-12)
    gram = gram + strength * np.eye(len(gram))
    cut, metrics = vectors.cut(wanted, length), vectors.blocks_of(gram, length)
    book = vectors.cluster(cut, metrics, codewords, rng)
    labels, _ = vectors.assign(cut, metrics, book)
    for _ in range(_ROUNDS):
        labels = vectors.descend(gram, wanted, book, labels)
        book = vectors.refit(gram, wanted, book, labels)
    result = vectors.together(book, labels)
    return np.vstack([result, matrix[-1:] + tied @ (wanted - result)]), labels


def rounded(kernel: np.ndarray, bits: int) -> np.ndarray:
    """Return a kernel whose values are whole multiples of one step, exactly, up to ``2**(bits - 1) - 1`` of them."""
    most = 2 ** (bits - 1) - 1
    step = np.float32(np.abs(kernel).max(initial=0) / most)
    if step == 0 or not np.isfinite(step):
        return kernel
    # Without its last bits its multiples are exact, which is how the packed file finds it.
    fraction, exponent = np.frexp(step)
    step = np.ldexp(np.ceil(np.ldexp(fraction, 16)), exponent - 16).astype(np.float32)
    return (np.rint(kernel / step) * step).astype(np.float32)


def _obstacle(kernel: Kernel) -> str | None:
    """Say why a kernel cannot be cut into vectors; None if it can."""
    layer = kernel.layer
    if isinstance(layer, layers.Dense):
        return None
    plain = isinstance(layer, layers.Conv2D) and not isinstance(
        layer, (layers.DepthwiseConv2D, layers.Conv2DTranspose, layers.SeparableConv2D)
    )
    if not plain or layer.groups > 1 or layer.data_format != "channels_last":
        return "it is no Dense or ordinary Conv2D"
    return None


def _metrics(step: Step, length: int) -> np.ndarray:
    """Return the second moments [groups, length, length] of the inputs of a layer too large to be solved for."""
    x = step.changed_inputs[0]
    total, count = np.zeros((int(np.prod(step.layer.kernel.shape[:-1])) // length, length, length)), 0
    for start in range(0, len(x), _BATCH):
        rows = np.asarray(rows_of(step.layer, x[start : start + _BATCH]))
        cut = rows.reshape(-1, rows.shape[-1] // length, length)
        total += np.einsum("ngl,ngm->glm", cut, cut, optimize=True)
        count += len(cut)
    mean = total / count
    usual = max(float(np.trace(mean, axis1=1, axis2=2).mean()) / length, 1e-12)
    # Inputs that are zero on all images say nothing of their weights: these stay near to what they were.
    return mean + _UNSEEN * usual * np.eye(length)
