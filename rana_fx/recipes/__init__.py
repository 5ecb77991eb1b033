"""Recipes by name: how a budget becomes adapters. A new recipe is one class with ``name``, ``wants`` and ``solve``."""

from __future__ import annotations

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
    def rehearses(self) -> bool:
        """Whether ``solve`` runs the model on some of the batches (``problem.rehearsal``)."""
        ...

    def wants(self, layout: Layout) -> Collection[tuple[str, ...]]:
        """Groups (by their site names) whose inputs must be sampled; a mapping says what to ``Keep`` of each."""
        ...

    def solve(self, problem: Problem) -> list[Adapter]:
        """Adapters for the problem; what stays dense goes to ``problem.skips`` with its reason."""
        ...


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

__all__ = ["RECIPES", "Problem", "Recipe"]
