"""The menu of one unit, each entry at the price of a unit of cost.

In: a unit's geometry, rows of its input and a price: the loss that one unit of cost (a multiply-add, a byte) must save. Out: a
``Point`` per kind: what it costs per token and by how much it raises the loss, both over the sample. Everything that can be
left out is kept where what it saves, half its squared size in the loss's coordinates, is worth its price:

    neuron   input j of this token        where x_j^2 norm_j >= 2 price (out), for each linear of the unit by itself
    rank     component k of this token    where z_k^2        >= 2 price (out)
             row k of the router          where mean over tokens of (z_k^2 - 2 price out)+ > 2 price (in)
    hybrid   as rank, and input j of the router where x_j^2 |B_:,j|^2 >= 2 price (rows of the router)
    static   component k                  where mean z_k^2   >= 2 price (in + out)
    stored   all of it, in fewer bits

A storage in fewer bits (storage.py) makes entries cheaper and adds what rounding does to the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rana_fx.recipes.geometry import Geometry, LossBasis
from rana_fx.recipes.storage import Rates, Storage

_OF_BASIS = ("rank", "hybrid", "static")


@dataclass(frozen=True, eq=False)
class SiteMask:
    """Thresholds of one site's inputs on x^2, and how many of them it keeps."""

    tau_I: Tensor
    kept: float


@dataclass(frozen=True, eq=False)
class Part:
    """One site of the unit: its number of outputs, and what dropping a unit of each input costs there."""

    out: int
    norms_I: Tensor


@dataclass(frozen=True, eq=False)
class Point:
    """``cost`` per token, ``loss``: expected increase, ``ranks``: rows of the router, ``sites``: masks of a neuron entry."""

    kind: str
    cost: float
    loss: float
    kept: float = 0.0
    ranks: int = 0
    tau: float = 0.0
    sites: tuple[SiteMask, ...] = ()
    storage: int = 0
    router_tau_I: Tensor | None = None
    router_kept: float | None = None


