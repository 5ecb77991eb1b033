"""Several budgets for one calibration: what no budget changes is computed once.

In: a recipe. Out: something to ``solve`` problems with that differ only in their budgets; adapters are those that
``recipe.solve`` makes of each problem alone. A recipe may have ``sharing()``, a context manager that yields it. Of any other
recipe ``solve`` is called for every budget; what it computes by ``problem.once`` is kept for the next one, as far as there is
memory for it (memory.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

from rana_fx.adapter import Adapter
from rana_fx.recipes.memory import Memory
from rana_fx.recipes.problem import Problem
from rana_fx.recipes.registry import Recipe


class Solver(Protocol):
    """Solves one problem after the other."""

    def solve(self, problem: Problem) -> list[Adapter]: ...


@contextmanager
def sharing(recipe: Recipe) -> Iterator[Solver]:
    """A solver for problems of one calibration and metric."""
    own: Callable[[], AbstractContextManager[Solver]] | None = getattr(recipe, "sharing", None)
    with nullcontext(_Remembering(recipe, Memory())) if own is None else own() as solver:
        yield _Owning(solver)


@dataclass(frozen=True)
class _Remembering:
    recipe: Recipe
    memory: Memory

    def solve(self, problem: Problem) -> list[Adapter]:
        # the same list of skips: what the recipe appends is the caller's
        return self.recipe.solve(replace(problem, memory=self.memory))


@dataclass(frozen=True)
class _Owning:
    """Adapters in memory of their own: training the factors of one plan must not change another one."""

    solver: Solver

    def solve(self, problem: Problem) -> list[Adapter]:
        return [_copied(adapter) for adapter in self.solver.solve(problem)]


def _copied(adapter: Adapter) -> Adapter:
    return replace(adapter, **{key: value.clone() for key, value in adapter.tensors().items()})  # type: ignore[arg-type]
