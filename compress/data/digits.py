"""The 8x8 digits that come with scikit-learn: 1,797 images, 10 classes, no download."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from annotated_types import Ge, Gt
from pydantic.dataclasses import dataclass

from compress.data.source import STRICT, Augmentation, Data, DataSource, EvaluatedPart, Split, make_data


@dataclass(frozen=True, config=STRICT)
class Digits(DataSource):
    """scikit-learn's digits; pixel values 0 to 16; every fifth image is test data."""

    recovery_epochs: Annotated[float, Ge(0)] = 1.0
    shift: Annotated[int, Ge(0)] = 0
    train_limit: Annotated[int, Gt(0)] | None = None
    test_limit: Annotated[int, Gt(0)] | None = None
    evaluate_on: EvaluatedPart = "test"

    def load(self) -> Data:
        """Read the data from the scikit-learn package."""
        from sklearn.datasets import load_digits

        bunch = load_digits()
        x = bunch.images[..., None].astype(np.uint8)
        y = bunch.target.astype(np.int64)
        test = np.arange(len(x)) % 5 == 4
        return make_data(
            "digits",
            Split(x[~test], y[~test]),
            Split(x[test], y[test]),
            augmentation=Augmentation(shift=self.shift),
            train_limit=self.train_limit,
            test_limit=self.test_limit,
            evaluate_on=self.evaluate_on,
            labels=[str(name) for name in bunch.target_names],
            pixels=(0.0, 16.0),
        )
