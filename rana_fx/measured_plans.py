"""Plans of several budgets of one calibration, measured on held-out documents.

In: what ``adapt`` was asked for, a function that makes the plan of one budget, and held-out documents. Out: a plan for each
budget, or the one that a target is searched for, with ``Plan.curve``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from rana_fx.asked import Asked
from rana_fx.curve import Curve, CurvePoint, Promise
from rana_fx.errors import TargetNotMeasurable, TooFewHeldOut
from rana_fx.plan import Plan
from rana_fx.progress import Progress
from rana_fx.recipes.held_out_quality import HeldOutQuality
from rana_fx.recipes.intervals import LEAST
from rana_fx.skips import Note
from rana_fx.targets import search

PLANS = "plans"  # the name of this stage
SEARCHED = 6  # budgets that a search makes plans of, about


def measured_plans(
    asked: Asked,
    plan_at: Callable[[float], Plan],
    quality: HeldOutQuality,
    *,
    model: str,
    recipe: str,
    metric: str,
    steps: Progress,
) -> list[Plan]:
    """The plans that were asked for, in order; each that is made and measured is a step of the stage "plans".

    Raises:
        TargetUnreachable, TargetNotMeasurable, TooFewHeldOut, and what ``plan_at`` raises.
    """

    def measure(budget: float) -> tuple[Plan, CurvePoint]:
        plan = plan_at(budget)
        point = _point(plan, quality)
        steps.advance()
        return plan, point

    with steps.stage(PLANS):
        if asked.promise is not None:
            _check_measurable(asked.promise, quality, model)
            return [search(asked.promise, measure, recipe=recipe, metric=metric)]
        steps.expect(len(asked.budgets))
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
