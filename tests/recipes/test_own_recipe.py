"""The recipe of docs/how-to/add-a-recipe.md runs unchanged; names and methods of earlier versions work with a warning."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import rana_fx
from rana_fx.calibration.calibrate import calibrate
from rana_fx.errors import BudgetUnreachable
from rana_fx.recipes import RECIPES, Problem, builders, mlp_rows, split_budget
from rana_fx.recipes.rana.recipe import Rana
from rana_fx.recipes.stages import run_stages, solve_in_stages
from tests.support.architectures import build, ids

DOCS = Path(__file__).parents[2] / "docs" / "how-to" / "add-a-recipe.md"


@pytest.fixture
def half():
    """Registers the documented recipe and returns its source."""
    source, _ = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    before = dict(RECIPES)
    exec(compile(source, str(DOCS), "exec"), {})
    yield source
    RECIPES.clear()
    RECIPES.update(before)


def problem_of(model, batch, budget=0.5, recipe="half", metric="flops"):
    found = calibrate(
        model, [batch, *(ids() for _ in range(3))], wanted=lambda layout: {group.sites for group in layout.groups}, progress=False
    )
    return Problem(found.layout, found.samples, budget, metric, recipe, False)


def test_the_documented_recipe_adapts_every_layer(half):
    model, batch = build("plain_llama", 1)
    plan = rana_fx.adapt(model, [batch, *(ids() for _ in range(3))], budget=0.5, recipe="half", progress=False)
    assert len(plan.adapters) == 7 and {adapter.kind for adapter in plan.adapters} == {"neuron"}
    assert plan.expected_budget() == pytest.approx(0.5)


def test_errors_name_the_recipes_that_adapt_every_layer(half):
    model, batch = build("plain_llama", 1)
    problem = problem_of(model, batch, budget=0.05, recipe="paper")
    with pytest.raises(BudgetUnreachable, match=r"static, teal, wina, rana and half adapt every layer") as caught:
        split_budget(problem, problem.counted()[:1])
    share = problem.size(problem.counted()[:1]) / problem.size(problem.counted())
    assert caught.value.facts["lowest"] == pytest.approx(1 - share + 0.01)
    RECIPES.pop("half")
    with pytest.raises(BudgetUnreachable, match=r"static, teal and wina adapt every layer"):
        split_budget(replace(problem, recipe="rana"), ())
    assert split_budget(replace(problem, budget=0.75), problem.counted()).fraction == pytest.approx(0.75)


def test_builders_that_were_methods_of_the_problem_still_are():
    model, batch = build("plain_llama", 1)
    problem = problem_of(model, batch)
    block, (name, *_) = problem.layout.blocks[0], problem.counted()
    norms = torch.ones(problem.layout.sites[name].in_features)
    with pytest.warns(DeprecationWarning, match=r"neuron_adapter is rana_fx\.recipes\.builders\.neuron_adapter\(problem"):
        made = problem.neuron_adapter(name, 0.25, norms, 0.5)
    expected = builders.neuron_adapter(problem, name, 0.25, norms, 0.5)
    assert torch.equal(made.tau, expected.tau) and (made.name, made.kept, made.flops) == (name, expected.kept, expected.flops)
    rows = problem.rows(block.ups[0])
    with pytest.warns(DeprecationWarning, match="hidden_rows"):
        assert torch.equal(problem.dense_rows(block, rows), mlp_rows.hidden_rows(problem, block, rows))


def test_options_of_earlier_versions_are_accepted_with_a_warning():
    with pytest.warns(DeprecationWarning, match="settles is refine_lambda now"):
        assert Rana(settles=False) == Rana(refine_lambda=False)
    with pytest.warns(DeprecationWarning, match="carried is error_feedback now"):
        recipe = Rana(carried=False)
    with pytest.warns(DeprecationWarning, match="carried is error_feedback now"):
        assert recipe.carried is False
    with pytest.warns(DeprecationWarning, match='"price" is "multiplier" now'):
        assert Rana(allocations=("fraction", "price")).allocations == ("fraction", "multiplier")
    with pytest.warns(DeprecationWarning, match="settles is refine_lambda now"):
        assert replace(Rana(gates=False), settles=False) == Rana(gates=False, refine_lambda=False)
    with pytest.raises(TypeError, match="settled"):
        Rana(settled=False)


def test_stages_run_in_their_contexts_and_return_the_adapters():
    events = []

    class Within:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            events.append(f"{self.name} begins")

        def __exit__(self, *_):
            events.append(f"{self.name} ends")

    def stages():
        yield "first"
        events.append("work")
        yield "second"
        return ["adapter"]

    assert run_stages(stages(), Within) == ["adapter"]
    assert events == ["first begins", "work", "first ends", "second begins", "second ends"]

    def fails():
        yield "first"
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        run_stages(fails(), Within)
    assert events[-2:] == ["first begins", "first ends"]

    def nothing():
        return []
        yield

    assert run_stages(nothing(), Within) == [] and len(events) == 7
    # a recipe without stages is solved as it is
    model, batch = build("plain_llama", 1)
    problem = problem_of(model, batch)
    assert len(solve_in_stages(RECIPES["teal"], problem, Within)) == 7 and len(events) == 7
