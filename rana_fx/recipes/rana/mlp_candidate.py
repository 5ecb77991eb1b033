"""A cut: a way to adapt an MLP by all of its units at once, since what one of them says of a neuron decides what others do.

In: a block, rows of its input, a menu of its gate alone (the linear that tells which neurons matter) and the geometry of its down
projection. Out: what each of its units pays and loses at any price. What is lost is measured at a few prices, by running the
adapted block on the rows: all that the hidden values change, through down's geometry. Their mean change over tokens is not
lost: it goes through down into its bias. Which neurons are kept, and of what, is up to the kinds:

    gated   behind an activated gate, as CATS does: rows of up and columns of down (gated.py)
    exact   where there is no gate: rows of up beside an approximation of all of it (exact.py)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from rana_fx.adapter import Adapter
from rana_fx.apply import Target, apply
from rana_fx.recipes.problem import Problem
from rana_fx.recipes.rana.builders import build
from rana_fx.recipes.rana.candidates import Menu
from rana_fx.recipes.rana.eligible_mlps import Cuttable
from rana_fx.recipes.rana.loss_metric import Geometry
from rana_fx.recipes.rana.operating_point import Point, Unit
from rana_fx.recipes.rana.tails import Tails

# shares of neurons at which it is measured
_DROPPED = (0.02, 0.06, 0.12, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.78, 0.85, 0.91, 0.95, 0.98, 0.995)
_ROWS = 1024


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a block's input, and what the dense model makes of them: outputs of its ups, and down's input."""

    x_TI: Tensor
    ups: list[Tensor]
    hidden_TF: Tensor


@dataclass(frozen=True, eq=False)
class Acted:
    """What the adapted block makes of rows: down's input, dropped neurons zero, and means per token.

    ``kept``: neurons that down reads. ``exact``: rows of up beside its approximation. ``tau_F``: thresholds that tell which.
    """

    hidden_TF: Tensor
    kept: float
    tau_F: Tensor
    exact: float = 0.0


@dataclass(frozen=True)
class _Level:
    """What was measured at a price: the entry of the gate's menu, what is kept, and what all of it loses."""

    place: float  # the price's logarithm
    gate: tuple[str, int]
    kept: float
    exact: float
    lost: float


