"""In how many bits the matrices of a unit may be stored, what that costs and what rounding does to the loss.

In: a unit's geometry, its basis, its linears and rows of its input. Out: ``Storage``s: the model's own numbers, and with
``metric="bytes"`` also 8 and 4 bits for the weight, the router (which then lies input-major, behind a mask) and the factor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rana_fx.recipes.geometry import Geometry, LossBasis
from rana_fx.recipes.rounding import GROUP, Packed, rounded

_SCALE = 2.0  # bytes of a scale
_MIXES = ((8, 0), (8, 8), (4, 8), (8, 4), (4, 4))  # bits of router and factor; 0: the model's own


@dataclass(frozen=True, eq=False)
class Rates:
    """Cost of one number of each matrix, in the budget's metric, times the uses of the unit."""

    weight: float  # the model's own
    router: float
    factor: float


@dataclass(frozen=True, eq=False)
class Storage:
    """One way to store a unit.

    ``kinds``: of the menu, that it serves. ``loss``: of rounding the weight. ``router_losses_D``, ``factor_losses_D``: of
    rounding a component's rows. ``weights``: by site, (in, out). ``router``: (in, components). ``factor``: (components, out).
    """

    kinds: tuple[str, ...]
    rates: Rates
    loss: float = 0.0
    router_losses_D: Tensor | None = None
    factor_losses_D: Tensor | None = None
    weights: Mapping[str, Packed] = field(default_factory=dict)
    router: Packed | None = None
    factor: Packed | None = None

    def rounding(self, kind: str, ranks: int) -> float:
        """Expected increase of the loss by rounding."""
        if kind in ("neuron", "stored"):
            return self.loss
        parts = (self.router_losses_D, self.factor_losses_D)
        return sum(float(part[:ranks].sum()) for part in parts if part is not None)

    @property
    def even(self) -> bool:
        """Whether a router needs an even number of components: two share a byte."""
        return self.router is not None and self.router.matrix.dtype == torch.uint8


def own(one: float, *, kinds: tuple[str, ...] = ("dense", "neuron", "rank", "hybrid", "static")) -> Storage:
    """Everything in the model's own numbers; ``one``: what a number costs."""
    return Storage(kinds, Rates(one, one, one))


def in_fewer_bits(
    geometry: Geometry, basis: LossBasis | None, weights: Mapping[str, Tensor], rows_TI: Tensor, *, one: float, uses: int
) -> list[Storage]:
    """``weights``: by site, (out, in), fp32. ``one``: cost of a number of the model's own."""
    x_TI = rows_TI.float()
    moment_II = x_TI.t() @ x_TI / max(1, len(x_TI))
    found = [_weights(geometry, weights, x_TI, moment_II, bits, uses) for bits in (8, 4) if _fits(weights.values(), bits)]
    if basis is not None:
        found += _factors(geometry, basis, x_TI, moment_II, one, uses)
    return found


def _fits(matrices: Iterable[Tensor], bits: int) -> bool:
    return bits == 8 or all(len(matrix) % 2 == 0 for matrix in matrices)


def _rate(bits: int, columns: int, uses: int) -> float:
    """Bytes of a number, its share of a scale included."""
    return uses * (1 + _SCALE / columns if bits == 8 else 0.5 + _SCALE * -(-columns // GROUP) / columns)


def _weights(geometry: Geometry, weights: Mapping[str, Tensor], x_TI: Tensor, moment_II: Tensor, bits: int, uses: int) -> Storage:
    packed = {name: rounded(weight.t(), bits, moment_II if bits == 4 else None) for name, weight in weights.items()}
    error = 0.0
    for name, weight in weights.items():
        error += float((x_TI @ (packed[name].wide() - weight.t())).square().sum(1).mean())
    outs = sum(len(weight) for weight in weights.values())
    rate = sum(_rate(bits, len(weight), uses) * len(weight) for weight in weights.values()) / outs
    return Storage(("stored", "neuron"), Rates(rate, rate, rate), loss=geometry.even * error / 2, weights=packed)


def _factors(geometry: Geometry, basis: LossBasis, x_TI: Tensor, moment_II: Tensor, one: float, uses: int) -> list[Storage]:
    components, out = len(basis.b_DI), len(basis.a_OD)
    routers: dict[int, Packed] = {}
    factors: dict[int, Packed] = {}
    router_losses: dict[int, Tensor] = {}
    factor_losses: dict[int, Tensor] = {}
    energy_D = (x_TI @ basis.b_DI.t()).square().mean(0)
    for bits in (8, 4):
        if bits == 8 or components % 2 == 0:
            routers[bits] = rounded(basis.b_DI.t(), bits, moment_II if bits == 4 else None)
            router_losses[bits] = (x_TI @ (routers[bits].wide() - basis.b_DI.t())).square().mean(0) / 2
        if bits == 8 or out % 2 == 0:
            factors[bits] = rounded(basis.a_OD.t(), bits)
            factor_losses[bits] = geometry.even * energy_D * (factors[bits].wide() - basis.a_OD.t()).square().sum(1) / 2
    found = []
    for router, factor in _MIXES:
        if router in routers and (factor == 0 or factor in factors):
            rates = Rates(one, _rate(router, components, uses), one if factor == 0 else _rate(factor, out, uses))
            losses = router_losses[router], factor_losses.get(factor)
            found.append(Storage(("hybrid",), rates, 0.0, *losses, router=routers[router], factor=factors.get(factor)))
    return found
