"""Summaries of plans: one line, a few lines, or a line for each adapter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rana_fx.adapter import Adapter
from rana_fx.cost import Cost
from rana_fx.plan import Plan, SiteRecord
from rana_fx.skips import Note

DEEP = 40
ROLES = {"q_proj": "qkv", "k_proj": "qkv", "up_proj": "up", "down_proj": "down"}


def record(name, role):
    return SiteRecord(name, role, "linear", 4, 4, False, 1, True, "float32", "")


def neuron(sites, kept):
    dense = 16.0 * len(sites)
    return Adapter(
        name="+".join(sites), kind="neuron", sites=sites, ranks=4, kept=kept, tau=torch.zeros(4),
        dense_flops=dense, dense_bytes=4 * dense, flops=dense * kept / 4, bytes=dense * kept,
    )  # fmt: skip


@pytest.fixture
def plan():
    """q and k stacked and up masked in each layer, down in the first alone."""
    sites, adapters = [], []
    for layer in range(DEEP):
        names = {part: f"layers.{layer}.{part}" for part in ROLES}
        sites += [record(name, ROLES[part]) for part, name in names.items()]
        adapters.append(neuron((names["q_proj"], names["k_proj"]), 1.0 + 2 * (layer % 2)))
        adapters.append(neuron((names["up_proj"],), 3.0))
    adapters.append(neuron(("layers.0.down_proj",), 2.0))
    return Plan("rana", "flops", 0.5, 0, 10, "M", {}, tuple(sites), tuple(adapters), (Note("", "a note"),))


def test_repr_is_one_line(plan):
    text = repr(plan)
    assert text == (
        "Plan(recipe='rana', budget=0.5, metric='flops', model='M', 81 adapters, 0 not adapted, 160 linears, "
        f"digest {plan.digest()[:12]})"
    )


def test_a_line_for_each_kind_and_role(plan):
    lines = plan.summary().splitlines()
    assert len(lines) == 8 and lines[3] == "  note: a note"
    cells = [line.split("  ") for line in lines[4:]]
    rows = [[cell.strip() for cell in row if cell.strip()] for row in cells]
    assert rows[0] == ["kind", "role", "adapters", "layers", "kept (least to most)", "flops over dense", "share of all"]
    # dense: 4 linears of 16 in each of 40 layers, 2560; q and k keep 1 and 3 of 4 in turn
    assert rows[1] == ["neuron", "qkv", "40", "0 to 39", "0.500 (0.250 to 0.750)", "0.500", f"{640 / 2560:.3f}"]
    assert rows[2] == ["neuron", "up", "40", "0 to 39", "0.750 (0.750 to 0.750)", "0.750", f"{480 / 2560:.3f}"]
    assert rows[3] == ["neuron", "down", "1", "0", "0.500", "0.500", f"{8 / 2560:.3f}"]


def test_all_is_a_line_for_each_adapter(plan):
    lines = plan.summary(all=True).splitlines()
    assert len(lines) == 4 + len(plan.adapters)
    assert lines[4] == "  layers.0.q_proj+layers.0.k_proj: neuron, 1.0 of 4 kept"


def test_any_plan_is_short(plan):
    """Sixty roles: more than any recipe makes."""
    names = [f"part{index}" for index in range(60)]
    many = replace(plan, sites=tuple(record(n, n) for n in names), adapters=tuple(neuron((n,), 1.0) for n in names))
    lines = many.summary().splitlines()
    assert len(lines) <= 25
    assert lines[-1].split() == ["other", "42", "groups", "42", "-", "0.250", "(0.250", "to", "0.250)", "0.250", "0.175"]
    assert "no adapters" in replace(plan, adapters=()).summary()


def test_costs_of_a_plan_by_hand(plan):
    assert plan.dense_cost == Cost(16.0 * 160, 64.0 * 160)
    saved = 40 * 16 + 40 * 4 + 8  # halves of q and k, a quarter of up, half of a down
    assert plan.expected_budget() == plan.expected_budget("bytes") == pytest.approx(1 - saved / 2560)
    assert plan.expected_budget(kept={"layers.0.down_proj": 4.0}) == pytest.approx(1 - (saved - 8) / 2560)
