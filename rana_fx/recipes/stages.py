"""A recipe in named stages, so that each can be timed from outside.

In: a recipe. A recipe that takes long may have ``stages(problem)``: a generator that yields the name of each stage as it begins
and returns the adapters. Out: the adapters, every stage run in a context of the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Generic, TypeVar

from rana_fx.adapter import Adapter
from rana_fx.recipes.problem import Problem
from rana_fx.recipes.registry import Recipe

Stages = Generator[str, None, list[Adapter]]
_T = TypeVar("_T")
Within = Callable[[str], AbstractContextManager[object]]


def run_stages(stages: Generator[str, None, _T], within: Within = nullcontext) -> _T:
    """What the stages return, every one in ``within(its name)``."""
    finished = _advance(stages)
    while isinstance(finished, str):
        with within(finished):
            finished = _advance(stages)
    return finished.value


def solve_in_stages(recipe: Recipe, problem: Problem, within: Within) -> list[Adapter]:
    """``recipe.solve(problem)``; stages, where the recipe has any, run in ``within(name)``."""
    stages: Callable[[Problem], Stages] | None = getattr(recipe, "stages", None)
    return recipe.solve(problem) if stages is None else run_stages(stages(problem), within)


@dataclass(frozen=True)
class _Finished(Generic[_T]):
    value: _T


def _advance(stages: Generator[str, None, _T]) -> str | _Finished[_T]:
    """The stage that begins, or what they return."""
    try:
        return next(stages)
    except StopIteration as finished:
        return _Finished(finished.value)
