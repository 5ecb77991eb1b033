"""Counts and sums beyond any threshold, against sorting."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rana_fx.recipes.rana.log_histogram import Survival


@given(st.integers(0, 2**16), st.integers(1, 700), st.integers(1, 9), st.floats(-12, 6), st.floats(-4, 4), st.booleans())
def test_counts_and_sums_are_those_of_scores_near_the_threshold(seed, rows, width, exponent, place, sparse):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator) * 10**exponent
    if sparse:
        x = x * (torch.rand(rows, width, generator=generator) < 0.5)
    norms = torch.rand(width, generator=generator) + 0.1
    scores = (x.square() * norms).double()
    threshold = float(10 ** (2 * exponent + place))
    kept, lost = Survival(x.square(), norms).at(threshold)

    # a bin is at most 1/128 wide, so what lies further from the threshold than that is on its side
    def count(edge):
        return float((scores >= edge).sum()) / rows

    def below(edge):
        return float(scores[scores < edge].sum()) / rows

    assert count(threshold * (1 + 1 / 64)) - 1e-9 <= kept <= count(threshold * (1 - 1 / 64)) + 1e-9
    slack = 1e-6 * float(scores.sum()) / rows
    assert below(threshold * (1 - 1 / 64)) - slack <= lost <= below(threshold * (1 + 1 / 64)) + slack


def test_extremes():
    survival = Survival(torch.zeros(5, 3), torch.ones(3))
    assert survival.at(1e-9) == (0.0, 0.0)
    survival = Survival(torch.tensor([[0.0, 1.0, 4.0, 1e30]]), torch.ones(4))
    assert survival.at(0.0)[0] == 4 and survival.at(2.0) == (2.0, 1.0) and survival.at(float("inf"))[0] == 0
    assert survival.threshold(0.5) == pytest.approx(1.0, rel=1 / 100) and survival.threshold(0.0) == 0.0
