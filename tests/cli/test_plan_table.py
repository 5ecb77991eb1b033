"""The summary of a plan: by layer and role it adds up to the plan's expected budget, and it fits on a screen for any depth."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import rana_fx
from rana_fx.commands.plan_table import by_adapter, by_kind, by_layer, by_role, show_plan
from rana_fx.commands.screen import Screen

PLANS = Path(__file__).parents[1] / "golden" / "plans"


@pytest.fixture(scope="module", params=["recipe-rana", "recipe-cats"])
def plan(request):
    return rana_fx.load_plan(PLANS / request.param)


def test_all_layers_together_cost_the_expected_budget(plan):
    columns, rows = by_layer(plan)
    assert [row[0] for row in rows] == ["0", "1", "2", "all"]
    assert columns[0] == "layer" and columns[-1] == "all" and {"up", "down", "attention in"} <= set(columns)
    assert rows[-1][-1] == pytest.approx(plan.expected_budget(), rel=1e-9)


def test_layers_and_roles_are_means_weighted_by_dense_cost(plan):
    columns, rows = by_layer(plan)
    sites = [site for site in plan.sites if site.counted]
    total = sum(site.cost(plan.metric) for site in sites)
    weights = [sum(s.cost(plan.metric) for s in sites if f".{layer}." in s.name) / total for layer in range(3)]
    assert sum(weight * row[-1] for weight, row in zip(weights, rows, strict=False)) == pytest.approx(rows[-1][-1], rel=1e-9)


def test_many_layers_share_lines_and_lose_none(plan):
    copies = tuple(
        dataclasses.replace(site, name=site.name.replace(".0.", f".{layer}."))
        for layer in range(77)
        for site in plan.sites
        if ".0." in site.name
    )
    deep = dataclasses.replace(plan, sites=copies, adapters=())
    _, rows = by_layer(deep, lines=16)
    assert [row[0] for row in rows[:2]] == ["0 to 4", "5 to 9"] and rows[-2][0] == "75 to 76" and len(rows) == 17
    assert all(value in (None, 1.0) for row in rows for value in row[1:])


def test_linears_outside_of_layers_have_a_line(plan):
    sites = (*plan.sites, dataclasses.replace(next(s for s in plan.sites if s.counted), name="adapter.proj"))
    _, rows = by_layer(dataclasses.replace(plan, sites=sites))
    assert rows[-2][0] == "no layer"


def test_kinds_count_every_adapter_and_linear(plan):
    _, rows = by_kind(plan)
    assert sum(row[1] for row in rows) == len(plan.adapters)
    assert sum(row[2] for row in rows) == sum(len(adapter.sites) for adapter in plan.adapters)
    assert all(0 <= row[3] <= 1 for row in rows)


def test_every_adapter_has_a_line_where_asked(plan, capsys):
    assert len(by_adapter(plan)[1]) == len(plan.adapters)
    show_plan(Screen(), "plan", plan, every_adapter=True)
    every = capsys.readouterr().out
    assert all(adapter.name in every for adapter in plan.adapters)
    show_plan(Screen(), "plan", plan, every_adapter=False)
    short = capsys.readouterr().out
    assert "by role and layers" in short and not any(adapter.name in short for adapter in plan.adapters)
    show_plan(Screen(quiet=True), "plan", plan, every_adapter=True)
    assert capsys.readouterr().out == ""


def test_roles_and_layers_are_the_same_table_turned(plan):
    columns, rows = by_role(plan)
    across, down = by_layer(plan, lines=5)
    assert columns == ("layers", *(str(row[0]) for row in down)) and [row[0] for row in rows] == list(across[1:])
    assert [row[1:] for row in rows] == [tuple(row[index] for row in down) for index in range(1, len(across))]
