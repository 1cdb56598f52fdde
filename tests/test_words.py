"""Numbers with their nouns: one layer, two layers, wherever a user reads how many."""

from __future__ import annotations

import numpy as np
import pytest

from compress.strategies.compact.guarantees import FireForm, GroupedForm, OctaveForm
from compress.strategies.lowrank.rank import Rank
from compress.strategies.pruning.widths import Widths
from compress.strategies.pruning.zeros import Zeros
from compress.strategies.sharing.codebook import Codebook
from compress.words import counted

ONE_ZERO = {"fc/kernel": np.array([[True, False]])}
LABELS = {"fc/kernel": np.zeros((2, 2), np.int32)}


@pytest.mark.parametrize(
    ("number", "nouns", "said"),
    [
        (0, ("layer",), "0 layers"),
        (1, ("layer",), "1 layer"),
        (2, ("layer",), "2 layers"),
        (1234, ("image",), "1,234 images"),
        (1, ("layer has", "layers have"), "1 layer has"),
        (3, ("layer has", "layers have"), "3 layers have"),
    ],
)
def test_a_number_with_its_noun(number, nouns, said):
    assert counted(number, *nouns) == said


@pytest.mark.parametrize(
    ("guarantee", "said"),
    [
        (Zeros("a", ONE_ZERO), "50.0% of 2 weights in 1 kernel are zero"),
        (Widths("a", {"fc": 3}), "1 layer has lost channels"),
        (Widths("a", {"fc": 3, "conv": 2}), "2 layers have lost channels"),
        (Rank("a", {"fc": 3}), "1 layer is a product of rank at most 3"),
        (Rank("a", {"fc": 3, "conv": 2}), "2 layers are products of rank at most 3"),
        (Codebook("a", 4, LABELS), "at most 4 distinct values in 1 kernel"),
        (GroupedForm("a", {"conv": 2}), "1 convolution is of 2 groups"),
        (FireForm("a", {"conv": "part"}), "1 convolution is a fire module"),
        (OctaveForm("a", {"conv": "part"}), "1 convolution works at two resolutions"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_what_a_stage_established_is_counted_rightly(guarantee, said):
    assert guarantee.describe() == said
