"""Rows that tokens with independent masks read: one by one, in one group of four, in two groups."""

from __future__ import annotations

import pytest

from rana_fx.kernels.cost import rows_read


@pytest.mark.parametrize(("tokens", "rows"), [(1, 50.0), (2, 75.0), (4, 93.75), (8, 187.5)])
def test_half_of_a_hundred_rows(tokens, rows):
    assert rows_read(100, tokens, 0.5) == pytest.approx(rows)
