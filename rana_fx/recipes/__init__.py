"""Recipes by name: how a budget becomes adapters. A new recipe is one file with one class, see ``Recipe``."""

from __future__ import annotations

from rana_fx import _moved
from rana_fx.calibration.samples import Keep
from rana_fx.recipes.baselines import Cats, Dense, Static, Thresholds
from rana_fx.recipes.builders import gated_adapter, neuron_adapter, rank_adapter, stack_name
from rana_fx.recipes.exact import Exact
from rana_fx.recipes.importance import importance_profile, neuron_threshold
from rana_fx.recipes.mlp_rows import hidden_rows, up_outputs
from rana_fx.recipes.paper.recipe import Paper
from rana_fx.recipes.problem import Problem
from rana_fx.recipes.rana.recipe import Rana
from rana_fx.recipes.registry import RECIPES, Recipe, needs_holdout, recipe_of, split_budget, takes_budget, title_of

RECIPES.update(
    (recipe.name, recipe)
    for recipe in (
        Dense(),
        Static(),
        Cats(),
        Thresholds("teal", weighted=False),
        Thresholds("wina", weighted=True),
        Exact(),
        Paper(),
        Rana(),
    )
)

_moved.methods(
    Problem,
    rank_adapter=rank_adapter,
    neuron_adapter=neuron_adapter,
    gated_adapter=gated_adapter,
    ups=up_outputs,
    dense_rows=hidden_rows,
)

__all__ = [
    "RECIPES",
    "Exact",
    "Keep",
    "Paper",
    "Problem",
    "Rana",
    "Recipe",
    "gated_adapter",
    "importance_profile",
    "needs_holdout",
    "neuron_adapter",
    "neuron_threshold",
    "rank_adapter",
    "recipe_of",
    "split_budget",
    "stack_name",
    "takes_budget",
    "title_of",
]
