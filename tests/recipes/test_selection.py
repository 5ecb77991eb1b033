"""``skip`` and ``only``: which linears a recipe may adapt; and recipes that are given as objects."""

from __future__ import annotations

import pytest
import torch

import rana_fx
from rana_fx.calibration.selection import Selection, matches
from rana_fx.errors import BudgetUnreachable, InvalidOption, NoSuchLinear, UnknownRecipe
from rana_fx.recipes import RECIPES, Paper, Rana, title_of
from tests.support.architectures import build, ids


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build("plain_llama", 2)[0]


@pytest.fixture
def batches():
    torch.manual_seed(1)
    return [ids(24) for _ in range(4)]


def adapt(model, batches, **options):
    return rana_fx.adapt(model, batches, **{"budget": 0.8, "recipe": "teal", "progress": False} | options)


def adapted_sites(plan):
    return {site for adapter in plan.adapters for site in (*adapter.sites, *adapter.also)}


@pytest.mark.parametrize("recipe", ["rana", "teal", "static"])
def test_skipped_linears_stay_dense_and_the_rest_meets_the_budget(model, batches, recipe):
    plan = adapt(model, batches, recipe=recipe, skip="*.down_proj")
    counted = {site.name for site in plan.sites if site.counted}
    down = {name for name in counted if name.endswith("down_proj")}
    assert len(down) == 2 and adapted_sites(plan) and not adapted_sites(plan) & down
    reasons = {skip.site: skip.reason for skip in plan.left}
    assert {reasons[name] for name in down} == {"left dense by skip='*.down_proj'"}
    assert plan.budget == 0.8
    # all linears count: those that are adapted cost less than the budget. Ranks of width 32 are whole numbers
    assert plan.expected_budget() == pytest.approx(0.8, abs=0.03)


def test_only_leaves_all_others_dense(model, batches):
    plan = adapt(model, batches, budget=0.9, only=["model.layers.0", "*.q_proj"])
    assert all(".layers.0." in name or name.endswith("q_proj") for name in adapted_sites(plan))
    assert {name for name in adapted_sites(plan) if ".1." in name} == {"model.layers.1.self_attn.q_proj"}
    assert "left dense: it matches no pattern of only='model.layers.0', '*.q_proj'" in {skip.reason for skip in plan.left}


def test_half_of_an_mlp_may_be_left(model, batches):
    plan = adapt(model, batches, recipe="paper", skip="*.layers.0.mlp.gate_proj", budget=0.85)
    assert not any(".0.mlp" in name for name in adapted_sites(plan)) and any(".1.mlp" in name for name in adapted_sites(plan))


def test_without_patterns_nothing_changes(model, batches):
    plain = adapt(model, batches)
    rana_fx.detach(model)
    assert adapt(model, batches, skip=(), only=[]).digest() == plain.digest()


@pytest.mark.parametrize(
    ("options", "near"),
    [
        ({"skip": "*.dwon_proj"}, r"did you mean '\*\.down_proj'"),
        ({"only": ["*.q_proj", "model.layer.1"]}, "only='model.layer.1' matches no linear of PlainLlama: did you mean"),
        ({"skip": "xyzzy*"}, "some are: "),
        # a table is no linear of the graphs: noticed after calibration
        ({"skip": "model.embed_tokens"}, "matches no linear"),
    ],
)
def test_a_pattern_that_matches_nothing(model, batches, options, near):
    with pytest.raises(NoSuchLinear, match=near):
        adapt(model, batches, **options)


def test_it_is_noticed_before_the_model_runs(model):
    def batches():
        raise AssertionError("the model ran")
        yield

    with pytest.raises(NoSuchLinear):
        adapt(model, batches(), skip="*.dwon_proj")


def test_patterns_that_leave_nothing(model, batches):
    with pytest.raises(InvalidOption, match="option skip='\\*' is not valid: expected patterns that leave a linear to adapt"):
        adapt(model, batches, skip="*")
    for wrong in (3, [3], ""):
        with pytest.raises((InvalidOption, TypeError)):
            adapt(model, batches, skip=wrong or [""])


@pytest.mark.parametrize("recipe", ["teal", "rana", "cats"])
def test_a_budget_below_what_is_left_dense(model, batches, recipe):
    with pytest.raises(BudgetUnreachable) as caught:
        adapt(model, batches, recipe=recipe, budget=0.3, only="*.down_proj")
    lowest = caught.value.facts["lowest"]
    assert caught.value.facts["budget"] == 0.3
    # attained, up to whole numbers of 48 inputs in a fifth of the cost
    plan = adapt(model, batches, recipe="teal", budget=lowest, only="*.down_proj")
    assert plan.expected_budget() == pytest.approx(lowest, abs=0.2 / 48)


def test_errors_of_a_recipe_are_in_budgets_of_all_linears(model, batches):
    with pytest.raises(BudgetUnreachable) as whole:
        adapt(model, batches, recipe="cats", budget=0.1)
    with pytest.raises(BudgetUnreachable) as part:
        # nearly nothing is left out: nearly the same budgets
        adapt(model, batches, recipe="cats", budget=0.1, skip="model.layers.0.self_attn.k_proj")
    assert part.value.facts["budget"] == 0.1
    # the margin that the error adds, 0.01, is of the selected linears: all but a thirtieth, 32 x 16 of 2 x 7680 weights
    assert part.value.facts["lowest"] == pytest.approx(whole.value.facts["lowest"], abs=0.01 / 29)


def test_names_of_modules_match():
    name = "model.layers.0.mlp.down_proj"
    assert all(matches(name, pattern) for pattern in (name, "*.mlp", "model.layers.0", "*.down_proj", "model.layers.[01]"))
    assert not any(matches(name, pattern) for pattern in ("down_proj", "mlp", "model.layers.1", "*.Down_proj"))
    assert Selection.of("a", ["b"]) == Selection(("a",), ("b",)) and not Selection.of()


def test_recipes_as_objects(model, batches):
    plan = adapt(model, batches, recipe=Rana(weighted=False, kinds=("dense", "neuron")))
    assert plan.recipe == "rana(weighted=False, kinds=('dense', 'neuron'))"
    assert {adapter.kind for adapter in plan.adapters} == {"neuron"}
    rana_fx.detach(model)
    same = adapt(model, batches, recipe=RECIPES["teal"])
    rana_fx.detach(model)
    assert same.digest() == adapt(model, batches, recipe="teal").digest()
    assert title_of(Rana()) == "rana" and title_of(Paper()) == "paper"


@pytest.mark.parametrize("given", [Rana, 3, None])
def test_what_is_no_recipe(model, batches, given):
    with pytest.raises(InvalidOption, match=r"or a recipe such as rana_fx.recipes.Rana\(weighted=False\)"):
        adapt(model, batches, recipe=given)
    with pytest.raises(UnknownRecipe):
        adapt(model, batches, recipe="soup")


@pytest.mark.parametrize("wrong", [{"kinds": ("denses",)}, {"bits": (3,)}, {"allocations": ()}, {"kinds": "dense"}])
def test_options_of_a_recipe_are_checked(wrong):
    (name,) = wrong
    with pytest.raises(InvalidOption, match=f"option {name}=.*expected a tuple of some of"):
        Rana(**wrong)
