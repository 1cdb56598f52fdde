"""Bits under a budget: the integer program against trying everything."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.strategies.quantization.mixed_precision import choose_bits


@given(seed=st.integers(0, 1000), layers=st.integers(1, 6), share=st.floats(0, 1))
@settings(deadline=None, max_examples=30)
def test_the_choice_is_the_best_one_that_fits(seed, layers, share):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 1000, layers)
    errors = {f"layer{i}": {2: e * 50, 4: e * 5, 8: e} for i, e in enumerate(rng.exponential(1e-3, layers))}
    costs = {f"layer{i}": {bits: size * bits / 8 for bits in (2, 4, 8)} for i, size in enumerate(sizes)}
    least, whole = sizes.sum() / 4, sizes.sum()
    most = least + share * (whole - least)
    found = choose_bits(errors, costs, most)
    assert found is not None
    assert sum(costs[layer][bits] for layer, bits in found.items()) <= most * (1 + 1e-6)
    combinations = (dict(zip(errors, bits, strict=True)) for bits in itertools.product((2, 4, 8), repeat=layers))
    allowed = [c for c in combinations if sum(costs[layer][bits] for layer, bits in c.items()) <= most * (1 + 1e-9)]
    best = min(sum(errors[layer][bits] for layer, bits in c.items()) for c in allowed)
    assert sum(errors[layer][bits] for layer, bits in found.items()) == pytest.approx(best, rel=1e-3)


def test_a_budget_below_the_cheapest_choice_has_no_answer():
    assert choose_bits({"a": {4: 1.0, 8: 0.0}}, {"a": {4: 50.0, 8: 100.0}}, 49.0) is None
