"""What a unit may be at a price: an entry of its menu, or its share of a block's cut."""

from __future__ import annotations

from dataclasses import dataclass

Unit = tuple[str, ...]  # sites that read one tensor, stacked


@dataclass(frozen=True)
class Point:
    """``cost`` per token, ``loss``: expected increase, ``ranks``: rows of the router, ``parts``: inputs that each site keeps.

    ``bar``: of a cut, on what a neuron is worth.
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
    bar: float = 0.0

    @property
    def total(self) -> float:
        """Loss, and cost at its price."""
        return self.loss + self.price * self.cost
