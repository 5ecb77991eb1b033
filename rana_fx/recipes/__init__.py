"""Recipes by name: how a budget becomes adapters. A new recipe is one class with ``name``, ``wants`` and ``solve``."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import Protocol

from rana_fx.adapter import Adapter
from rana_fx.calibration.layout import Layout
from rana_fx.recipes.baselines import Cats, Dense, Static, Thresholds
from rana_fx.recipes.paper.recipe import Paper
from rana_fx.recipes.problem import Problem
from rana_fx.recipes.rana.recipe import Rana


class Recipe(Protocol):
    """One way to spend a budget."""

    @property
    def name(self) -> str: ...

    @property
    def needs_holdout(self) -> bool:
        """Whether ``solve`` runs the model on some of the batches (``problem.holdout``)."""
        ...

    def wants(self, layout: Layout) -> Collection[tuple[str, ...]]:
        """Groups (by their site names) whose inputs must be sampled; a mapping says what to ``Keep`` of each."""
        ...

    def solve(self, problem: Problem) -> list[Adapter]:
        """Adapters for the problem; what stays dense goes to ``problem.skips`` with its reason."""
        ...


def needs_holdout(recipe: Recipe) -> bool:
    """``recipe.needs_holdout``; a third party's recipe may still have it under its old name, ``rehearses``."""
    if not hasattr(recipe, "needs_holdout") and hasattr(recipe, "rehearses"):
        text = f"recipe {recipe.name}: rehearses is named needs_holdout now; the old name goes with the next release"
        warnings.warn(text, DeprecationWarning, stacklevel=3)
        return bool(recipe.rehearses)
    return recipe.needs_holdout


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Dense(),
        Static(),
        Cats(),
        Thresholds("teal", weighted=False),
        Thresholds("wina", weighted=True),
        Paper(),
        Rana(),
    )
}

__all__ = ["RECIPES", "Problem", "Recipe", "needs_holdout"]
