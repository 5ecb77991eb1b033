"""What ``rana-fx eval`` shows of every linear: routers that are masked themselves have columns of their own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from rana_fx.commands.evaluate import _columns, _sites
from rana_fx.measure import Measurement
from tests.null.test_adapters import rank


@pytest.mark.parametrize("hybrid", [True, False])
def test_masked_routers_have_columns(hybrid):
    adapter = rank(hybrid=hybrid)
    measured = Measurement(10, {adapter.name: 0.25}, 0.5, 0.5, {adapter.name: 0.3} if hybrid else {})
    rows = _sites(SimpleNamespace(adapters=(adapter,)), measured)
    assert [row["site"] for row in rows] == list(adapter.sites)
    assert all(row["density_measured"] == 0.25 for row in rows)
    found = [(row["router_density_expected"], row["router_density_measured"]) for row in rows]
    assert found == [(adapter.router_density, 0.3) if hybrid else (None, None)] * len(rows)
    assert [column for column in _columns(rows) if "router" in column] == (
        ["router density expected", "router density measured"] if hybrid else []
    )
