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
    gated, exact   its share of a cut through all units of an MLP (cut.py)

A storage in fewer bits (storage.py) makes entries cheaper and adds what rounding does to the loss. Masks of inputs are counted
once for all prices (score_histogram.py). Components are priced on a grid of prices, each the first time it is asked for, and
between two of them by interpolation. What a menu holds is in the model's own dtype: menus of all units are held at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rana_fx.calibration.score_histogram import Survival
from rana_fx.recipes.rana.joint_drop import Interplay
from rana_fx.recipes.rana.loss_metric import Geometry, LossBasis
from rana_fx.recipes.rana.operating_point import CUTS, Point
from rana_fx.recipes.rana.quantization import Storage

if TYPE_CHECKING:
    from rana_fx.recipes.rana.mlp_candidate import Share

OF_BASIS = ("rank", "hybrid", "static")
_STEP = 0.1  # of the price's logarithm, between two points of the grid


@dataclass(frozen=True, eq=False)
class Part:
    """One site of the unit: its number of outputs, and what dropping a unit of each input costs there."""

    out: int
    norms_I: Tensor


class Menu:
    """Points of one unit, priced on rows of its input. ``parts``: its sites. ``storages``: the first is the model's own.

    ``router_DI``, ``factor_DO``: the basis, W = factor^T router; None: no components. Factors are about as long as 1 and routers
    ``units_D`` times what they are in units of loss, powers of two: there they are so small, and factors so large, that 16-bit
    floats would cut them off and one learning rate would not suit both. ``cut``: where one goes through the unit.
    """

    def __init__(
        self,
        geometry: Geometry,
        basis: LossBasis | None,
        rows_TI: Tensor,
        storages: Sequence[Storage],
        parts: Sequence[Part] = (),
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        dtype = dtype or rows_TI.dtype
        self.storages = tuple(storages)
        self.out, self.width = geometry.lift_OD.shape[0], geometry.read_DI.shape[1]
        norms_I = geometry.norms_I
        self.parts = tuple(parts) or (Part(self.out, norms_I),)
        self.rows_TI = rows_TI
        x_TI = rows_TI.float()
        squares_TI = x_TI.square()
        self._survival = [Survival(squares_TI, part.norms_I) for part in self.parts]
        self._interplay = Interplay(geometry, x_TI)
        self.cut: Share | None = None
        self._grid: dict[tuple[str, int, int], Point] = {}
        self.router_DI: Tensor | None = None
        self.factor_DO: Tensor | None = None
        if basis is not None:
            self.units_D = _powers_of_two(torch.linalg.vector_norm(basis.a_OD, dim=0))
            router_DI = basis.b_DI * self.units_D[:, None]
            self.router_DI, self.factor_DO = router_DI.to(dtype), (basis.a_OD / self.units_D).t().contiguous().to(dtype)
            self._z_TD = (x_TI @ router_DI.t()).to(dtype)
            z2_TD = (self._z_TD.float() / self.units_D).square()
            self._z2_D = z2_TD.mean(0).cpu()
            self._z_survival = Survival(z2_TD, z2_TD.new_ones(z2_TD.shape[1]))

    @property
    def entries(self) -> list[tuple[str, int]]:
        """(kind, index of a storage) of all that can be had here: components need a basis, and a cut takes other units, too."""
        return [
            (kind, index)
            for index, storage in enumerate(self.storages)
            for kind in storage.kinds
            if self.router_DI is not None or kind not in OF_BASIS
        ]

    def offers(self, kinds: Sequence[str]) -> bool:
        """Whether there is an entry of one of these kinds."""
        return any(kind in kinds for kind, _ in self.entries)

    @property
    def dense_cost(self) -> float:
        return self.storages[0].rates.weight * self.out * self.width

    def offload_to_host(self) -> None:
        """The factor goes to the host, until an adapter needs it: menus of all units are held at once."""
        if self.factor_DO is not None:
            self.factor_DO = self.factor_DO.cpu()

    # ---- points

    def point(self, kind: str, price: float, *, storage: int = 0) -> Point:
        """The entry at ``price``. ``storage``: its index."""
        stored = self.storages[storage]
        if kind in ("dense", "stored"):
            loss = stored.rounding(kind, 0)
            return Point(kind, price, stored.rates.weight * self.out * self.width, loss, float(self.width), storage=storage)
        if kind == "neuron":
            return self._neuron(price, storage)
        if kind in CUTS:
            assert self.cut is not None
            return self.cut.point(price)
        place = math.log(price) / _STEP
        left, share = math.floor(place), place - math.floor(place)
        first = self._at(kind, left, storage)
        if share < 1e-6:
            return replace(first, price=price)
        return self._blend(first, self._at(kind, left + 1, storage), share, price)

    def best(self, price: float, *, kinds: Sequence[str] | None = None) -> Point:
        """The entry, of these kinds, with the least loss plus price times cost."""
        best, least = None, math.inf
        # components take longest to price: only where they may yet be better
        for bound, kind, storage in sorted(
            (self.least(kind, price, storage=storage), kind, storage)
            for kind, storage in self.entries
            if kinds is None or kind in kinds
        ):
            if bound >= least:
                break
            point = self.point(kind, price, storage=storage)
            if point.total < least:
                best, least = point, point.total
        assert best is not None
        return best

    def least(self, kind: str, price: float, *, storage: int = 0) -> float:
        """What loss + price x cost of the entry is at least: for components, what it were if the router cost nothing."""
        if kind not in OF_BASIS:
            return self.point(kind, price, storage=storage).total
        worth = price * self.storages[storage].rates.factor * self.out
        kept, lost = self._z_survival.at(2 * worth)
        return lost / 2 + kept * worth

    def bars(self, point: Point) -> list[Tensor]:
        """Thresholds on the squared inputs: of every site's inputs, or of its router's."""
        rates = self.storages[point.storage].rates
        if point.kind == "neuron":
            given = [(2 * point.price * rates.weight * part.out, part.norms_I) for part in self.parts]
        else:
            given = [(2 * point.price * rates.router * point.ranks, self._router_norms(point.ranks))]
        # a zero column is never needed
        return [torch.where(norms_I > 0, bar / norms_I, torch.inf) for bar, norms_I in given]

    def bar(self, point: Point) -> float:
        """The threshold on squared components, in units of loss."""
        return 0.0 if point.kind == "static" else 2 * point.price * self.storages[point.storage].rates.factor * self.out

    def _router_norms(self, ranks: int) -> Tensor:
        """What dropping a unit of each input does to the first components, in units of loss."""
        assert self.router_DI is not None
        return (self.router_DI[:ranks].float() / self.units_D[:ranks, None]).square().sum(0)

    def _neuron(self, price: float, storage: int) -> Point:
        rates = self.storages[storage].rates
        found = [
            survival.at(2 * price * rates.weight * part.out) for part, survival in zip(self.parts, self._survival, strict=True)
        ]
        kept = tuple(count for count, _ in found)
        reads = sum(count * part.out for count, part in zip(kept, self.parts, strict=True))
        lost = sum(energy for _, energy in found) / 2 * self._interplay.at(2 * price * rates.weight * self.out)
        rounding = self.storages[storage].rounding("neuron", 0)
        return Point("neuron", price, rates.weight * reads, lost + rounding, reads / self.out, parts=kept, storage=storage)

    def _blend(self, first: Point, second: Point, share: float, price: float) -> Point:
        stored = self.storages[first.storage]

        def mean(a: float, b: float) -> float:
            return (1 - share) * a + share * b

        ranks = round(mean(first.ranks, second.ranks))
        ranks += ranks % 2 if stored.even else 0
        router_kept = None
        if first.router_kept is not None and second.router_kept is not None:
            router_kept = mean(first.router_kept, second.router_kept)
        kept = min(mean(first.kept, second.kept), float(ranks))
        loss = mean(first.loss, second.loss)
        return self._costed(first.kind, price, first.storage, ranks, ranks if first.kind == "static" else kept, router_kept, loss)

    def _costed(
        self, kind: str, price: float, storage: int, ranks: int, kept: float, router_kept: float | None, loss: float
    ) -> Point:
        rates = self.storages[storage].rates
        read = self.width if router_kept is None else router_kept
        cost = ranks * rates.router * read + kept * rates.factor * self.out
        return Point(kind, price, cost, loss, kept, ranks, storage=storage, router_kept=router_kept)

    # ---- components, on the grid

    def _at(self, kind: str, index: int, storage: int) -> Point:
        found = self._grid.get((kind, index, storage))
        if found is None:
            found = self._grid[kind, index, storage] = self._components(kind, math.exp(_STEP * index), storage)
        return found

    def _components(self, kind: str, price: float, storage: int) -> Point:
        stored = self.storages[storage]
        factor_bar, row_price = 2 * price * stored.rates.factor * self.out, 2 * price * stored.rates.router * self.width
        # components are ordered by energy, which is the order of their worth as well
        if kind == "static":
            ranks = self._even(int((self._z2_D >= factor_bar + row_price).sum()), stored)
            return self._costed(kind, price, storage, ranks, ranks, None, float(self._z2_D[ranks:].sum()) / 2)
        z_TD = self._z_TD.float() / self.units_D
        gain_D = (z_TD.square() - factor_bar).clamp_min_(0).mean(0)
        ranks = self._even(int((gain_D > row_price).sum()), stored)
        lost, router_kept, z_TR = float(self._z2_D[ranks:].sum()), None, z_TD[:, :ranks]
        if kind == "hybrid":
            assert self.router_DI is not None
            # an accelerator multiplies 16-bit numbers many times as fast, a CPU does not
            precision = torch.float32 if self.rows_TI.device.type == "cpu" else self.rows_TI.dtype
            router_RI, x_TI = self.router_DI[:ranks].to(precision), self.rows_TI.to(precision)
            inputs_TI = x_TI.float().square().mul_(self._router_norms(ranks)) >= 2 * price * stored.rates.router * ranks
            router_kept = float(inputs_TI.count_nonzero()) / max(1, len(x_TI))
            z_TR = ((x_TI * inputs_TI) @ router_RI.t()).float() / self.units_D[:ranks]
        kept_TR = z_TR.square() >= factor_bar
        kept = float(kept_TR.count_nonzero()) / max(1, len(kept_TR))
        lost += float((z_TD[:, :ranks] - z_TR * kept_TR).square_().sum()) / max(1, len(kept_TR))
        return self._costed(kind, price, storage, ranks, kept, router_kept, lost / 2 + stored.rounding(kind, ranks))

    def _even(self, ranks: int, stored: Storage) -> int:
        ranks = max(1, ranks)
        return ranks + ranks % 2 if stored.even else ranks


def _powers_of_two(norms_D: Tensor) -> Tensor:
    """The nearest ones: multiplying by them rounds nothing."""
    return torch.exp2(norms_D.clamp(1e-30, 1e30).log2().round())
