"""Values that cost few bits: each weight takes the level that is best for the error and the entropy code together.

Sources: entropy-constrained quantization, Chou, Lookabaugh, Gray (IEEE Trans. ASSP 1989), for networks Choi, El-Khamy,
Lee (arXiv 1612.01543); the error is that of the layer's outputs, weighed by what it means for the logits, and the other
weights make up for each rounding, as in GPTQ (arXiv 2210.17323) and COMQ (arXiv 2403.07134).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass as plain_dataclass
from typing import Annotated

import numpy as np
import tf_keras
from annotated_types import Ge, Gt, Le, Lt
from pydantic.dataclasses import dataclass

from compress.candidate import Candidate, Effect, Skipped
from compress.deploy.packing import packed_model_bytes
from compress.errors import CompressError
from compress.graph.kernels import Kernel, kernels
from compress.graph.rewrite import calls, copy_model
from compress.graph.walk import Walk
from compress.metrics.counts import count_params
from compress.progress import progress
from compress.strategies.least_squares import Moments, assign_matrix, is_linear, matrix_of
from compress.strategies.pruning.zeros import Zeros
from compress.strategies.repair import REPAIR_RIDGE, RIDGE, Repair
from compress.strategies.sharing.chosen import choose_kernels
from compress.strategies.sharing.codebook import Codebook
from compress.strategies.strategy import STRICT, Context, Strategy

_MOST_LEVELS = 31
"""To each side of zero."""
_STEPS = (0.6, 0.8, 1.0, 1.25)
"""What is tried for a layer: parts of the step that is best where bits are many."""
_SWEEPS = 4
_PASSES = 8
_CLOSE = 0.97
"""A packed file between this part of the budget and the whole is near enough."""


@dataclass(frozen=True, config=STRICT)
class RateDistortion(Strategy):
    """Quantize the selected Dense and Conv2D kernels so that the packed file has the size that is asked for.

    All layers share one price of a bit, and with it the bits go where they keep the logits: most weights become zero,
    the others multiples of their layer's step. Batch norms are folded; a layer that is called more than once is left
    alone, and one into which the export merges a normalisation that could not be folded. Recovery trains the values,
    and no weight changes its place among them.

    Args:
        bytes: size of the packed file, as part of 4 bytes for each parameter of the reference.
        images: unlabelled calibration images.
    """

    bytes: Annotated[float, Gt(0), Lt(1)] = 0.05
    images: Annotated[int, Ge(1), Le(100_000)] = 500

    effects = frozenset({Effect.TRAIN, Effect.ZERO, Effect.SHARE})
    establishes = Codebook

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        """Search the price of a bit; quantize; train the values."""
        names = context.selection.names(candidate.model)
        repair = Repair(candidate.model, context.calibration_samples(self.images), context.seed, candidate.guarantees)
        times = calls(repair.folded)

        def obstacle(kernel: Kernel) -> Skipped | None:
            name = kernel.layer.name
            if not is_linear(kernel.layer):
                return Skipped(name, "it is no Dense or ordinary Conv2D")
            return Skipped(name, "it is called more than once") if times[name] > 1 else None

        linear, skipped = choose_kernels(repair.folded, names, "quantized", obstacle)
        chosen = {kernel.layer.name for kernel in linear}
        if not chosen:
            raise context.nothing_done("a Dense or an ordinary Conv2D that is called once", skipped)
        repair.measure_importance(chosen)
        limit = self.bytes * 4 * count_params(context.reference)
        found = self._search(repair, chosen, limit, candidate, context.stage)
        labels = {name: level.astype(np.uint16) for name, level in found.labels.items()}
        most = max(int(level.max()) + 1 for level in labels.values())
        result = candidate.evolve(model=found.model, skipped=context.skip(skipped))
        masks = {k.name: k.value != 0 for k in kernels(found.model) if k.name in labels}
        result = result.with_guarantee(Zeros(context.stage, masks)).with_guarantee(
            Codebook(context.stage, most, labels)
        )
        return context.recover(result)

    def _search(self, repair: Repair, chosen: set[str], limit: float, candidate: Candidate, stage: str) -> Quantized:
        """Return the largest quantized model within the limit, to a few percent."""
        price = _first_price(repair, chosen)
        fitting: tuple[int, Quantized] | None = None
        low = high = 0.0
        smallest = 0
        for _ in range(_PASSES):
            found = quantize_layers(repair, chosen, price)
            size = packed_model_bytes(found.model, candidate.coder)
            smallest = min(smallest or size, size)
            if size > limit:
                low = price
            else:
                high = price
                if fitting is None or size > fitting[0]:
                    fitting = size, found
                if size >= _CLOSE * limit:
                    break
            price = float(np.sqrt(low * high)) if low and high else price * dearer(size / limit)
        if fitting is None:
            raise CompressError(
                f"strategy.{stage}.bytes",
                expected="a size that the packed file can have",
                received=f"{self.bytes:g}, which is {limit:,.0f} bytes, where {smallest:,} were reached",
                fix="Ask for more bytes; biases, other layers and the network's description take some, too.",
            )
        return fitting[1]


def dearer(excess: float) -> float:
    """Return the factor for the price of a bit that brings a file of ``excess`` times the budget about into it.

    Half as many bytes ask for about eight times the price; a file that misses by little still asks for a real step.
    """
    factor = float(np.clip(excess, 0.25, 8.0)) ** 3
    return max(factor, 1.2) if excess > 1 else min(factor, 1 / 1.2)


@plain_dataclass(frozen=True)
class Quantized:
    """A folded model with quantized kernels, and for each of these which of its values every weight has."""

    model: tf_keras.Model
    labels: Mapping[str, np.ndarray]


def quantize_layers(repair: Repair, chosen: set[str], price: float) -> Quantized:
    """Quantize the kernels of the chosen layers, layer after layer, each making up for those before it.

    Args:
        repair: the model, made ready, with the importance of the layers measured.
        chosen: names of Dense or ordinary Conv2D layers, each called once.
        price: squared change of the logits that a bit is worth.
    """
    changed = copy_model(repair.folded)
    labels: dict[str, np.ndarray] = {}
    with progress("quantizing") as shown:
        for step in (walk := Walk(repair.folded, changed, repair.samples)):
            shown.advance(step.position + 1, len(walk.nodes), step.layer.name)
            layer = step.layer
            if layer.name not in chosen:
                continue
            before, known = matrix_of(layer), repair.moments(step, repair.target(walk, step))
            repair.put(walk, step, known, before, REPAIR_RIDGE)
            own = price / max(repair.importance[layer.name].scale, 1e-30)
            matrix, levels = quantize_matrix(known, matrix_of(layer), own, repair.alive.get(layer.name))
            assign_matrix(layer, matrix)
            _, label = np.unique(levels, return_inverse=True)
            labels[f"{layer.name}/kernel"] = label.reshape(layer.kernel.shape)
    return Quantized(changed, labels)


def quantize_matrix(
    known: Moments, matrix: np.ndarray, price: float, alive: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return weights that are multiples of one step, chosen for the outputs' squared error plus the price of the bits.

    Bits are those of an ideal entropy code for the levels of the whole matrix.

    Args:
        known: the moments of the layer's inputs.
        matrix: the weights with the bias in the last row [d + 1, outputs]; the bias stays free.
        price: squared error, summed over the outputs, that a bit is worth.
        alive: which weights may be other than zero [d, outputs]; all if None.

    Returns:
        The matrix [d + 1, outputs] and the levels [d, outputs], whole numbers.
    """
    strength = RIDGE * max(float(np.mean(np.diag(known.inputs)[:-1])), 1e-12)
    gram = known.inputs + np.diag(np.append(np.full(len(matrix) - 1, strength), strength * 1e-3))
    free = np.ones(matrix[:-1].shape, bool) if alive is None else alive
    # Where bits are many, one more quarters the error: its price is 2 ln 2 times the error step**2 / 12 of a weight.
    fine = np.sqrt(6.0 * price / (np.log(2) * float(np.mean(np.diag(gram)[:-1]))))
    widest = np.abs(matrix[:-1]).max(initial=0.0)
    tried = []
    for part in _STEPS:
        step = max(part * fine, widest / _MOST_LEVELS, 1e-12)
        result, levels, cost = _descend(gram, matrix, step, price, free)
        tried.append((cost, result, levels))
    _, result, levels = min(tried, key=lambda found: found[0])
    return result, levels


