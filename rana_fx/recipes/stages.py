"""A recipe in named stages, so that each can be timed from outside.

In: a recipe. A recipe that takes long may have ``stages(problem)``: a generator that yields the name of each stage as it begins
and returns the adapters. Out: the adapters, every stage run in a context of the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext

from rana_fx.adapter import Adapter
from rana_fx.recipes.problem import Problem
from rana_fx.recipes.registry import Recipe

Stages = Generator[str, None, list[Adapter]]
Within = Callable[[str], AbstractContextManager[object]]


def run_stages(stages: Stages, within: Within = nullcontext) -> list[Adapter]:
    """Every stage in ``within(its name)``."""
    name, adapters = _advance(stages)
    while name is not None:
        with within(name):
            name, adapters = _advance(stages)
    return adapters


def solve_in_stages(recipe: Recipe, problem: Problem, within: Within) -> list[Adapter]:
    """``recipe.solve(problem)``; stages, where the recipe has any, run in ``within(name)``."""
    stages: Callable[[Problem], Stages] | None = getattr(recipe, "stages", None)
    return recipe.solve(problem) if stages is None else run_stages(stages(problem), within)


def _advance(stages: Stages) -> tuple[str | None, list[Adapter]]:
    """(the stage that begins, nothing yet), or (None, the adapters)."""
    try:
        return next(stages), []
    except StopIteration as finished:
        return None, finished.value
