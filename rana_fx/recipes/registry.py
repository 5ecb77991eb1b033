"""Recipes by name, and what depends on which recipes there are: the alternatives that an unreachable budget suggests.

In: recipes, entered by ``rana_fx.recipes``. Out: ``RECIPES``.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection
from typing import Protocol, cast

from rana_fx.adapter import Adapter
from rana_fx.budget import Split
from rana_fx.calibration.layout import Layout
from rana_fx.errors import BudgetUnreachable, InvalidOption, UnknownRecipe
from rana_fx.recipes.problem import Problem


class Recipe(Protocol):
    """One way to turn a budget into adapters.

    Further attributes are optional. ``adapts_every_layer = True``: any budget can be reached on any model, so errors of
    other recipes name this one. ``stages``: see ``rana_fx.recipes.stages``. ``shares``: of the time of ``solve`` by stage, for
    the estimate of the time left; ``solve`` then enters each with ``problem.steps.stage(name)``. ``sharing``: see
    ``rana_fx.recipes.sharing``; ``once``: the stages of ``shares`` that it runs once for all budgets. ``takes_budget = False``:
    its plans cost what they cost, which ``adapt`` records as their budget.
    """

    @property
    def name(self) -> str: ...

    @property
    def needs_holdout(self) -> bool:
        """Whether ``solve`` runs the model on some of the batches (``problem.holdout``)."""
        ...

    def wants(self, layout: Layout) -> Collection[tuple[str, ...]]:
        """Groups (by their site names) whose inputs must be sampled; a mapping gives the ``Keep`` of each."""
        ...

    def solve(self, problem: Problem) -> list[Adapter]:
        """Adapters for the problem; sites that stay dense are appended to ``problem.skips``, each with its reason."""
        ...


RECIPES: dict[str, Recipe] = {}


def recipe_of(given: object) -> Recipe:
    """The recipe of that name, or the recipe itself. Raises UnknownRecipe, InvalidOption."""
    if isinstance(given, str):
        if given not in RECIPES:
            raise UnknownRecipe(kind="recipe", got=given, valid=", ".join(RECIPES))
        return RECIPES[given]
    if isinstance(given, type) or not all(hasattr(given, name) for name in ("name", "wants", "solve")):
        expected = f"a name ({', '.join(RECIPES)}), or a recipe such as rana_fx.recipes.Rana(weighted=False)"
        raise InvalidOption(name="recipe", got=given, expected=expected)
    return cast(Recipe, given)


def title_of(recipe: Recipe) -> str:
    """The name that plans and errors give it: with those options that are not the default, "rana(weighted=False)"."""
    if not dataclasses.is_dataclass(recipe):
        return recipe.name
    fields = [field for field in dataclasses.fields(recipe) if field.init and field.default is not dataclasses.MISSING]
    changed = [
        f"{field.name}={getattr(recipe, field.name)!r}" for field in fields if getattr(recipe, field.name) != field.default
    ]
    return recipe.name + (f"({', '.join(changed)})" if changed else "")


def needs_holdout(recipe: Recipe) -> bool:
    """``recipe.needs_holdout``; a third party's recipe may still have it under its old name, ``rehearses``."""
    if not hasattr(recipe, "needs_holdout") and hasattr(recipe, "rehearses"):
        text = f"recipe {recipe.name}: rehearses is named needs_holdout now; the old name goes with the next release"
        warnings.warn(text, DeprecationWarning, stacklevel=3)
        return bool(recipe.rehearses)
    return recipe.needs_holdout


def takes_budget(recipe: Recipe) -> bool:
    """Whether the recipe spends a budget: one without it has the same plan at any."""
    return bool(getattr(recipe, "takes_budget", True))


def split_budget(problem: Problem, adaptable: tuple[str, ...], *, why: str = "") -> Split:
    """What the budget leaves for ``adaptable`` sites when all other sites stay dense.

    Raises:
        BudgetUnreachable: nothing; ``why`` is its reason.
    """
    split = problem.limit.split(problem.size(problem.counted()), problem.size(adaptable))
    if split.adaptable == 0 or split.target <= 0:
        share = split.fixed_cost / split.total
        raise unreachable(problem, share, why or f"{share:.1%} of the cost is in layers this recipe leaves dense")
    return split


def unreachable(problem: Problem, lowest: float, why: str) -> BudgetUnreachable:
    """The error to raise where ``problem.recipe`` reaches no less than the budget ``lowest``."""
    others = [name for name, recipe in RECIPES.items() if name != problem.recipe and getattr(recipe, "adapts_every_layer", False)]
    return problem.limit.unreachable(recipe=problem.recipe, lowest=lowest, why=why, alternatives=others)
