"""Plans of several budgets of one calibration, measured on held-out documents.

In: what ``adapt`` was asked for, a function that makes the plan of one budget, and held-out documents. Out: a plan for each
budget, or the one that a target is searched for, with ``Plan.curve``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real

from tqdm.auto import tqdm

from rana_fx.curve import Curve, CurvePoint, Promise
from rana_fx.errors import BudgetOrTarget, BudgetOutOfRange, InvalidOption, TargetNotMeasurable, TooFewHeldOut
from rana_fx.plan import Plan
from rana_fx.recipes.held_out_quality import HeldOutQuality
from rana_fx.recipes.intervals import LEAST
from rana_fx.skips import Note
from rana_fx.targets import promise_of, search

DEFAULT_BUDGET = 0.58


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


def asked_of(budget: float | None, budgets: Sequence[float] | None, targets: Mapping[str, float | None]) -> Asked:
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


def _checked(budget: object) -> float:
    if not isinstance(budget, Real) or isinstance(budget, bool) or not 0 < float(budget) <= 1:
        raise BudgetOutOfRange(budget=budget)
    return float(budget)


def measured_plans(
    asked: Asked,
    plan_at: Callable[[float], Plan],
    quality: HeldOutQuality,
    *,
    model: str,
    recipe: str,
    metric: str,
    progress: bool,
) -> list[Plan]:
    """The plans that were asked for, in order.

    Raises:
        TargetUnreachable, TargetNotMeasurable, TooFewHeldOut, and what ``plan_at`` raises.
    """
    total = len(asked.budgets) if asked.promise is None else None
    with tqdm(total=total, desc="plans" if asked.promise is None else "search", unit="plan", disable=not progress) as bar:

        def measure(budget: float) -> tuple[Plan, CurvePoint]:
            bar.set_postfix_str(f"budget {budget:.3f}")
            plan = plan_at(budget)
            point = _point(plan, quality)
            bar.update()
            return plan, point

        if asked.promise is not None:
            _check_measurable(asked.promise, quality, model)
            return [search(asked.promise, measure, recipe=recipe, metric=metric)]
        pairs = [measure(budget) for budget in asked.budgets]
    curve = Curve(tuple(sorted((point for _, point in pairs), key=lambda point: point.budget)))
    notes = []
    if quality.documents < LEAST:
        notes.append(Note("", f"{quality.documents} held-out documents: {LEAST} are needed to measure what the plan loses"))
    return [replace(plan, curve=curve, skips=(*plan.skips, *notes)) for plan, _ in pairs]


def _point(plan: Plan, quality: HeldOutQuality) -> CurvePoint:
    found = quality.measure(plan.adapters)
    flops, bytes_ = plan.expected_budget("flops"), plan.expected_budget("bytes")
    return CurvePoint(plan.budget, flops, bytes_, found.kl, found.loss, found.perplexity, found.documents, found.tokens)


def _check_measurable(promise: Promise, quality: HeldOutQuality, model: str) -> None:
    """Raises TargetNotMeasurable, TooFewHeldOut; before any plan is made."""
    if quality.batches and not quality.has_logits:
        raise TargetNotMeasurable(name=promise.name, model=model, reason="its output has no logits")
    documents = quality.documents
    if promise.name != "max_kl" and documents:
        if not quality.has_targets:
            raise TargetNotMeasurable(
                name=promise.name, model=model, reason="its logits are not those of next tokens of input_ids"
            )
        documents = quality.predicted
    if documents < LEAST:
        raise TooFewHeldOut(got=documents, name=promise.name, needed=LEAST)
