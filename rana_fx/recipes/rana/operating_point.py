"""Operating point of a unit: what one of its candidates costs and loses at a Lagrange multiplier."""

from __future__ import annotations

from dataclasses import dataclass

BASIS_KINDS = ("rank", "hybrid", "static")  # candidates that multiply by components of a basis
JOINT_KINDS = ("gated", "exact")  # candidates of a whole MLP: all of its units are of the kind, or none
KINDS = ("dense", "neuron", "rank", "hybrid", "static", "stored", *JOINT_KINDS)


@dataclass(frozen=True)
class OperatingPoint:
    """One candidate of a unit at a multiplier.

    Attributes:
        kind: one of ``KINDS``.
        multiplier: lambda, the loss that a unit of cost has to save.
        cost: expected, per token, in the budget's metric.
        loss: expected increase of the loss, per token.
        kept: ranks or inputs per token. ranks: rows of the router. kept_by_site: inputs, of a neuron candidate.
        format_index: of the unit's formats. router_kept: inputs that a masked router reads.
        joint_multiplier: of a joint candidate, the multiplier that its masks are made at. gate: operating point of its gate.
    """

    kind: str
    multiplier: float
    cost: float
    loss: float
    kept: float = 0.0
    ranks: int = 0
    kept_by_site: tuple[float, ...] = ()
    format_index: int = 0
    router_kept: float | None = None
    joint_multiplier: float = 0.0
    gate: OperatingPoint | None = None

    @property
    def lagrangian(self) -> float:
        """loss + multiplier x cost: what the allocation minimises."""
        return self.loss + self.multiplier * self.cost
