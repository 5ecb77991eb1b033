"""A problem over some of the linears: the others stay dense, and a recipe sees neither them nor their share of the budget.

In: a problem over all linears that the budget counts, and a ``Selection``. Out: the problem over the selected ones, with the
budget that the dense ones leave; and errors on such budgets in terms of all linears again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from rana_fx.calibration.selection import Selection
from rana_fx.errors import BudgetUnreachable
from rana_fx.recipes.problem import Problem


def selected(problem: Problem, selection: Selection) -> Problem:
    """The problem that a recipe is given. Raises BudgetUnreachable."""
    total = problem.size(problem.counted())
    layout = selection.applied(problem.layout)
    adaptable = problem.size(tuple(site.name for site in layout.sites.values() if site.counted))
    split = problem.limit.split(total, adaptable)
    if split.target <= 0:
        share = split.fixed_cost / split.total
        why = f"{share:.1%} of the cost is in linears that skip and only leave dense"
        raise problem.limit.unreachable(recipe=problem.recipe, lowest=share, why=why, alternatives=())
    made = replace(problem, layout=layout, budget=split.fraction, asked=problem.budget, skips=[*problem.skips])
    made.skips += selection.skips(problem.layout)
    return made


@contextmanager
def in_budgets_of_all(problem: Problem) -> Iterator[None]:
    """Raises a ``BudgetUnreachable`` of a selection in terms of the budget that was asked for."""
    try:
        yield
    except BudgetUnreachable as error:
        if problem.asked is None:
            raise
        # budgets are linear in each other: 1 is 1, and ``problem.budget`` is ``problem.asked``
        scale = (1 - problem.asked) / (1 - problem.budget) if problem.budget < 1 else 1.0
        lowest = error.facts["lowest"]
        assert isinstance(lowest, float)
        of_all = {"budget": problem.asked, "lowest": 1 - (1 - lowest) * scale}
        raise BudgetUnreachable(**error.facts | of_all) from error
