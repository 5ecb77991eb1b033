"""Candidates of one unit, and the operating point of each at a multiplier.

In: a unit's loss metric, rows of its input and lambda, the loss that one unit of cost (a multiply-add, a byte) has to save.
Out: an ``OperatingPoint`` for each kind: its expected cost per token and increase of the loss, both over the sample. Everything
that can be dropped is kept where half its squared size, in the loss metric's coordinates, exceeds lambda times its cost:

    dense    everything
    neuron   input j of this token where x_j^2 norm_j >= 2 lambda (out), for each linear of the unit by itself
    rank, hybrid, static   components of a basis (components.py)
    stored   everything, in fewer bits

A quantized format (quantization.py) lowers the cost of candidates and adds the loss of rounding. Masks of inputs are counted once
for all multipliers (score_histogram.py). Candidates of a whole MLP are another module's (mlp_candidate.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rana_fx.calibration.score_histogram import Survival
from rana_fx.recipes.basis import Basis
from rana_fx.recipes.rana.components import Components
from rana_fx.recipes.rana.joint_drop import JointDropCorrection
from rana_fx.recipes.rana.loss_metric import LossMetric
from rana_fx.recipes.rana.operating_point import BASIS_KINDS, OperatingPoint
from rana_fx.recipes.rana.paired_errors import PairedErrors
from rana_fx.recipes.rana.quantization import UnitFormat


@dataclass(frozen=True, eq=False)
class UnitSite:
    """One site of a unit: its number of outputs, and norms_I, (in,): twice the loss of dropping a unit of each input there."""

    out: int
    norms_I: Tensor


class UnitCandidates:
    """Operating points of one unit, on sampled rows of its input.

    Args:
        basis: None: no components. rows_TI: (tokens, in). formats: the first is unquantized. sites: default: the unit as one.
        dtype: of the model; components are held in it. paired: of an output head, see ``Components``.
    """

    def __init__(
        self,
        metric: LossMetric,
        basis: Basis | None,
        rows_TI: Tensor,
        formats: Sequence[UnitFormat],
        sites: Sequence[UnitSite] = (),
        *,
        dtype: torch.dtype | None = None,
        paired: PairedErrors | None = None,
    ) -> None:
        self.formats = tuple(formats)
        self.out, self.width = metric.left_OD.shape[0], metric.right_DI.shape[1]
        self.sites = tuple(sites) or (UnitSite(self.out, metric.norms_I),)
        self.rows_TI = rows_TI
        x_TI = rows_TI.float()
        squares_TI = x_TI.square()
        self._survival = [Survival(squares_TI, site.norms_I) for site in self.sites]
        self._joint_drop = JointDropCorrection(metric, x_TI)
        self.components = None if basis is None else Components(basis, rows_TI, formats, dtype or rows_TI.dtype, paired)

    @property
    def entries(self) -> list[tuple[str, int]]:
        """(kind, index of a format) of every candidate; without a basis there are no components."""
        return [
            (kind, index)
            for index, stored in enumerate(self.formats)
            for kind in stored.kinds
            if self.components is not None or kind not in BASIS_KINDS
        ]

    def has(self, kinds: Sequence[str]) -> bool:
        """Whether there is a candidate of one of these kinds."""
        return any(kind in kinds for kind, _ in self.entries)

    @property
    def dense_cost(self) -> float:
        """Per token, in the budget's metric."""
        return self.formats[0].rates.weight * self.out * self.width

    def offload_to_host(self) -> None:
        """Keep the factor on the host until an adapter needs it: candidates of all units are held at once."""
        if self.components is not None:
            self.components.offload_to_host()

    def point(self, kind: str, multiplier: float, *, format_index: int = 0) -> OperatingPoint:
        """The operating point of one candidate."""
        stored = self.formats[format_index]
        if kind in ("dense", "stored"):
            cost, loss = stored.rates.weight * self.out * self.width, stored.rounding_loss(kind, 0)
            return OperatingPoint(kind, multiplier, cost, loss, float(self.width), format_index=format_index)
        if kind == "neuron":
            return self._neuron(multiplier, format_index)
        assert self.components is not None, kind
        return self.components.point(kind, multiplier, format_index)

    def best(self, multiplier: float, *, kinds: Sequence[str] | None = None) -> OperatingPoint:
        """The candidate, of these kinds, with the least Lagrangian."""
        best, least = None, math.inf
        # components take longest to compute: only where they may yet be better
        for bound, kind, index in sorted(
            (self.lower_bound(kind, multiplier, format_index=index), kind, index)
            for kind, index in self.entries
            if kinds is None or kind in kinds
        ):
            if bound >= least:
                break
            point = self.point(kind, multiplier, format_index=index)
            if point.lagrangian < least:
                best, least = point, point.lagrangian
        assert best is not None
        return best

    def lower_bound(self, kind: str, multiplier: float, *, format_index: int = 0) -> float:
        """Of the candidate's Lagrangian; tight but for components."""
        if kind not in BASIS_KINDS:
            return self.point(kind, multiplier, format_index=format_index).lagrangian
        assert self.components is not None
        return self.components.lower_bound(multiplier, format_index)

    def input_thresholds(self, point: OperatingPoint) -> list[Tensor]:
        """Thresholds on squared inputs, (in,): for every site of a neuron candidate, or one for the router of a hybrid."""
        rates = self.formats[point.format_index].rates
        if point.kind == "neuron":
            given = [(2 * point.multiplier * rates.weight * site.out, site.norms_I) for site in self.sites]
        else:
            assert self.components is not None
            given = [(2 * point.multiplier * rates.router * point.ranks, self.components.router_norms(point.ranks))]
        # a zero column's input is never needed
        return [torch.where(norms_I > 0, threshold / norms_I, torch.inf) for threshold, norms_I in given]

    def _neuron(self, multiplier: float, format_index: int) -> OperatingPoint:
        rates = self.formats[format_index].rates
        found = [
            survival.at(2 * multiplier * rates.weight * site.out)
            for site, survival in zip(self.sites, self._survival, strict=True)
        ]
        kept = tuple(count for count, _ in found)
        reads = sum(count * site.out for count, site in zip(kept, self.sites, strict=True))
        lost = sum(energy for _, energy in found) / 2 * self._joint_drop.at(2 * multiplier * rates.weight * self.out)
        loss = lost + self.formats[format_index].rounding_loss("neuron", 0)
        cost, inputs = rates.weight * reads, reads / self.out
        return OperatingPoint("neuron", multiplier, cost, loss, inputs, kept_by_site=kept, format_index=format_index)
