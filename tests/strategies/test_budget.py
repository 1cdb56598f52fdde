"""Budgets: one at a time, and what a part must keep so that the whole does."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from compress.errors import CompressError
from compress.strategies.budget import Budget, one_budget, share_for_part


def test_the_budget_that_is_set_is_taken():
    default = Budget("sparsity", 0.5)
    assert one_budget(default, macs=None, params=None) == default
    assert one_budget(default, macs=None, params=0.25) == Budget("params", 0.25)
    # 0 is a value, not nothing.
    assert one_budget(default, macs=0.0) == Budget("macs", 0.0)


def test_two_budgets_are_refused_by_name():
    with pytest.raises(ValueError, match="one of sparsity, macs, params"):
        one_budget(Budget("sparsity", 0.5), sparsity=None, macs=0.5, params=0.25)


@given(keep=st.floats(0.01, 1.0), total=st.floats(1.0, 1e9), touched=st.floats(0.01, 1.0))
def test_the_part_gives_what_the_whole_must_lose(keep, total, touched):
    part = total * touched
    assume(keep * total - (total - part) > 1e-6 * total)
    share = share_for_part(keep, total, part, stage="prune", unit="macs")
    assert 0 < share <= 1
    assert (total - part) + share * part == pytest.approx(keep * total, rel=1e-6)


@given(total=st.floats(1.0, 1e9), touched=st.floats(0.0, 0.99), below=st.floats(0.0, 1.0))
def test_a_budget_below_the_untouchable_rest_is_refused_with_the_limit(total, touched, below):
    part = total * touched
    rest = (total - part) / total
    with pytest.raises(CompressError) as caught:
        share_for_part(rest * below * (1 - 1e-9), total, part, stage="prune", unit="macs")
    assert caught.value.where == "strategy.prune.macs"
    assert f"{rest:.3f}" in caught.value.expected
