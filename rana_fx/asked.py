"""What ``adapt`` is asked for: one budget, several, or a promise. Importing this loads no torch: commands check it first.

In: arguments of ``adapt``, as given. Out: ``Asked``, or an error that says which of them exclude each other, or what is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Real

from rana_fx.curve import Promise
from rana_fx.errors import BudgetOrTarget, BudgetOutOfRange, InvalidOption, TargetNotPositive

DEFAULT_BUDGET = 0.58
EXAMPLES = {"max_kl": 0.02, "max_loss": 0.05, "max_ppl_increase": 0.5}


@dataclass(frozen=True)
class Asked:
    """One budget, several (``many``), or none where a promise is to be kept."""

    budgets: tuple[float, ...]
    many: bool = False
    promise: Promise | None = None

    @property
    def measured(self) -> bool:
        """Whether plans are measured on held-out documents."""
        return self.many or self.promise is not None


def asked_of(budget: object, budgets: object, targets: Mapping[str, object]) -> Asked:
    """From the arguments of ``adapt``. Raises BudgetOrTarget, BudgetOutOfRange, InvalidOption, TargetNotPositive."""
    given = {"budget": budget, "budgets": budgets, **targets}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) > 1:
        raise BudgetOrTarget(got=", ".join(f"{name}={value!r}" for name, value in given.items()))
    named = {name: value for name, value in targets.items() if value is not None}
    if named:
        return Asked((), promise=promise_of(named))
    if budgets is None:
        return Asked((_checked(DEFAULT_BUDGET if budget is None else budget),))
    several = tuple(budgets) if isinstance(budgets, Iterable) and not isinstance(budgets, str) else ()
    if not several or len(set(several)) < len(several):
        raise InvalidOption(name="budgets", got=budgets, expected="a list of different budgets, such as [0.3, 0.5, 0.7]")
    return Asked(tuple(map(_checked, several)), many=True)


def promise_of(targets: Mapping[str, object]) -> Promise:
    """The promise that one argument of ``adapt`` asks for. Raises TargetNotPositive."""
    ((name, limit),) = targets.items()
    if not isinstance(limit, Real) or isinstance(limit, bool) or not 0 < float(limit) < math.inf:
        raise TargetNotPositive(name=name, got=limit, example=EXAMPLES[name])
    return Promise(name, float(limit))


def _checked(budget: object) -> float:
    if not isinstance(budget, Real) or isinstance(budget, bool) or not 0 < float(budget) <= 1:
        raise BudgetOutOfRange(budget=budget)
    return float(budget)
