"""The search for the cheapest plan that keeps a promise, on curves that are known."""

from __future__ import annotations

import math

import pytest

import rana_fx
from rana_fx.asked import asked_of, promise_of
from rana_fx.budget import Budget
from rana_fx.curve import CurvePoint, Interval, Promise
from rana_fx.errors import (
    BudgetOrTarget,
    BudgetOutOfRange,
    BudgetUnreachable,
    InvalidOption,
    TargetNotPositive,
    TargetUnreachable,
)
from rana_fx.plan import Plan
from rana_fx.targets import LOWEST, MOST, STEP, search

NONE = dict.fromkeys(("max_kl", "max_loss", "max_ppl_increase"))


def run(bound, limit, *, lowest=0.0, name="max_kl"):
    """(the plan found, budgets tried) where a plan's bound is ``bound(budget)``; its mean is nine tenths of it."""
    tried = []

    def measure(budget):
        tried.append(budget)
        if budget < lowest:
            raise Budget(budget, "flops").unreachable(recipe="rana", lowest=lowest, why="test", alternatives=())
        found = Interval(0.9 * bound(budget), 0.8 * bound(budget), bound(budget))
        plan = Plan("rana", "flops", budget, 0, 100, "M", {}, (), (), ())
        return plan, CurvePoint(budget, budget, budget, *(found if one == name else None for one in NONE), 20, 1000)

    return search(Promise(name, limit), measure, recipe="rana", metric="flops"), tried


CURVES = {
    "exponential": lambda budget: 13 * math.exp(-9 * budget),
    "steep": lambda budget: 100 * math.exp(-20 * budget),
    "bent": lambda budget: 2 * (1 - budget) ** 3,
    "negative above": lambda budget: 0.3 * (0.8 - budget),
}


@pytest.mark.parametrize("limit", [0.2, 0.05, 0.02, 0.005])
@pytest.mark.parametrize("name", CURVES)
def test_the_cheapest_plan_within_a_step(name, limit):
    bound = CURVES[name]
    plan, tried = run(bound, limit)
    assert bound(plan.budget) <= limit
    assert bound(plan.budget - STEP - 1e-9) > limit, "a plan that is a step cheaper keeps the target as well"
    assert len(tried) <= 9 and len(set(tried)) == len(tried)
    assert sorted(tried) == [point.budget for point in plan.curve.points]
    assert plan.curve.promise == Promise("max_kl", limit)
    assert plan.notes() == ()


def test_a_target_that_no_plan_reaches():
    with pytest.raises(
        TargetUnreachable, match=r"max_kl=0\.001 is reached by no plan .* is 0\.950, which promises 0\.05 "
    ) as caught:
        run(lambda budget: 1 - budget, 0.001)
    assert caught.value.facts["mean"] == pytest.approx(0.045) and caught.value.facts["documents"] == 20


def test_a_target_that_the_cheapest_plan_keeps():
    plan, _ = run(lambda _: 0.001, 0.01)
    assert plan.budget == LOWEST
    assert plan.notes() == ("max_kl=0.01 is already kept by the cheapest plan that there is",)


def test_budgets_that_cannot_be_reached_are_not_errors():
    plan, tried = run(lambda budget: 0.1 * math.exp(-budget), 1.0, lowest=0.3)
    # the error's lowest budget is a margin above
    assert 0.3 <= plan.budget <= 0.32 and min(tried) < 0.3
    assert len(plan.notes()) == 1
    plan, tried = run(CURVES["exponential"], 0.05, lowest=0.6)
    assert 0.6 <= plan.budget <= 0.63


def test_a_bound_that_does_not_fall_with_the_budget_is_noted():
    plan, _ = run(lambda budget: 0.06 if budget < 0.6 else 0.08 if budget < 0.7 else 0.04, 0.05)
    assert plan.curve.at(plan.budget).kl.high == 0.04
    assert plan.notes() == (
        "max_kl rises between two budgets (plan.curve): a plan that was not measured may be cheaper and keep it",
    )


def test_plans_of_one_cost_are_not_tried_for_ever():
    """As with formats of 8 bits: no plan costs more than half, whatever the budget."""
    tried = []

    def measure(budget):
        tried.append(budget)
        found = Interval(0.0, 0.0, 0.01 if budget > 0.5 else 0.1)
        plan = Plan("rana", "bytes", budget, 0, 100, "M", {}, (), (), ())
        return plan, CurvePoint(budget, budget, min(0.5, budget), found, None, None, 20, 1000)

    plan = search(Promise("max_kl", 0.05), measure, recipe="rana", metric="bytes")
    assert 0.5 < plan.budget <= 0.5 + STEP and len(set(tried)) == len(tried) <= 9


def test_it_ends():
    _, tried = run(lambda budget: 0.05 + 0.01 * math.sin(1e4 * budget), 0.05)
    assert len(tried) <= MOST


def test_a_recipe_that_reaches_no_budget_says_so():
    with pytest.raises(BudgetUnreachable, match="lowest reachable budget is 0.98"):
        run(lambda _: 1.0, 0.5, lowest=0.97)


@pytest.mark.parametrize("limit", [0, -0.1, math.nan, math.inf, True, "0.02"])
@pytest.mark.parametrize("name", NONE)
def test_targets_are_positive_numbers(name, limit):
    with pytest.raises(TargetNotPositive, match=f"^{name}=.* is not a positive number"):
        promise_of({name: limit})


def test_one_of_budget_budgets_and_targets():
    assert asked_of(None, None, NONE).budgets == (0.58,)
    assert asked_of(0.3, None, NONE).budgets == (0.3,) and not asked_of(0.3, None, NONE).measured
    assert asked_of(None, (0.7, 0.3), NONE).budgets == (0.7, 0.3)
    assert asked_of(None, None, NONE | {"max_loss": 0.05}).promise == Promise("max_loss", 0.05)
    for budget, budgets, targets in [
        (0.5, [0.5], {}),
        (0.5, None, {"max_kl": 0.1}),
        (None, [0.5], {"max_kl": 0.1}),
        (None, None, {"max_kl": 0.1, "max_loss": 0.1}),
    ]:
        with pytest.raises(BudgetOrTarget, match="expected at most one of budget, budgets, max_kl"):
            asked_of(budget, budgets, NONE | targets)
    for wrong in ([], [0.5, 0.5], "0.5", 0.5):
        with pytest.raises(InvalidOption, match="a list of different budgets"):
            asked_of(None, wrong, NONE)
    with pytest.raises(BudgetOutOfRange):
        asked_of(None, [0.5, 1.5], NONE)
    with pytest.raises(BudgetOrTarget):
        rana_fx.adapt(None, None, budget=0.5, max_kl=0.02)
