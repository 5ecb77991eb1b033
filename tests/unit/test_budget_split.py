"""The part of a budget that remains for the adapted layers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rana_fx.budget import Budget


@given(st.floats(0.01, 1), st.floats(1, 1e12), st.floats(0.01, 1))
def test_the_target_and_the_fixed_cost_are_the_budget(fraction, total, share):
    split = Budget(fraction, "flops").split(total, share * total)
    assert split.fixed_cost + split.target == pytest.approx(fraction * total, abs=1e-9 * total)
    assert split.fixed_cost == pytest.approx((1 - share) * total, abs=1e-9 * total)
    assert split.fraction * split.adaptable == pytest.approx(split.target, abs=1e-9 * total)
    assert split.budget_of(split.target) == pytest.approx(fraction, abs=1e-9)
    assert split.budget_of(split.adaptable) == pytest.approx(1)


def test_a_budget_below_the_fixed_cost_has_no_positive_target():
    assert Budget(0.25, "bytes").split(8.0, 6.0).target == 0
    assert Budget(0.2, "bytes").split(8.0, 6.0).target < 0 < Budget(0.3, "bytes").split(8.0, 6.0).target


@pytest.mark.parametrize(
    ("alternatives", "said"),
    [((), "no other adapts"), (("teal",), "teal adapts"), (("a", "b", "c"), "a, b and c adapt")],
)
def test_the_error_lists_alternatives_and_a_reachable_budget(alternatives, said):
    error = Budget(0.2, "flops").unreachable(recipe="paper", lowest=0.25, why="the rest is dense", alternatives=alternatives)
    assert f"rana_fx recipes: {said} every layer" in str(error) and "lowest reachable budget is 0.260 (the rest" in str(error)
    assert Budget(0.2, "flops").unreachable(recipe="x", lowest=1.0, why="", alternatives=()).facts["lowest"] == 1.0