class Menu:
    """Points of one unit, priced on rows of its input. ``parts``: its sites. ``storages``: the first is the model's own."""

    def __init__(
        self,
        geometry: Geometry,
        basis: LossBasis | None,
        rows_TI: Tensor,
        storages: Sequence[Storage],
        parts: Sequence[Part] = (),
    ) -> None:
        self.geometry, self.basis, self.storages = geometry, basis, tuple(storages)
        self.out, self.width = geometry.lift_OD.shape[0], geometry.read_DI.shape[1]
        self._parts = tuple(parts) or (Part(self.out, geometry.norms_I),)
        self._x_TI = rows_TI.float()
        self._squares_TI = self._x_TI.square()
        self._z_TD = None if basis is None else self._x_TI @ basis.b_DI.t()
        self._z2_TD = None if self._z_TD is None else self._z_TD.square()

    @property
    def entries(self) -> list[tuple[str, int]]:
        """(kind, index of a storage) of all that can be had here: components need a basis."""
        return [
            (kind, index)
            for index, storage in enumerate(self.storages)
            for kind in storage.kinds
            if self.basis is not None or kind not in _OF_BASIS
        ]

    @property
    def dense_cost(self) -> float:
        return self.storages[0].rates.weight * self.out * self.width

    def point(self, kind: str, price: float, *, storage: int = 0, ranks: int | None = None, loss: bool = True) -> Point:
        """The entry at ``price``.

        Args:
            storage: its index. ranks: components in the router; default: as many as are worth their price.
            loss: without, only its cost is worked out (the loss is 0).
        """
        stored = self.storages[storage]
        point = self._point(kind, price, stored, ranks, loss)
        return replace(point, storage=storage, loss=point.loss + (stored.rounding(kind, point.ranks) if loss else 0.0))

    def _point(self, kind: str, price: float, stored: Storage, ranks: int | None, loss: bool) -> Point:
        rates = stored.rates
        if kind in ("dense", "stored"):
            return Point(kind, rates.weight * self.out * self.width, 0.0, float(self.width))
        if kind == "neuron":
            return self._neuron(rates, price, loss)
        count = self._ranks(kind, rates, price) if ranks is None else ranks
        if stored.even:
            count += count % 2
        if kind == "static":
            return self._static(rates, loss, count)
        return self._rank(rates, price, loss, count) if kind == "rank" else self._hybrid(rates, price, loss, count)

    def _neuron(self, rates: Rates, price: float, loss: bool) -> Point:
        masks, cost, lost = [], 0.0, 0.0
        for part in self._parts:
            bar = 2 * price * rates.weight * part.out
            scores_TI = self._squares_TI * part.norms_I
            kept_TI = scores_TI >= bar
            kept = float(kept_TI.float().sum(1).mean())
            tau_I = torch.where(part.norms_I > 0, bar / part.norms_I, torch.inf)  # a zero column is never needed
            masks.append(SiteMask(tau_I, kept))
            cost += rates.weight * part.out * kept
            if loss:
                lost += float(scores_TI.masked_fill_(kept_TI, 0.0).sum(1).mean()) / 2
        ratio = self._interplay(rates, price) if loss else 1.0
        mean = sum(mask.kept * part.out for mask, part in zip(masks, self._parts, strict=True)) / self.out
        return Point("neuron", cost, lost * ratio, mean, sites=tuple(masks))

    def _interplay(self, rates: Rates, price: float) -> float:
        """Loss of dropping inputs together over the sum of what dropping each would cost."""
        scores_TI = self._squares_TI * self.geometry.norms_I
        kept_TI = scores_TI >= 2 * price * rates.weight * self.out
        each = float(scores_TI.masked_fill_(kept_TI, 0.0).sum(1).mean())
        together = self._x_TI.masked_fill(kept_TI, 0.0) @ self.geometry.read_DI.t()
        return float(together.square().sum(1).mean()) / each if each > 0 else 1.0

    def _ranks(self, kind: str, rates: Rates, price: float) -> int:
        """Components are ordered by energy, which is the order of their worth as well."""
        assert self._z2_TD is not None
        factor, router = rates.factor * self.out, rates.router * self.width
        if kind == "static":
            worth_D = self._z2_TD.mean(0) >= 2 * price * (factor + router)
        else:
            worth_D = (self._z2_TD - 2 * price * factor).clamp_min_(0).mean(0) > 2 * price * router
        return max(1, int(worth_D.sum()))

    def _static(self, rates: Rates, loss: bool, ranks: int) -> Point:
        assert self._z2_TD is not None
        lost = float(self._z2_TD[:, ranks:].sum(1).mean()) / 2 if loss else 0.0
        cost = ranks * (rates.factor * self.out + rates.router * self.width)
        return Point("static", cost, lost, float(ranks), ranks)

    def _rank(self, rates: Rates, price: float, loss: bool, ranks: int) -> Point:
        assert self._z2_TD is not None
        bar = 2 * price * rates.factor * self.out
        mask_TR = self._z2_TD[:, :ranks] >= bar
        kept = float(mask_TR.float().sum(1).mean())
        lost = 0.0
        if loss:
            lost = float(self._z2_TD.sum(1).mean() - (self._z2_TD[:, :ranks] * mask_TR).sum(1).mean()) / 2
        cost = ranks * rates.router * self.width + kept * rates.factor * self.out
        return Point("rank", cost, lost, kept, ranks, bar)

    def _hybrid(self, rates: Rates, price: float, loss: bool, ranks: int) -> Point:
        assert self.basis is not None and self._z_TD is not None and self._z2_TD is not None
        router_RI = self.basis.b_DI[:ranks]
        norms_I = router_RI.square().sum(0)
        router_bar = 2 * price * rates.router * ranks
        inputs_TI = self._squares_TI * norms_I >= router_bar
        router_kept = float(inputs_TI.float().sum(1).mean())
        z_TR = (self._x_TI * inputs_TI) @ router_RI.t()
        bar = 2 * price * rates.factor * self.out
        mask_TR = z_TR.square() >= bar
        kept = float(mask_TR.float().sum(1).mean())
        lost = 0.0
        if loss:
            outside = self._z2_TD[:, ranks:].sum(1).mean()
            inside = (self._z_TD[:, :ranks] - z_TR * mask_TR).square().sum(1).mean()
            lost = float(outside + inside) / 2
        cost = rates.router * ranks * router_kept + kept * rates.factor * self.out
        tau_I = torch.where(norms_I > 0, router_bar / norms_I, torch.inf)
        return Point("hybrid", cost, lost, kept, ranks, bar, router_tau_I=tau_I, router_kept=router_kept)
