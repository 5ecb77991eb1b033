"""Counts and sums beyond any threshold, against sorting."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rana_fx.calibration.score_histogram import Survival


@given(st.integers(0, 2**16), st.integers(1, 700), st.integers(1, 9), st.floats(-12, 6), st.floats(-4, 4), st.booleans())
def test_counts_and_sums_are_those_of_scores_near_the_threshold(seed, rows, width, exponent, place, sparse):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator) * 10**exponent
    if sparse:
        x = x * (torch.rand(rows, width, generator=generator) < 0.5)
    norms = torch.rand(width, generator=generator) + 0.1
    scores = (x.square() * norms).double()
    bar = float(10 ** (2 * exponent + place))
    kept, lost = Survival(x.square(), norms).at(bar)

    # a bin is at most 1/128 wide, so what lies further from the threshold than that is on its side
    def count(edge):
        return float((scores >= edge).sum()) / rows

    def below(edge):
        return float(scores[scores < edge].sum()) / rows

    assert count(bar * (1 + 1 / 64)) - 1e-9 <= kept <= count(bar * (1 - 1 / 64)) + 1e-9
    slack = 1e-6 * float(scores.sum()) / rows
    assert below(bar * (1 - 1 / 64)) - slack <= lost <= below(bar * (1 + 1 / 64)) + slack


def test_extremes():
    found = Survival(torch.zeros(5, 3), torch.ones(3))
    assert found.at(1e-9) == (0.0, 0.0)
    found = Survival(torch.tensor([[0.0, 1.0, 4.0, 1e30]]), torch.ones(4))
    assert found.at(0.0)[0] == 4 and found.at(2.0) == (2.0, 1.0) and found.at(float("inf"))[0] == 0
    assert found.threshold(0.5) == pytest.approx(1.0, rel=1 / 100) and found.threshold(0.0) == 0.0
