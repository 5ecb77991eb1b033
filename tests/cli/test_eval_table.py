"""What ``rana-fx eval`` shows of every linear: masked routers and exact outputs have columns of their own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from rana_fx.commands.evaluate import _columns, _sites
from rana_fx.evaluation.measure import Measurement
from tests.unit.test_adapter import OUT, rank


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("hybrid", [True, False])
def test_masked_routers_and_exact_outputs_have_columns(hybrid, exact):
    more = {"exact_tau": torch.zeros(OUT), "exact_kept": 13.0} if exact else {}
    adapter = rank(hybrid=hybrid, **more)
    parts = [{adapter.name: value} if given else {} for value, given in ((0.3, hybrid), (0.2, exact))]
    measured = Measurement(10, {adapter.name: 0.25}, 0.5, 0.5, *parts)
    rows = _sites(SimpleNamespace(adapters=(adapter,)), measured)
    assert [row["site"] for row in rows] == list(adapter.sites)
    assert all(row["density_measured"] == 0.25 for row in rows)
    found = [(row["router_density_expected"], row["router_density_measured"]) for row in rows]
    assert found == [(adapter.router_density, 0.3) if hybrid else (None, None)] * len(rows)
    found = [(row["exact_density_expected"], row["exact_density_measured"]) for row in rows]
    assert found == [(13 / OUT, 0.2) if exact else (None, None)] * len(rows)
    for part, given in (("router", hybrid), ("exact", exact)):
        columns = [f"{part} density expected", f"{part} density measured"]
        assert [column for column in _columns(rows) if part in column] == (columns if given else [])
