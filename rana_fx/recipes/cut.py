"""The cut: one more way to adapt a gated MLP, by the units of its gate, up and down at once, as CATS does (COLM 2024).

In: a block, rows of its input and the geometry of its down projection. Out: what each of its units pays and loses at any price
when the gate stays dense and the other two skip the same neurons: rows of up and columns of down.

    neuron i of this token   where act(gate)_i^2 worth_i >= 2 price (inputs of up + outputs of down)

worth_i = n_i E[u_i^2]: dropping the hidden value h_i = act(gate)_i u_i costs half of h_i^2 n_i, but the mask is made before up is
multiplied, so that only the size of u_i in general is known. What is lost is nevertheless counted from the h_i themselves. Their
mean over tokens is not lost: it goes through down into its bias.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rana_fx.layout import Layout, MlpBlock
from rana_fx.recipes.geometry import Geometry
from rana_fx.recipes.interplay import Interplay
from rana_fx.recipes.point import Point, Unit
from rana_fx.recipes.problem import Problem
from rana_fx.recipes.tails import Tails

_CHUNK = 512  # rows at a time


@dataclass(frozen=True, eq=False)
class Cuttable:
    """A block that a cut may go through: what its sites are, and the units that hold them, no other site among these."""

    block: MlpBlock
    units: tuple[Unit, ...]

    @property
    def gate(self) -> str:
        return self.block.ups[self.block.gate]

    @property
    def up(self) -> str:
        return self.block.ups[1 - self.block.gate]

    @property
    def down(self) -> str:
        return self.block.down

    @property
    def lead(self) -> Unit:
        """The unit of down, which a cut's mask acts in."""
        return self._unit(self.down)

    @property
    def source(self) -> Unit:
        """The unit of the gate."""
        return self._unit(self.gate)

    def _unit(self, site: str) -> Unit:
        return next(unit for unit in self.units if site in unit)


class Cut:
    """A cut through one block, priced on rows. ``surcharge``: how many times as much as its rows tell it costs (search.py)."""

    def __init__(self, problem: Problem, cuttable: Cuttable, rows_TI: Tensor, geometry: Geometry) -> None:
        """``rows_TI``: of the block's input. ``geometry``: of down."""
        self.of = cuttable
        self._problem, self._rows_TI = problem, rows_TI
        self.surcharge = 1.0
        self.width = problem.layout.sites[cuttable.down].in_features
        self.row_cost = problem.size((cuttable.up, cuttable.down)) / self.width
        self.gate_cost = problem.size((cuttable.gate,))
        gates_TF, hidden_TF = _activations(problem, cuttable.block, rows_TI)
        squares_TF = gates_TF.square_()
        held_TF = hidden_TF.square()
        # where the gate is zero nothing is known of up, and nothing needs to be
        sizes_TF = torch.where(squares_TF > 0, held_TF / squares_TF, 0.0)
        sizes_F = sizes_TF.sum(0) / (squares_TF > 0).sum(0).clamp_min(1)
        self.worth_F = sizes_F * geometry.norms_I
        self._tails = Tails(squares_TF, self.worth_F, held_TF.mul_(geometry.norms_I))
        self._interplay = Interplay(geometry, hidden_TF, squares_TF * self.worth_F, centred=True)

    def point(self, unit: Unit, price: float) -> Point:
        """The share of one of its units: that of down holds the loss and all that is skipped, that of the gate its dense cost."""
        if unit != self.of.lead:
            return Point("gated", price, self.gate_cost if unit == self.of.source else 0.0, 0.0)
        bar = 2 * price * self.row_cost / self.surcharge
        kept, lost = self._tails.at(bar)
        return Point("gated", price, kept * self.row_cost, self.surcharge * lost / 2 * self._interplay.at(bar), kept, bar=bar)

    def tau_F(self, bar: float) -> Tensor:
        """Thresholds on act(gate)^2. A neuron that is worth nothing is never needed."""
        return torch.where(self.worth_F > 0, bar / self.worth_F, torch.inf)

    def bias_O(self, bar: float) -> Tensor:
        """Down's, and what it makes of the mean of all that is dropped."""
        gates_TF, hidden_TF = _activations(self._problem, self.of.block, self._rows_TI)
        dropped_TF = gates_TF.square_() < self.tau_F(bar)
        own = self._problem.bias((self.of.down,))
        made: Tensor = self._problem.matrix((self.of.down,)) @ (hidden_TF * dropped_TF).mean(0)
        return made if own is None else made + own


@dataclass(frozen=True, eq=False)
class Share:
    """A unit's share of a cut."""

    cut: Cut
    unit: Unit

    def point(self, price: float) -> Point:
        return self.cut.point(self.unit, price)


def cuttables(layout: Layout, units: Iterable[Unit]) -> list[Cuttable]:
    """Blocks with a gate, whose units hold nothing else and are met equally often by a token."""
    unit_of = {name: unit for unit in units for name in unit}
    found = []
    for block in layout.blocks:
        if block.activation is None or not all(name in unit_of for name in block.sites):
            continue
        held = tuple(dict.fromkeys(unit_of[name] for name in block.sites))
        widths = {*(layout.sites[up].out_features for up in block.ups), layout.sites[block.down].in_features}
        uses = {layout.sites[name].uses for name in block.sites}
        if len(widths) == len(uses) == 1 and {name for unit in held for name in unit} == set(block.sites):
            found.append(Cuttable(block, held))
    return found


def cuts_of(shares: Mapping[Unit, Share | None]) -> list[Cut]:
    """The cuts all of whose units are here."""
    cuts = dict.fromkeys(share.cut for share in shares.values() if share is not None)
    return [cut for cut in cuts if all(unit in shares for unit in cut.of.units)]


def _activations(problem: Problem, block: MlpBlock, rows_TI: Tensor) -> tuple[Tensor, Tensor]:
    """act(gate) and the input of down of the dense model, (tokens, neurons), fp32."""
    assert block.activation is not None
    weights = [(problem.matrix((up,)), problem.bias((up,))) for up in block.ups]
    gates: list[Tensor] = []
    hidden: list[Tensor] = []
    for chunk in rows_TI.split(_CHUNK):
        outs: Sequence[Tensor] = [torch.nn.functional.linear(chunk.float(), weight, bias) for weight, bias in weights]
        gates.append(block.activation(outs[block.gate]).float())
        hidden.append(block.pointwise(*outs).float())
    return torch.cat(gates), torch.cat(hidden)