def _descend(
    gram: np.ndarray, wanted: np.ndarray, step: float, price: float, free: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """Set each weight to the level that is best given all others, over and over; return weights, levels, and cost."""
    size = len(gram) - 1
    choices = np.arange(-_MOST_LEVELS, _MOST_LEVELS + 1)
    levels = np.clip(np.rint(wanted[:-1] / step), -_MOST_LEVELS, _MOST_LEVELS).astype(np.int64) * free
    result = np.vstack([levels * step, wanted[-1:]])
    slope = gram @ (wanted - result)
    order = np.argsort(-np.diag(gram)[:-1], kind="stable")
    for _ in range(_SWEEPS):
        bits = _bits(levels)
        for row in order:
            ideal = result[row] + slope[row] / gram[row, row]
            cost = gram[row, row] * (choices[:, None] * step - ideal) ** 2 + price * bits[:, None]
            chosen = choices[cost.argmin(0)] * free[row]
            moved = chosen * step - result[row]
            if moved.any():
                levels[row], result[row] = chosen, chosen * step
                slope -= gram[:, row, None] * moved
        moved = slope[size] / gram[size, size]
        result[size] += moved
        slope -= gram[:, size, None] * moved
    error = result - wanted
    distortion = float(np.einsum("io,io->", error, gram @ error))
    return result, levels, distortion + price * float(_bits(levels)[levels + _MOST_LEVELS].sum())


def _bits(levels: np.ndarray) -> np.ndarray:
    """Return the bits of each level [2 * most + 1] in an ideal code for these; an unused one is not for free."""
    counts = np.bincount((levels + _MOST_LEVELS).ravel(), minlength=2 * _MOST_LEVELS + 1)
    return -np.log2(np.maximum(counts, 0.5) / counts.sum())


def _first_price(repair: Repair, chosen: set[str]) -> float:
    """Return the price at which a usual layer's best step is half of what its weights usually are."""
    prices = []
    for name in chosen:
        kernel = np.asarray(repair.folded.get_layer(name).kernel)
        scale = repair.importance[name].scale
        prices.append(np.log(2) / 6 * scale * float(np.mean(kernel**2)) / 4)
    return float(np.median(prices)) or 1e-12
