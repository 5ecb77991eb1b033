"""Definition of a budget: the expected cost per token of all counted linears, as a fraction of their dense cost.

In: a fraction in (0, 1], a metric ("flops": multiply-adds, "bytes": bytes of weights read), and dense costs in that metric. Out:
the target for the layers that a recipe adapts, after the cost of those that stay dense, or the error where it is not positive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rana_fx.errors import BudgetUnreachable

_MARGIN = 0.01  # of the dense cost, added to the lowest budget that an error names: ranks and kept inputs are integers


@dataclass(frozen=True)
class Split:
    """A budget over adaptable and dense layers; costs per token, in the budget's metric.

    Attributes:
        total: dense cost of all layers that the budget counts.
        adaptable: dense cost of those among them that a recipe adapts.
        target: total cost of the adaptable layers at the budget. Not positive: the budget cannot be reached.
    """

    total: float
    adaptable: float
    target: float

    @property
    def fixed_cost(self) -> float:
        """Cost of the counted layers that stay dense."""
        return self.total - self.adaptable

    @property
    def fraction(self) -> float:
        """The target over the dense cost of the adaptable layers."""
        return self.target / self.adaptable

    def budget_of(self, cost: float) -> float:
        """The budget at which the adaptable layers cost ``cost`` together."""
        return (self.fixed_cost + cost) / self.total


@dataclass(frozen=True)
class Budget:
    """``fraction`` of the dense cost of all counted linears, in ``metric``."""

    fraction: float
    metric: str

    def split(self, total: float, adaptable: float) -> Split:
        """Targets when, of all counted layers, those of dense cost ``adaptable`` are adapted and the others stay dense."""
        return Split(total, adaptable, self.fraction * total - (total - adaptable))

    def unreachable(self, *, recipe: str, lowest: float, why: str, alternatives: Sequence[str]) -> BudgetUnreachable:
        """The error to raise.

        Args:
            lowest: the lowest budget that ``recipe`` reaches, up to the rounding of ranks to integers.
            why: the reason for that limit.
            alternatives: names of recipes that adapt every layer.
        """
        *firsts, last = alternatives or ("no other",)
        listed = f"{', '.join(firsts)} and {last} adapt" if firsts else f"{last} adapts"
        return BudgetUnreachable(
            budget=self.fraction,
            recipe=recipe,
            lowest=min(1.0, lowest + _MARGIN),
            why=why,
            recipes=f"{listed} every layer",
        )
