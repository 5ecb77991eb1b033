"""What plans of one calibration lose on held-out text, by budget: the facts of ``Plan.curve``.

In: measurements (rana_fx/recipes/held_out_quality.py). Out: points with intervals, the promise that a budget was searched for,
and lines of text. All of it is JSON-able by ``dataclasses.asdict`` and part of a plan's facts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

# by the argument of ``adapt``: the attribute of a point that it bounds, and what that is in words
PROMISES = {
    "max_kl": ("kl", "KL divergence, nats per token"),
    "max_loss": ("loss", "increase of the loss, nats per token"),
    "max_ppl_increase": ("perplexity", "increase of the perplexity, points"),
}


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its two-sided 95 % confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.4f} ({self.low:.4f} to {self.high:.4f})"


@dataclass(frozen=True)
class CurvePoint:
    """A plan of one budget, measured against the dense model on held-out documents.

    Attributes:
        budget: as asked. flops, bytes: expected cost per token over dense.
        kl: divergence from the dense model's predictions, nats per token; None: the model's output has no logits.
        loss: increase of the next-token loss, nats per token; perplexity: increase of exp(loss), in points; None: it predicts no
            next tokens.
        documents, tokens: that it was measured on, padding not counted.
    """

    budget: float
    flops: float
    bytes: float
    kl: Interval | None
    loss: Interval | None
    perplexity: Interval | None
    documents: int
    tokens: int


@dataclass(frozen=True)
class Promise:
    """``name``: of ``PROMISES``. ``limit``: what the upper end of the 95 % interval stays below."""

    name: str
    limit: float

    def of(self, point: CurvePoint) -> Interval | None:
        """The measurement that it bounds."""
        found: Interval | None = getattr(point, PROMISES[self.name][0])
        return found

    def kept(self, point: CurvePoint) -> bool:
        """Whether the point keeps it."""
        found = self.of(point)
        return found is not None and found.high <= self.limit


@dataclass(frozen=True)
class Curve:
    """All budgets that were measured, ascending, and the promise, if the budget was searched for."""

    points: tuple[CurvePoint, ...]
    promise: Promise | None = None

    def at(self, budget: float) -> CurvePoint | None:
        """The point of a budget."""
        return next((point for point in self.points if point.budget == budget), None)

    def lines(self, budget: float) -> list[str]:
        """The promise and the measurement of one budget, as text."""
        point = self.at(budget)
        if point is None:
            return []
        lines = []
        found = None if self.promise is None else self.promise.of(point)
        if self.promise is not None and found is not None:
            what, limit = PROMISES[self.promise.name][1], self.promise.limit
            lines.append(f"promised {what}: at most {limit:g}; measured {found.mean:.4f}, at most {found.high:.4f} (95 %)")
        named = (("KL", point.kl), ("loss +", point.loss), ("perplexity +", point.perplexity))
        parts = [f"{name} {value}" for name, value in named if value is not None]
        if parts:
            lines.append(f"on {point.documents} held-out documents, {point.tokens:,} tokens: {', '.join(parts)}")
        return lines

    def check(self, expect: Callable[[bool, str], None]) -> None:
        """Call ``expect(right, fault)`` for everything that a measurement cannot be otherwise."""
        budgets = [point.budget for point in self.points]
        expect(budgets == sorted(set(budgets)), f"curve: budgets {budgets} do not ascend")
        if self.promise is not None:
            expect(self.promise.name in PROMISES, f"curve: promise {self.promise.name!r} is none of {', '.join(PROMISES)}")
            expect(0 < self.promise.limit < math.inf, f"curve: promise of {self.promise.limit}")
        for point in self.points:
            where = f"curve at {point.budget}"
            expect(point.documents >= 0 and point.tokens >= 0, f"{where}: {point.documents} documents, {point.tokens} tokens")
            for value in (point.budget, point.flops, point.bytes):
                expect(0 <= value < math.inf, f"{where}: budget and costs {point.budget}, {point.flops}, {point.bytes}")
            for name, _ in PROMISES.values():
                found = getattr(point, name)
                right = found is None or -math.inf < found.low <= found.mean <= found.high < math.inf
                expect(right, f"{where}: {name} {found}")
