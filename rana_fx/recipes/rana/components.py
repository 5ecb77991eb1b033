"""Candidates of a unit that multiply by components of a basis: rank, hybrid and static.

In: a unit's basis and rows of its input. Out: operating points. With z = B x, at a multiplier lambda:

    rank     component k of this token    where z_k^2        >= 2 lambda (out)
             row k of the router          where mean over tokens of (z_k^2 - 2 lambda out)+ > 2 lambda (in)
    hybrid   as rank, and input j of the router where x_j^2 |B_:,j|^2 >= 2 lambda (rows of the router)
    static   component k                  where mean z_k^2   >= 2 lambda (in + out)

Points are computed on a grid of multipliers, each the first time it is needed, and interpolated between two of them. At an output
head their losses are corrected on other tokens (paired_errors.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rana_fx.calibration.score_histogram import Survival
from rana_fx.recipes.basis import Basis
from rana_fx.recipes.rana.operating_point import OperatingPoint
from rana_fx.recipes.rana.paired_errors import LEAST, PairedErrors
from rana_fx.recipes.rana.quantization import UnitFormat

GRID_STEP = 0.1  # of the multiplier's logarithm, between two points of the grid


class Components:
    """Components of a unit on sampled rows of its input, in the model's dtype: those of all units are held at once.

    Attributes:
        router_DI, factor_DO: the basis, W = factor^T router. Factors have about unit length, and routers are ``units_D`` times
            what they are in units of loss, powers of two: there routers are so small, and factors so large, that 16-bit floats
            would cut them off and one learning rate would not suit both.
    """

    def __init__(
        self,
        basis: Basis,
        rows_TI: Tensor,
        formats: Sequence[UnitFormat],
        dtype: torch.dtype,
        paired: PairedErrors | None = None,
    ) -> None:
        self._paired = paired
        self.out, self.width = basis.a_OD.shape[0], basis.b_DI.shape[1]
        self._rows_TI, self._formats = rows_TI, tuple(formats)
        self.units_D = _powers_of_two(torch.linalg.vector_norm(basis.a_OD, dim=0))
        router_DI = basis.b_DI * self.units_D[:, None]
        self.router_DI, self.factor_DO = router_DI.to(dtype), (basis.a_OD / self.units_D).t().contiguous().to(dtype)
        self._z_TD = (rows_TI.float() @ router_DI.t()).to(dtype)
        z2_TD = (self._z_TD.float() / self.units_D).square()
        self._z2_D = z2_TD.mean(0).cpu()
        self._survival = Survival(z2_TD, z2_TD.new_ones(z2_TD.shape[1]))
        self._grid: dict[tuple[str, int, int], OperatingPoint] = {}

    def offload_to_host(self) -> None:
        """Keep the factor on the host until an adapter needs it."""
        self.factor_DO = self.factor_DO.cpu()

    def point(self, kind: str, multiplier: float, format_index: int) -> OperatingPoint:
        """The candidate's operating point, from the grid or interpolated."""
        position = math.log(multiplier) / GRID_STEP
        left, share = math.floor(position), position - math.floor(position)
        first = self._at(kind, left, format_index)
        if share < 1e-6:
            return replace(first, multiplier=multiplier)
        return self._interpolated(first, self._at(kind, left + 1, format_index), share, multiplier)

    def lower_bound(self, multiplier: float, format_index: int) -> float:
        """Of the Lagrangian of every kind: its value, were the router free."""
        threshold = multiplier * self._formats[format_index].rates.factor * self.out
        kept, lost = self._survival.at(2 * threshold)
        return (1.0 if self._paired is None else LEAST) * lost / 2 + kept * threshold

    def threshold(self, point: OperatingPoint) -> float:
        """On squared components, in units of loss."""
        if point.kind == "static":
            return 0.0
        return 2 * point.multiplier * self._formats[point.format_index].rates.factor * self.out

    def router_norms(self, ranks: int) -> Tensor:
        """|B_:,j|^2 over the first components, (in,), in units of loss."""
        return (self.router_DI[:ranks].float() / self.units_D[:ranks, None]).square().sum(0)

    def _interpolated(self, first: OperatingPoint, second: OperatingPoint, share: float, multiplier: float) -> OperatingPoint:
        def mean(a: float, b: float) -> float:
            return (1 - share) * a + share * b

        ranks = round(mean(first.ranks, second.ranks))
        ranks += -ranks % self._formats[first.format_index].rank_multiple
        router_kept = None
        if first.router_kept is not None and second.router_kept is not None:
            router_kept = mean(first.router_kept, second.router_kept)
        kept = min(mean(first.kept, second.kept), float(ranks))
        made = replace(first, multiplier=multiplier, loss=mean(first.loss, second.loss), ranks=ranks, router_kept=router_kept)
        return self._with_cost(replace(made, kept=ranks if first.kind == "static" else kept))

    def _with_cost(self, point: OperatingPoint) -> OperatingPoint:
        rates = self._formats[point.format_index].rates
        inputs = self.width if point.router_kept is None else point.router_kept
        return replace(point, cost=point.ranks * rates.router * inputs + point.kept * rates.factor * self.out)

    # ---- on the grid

    def _at(self, kind: str, index: int, format_index: int) -> OperatingPoint:
        found = self._grid.get((kind, index, format_index))
        if found is None:
            made = self._computed(kind, math.exp(GRID_STEP * index), format_index)
            found = self._grid[kind, index, format_index] = self._with_cost(replace(made, format_index=format_index))
        return found

    def _computed(self, kind: str, multiplier: float, format_index: int) -> OperatingPoint:
        """Without its cost."""
        stored = self._formats[format_index]
        threshold, row_threshold = (
            2 * multiplier * stored.rates.factor * self.out,
            2 * multiplier * stored.rates.router * self.width,
        )
        # components are ordered by energy, which is also the order in which rows of the router reduce the loss
        if kind == "static":
            ranks = _whole(int((self._z2_D >= threshold + row_threshold).sum()), stored)
            loss = float(self._z2_D[ranks:].sum()) / 2 * self._ratio(0.0, ranks)
            return OperatingPoint(kind, multiplier, 0.0, loss, ranks, ranks)
        z_TD = self._z_TD.float() / self.units_D
        gain_D = (z_TD.square() - threshold).clamp_min_(0).mean(0)
        ranks = _whole(int((gain_D > row_threshold).sum()), stored)
        lost, router_kept, z_TR = float(self._z2_D[ranks:].sum()), None, z_TD[:, :ranks]
        if kind == "hybrid":
            router_kept, z_TR = self._behind_mask(ranks, 2 * multiplier * stored.rates.router * ranks)
        kept_TR = z_TR.square() >= threshold
        kept = float(kept_TR.count_nonzero()) / max(1, len(kept_TR))
        lost += float((z_TD[:, :ranks] - z_TR * kept_TR).square_().sum()) / max(1, len(kept_TR))
        loss = lost / 2 * self._ratio(threshold, ranks) + stored.rounding_loss(kind, ranks)
        return OperatingPoint(kind, multiplier, 0.0, loss, kept, ranks, router_kept=router_kept)

    def _ratio(self, threshold: float, ranks: int) -> float:
        return 1.0 if self._paired is None else self._paired.ratio(threshold, ranks)

    def _behind_mask(self, ranks: int, threshold: float) -> tuple[float, Tensor]:
        """(inputs per token that the router's mask keeps, the first components of the masked input, (tokens, ranks))."""
        # an accelerator multiplies 16-bit numbers many times as fast, a CPU does not
        precision = torch.float32 if self._rows_TI.device.type == "cpu" else self._rows_TI.dtype
        router_RI, x_TI = self.router_DI[:ranks].to(precision), self._rows_TI.to(precision)
        inputs_TI = x_TI.float().square().mul_(self.router_norms(ranks)) >= threshold
        z_TR = ((x_TI * inputs_TI) @ router_RI.t()).float() / self.units_D[:ranks]
        return float(inputs_TI.count_nonzero()) / max(1, len(x_TI)), z_TR


def _whole(ranks: int, stored: UnitFormat) -> int:
    """At least one, and a multiple of what the format stores together."""
    ranks = max(1, ranks)
    return ranks + -ranks % stored.rank_multiple


def _powers_of_two(norms_D: Tensor) -> Tensor:
    """The nearest ones: multiplying by them rounds nothing."""
    return torch.exp2(norms_D.clamp(1e-30, 1e30).log2().round())
