"""Images of random pixels: what a network needs that is only counted, timed, or compressed without training."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from annotated_types import Ge, Gt, Le
from pydantic.dataclasses import dataclass

from compress.data.source import STRICT, Data, DataSource, EvaluatedPart, Split, make_data

Side = Annotated[int, Ge(1), Le(10_000)]
_SEED = 20171023


@dataclass(frozen=True, config=STRICT)
class Noise(DataSource):
    """Random images of ``shape`` [h, w, c], random labels: sizes and latencies mean something, accuracies do not."""

    shape: tuple[Side, Side, Side] = (224, 224, 3)
    classes: Annotated[int, Ge(1), Le(100_000)] = 1000
    samples: Annotated[int, Ge(2), Le(1_000_000)] = 64
    recovery_epochs: Annotated[float, Ge(0)] = 1.0
    train_limit: Annotated[int, Gt(0)] | None = None
    test_limit: Annotated[int, Gt(0)] | None = None
    evaluate_on: EvaluatedPart = "test"

    def load(self) -> Data:
        """Draw the samples, always the same; as many again are the test part."""
        rng = np.random.default_rng(_SEED)
        x = rng.integers(0, 256, (2 * self.samples, *self.shape), dtype=np.uint8)
        y = rng.integers(0, self.classes, 2 * self.samples)
        y[self.samples] = self.classes - 1  # The number of classes is seen from the labels.
        return make_data(
            "noise",
            Split(x[: self.samples], y[: self.samples]),
            Split(x[self.samples :], y[self.samples :]),
            train_limit=self.train_limit,
            test_limit=self.test_limit,
            evaluate_on=self.evaluate_on,
            pixels=(0.0, 255.0),
        )
