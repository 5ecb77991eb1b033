"""What a unit may be at a price: an entry of its menu, or its share of a block's cut."""

from __future__ import annotations

from dataclasses import dataclass

CUTS = ("gated", "exact")  # kinds that all units of a block are of, or none (cut.py)

Unit = tuple[str, ...]  # sites that read one tensor, stacked


@dataclass(frozen=True)
class Point:
    """``cost`` per token, ``loss``: expected increase, ``ranks``: rows of the router, ``parts``: inputs that each site keeps.

    ``charged``: of a cut, the price that its masks are made at. ``gate``: what its gate is.
    """

    kind: str
    price: float
    cost: float
    loss: float
    kept: float = 0.0
    ranks: int = 0
    parts: tuple[float, ...] = ()
    storage: int = 0
    router_kept: float | None = None
    charged: float = 0.0
    gate: Point | None = None

    @property
    def total(self) -> float:
        """Loss, and cost at its price."""
        return self.loss + self.price * self.cost