class Cut(ABC):
    """A cut through one block, priced on rows. ``surcharge``: how many times as much as its rows tell it costs (search.py).

    ``kinds``: entries of the gate's menu that it may be. ``at_gate``: the price there over the block's.
    """

    kinds: Sequence[str] | None = None
    at_gate = 1.0

    def __init__(self, problem: Problem, cuttable: Cuttable, gate: Menu, rows_TI: Tensor, geometry: Geometry) -> None:
        """``gate``: of the gate alone. ``rows_TI``: of the block's input. ``geometry``: of down."""
        self.of, self.gate = cuttable, gate
        self.problem, self.norms_F = problem, geometry.norms_I
        self.surcharge = 1.0
        self.width = problem.layout.sites[cuttable.down].in_features
        self.up_cost, self.down_cost = (problem.size((name,)) / self.width for name in (cuttable.up, cuttable.down))
        self._rows_TI = rows_TI
        self._last: tuple[tuple[float, Point], tuple[Acted, Tensor]] | None = None
        rows = self._dense()
        self.worth_F = self.worth(rows)
        self._levels = self._measured(rows, geometry)

    # ---- what a kind of cut decides

    @abstractmethod
    def squares(self, rows: Rows) -> Tensor:
        """(tokens, neurons): a neuron is dropped where this times its worth is below twice the price times ``row_cost``."""

    @abstractmethod
    def worth(self, rows: Rows) -> Tensor:
        """(neurons,), of the dense model's rows."""

    @abstractmethod
    def act(self, rows: Rows, gate_TF: Tensor, price: float) -> Acted:
        """The adapted block at a price, for given outputs of the gate."""

    @abstractmethod
    def row_cost(self) -> float:
        """Of each neuron that down reads."""

    @abstractmethod
    def adapters(self, unit: Unit, point: Point) -> list[Adapter]:
        """Those of one of its units."""

    # ---- points

    def point(self, unit: Unit, price: float) -> Point:
        """The share of a unit: that of down holds the loss and what down reads, that of the gate what is computed before."""
        if unit not in (self.of.lead, self.of.source):
            return Point(self.of.kind, price, 0.0, 0.0)
        charged = price / self.surcharge
        left, right, share = self._around(math.log(charged))

        def mean(name: str) -> float:
            low, high = getattr(left, name), getattr(right, name)
            return float(low + share * (high - low))

        kind, storage = (left if share < 0.5 else right).gate
        gate = self.gate.point(kind, charged * self.at_gate, storage=storage)
        if unit == self.of.lead:
            kept = mean("kept")
            return Point(
                self.of.kind, price, kept * self.row_cost(), self.surcharge * mean("lost"), kept, charged=charged, gate=gate
            )
        return Point(self.of.kind, price, gate.cost + mean("exact") * self.up_cost, 0.0, charged=charged, gate=gate)

    def acted(self, point: Point) -> tuple[Acted, Tensor]:
        """(the block as it is at a point, down's bias with what it makes of the mean change of hidden values)."""
        assert point.gate is not None
        if self._last is not None and self._last[0] == (point.charged, point.gate):
            return self._last[1]  # another unit at the same price
        rows = self._dense()
        found = self.act(rows, self._gate(rows, point.gate), point.charged)
        made: Tensor = self.problem.matrix((self.of.down,)) @ (rows.hidden_TF - found.hidden_TF).mean(0)
        own = self.problem.bias((self.of.down,))
        # masks are kept, hidden values are large
        result = replace(found, hidden_TF=made.new_empty(0)), made if own is None else made + own
        self._last = (point.charged, point.gate), result
        return result

    def _measured(self, rows: Rows, geometry: Geometry) -> list[_Level]:
        tails = Tails(self.squares(rows), self.worth_F)
        levels: list[_Level] = []
        for share in _DROPPED:
            bar = tails.bar(share)
            price = bar / (2 * self.row_cost())
            if bar <= 0 or (levels and math.log(price) <= levels[-1].place):
                continue
            gate = self.gate.best(price * self.at_gate, kinds=self.kinds)
            found = self.act(rows, self._gate(rows, gate), price)
            lost_TD = (rows.hidden_TF - found.hidden_TF) @ geometry.read_DI.t()
            lost = float((lost_TD - lost_TD.mean(0)).square().sum()) / (2 * max(1, len(lost_TD)))
            levels.append(_Level(math.log(price), (gate.kind, gate.storage), found.kept, found.exact, lost))
        return levels or [_Level(0.0, ("dense", 0), 0.0, 0.0, 0.0)]  # all neurons are zero

    def _around(self, place: float) -> tuple[_Level, _Level, float]:
        """(the level below, the one above, where between them); outside of all the nearest."""
        for left, right in zip(self._levels, self._levels[1:], strict=False):
            if place < left.place:
                return left, left, 0.0
            if place < right.place:
                return left, right, (place - left.place) / (right.place - left.place)
        return self._levels[-1], self._levels[-1], 0.0

    def _gate(self, rows: Rows, gate: Point) -> Tensor:
        """Outputs of the gate, as it is at a point."""
        name = (self.of.gate,)
        if gate.kind == "dense":
            return rows.ups[self.of.block.gate]
        (made,) = build(self.problem, name, self.gate, gate)
        made = made.on(rows.x_TI.device).to(rows.x_TI.dtype)
        dense = self.problem.matrix(name), self.problem.bias(name), rows.x_TI.dtype
        return apply(made, made.tensors(), rows.x_TI, [Target(self.of.gate, (0, len(dense[0])), *dense)])[0]

    def _dense(self) -> Rows:
        step = max(1, len(self._rows_TI) // _ROWS)
        x_TI = self._rows_TI[::step].float()
        ups = self.problem.ups(self.of.block, x_TI)
        return Rows(x_TI, ups, self.of.block.pointwise(*ups).float())


@dataclass(frozen=True, eq=False)
class Share:
    """A unit's share of a cut."""

    cut: Cut
    unit: Unit

    def point(self, price: float) -> Point:
        return self.cut.point(self.unit, price)


def cuts_of(shares: Mapping[Unit, Share | None]) -> list[Cut]:
    """The cuts all of whose units are here."""
    cuts = dict.fromkeys(share.cut for share in shares.values() if share is not None)
    return [cut for cut in cuts if all(unit in shares for unit in cut.of.units)]
