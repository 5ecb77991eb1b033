"""A plan as a user meets it: one line by repr, about ten by str, a folder wherever a plan is taken."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import rana_fx
from rana_fx.errors import InvalidOption, PlanFileError
from rana_fx.plan import as_plan
from rana_fx.skips import Note
from tests.support.trained import adapted

PLANS = sorted((Path(__file__).parents[1] / "golden" / "plans").iterdir())


def deep(plan, layers):
    """The plan of a model of so many layers, each a copy of the first, with a remark on each linear."""
    sites = [site for site in plan.sites if ".0." in site.name]
    named = {f".{layer}.": layer for layer in range(layers)}
    copies = tuple(dataclasses.replace(site, name=site.name.replace(".0.", key)) for key in named for site in sites)
    made = []
    for adapter in (adapter for adapter in plan.adapters if ".0." in adapter.name):
        for key in named:
            renamed = {part: tuple(s.replace(".0.", key) for s in getattr(adapter, part)) for part in ("sites", "also")}
            gate = None if adapter.gate is None else adapter.gate.replace(".0.", key)
            made.append(dataclasses.replace(adapter, name=adapter.name.replace(".0.", key), gate=gate, **renamed))
    notes = tuple(Note(site.name, "a remark that is much too long for one line of a terminal, as some are") for site in copies)
    return dataclasses.replace(plan, sites=copies, adapters=tuple(made), skips=(*notes, Note("", "of the whole plan")))


@pytest.mark.parametrize("layers", [1, 30])
@pytest.mark.parametrize("name", ["recipe-rana", "recipe-cats"])
def test_str_has_about_ten_short_lines_for_any_depth(name, layers):
    plan = deep(rana_fx.load_plan(next(path for path in PLANS if path.name == name)), layers)
    assert len(plan.adapters) % layers == 0 and len(plan.adapters) >= layers
    lines = str(plan).splitlines()
    assert 5 <= len(lines) <= 12 and all(len(line) <= 80 for line in lines)
    assert plan.digest()[:12] in lines[0] and f"{plan.expected_budget('flops'):.3f}" in str(plan)
    notes = len(plan.sites) + 1
    assert f"{notes} remarks, the first:" in str(plan) and "of the whole plan" in lines[-1]
    assert any(("0 to 29" if layers == 30 else " 0 ") in line for line in lines)


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.name)
def test_repr_is_one_line(path):
    plan = rana_fx.load_plan(path)
    assert "\n" not in repr(plan) and len(repr(plan)) < 200 and plan.digest()[:12] in repr(plan)
    assert len(str(plan).splitlines()) <= 12


def test_attach_takes_the_folder_of_a_plan(tmp_path):
    model, _ = adapted()
    plan = rana_fx.detach(model)
    plan.save(tmp_path)
    for given in (str(tmp_path), tmp_path, plan):
        rana_fx.attach(model, given)
        assert rana_fx.detach(model).digest() == plan.digest()
    with pytest.raises(PlanFileError, match="there is no plan.json in it"):
        rana_fx.attach(model, tmp_path / "none")


def test_what_is_neither_plan_nor_folder():
    with pytest.raises(InvalidOption, match=r"option plan=3 is not valid: expected a rana_fx.Plan, or the folder of a saved one"):
        as_plan(3)
